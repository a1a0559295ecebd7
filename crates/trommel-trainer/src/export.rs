//! A model in the formats that other programs open: a folder for `transformers`, a file for llama.cpp.
//!
//! A checkpoint's folder holds most of what `transformers` reads. An export leaves out the training state and adds what makes
//! `AutoTokenizer` and `generate` work without being told more. It is whole or absent, and replaces nothing.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use trommel_core::error::{Error, Kind, Result};
use trommel_core::storage::{refuse_existing, write_atomic, write_bytes, write_new_folder};
use trommel_core::tokenizer;

use crate::checkpoint::{self, Model};
use crate::gguf;

/// The formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A folder as `transformers` saves it.
    Hf,
    /// One file for llama.cpp.
    Gguf,
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exported {
    /// The new folder or file.
    pub out: PathBuf,
    /// Its format.
    pub format: Format,
    /// Parameters of the model; the embedding, which is also the output layer, counts once.
    pub parameters: u64,
    /// Size of the folder's files, or of the file.
    pub bytes: u64,
}

/// Writes the model in `checkpoint` to `out`, where nothing may be yet.
pub fn export(checkpoint: &Path, format: Format, out: &Path) -> Result<Exported> {
    refuse_existing(out)?;
    let model = checkpoint::read_model(checkpoint)?;
    model.config.check_plain().map_err(|e| e.file(checkpoint.display()))?;
    if format == Format::Gguf {
        gguf::check(&model.config).map_err(|e| e.file(checkpoint.display()))?;
    }
    let tokenizer = checkpoint::tokenizer(checkpoint);
    let end_of_text = end_of_text(&model, &tokenizer)?;
    let written = match format {
        Format::Hf => write_new_folder(out, |folder| write_hf(folder, &model, &tokenizer, &end_of_text)),
        Format::Gguf => write_atomic(out, |file| gguf::write(&model, &tokenizer, out, file)),
    };
    written.map_err(|error| match error.kind() {
        Kind::System => error.hint("check the space and the permissions there, or name another place with `--out`"),
        _ => error,
    })?;
    let bytes = size(out).map_err(|e| Error::system("cannot read what was written").file(out.display()).source(e))?;
    Ok(Exported { out: out.to_owned(), format, parameters: model.parameters.len() as u64, bytes })
}

/// The text of the end-of-text token, once the tokenizer is known to fit the model.
fn end_of_text(model: &Model, path: &Path) -> Result<String> {
    let tokenizer = tokenizer::read(path)?;
    let hint = "the tokenizer does not belong to this model";
    let last = tokenizer.get_vocab(true).into_values().max().unwrap_or_default();
    if last as usize >= model.config.vocab {
        let message = format!("the tokenizer has the token {last}, and the model only {} of them", model.config.vocab);
        return Err(Error::data(message).file(path.display()).hint(hint));
    }
    let missing = || Error::data(format!("the tokenizer has no token {}, which ends a text", model.end_of_text));
    tokenizer.id_to_token(model.end_of_text).ok_or_else(|| missing().file(path.display()).hint(hint))
}

fn write_hf(folder: &Path, model: &Model, tokenizer: &Path, end_of_text: &str) -> Result<()> {
    for (name, bytes) in checkpoint::published(model, tokenizer)? {
        write_bytes(&folder.join(name), &bytes)?;
    }
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "model_max_length": model.config.context,
        // `transformers` would otherwise take spaces away before punctuation when it decodes.
        "clean_up_tokenization_spaces": false,
        // And make `token_type_ids`, which the model does not take.
        "model_input_names": ["input_ids", "attention_mask"],
    });
    let generation_config = json!({ "bos_token_id": model.end_of_text, "eos_token_id": model.end_of_text });
    write_bytes(&folder.join("tokenizer_config.json"), &checkpoint::json(&tokenizer_config)?)?;
    write_bytes(&folder.join("generation_config.json"), &checkpoint::json(&generation_config)?)
}

fn size(path: &Path) -> std::io::Result<u64> {
    if path.is_file() {
        return Ok(path.metadata()?.len());
    }
    fs::read_dir(path)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_core::quantized::gguf_file::Content;

    use super::*;
    use crate::model::{Activation, Config, preset};
    use crate::parameters::Layout;

    /// A tokenizer of the 256 bytes' alphabet, after the end-of-text token; each byte is a token.
    fn tokenizer() -> String {
        let alphabet = (33..=126).chain(161..=172).chain(174..=255).chain(256..324).filter_map(char::from_u32);
        let mut vocab = serde_json::Map::from_iter([("<|endoftext|>".to_owned(), json!(0))]);
        vocab.extend(alphabet.zip(1..).map(|(byte, id)| (byte.to_string(), json!(id))));
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [{"id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        })
        .to_string()
    }

    /// A checkpoint in `folder/c`.
    fn saved(folder: &Path, activation: Activation) -> Model {
        let config = Config { activation, width: 12, heads: 2, mlp: 6, layers: 2, ..preset("slm-1m", 257).unwrap() };
        let model = Model { parameters: Layout::new(&config).initial(1), config, end_of_text: 0 };
        fs::write(folder.join("source.json"), tokenizer()).unwrap();
        checkpoint::save(&folder.join("c"), &model, &folder.join("source.json"), None, &7u32).unwrap();
        model
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_exported_folder_is_read_exactly_and_exports_to_itself() {
        for activation in [Activation::SwiGlu, Activation::Gelu] {
            let folder = tempfile::tempdir().unwrap();
            let model = saved(folder.path(), activation);
            let [first, second] = ["deep/first", "second"].map(|name| folder.path().join(name));
            let exported = export(&folder.path().join("c"), Format::Hf, &first).unwrap();
            assert_eq!(exported.parameters, model.config.parameters() as u64);
            assert!(exported.bytes > 4 * exported.parameters);
            export(&first, Format::Hf, &second).unwrap();
            let files =
                ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
            assert_eq!(names(&first), files);
            for file in files {
                assert_eq!(fs::read(first.join(file)).unwrap(), fs::read(second.join(file)).unwrap(), "{file}");
            }
            let read = checkpoint::read_model(&second).unwrap();
            assert_eq!((read.config, read.end_of_text, read.parameters), (model.config, 0, model.parameters));
            assert_eq!(names(folder.path()), ["c", "deep", "second", "source.json"]);
        }
    }

    #[test]
    fn a_gguf_file_holds_the_weights_in_llamas_order() {
        let folder = tempfile::tempdir().unwrap();
        let model = saved(folder.path(), Activation::SwiGlu);
        let out = folder.path().join("tiny.gguf");
        export(&folder.path().join("c"), Format::Gguf, &out).unwrap();
        let mut file = fs::File::open(&out).unwrap();
        let content = Content::read(&mut file).unwrap();
        let layout = Layout::new(&model.config);
        assert_eq!(content.tensor_infos.len(), layout.slots().len());
        assert_eq!(content.metadata["llama.rope.dimension_count"].to_u32().unwrap(), 6);
        assert_eq!(content.metadata["general.name"].to_string().unwrap(), "tiny");
        let mut tensor = |name: &str| -> Vec<f32> {
            let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
            tensor.flatten_all().unwrap().to_vec1().unwrap()
        };
        let ours = |name: &str| {
            let slot = layout.slots().iter().find(|slot| slot.name == name).unwrap();
            &model.parameters[slot.range.clone()]
        };
        assert_eq!(tensor("token_embd.weight"), ours("model.embed_tokens.weight"));
        assert_eq!(tensor("blk.1.ffn_down.weight"), ours("model.layers.1.mlp.down_proj.weight"));
        assert_eq!(tensor("blk.1.attn_v.weight"), ours("model.layers.1.self_attn.v_proj.weight"));
        let (file, rows) = (tensor("blk.1.attn_k.weight"), ours("model.layers.1.self_attn.k_proj.weight"));
        // Rows 0, 1 and 2 of the second head's six: the first of its first half, of its second half, the next of the first.
        for (at, from) in [(6, 6), (7, 9), (8, 7)] {
            assert_eq!(file[at * 12..][..12], rows[from * 12..][..12], "{at}");
        }
    }

    #[test]
    fn nothing_is_replaced_and_a_failure_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        saved(folder.path(), Activation::Gelu);
        let at = folder.path().join("c");
        let before = names(folder.path());
        for (format, out) in [(Format::Hf, "c"), (Format::Gguf, "source.json")] {
            let error = export(&at, format, &folder.path().join(out)).unwrap_err();
            assert!(error.exit_code() == 2 && error.message().contains("not overwritten"), "{error}");
        }
        let out = folder.path().join("out");
        let error = export(&at, Format::Gguf, &out).unwrap_err();
        assert!(error.exit_code() == 2 && error.message().contains("`GELU`"), "{error}");
        assert_eq!(error.place().file.as_deref(), at.to_str());
        // A flipped bit is found by the checkpoint's checksums, although it is a number like any other.
        let weights = fs::read(at.join("model.safetensors")).unwrap();
        let mut flipped = weights.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(at.join("model.safetensors"), flipped).unwrap();
        let error = export(&at, Format::Hf, &out).unwrap_err();
        assert!(error.place().file.as_ref().unwrap().ends_with("model.safetensors"), "{error}");
        fs::write(at.join("model.safetensors"), weights).unwrap();
        fs::remove_file(at.join("state.json")).unwrap();
        fs::write(at.join("tokenizer.json"), tokenizer().replace("\"Ń\":256", "\"Ń\":999")).unwrap();
        let error = export(&at, Format::Hf, &out).unwrap_err();
        assert!(error.message().contains("has the token 999, and the model only 257"), "{error}");
        fs::remove_file(at.join("tokenizer.json")).unwrap();
        let error = export(&at, Format::Hf, &out).unwrap_err();
        assert!(error.place().file.as_ref().unwrap().ends_with("tokenizer.json"), "{error}");
        assert_eq!(names(folder.path()), before);
    }
}
