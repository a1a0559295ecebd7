//! A BERT-family sentence-transformers model: tokens, encoder, mean over the tokens, L2 norm.
//!
//! Each text runs through the encoder by itself, and texts run side by side on rayon's threads. The windows of a corpus
//! fill the encoder's length almost always, where a batch would not make the matrix products faster; and a product's last
//! bits can depend on how many rows it has, so that only a text that is alone has the same vector in every call.

use std::path::Path;

use rayon::prelude::*;
use tokenizers::{ModelWrapper, Tokenizer, TruncationParams};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_kernels::panels::Precision;

use crate::bert::{Bert, Scratch};
use crate::encoder_config::{BertConfig, TextConfig, check_modules};
use crate::model_folder::{ModelFolder, TOKENIZER, Tensors};
use crate::{Embedder, assert_shape, normalize};

/// A sentence-transformers folder, loaded.
pub struct SentenceEncoder {
    bert: Bert,
    dimensions: usize,
    tokenizer: Tokenizer,
    lower_case: bool,
    unknown: Option<u32>,
    key: Key,
}

impl SentenceEncoder {
    /// Reads the folder and checks that we follow everything that it asks for.
    pub fn read(folder: &Path, precision: Precision) -> Result<Self> {
        let mut folder = ModelFolder::new(folder);
        let config = BertConfig::read(&mut folder)?;
        check_modules(&mut folder)?;
        let text = TextConfig::read(&mut folder, config.max_position_embeddings)?;
        let mut tokenizer = folder.read_tokenizer()?;
        check_vocabulary(&tokenizer, &config).map_err(|e| e.file(folder.file(TOKENIZER).display()))?;
        let truncation = TruncationParams { max_length: text.max_seq_length, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| Error::data("the tokenizer cannot truncate").source(e))?;
        let weights = "model.safetensors";
        let bytes = folder.read(weights)?;
        let bert = Bert::from_tensors(&Tensors::parse(folder.file(weights), &bytes)?, &config, precision)?;
        Ok(SentenceEncoder {
            bert,
            dimensions: config.hidden_size,
            unknown: unknown_token(&tokenizer),
            tokenizer,
            lower_case: text.do_lower_case,
            key: folder.key(match precision {
                Precision::F32 => "sentence-encoder-f32 3",
                Precision::Bf16 => "sentence-encoder-bf16 3",
            }),
        })
    }

    /// The tokenizer, which truncates at the encoder's length.
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Memory for [`SentenceEncoder::states`] on one thread.
    pub(crate) fn scratch(&self) -> Scratch {
        self.bert.scratch()
    }

    /// The last layer's states of one token sequence: `ids` (time) gives `(time, dimensions)`, in `scratch`.
    pub(crate) fn states<'a>(&self, ids: &[u32], scratch: &'a mut Scratch) -> &'a [f32] {
        self.bert.states(ids, scratch)
    }

    /// The ids of a text with `[CLS]` and `[SEP]`, or `None` if it has no known token.
    fn tokens(&self, text: &str) -> Result<Option<Vec<u32>>> {
        let lower;
        let text = if self.lower_case {
            lower = text.to_lowercase();
            &lower
        } else {
            text
        };
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|e| Error::data("cannot tokenize a text").source(e))?;
        let ids = encoding.get_ids();
        let known = |(id, special): (&u32, &u32)| *special == 0 && Some(*id) != self.unknown;
        Ok(ids.iter().zip(encoding.get_special_tokens_mask()).any(known).then(|| ids.to_vec()))
    }
}

impl Embedder for SentenceEncoder {
    fn dimensions(&self) -> usize {
        self.dimensions
    }

    fn key(&self) -> Key {
        self.key
    }

    fn embed(&self, texts: &[&str], vectors: &mut [f32]) -> Result<()> {
        assert_shape(texts, self.dimensions, vectors);
        let tokens: Vec<Option<Vec<u32>>> = texts.par_iter().map(|text| self.tokens(text)).collect::<Result<_>>()?;
        let mut work: Vec<(&Option<Vec<u32>>, &mut [f32])> =
            tokens.iter().zip(vectors.chunks_exact_mut(self.dimensions)).collect();
        // The longest first, so that no thread starts a long text when the others are done.
        work.sort_by_key(|(ids, _)| std::cmp::Reverse(ids.as_ref().map_or(0, Vec::len)));
        work.into_par_iter().with_max_len(1).for_each_init(
            || self.scratch(),
            |scratch, (ids, vector)| {
                vector.fill(0.0);
                if let Some(ids) = ids {
                    // The mean and the sum have the same direction, so the division by the count is left out.
                    for state in self.states(ids, scratch).chunks_exact(self.dimensions) {
                        vector.iter_mut().zip(state).for_each(|(sum, x)| *sum += x);
                    }
                }
                normalize(vector);
            },
        );
        Ok(())
    }
}

/// The id that stands for every word that the vocabulary cannot spell.
pub(crate) fn unknown_token(tokenizer: &Tokenizer) -> Option<u32> {
    match tokenizer.get_model() {
        ModelWrapper::WordPiece(model) => tokenizer.token_to_id(&model.unk_token),
        _ => tokenizer.token_to_id("[UNK]").or_else(|| tokenizer.token_to_id("<unk>")),
    }
}

/// Every id that the tokenizer can give has a row in the encoder's table.
fn check_vocabulary(tokenizer: &Tokenizer, config: &BertConfig) -> Result<()> {
    let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
    if largest < config.vocab_size {
        return Ok(());
    }
    Err(Error::data(format!("the tokenizer has the id {largest}, the encoder's `vocab_size` is {}", config.vocab_size))
        .hint("take `tokenizer.json` and `config.json` from the same model"))
}
