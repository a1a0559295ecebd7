//! Stage `tokenizer`: the byte-level BPE of the shards, trained on the corpus's sample or taken as given.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, ListArray, UInt16Array, UInt32Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer, TokenizerBuilder,
};
use trommel_core::error::{Error, Result};
use trommel_core::storage::write_bytes;
use trommel_core::tokenizer;
use trommel_spec::pipeline;

use crate::embed::read_sample;
use crate::engine::{Engine, Written};
use crate::outputs::Outputs;

/// The token that ends every text, in a tokenizer that we train.
const END_OF_TEXT: &str = "<|endoftext|>";
/// What other tokenizers call it.
const END_OF_TEXT_NAMES: [&str; 5] = [END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"];

/// Texts that are encoded at a time: until its ids are taken, an encoding holds some hundred bytes for each token.
const ENCODED_TOGETHER: usize = 256;

/// Trains the tokenizer, or copies the given one.
pub fn run(engine: &Engine, outputs: &Outputs, spec: &pipeline::Tokenizer) -> Result<Written> {
    let (tokenizer, rows) = match &spec.path {
        Some(path) => (with_end_of_text(tokenizer::read(path)?).map_err(|e| e.file(path.display()))?, 0),
        None => {
            let sample = read_sample(engine, outputs)?;
            let texts = sample.iter().map(|s| s.text.as_str());
            let tokenizer = train(texts, spec.vocab() as usize)?;
            let (vocab, asked) = (tokenizer::vocab(&tokenizer), spec.vocab());
            if vocab < asked {
                engine
                    .progress
                    .line(&format!("the text gives a vocabulary of {vocab} tokens, and not the {asked} that are asked for"));
            }
            (tokenizer, sample.len() as u64)
        }
    };
    let text = tokenizer.to_string(false).map_err(|e| Error::internal("a tokenizer cannot be written").source(e))?;
    write_bytes(&outputs.tokenizer, text.as_bytes())?;
    Ok(Written { rows, bytes: text.len() as u64 })
}

fn train<'a>(texts: impl Iterator<Item = &'a str> + Send, vocab: usize) -> Result<Tokenizer> {
    let failed = |e: tokenizers::Error| Error::internal("the tokenizer cannot be trained").source(e);
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(ByteLevel::new(false, true, true).into()))
            .with_decoder(Some(ByteLevel::default().into()))
            .build()
            .map_err(failed)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .build();
    tokenizer.train(&mut trainer, texts).map_err(failed)?;
    let text = tokenizer.to_string(false).map_err(failed)?;
    text.parse().map_err(failed)
}

fn with_end_of_text(mut tokenizer: Tokenizer) -> Result<Tokenizer> {
    if END_OF_TEXT_NAMES.iter().all(|name| tokenizer.token_to_id(name).is_none()) {
        // A new token gets the number of tokens as its id.
        if tokenizer::vocab(&tokenizer) as usize != tokenizer.get_vocab_size(true) {
            let message = format!("the tokenizer has no end-of-text token, such as `{END_OF_TEXT}`, and gaps in its ids");
            return Err(Error::config(message).hint("add the token to the file, under an id of its own"));
        }
        let added = tokenizer.add_special_tokens([AddedToken::from(END_OF_TEXT, true)]);
        added.map_err(|e| Error::data("the tokenizer does not take an end-of-text token").source(e))?;
    }
    Ok(tokenizer)
}

/// A tokenizer that is ready to encode plain text.
#[derive(Debug, Clone)]
pub struct Encoder {
    tokenizer: Arc<Tokenizer>,
    /// Ids lie in `0..vocab`.
    pub vocab: u32,
    /// The id of the end-of-text token.
    pub end_of_text: u32,
}

impl Encoder {
    /// Reads the stage's output.
    pub fn read(path: &Path) -> Result<Encoder> {
        let tokenizer = tokenizer::read(path)?;
        let end_of_text = END_OF_TEXT_NAMES.iter().find_map(|name| tokenizer.token_to_id(name));
        let end_of_text =
            end_of_text.ok_or_else(|| Error::internal("the tokenizer has no end-of-text token").file(path.display()))?;
        let vocab = tokenizer::vocab(&tokenizer);
        Ok(Encoder { tokenizer: Arc::new(tokenizer), vocab, end_of_text })
    }

    /// The tokens of each text, in parallel.
    pub fn encode(&self, texts: Vec<&str>) -> Result<Vec<Vec<u32>>> {
        let mut tokens = Vec::with_capacity(texts.len());
        for texts in texts.chunks(ENCODED_TOGETHER) {
            let encodings = self.tokenizer.encode_batch_fast(texts.to_vec(), false);
            let encodings = encodings.map_err(|e| {
                let error = Error::data("the tokenizer does not take every text").source(e);
                error.hint("take one that knows each byte, or has a token for what it does not know")
            })?;
            tokens.extend(encodings.into_iter().map(|e| e.get_ids().to_vec()));
        }
        Ok(tokens)
    }

    /// The type of a list of tokens: 16 bits each where the vocabulary allows it.
    pub fn tokens_type(&self) -> DataType {
        let item = if self.vocab <= 1 << 16 { DataType::UInt16 } else { DataType::UInt32 };
        DataType::List(Arc::new(Field::new("item", item, false)))
    }

    /// SQL `tokenize(text)`.
    pub fn tokenize_function(&self) -> ScalarUDF {
        let encoder = self.clone();
        let returns = self.tokens_type();
        let compute = move |arguments: &[ColumnarValue]| {
            let texts = ColumnarValue::values_to_arrays(arguments)?;
            let texts: Vec<&str> = texts[0].as_string_view().iter().map(Option::unwrap_or_default).collect();
            let tokens = encoder.encode(texts).map_err(|e| DataFusionError::External(Box::new(e)))?;
            let offsets = OffsetBuffer::from_lengths(tokens.iter().map(Vec::len));
            let ids = tokens.into_iter().flatten();
            let values: ArrayRef = match encoder.vocab <= 1 << 16 {
                true => Arc::new(UInt16Array::from_iter_values(ids.map(|id| id as u16))),
                false => Arc::new(UInt32Array::from_iter_values(ids)),
            };
            let item = Arc::new(Field::new("item", values.data_type().clone(), false));
            Ok(ColumnarValue::Array(Arc::new(ListArray::try_new(item, offsets, values, None)?)))
        };
        create_udf("tokenize", vec![DataType::Utf8View], returns, Volatility::Immutable, Arc::new(compute))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_survives_and_special_tokens_in_text_are_text() {
        let texts: Vec<String> = (0..300).map(|i| format!("gold and gravel number {i}, gravel and gold")).collect();
        let tokenizer = train(texts.iter().map(String::as_str), 400).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        tokenizer.save(&path, false).unwrap();
        let encoder = Encoder::read(&path).unwrap();
        assert!(encoder.vocab <= 400 && encoder.end_of_text < encoder.vocab);
        for text in ["gold <|endoftext|> gravel", "\u{0}日本語 \t\n é", ""] {
            let tokens = encoder.encode(vec![text]).unwrap().remove(0);
            assert!(!tokens.contains(&encoder.end_of_text), "{text}");
            assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
        }
    }

    #[test]
    fn training_twice_gives_one_tokenizer() {
        let texts: Vec<String> = (0..200).map(|i| format!("abc{} abd{} xyz", i % 7, i % 11)).collect();
        let train = || train(texts.iter().map(String::as_str), 300).unwrap().to_string(false).unwrap();
        assert_eq!(train(), train());
    }
}
