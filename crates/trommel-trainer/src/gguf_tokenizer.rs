//! A `tokenizer.json` as the metadata of a GGUF file.
//!
//! llama.cpp has the pre-tokenizers of known models built in, by name. That of GPT-2 is what a byte-level BPE has that
//! `trommel run` trains; any other tokenizer is refused, because llama.cpp would cut texts otherwise.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use serde::Deserialize;
use serde_json::json;
use trommel_core::error::{Error, Result};

use crate::model::Config;

/// The types that llama.cpp gives to tokens.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: BytePairs,
}

#[derive(Deserialize)]
struct AddedToken {
    id: usize,
    content: String,
    special: bool,
}

#[derive(Deserialize)]
struct BytePairs {
    vocab: BTreeMap<String, usize>,
    merges: Vec<Merge>,
}

/// Both ways in which `tokenizers` has written a merge.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair(String, String),
}

/// The `tokenizer.ggml` keys of the tokenizer at `path`, for a model of this shape.
///
/// Each text begins with the token `end_of_text`, as in training and in `trommel generate`.
pub(crate) fn metadata(path: &Path, config: &Config, end_of_text: u32) -> Result<Vec<(&'static str, Value)>> {
    let damaged = |e| Error::data("the tokenizer is damaged").file(path.display()).source(e);
    let bytes = fs::read(path).map_err(|e| Error::data("the tokenizer cannot be read").file(path.display()).source(e))?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(damaged)?;
    refuse_others(&value).map_err(|e| e.file(path.display()))?;
    let file = TokenizerFile::deserialize(value).map_err(damaged)?;
    let merge = |merge| match merge {
        Merge::Line(line) => Value::String(line),
        Merge::Pair(left, right) => Value::String(format!("{left} {right}")),
    };
    let merges = file.model.merges.into_iter().map(merge).collect();
    let (tokens, types) = tokens(file.model.vocab, file.added_tokens, config.vocab).map_err(|e| e.file(path.display()))?;
    Ok(vec![
        ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".to_owned())),
        ("tokenizer.ggml.tokens", Value::Array(tokens)),
        ("tokenizer.ggml.token_type", Value::Array(types)),
        ("tokenizer.ggml.merges", Value::Array(merges)),
        ("tokenizer.ggml.bos_token_id", Value::U32(end_of_text)),
        ("tokenizer.ggml.eos_token_id", Value::U32(end_of_text)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.ggml.add_eos_token", Value::Bool(false)),
    ])
}

/// Refuses what llama.cpp's `gpt-2` does not do. The list names each field that changes how texts are cut, with the values
/// that change nothing.
fn refuse_others(file: &serde_json::Value) -> Result<()> {
    let fields = [
        ("/model/type", vec![json!("BPE")]),
        ("/normalizer", vec![json!(null)]),
        ("/pre_tokenizer/type", vec![json!("ByteLevel")]),
        ("/pre_tokenizer/add_prefix_space", vec![json!(false)]),
        ("/pre_tokenizer/use_regex", vec![json!(null), json!(true)]),
        ("/model/dropout", vec![json!(null), json!(0.0)]),
        ("/model/continuing_subword_prefix", vec![json!(null), json!("")]),
        ("/model/end_of_word_suffix", vec![json!(null), json!("")]),
        ("/model/byte_fallback", vec![json!(null), json!(false)]),
        ("/model/ignore_merges", vec![json!(null), json!(false)]),
    ];
    for (field, plain) in fields {
        let found = file.pointer(field).unwrap_or(&serde_json::Value::Null);
        if !plain.contains(found) {
            let name = field[1..].replace('/', ".");
            let message = format!("llama.cpp would cut texts otherwise than this tokenizer: `{name}` is {found}");
            let hint = "a GGUF file takes byte-level BPE with GPT-2's pre-tokenizer, such as `trommel run` trains; for other \
                        tokenizers use `--format hf`";
            return Err(Error::config(message).hint(hint));
        }
    }
    Ok(())
}

/// The text and the type of each token of a model with `vocab` tokens.
fn tokens(known: BTreeMap<String, usize>, added: Vec<AddedToken>, vocab: usize) -> Result<(Vec<Value>, Vec<Value>)> {
    let known = known.into_iter().map(|(token, id)| (id, token, NORMAL));
    // An added token is often in the vocabulary too; its text here is plain, not the alphabet that stands for bytes.
    let added = added.into_iter().map(|token| (token.id, token.content, if token.special { CONTROL } else { USER_DEFINED }));
    let mut tokens: Vec<(String, i32)> = (0..vocab).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
    for (id, token, kind) in known.chain(added) {
        let Some(slot) = tokens.get_mut(id) else {
            let message = format!("the tokenizer has the token {id}, and the model only {vocab} of them");
            return Err(Error::data(message).hint("the tokenizer does not belong to this model"));
        };
        *slot = (token, kind);
    }
    Ok(tokens.into_iter().map(|(token, kind)| (Value::String(token), Value::I32(kind))).unzip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    fn file() -> serde_json::Value {
        json!({
            "added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": true}, {"id": 4, "content": "## ", "special": false}],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "vocab": {"<|endoftext|>": 0, "a": 1, "Ġ": 2, "Ġa": 3}, "merges": [["Ġ", "a"]]},
        })
    }

    fn read(file: &serde_json::Value, vocab: usize) -> Result<BTreeMap<&'static str, String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        fs::write(&path, file.to_string()).unwrap();
        let metadata = metadata(&path, &preset("slm-1m", vocab).unwrap(), 0)?;
        Ok(metadata.into_iter().map(|(key, value)| (key, format!("{value:?}"))).collect())
    }

    #[test]
    fn tokens_types_and_merges_stand_in_order() {
        let mut file = file();
        let metadata = read(&file, 6).unwrap();
        let strings = |list: [&str; 6]| list.map(|text| format!("String({text:?})")).join(", ");
        let expected = format!("Array([{}])", strings(["<|endoftext|>", "a", "Ġ", "Ġa", "## ", "[PAD5]"]));
        assert_eq!(metadata["tokenizer.ggml.tokens"], expected);
        assert_eq!(metadata["tokenizer.ggml.token_type"], "Array([I32(3), I32(1), I32(1), I32(1), I32(4), I32(5)])");
        assert_eq!(metadata["tokenizer.ggml.merges"], "Array([String(\"Ġ a\")])");
        file["model"]["merges"] = json!(["Ġ a"]);
        assert_eq!(read(&file, 6).unwrap(), metadata);
    }

    #[test]
    fn a_tokenizer_that_cuts_otherwise_is_refused_by_field() {
        let cases = [
            ("/model/type", json!("Unigram")),
            ("/normalizer", json!({"type": "NFC"})),
            ("/pre_tokenizer", json!(null)),
            ("/pre_tokenizer/type", json!("Whitespace")),
            ("/pre_tokenizer/add_prefix_space", json!(true)),
            ("/pre_tokenizer/use_regex", json!(false)),
            ("/model/dropout", json!(0.1)),
        ];
        for (field, value) in cases {
            let mut file = file();
            *file.pointer_mut(field).unwrap() = value;
            let error = read(&file, 6).unwrap_err();
            let name = field[1..].replace('/', ".");
            assert!(error.message().contains(&name) && error.remedy().is_some() && error.exit_code() == 2, "{error}");
        }
        let error = read(&file(), 4).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json: the tokenizer has the token 4"), "{error}");
    }
}
