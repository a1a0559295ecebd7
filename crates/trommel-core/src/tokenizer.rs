//! How a `tokenizer.json` makes tokens of a text: one way for shards, fine-tuning, evaluation and generation.

use std::path::Path;

use tokenizers::{ModelWrapper, Tokenizer};

use crate::error::{Error, Result};

/// Reads a `tokenizer.json` for plain text: what spells out a special token is still text, and no text is cut off or filled up,
/// even if the file asks for it. A tokenizer that leaves out merges at random is refused: equal texts have equal tokens.
pub fn read(path: &Path) -> Result<Tokenizer> {
    let unusable = |e: tokenizers::Error| {
        let error = Error::data("the tokenizer cannot be read").file(path.display());
        error.source(e).hint("a file in the format of Hugging Face's `tokenizers` is needed here, such as `transformers` and `trommel run` write")
    };
    let mut tokenizer = Tokenizer::from_file(path).map_err(unusable)?;
    tokenizer.set_encode_special_tokens(true);
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(unusable)?;
    match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) if bpe.dropout.is_some_and(|share| share > 0.0) => {
            let error = Error::config("the tokenizer leaves out merges at random: `model.dropout` is set");
            Err(error.file(path.display()).hint("set it to `null` in a copy of the file"))
        }
        _ => Ok(tokenizer),
    }
}

/// Ids lie in `0..vocab`; some may have no token.
pub fn vocab(tokenizer: &Tokenizer) -> u32 {
    tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id + 1)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read_with(field: &str, value: Value) -> Result<Tokenizer> {
        let mut file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
            "added_tokens": [{"id": 2, "content": "<|endoftext|>", "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false}],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "BPE", "dropout": null, "unk_token": "u", "vocab": {"a": 0, "u": 1}, "merges": []},
        });
        *file.pointer_mut(field).unwrap() = value;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, file.to_string()).unwrap();
        read(&path)
    }

    #[test]
    fn a_text_is_neither_cut_nor_filled_and_holds_no_special_token() {
        let truncation = json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
        let padding = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "a"});
        for (field, value) in [("/truncation", truncation), ("/padding", padding)] {
            let tokenizer = read_with(field, value).unwrap();
            assert_eq!(tokenizer.encode_fast("a a a a", false).unwrap().get_ids(), [0; 4]);
            assert!(!tokenizer.encode_fast("a <|endoftext|>", false).unwrap().get_ids().contains(&2));
            assert_eq!(vocab(&tokenizer), 3);
        }
    }

    #[test]
    fn chance_is_refused() {
        assert!(read_with("/model/dropout", json!(0.0)).is_ok());
        let error = read_with("/model/dropout", json!(0.1)).unwrap_err();
        assert!(error.to_string().contains("model.dropout") && error.remedy().is_some());
    }
}
