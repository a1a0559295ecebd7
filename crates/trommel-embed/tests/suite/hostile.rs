//! Texts and folders that nobody should pass, but somebody will.

use std::fs;
use std::path::Path;

use serde_json::json;
use trommel_embed::load::load;
use trommel_kernels::panels::Precision;

use crate::tiny_bert;

/// Loads a tiny BERT after `spoil`; gives the error's text, with the folder's name as `F`, and its exit code.
fn error_of(spoil: impl FnOnce(&Path)) -> (String, u8) {
    let folder = tempfile::tempdir().unwrap();
    tiny_bert::write(folder.path(), "");
    spoil(folder.path());
    let name = folder.path().to_str().unwrap();
    let error = load(name, Precision::F32).err().expect("the folder must not load");
    (error.to_string().replace(name, "F"), error.exit_code())
}

fn check(spoil: impl FnOnce(&Path), exit_code: u8, parts: &[&str]) {
    let (text, code) = error_of(spoil);
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert_eq!(code, exit_code, "{text}");
}

#[test]
fn another_architecture_is_named() {
    check(
        |folder| {
            let llama = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048});
            fs::write(folder.join("config.json"), llama.to_string()).unwrap();
        },
        2,
        &[
            "F/config.json: the model is no BERT encoder: `model_type` `llama`, `architectures` [LlamaForCausalLM]",
            "hint: only BERT",
        ],
    );
    let relative = |folder: &Path| tiny_bert::set(folder, "config.json", "position_embedding_type", json!("relative_key"));
    check(relative, 2, &["F/config.json: `position_embedding_type` is `relative_key`"]);
    let tanh = |folder: &Path| tiny_bert::set(folder, "config.json", "hidden_act", json!("gelu_new"));
    check(tanh, 2, &["F/config.json: `hidden_act` is `gelu_new`, supported is `gelu`"]);
    let odd = |folder: &Path| tiny_bert::set(folder, "config.json", "num_attention_heads", json!(32));
    check(odd, 2, &["F/config.json: `hidden_size` 32 / `num_attention_heads` 32 is odd"]);
}

#[test]
fn each_missing_file_is_named() {
    for file in [
        "config.json",
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "model.safetensors",
    ] {
        let remove = |folder: &Path| fs::remove_file(folder.join(file)).unwrap();
        check(remove, 2, &[&format!("F/{file}: the model folder lacks this file"), "hint: name `static`"]);
    }
}

#[test]
fn other_pooling_is_refused() {
    let both = |folder: &Path| tiny_bert::set(folder, "1_Pooling/config.json", "pooling_mode_cls_token", json!(true));
    check(
        both,
        2,
        &["F/1_Pooling/config.json: the pooling mode is `cls_token, mean_tokens`, supported is `mean_tokens` alone"],
    );
    let none = |folder: &Path| tiny_bert::set(folder, "1_Pooling/config.json", "pooling_mode_mean_tokens", json!(false));
    check(none, 2, &["the pooling mode is `none`"]);
    let dense = |folder: &Path| {
        let modules = json!([{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}, {"path": "2", "type": "x.Dense"}]);
        fs::write(folder.join("modules.json"), modules.to_string()).unwrap();
    };
    check(dense, 2, &["F/modules.json: the model's modules are Transformer, Pooling, Dense", "hint: supported are"]);
}

#[test]
fn damaged_files_are_named() {
    let cut = |folder: &Path| {
        let path = folder.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    check(cut, 1, &["F/model.safetensors: the tensors are damaged or cut short", "hint: copy or download"]);
    check(|folder| fs::write(folder.join("model.safetensors"), b"").unwrap(), 1, &["F/model.safetensors", "damaged"]);
    check(|folder| fs::write(folder.join("modules.json"), b"[{").unwrap(), 1, &["F/modules.json:1:2"]);
    check(
        |folder| fs::write(folder.join("tokenizer.json"), b"{}").unwrap(),
        1,
        &["F/tokenizer.json: the tokenizer is damaged"],
    );
    check(
        |folder| fs::write(folder.join("config.json"), b"{\"model_type\": \"bert\"}").unwrap(),
        1,
        &["F/config.json", "missing field"],
    );
}

#[test]
fn tensors_of_another_shape_are_named() {
    let wider = |folder: &Path| tiny_bert::set(folder, "config.json", "intermediate_size", json!(65));
    check(
        wider,
        1,
        &["F/model.safetensors: the tensor `encoder.layer.0.intermediate.dense.weight` is F32 [64, 32], expected F32 [65, 32]"],
    );
    let deeper = |folder: &Path| tiny_bert::set(folder, "config.json", "num_hidden_layers", json!(3));
    check(deeper, 1, &["F/model.safetensors: the tensor `encoder.layer.2.attention.self.query.weight` is missing"]);
    let small = |folder: &Path| tiny_bert::set(folder, "config.json", "vocab_size", json!(9));
    check(small, 1, &["F/tokenizer.json: the tokenizer has the id 44, the encoder's `vocab_size` is 9"]);
    let long = |folder: &Path| tiny_bert::set(folder, "sentence_bert_config.json", "max_seq_length", json!(512));
    check(long, 2, &["F/sentence_bert_config.json: `max_seq_length` is 512, possible is 3 to 24"]);
}

#[test]
fn a_damaged_static_table_is_named() {
    let table = |bytes: &'static [u8]| move |folder: &Path| fs::write(folder.join("static_table.safetensors"), bytes).unwrap();
    check(table(b"gold"), 1, &["F/static_table.safetensors: the tensors are damaged"]);
    let mut header = br#"{"vectors":{"dtype":"I8","shape":[2,3],"data_offsets":[0,6]}}"#.to_vec();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    bytes.extend([1; 6]);
    let spoil = |folder: &Path| fs::write(folder.join("static_table.safetensors"), bytes).unwrap();
    check(spoil, 1, &["F/static_table.safetensors: the table has 2 rows of 3, the tokenizer has 45 tokens"]);
}

#[test]
fn a_name_that_is_no_folder_is_explained() {
    let error = load("no/such/model", Precision::F32).err().unwrap();
    assert!(
        error.to_string().starts_with("the embedding model `no/such/model` does not exist\n\nhint: name `static`"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 2);
    assert!(load("Cargo.toml", Precision::F32).err().unwrap().to_string().contains("is a file, not a folder"));
}

#[test]
fn hostile_texts_have_vectors() {
    let folder = tempfile::tempdir().unwrap();
    tiny_bert::write(folder.path(), "");
    for model in [load(folder.path().to_str().unwrap(), Precision::F32).unwrap(), load("static", Precision::F32).unwrap()] {
        let same = "a".repeat(200_000);
        let spaced = "a ".repeat(100_000);
        let texts = [&same, &spaced, " \t\n", "\0\u{fffd}\u{feff}", "[CLS] [PAD] [SEP]", "e\u{301}\u{301}\u{301}", "\u{1f600}"];
        let mut vectors = vec![f32::NAN; texts.len() * model.dimensions()];
        model.embed(&texts, &mut vectors).unwrap();
        assert!(vectors.iter().all(|x| x.is_finite()));
        let is_zero = |row: usize| vectors[row * model.dimensions()..][..model.dimensions()].iter().all(|x| *x == 0.0);
        // A word of over 100 characters is unknown to WordPiece.
        assert_eq!((is_zero(0), is_zero(1), is_zero(2)), (true, false, true));
    }
}
