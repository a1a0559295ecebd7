//! A generated BERT of a few kilobytes in a sentence-transformers folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Words of the vocabulary, after the special tokens and single characters.
const WORDS: [&str; 12] = ["the", "of", "and", "gold", "gravel", "screen", "turn", "##ing", "##s", "court", "surgeon", "king"];
pub(crate) const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 64;
const POSITIONS: usize = 24;

/// Writes the folder; every tensor name begins with `prefix`.
pub(crate) fn write(folder: &Path, prefix: &str) {
    let vocabulary = vocabulary();
    fs::create_dir_all(folder.join("1_Pooling")).unwrap();
    let config = json!({
        "model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_attention_heads": 4, "num_hidden_layers": 2, "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "vocab_size": vocabulary.len(),
    });
    let module = |path: &str, kind: &str| json!({"idx": 0, "name": "0", "path": path, "type": format!("sentence_transformers.models.{kind}")});
    let modules = json!([module("", "Transformer"), module("1_Pooling", "Pooling"), module("2_Normalize", "Normalize")]);
    let pooling =
        json!({"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true});
    write_json(folder, "config.json", &config);
    write_json(folder, "modules.json", &modules);
    write_json(folder, "1_Pooling/config.json", &pooling);
    write_json(folder, "sentence_bert_config.json", &json!({"max_seq_length": 16, "do_lower_case": false}));
    write_json(folder, "tokenizer.json", &tokenizer(&vocabulary));
    fs::write(folder.join("model.safetensors"), weights(prefix, vocabulary.len())).unwrap();
}

/// Sets one member of a JSON file in the folder.
pub(crate) fn set(folder: &Path, file: &str, member: &str, value: Value) {
    let text = fs::read_to_string(folder.join(file)).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json[member] = value;
    write_json(folder, file, &json);
}

fn write_json(folder: &Path, file: &str, value: &Value) {
    fs::write(folder.join(file), value.to_string()).unwrap();
}

fn vocabulary() -> Vec<String> {
    let special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]"].map(str::to_string);
    let characters = ('a'..='z').chain(['.', ',']).map(String::from);
    special.into_iter().chain(characters).chain(WORDS.map(str::to_string)).collect()
}

fn tokenizer(vocabulary: &[String]) -> Value {
    let ids: BTreeMap<&String, usize> = vocabulary.iter().enumerate().map(|(id, token)| (token, id)).collect();
    let special = |token: &str| {
        json!({"id": ids[&token.to_string()], "content": token, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let framed = |token: &str| json!({"id": token, "ids": [ids[&token.to_string()]], "tokens": [token]});
    let piece = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    json!({
        "version": "1.0",
        // As in the real model: what the file says of truncation and padding is not what the encoder does.
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
                    "pad_token": "[PAD]"},
        "added_tokens": [special("[PAD]"), special("[UNK]"), special("[CLS]"), special("[SEP]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                       "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [piece("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, piece("[SEP]")],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": framed("[CLS]"), "[SEP]": framed("[SEP]")},
        },
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": ids},
    })
}

fn weights(prefix: &str, vocabulary: usize) -> Vec<u8> {
    let mut shapes = vec![
        ("embeddings.word_embeddings.weight".to_string(), vec![vocabulary, HIDDEN]),
        ("embeddings.position_embeddings.weight".to_string(), vec![POSITIONS, HIDDEN]),
        ("embeddings.token_type_embeddings.weight".to_string(), vec![2, HIDDEN]),
        ("embeddings.LayerNorm.weight".to_string(), vec![HIDDEN]),
        ("embeddings.LayerNorm.bias".to_string(), vec![HIDDEN]),
    ];
    for layer in 0..2 {
        let mut linear = |part: &str, outputs: usize, inputs: usize| {
            shapes.push((format!("encoder.layer.{layer}.{part}.weight"), vec![outputs, inputs]));
            shapes.push((format!("encoder.layer.{layer}.{part}.bias"), vec![outputs]));
        };
        for part in ["query", "key", "value"] {
            linear(&format!("attention.self.{part}"), HIDDEN, HIDDEN);
        }
        linear("attention.output.dense", HIDDEN, HIDDEN);
        linear("intermediate.dense", INTERMEDIATE, HIDDEN);
        linear("output.dense", HIDDEN, INTERMEDIATE);
        for norm in ["attention.output.LayerNorm", "output.LayerNorm"] {
            shapes.push((format!("encoder.layer.{layer}.{norm}.weight"), vec![HIDDEN]));
            shapes.push((format!("encoder.layer.{layer}.{norm}.bias"), vec![HIDDEN]));
        }
    }
    let mut state = 17_u64;
    let mut next = || {
        // Knuth's MMIX linear congruential generator.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.6
    };
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let bytes = (0..shape.iter().product()).flat_map(|_: usize| next().to_le_bytes()).collect();
            (format!("{prefix}{name}"), shape, bytes)
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}
