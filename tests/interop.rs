//! Other programs open what we export, and we open what they save: `transformers`, `gguf` and llama.cpp, from PyPI.
//!
//! Here is what we compute; `tests/interop/*.py` compute the same and compare. The packages come once, as
//! `tests/environment.py` tells.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::Device;
use serde_json::{Value, json};
use trommel_core::tokenizer;
use trommel_kernels::panels::Precision;
use trommel_trainer::batch::Batch;
use trommel_trainer::checkpoint::{self, Model};
use trommel_trainer::documents::tokenize;
use trommel_trainer::engine::Engine;
use trommel_trainer::model::{Activation, Config, preset};
use trommel_trainer::parameters::Layout;

use crate::bench::Bench;

/// Texts of fewer tokens than the context, which is 64.
const TEXTS: [&str; 6] = [
    "the violin and the melody of a soprano",
    " the temple  in heaven\n\n\tpraise \n",
    "don't we'll THEY'RE 1234567 x+=y*(z-1); //",
    "\u{65e5}\u{672c}\u{8a9e} caf\u{e9} \u{1f600}",
    "a",
    "query, index: table. transaction; schema!?",
];

/// Runs a script of `tests/interop`; what it printed.
fn python(script: &str, arguments: &[&Path]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/interop").join(script);
    let run = Command::new("python3").arg(&script).args(arguments).output();
    let output = run.unwrap_or_else(|e| panic!("this test needs `python3` with `venv` and PyPI: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed: {errors}", script.display());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The logits after each position of `tokens`, (time, vocab).
fn logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut engine = Engine::new(&model.config, model.parameters.clone(), &Device::Cpu, Precision::F32).unwrap();
    let prefix =
        |time: usize| Batch { time, tokens: tokens[..time].to_vec(), targets: tokens[..time].to_vec(), starts: vec![0; time] };
    (1..=tokens.len()).map(|time| engine.logits(&prefix(time)).unwrap()).collect()
}

/// Writes what we compute of `TEXTS` with the model in `checkpoint`, beside its export in `folder`.
fn write_ours(bench: &Bench, checkpoint: &str, folder: &str, architecture: &str) -> PathBuf {
    let model = checkpoint::read_model(&bench.path(checkpoint)).unwrap();
    let tokenizer = tokenizer::read(&checkpoint::tokenizer(&bench.path(checkpoint))).unwrap();
    let tokens = tokenize(&tokenizer, &TEXTS.map(str::to_owned)).unwrap();
    assert!(tokens.iter().all(|tokens| tokens.len() < model.config.context));
    let start = |tokens: &Vec<u32>| [&[model.end_of_text], &tokens[..]].concat();
    let logits: Vec<_> = tokens.iter().map(|tokens| logits(&model, &start(tokens))).collect();
    bench.write_lines("texts.jsonl", &TEXTS.map(str::to_owned));
    let evaluation = bench.call(&["eval", checkpoint, "texts.jsonl", "--json"]).json();
    let name = format!("{folder}.json");
    let ours = json!({
        "folder": bench.path(folder), "architecture": architecture, "end_of_text": model.end_of_text, "texts": TEXTS,
        "tokens": tokens, "logits": logits, "perplexity": evaluation["perplexity"],
    });
    bench.write(&name, ours.to_string());
    bench.path(&name)
}

fn export(bench: &Bench, checkpoint: &str, format: &str, out: &str) -> Value {
    bench.call(&["export", checkpoint, "--format", format, "--out", out, "--json"]).json()
}

/// A directory with the checkpoint of a model that was trained a little.
fn trained() -> (Bench, String) {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml"]).code, 0);
    bench.write("t.yaml", "name: alone\nshards: runs/small/shards/music\nmodel: slm-1m\ncontext: 64\ntokens: 12k\n");
    let report = bench.call(&["train", "t.yaml", "--json"]).json();
    (bench, report["checkpoint"].as_str().unwrap().to_owned())
}

/// A checkpoint in `folder` of a model with `GELU`, whose numbers are all different.
fn save_gelu(bench: &Bench, folder: &str, tokenizer: &Path) {
    let vocab = tokenizer::read(tokenizer).unwrap().get_vocab_size(true);
    let config = Config { activation: Activation::Gelu, layers: 2, context: 64, ..preset("slm-1m", vocab).unwrap() };
    let numbers = Layout::new(&config).initial(5).into_iter().enumerate();
    let parameters = numbers.map(|(i, x)| x * (1.0 + (i % 7) as f32 * 0.3)).collect();
    let model = Model { config, end_of_text: 0, parameters };
    checkpoint::save(&bench.path(folder), &model, tokenizer, None, &()).unwrap();
}

#[test]
fn transformers_gguf_and_llama_cpp_open_our_exports() {
    let (bench, checkpoint) = trained();
    save_gelu(&bench, "gelu-checkpoint", &checkpoint::tokenizer(&bench.path(&checkpoint)));
    assert_eq!(export(&bench, &checkpoint, "hf", "swiglu")["format"], "hf");
    export(&bench, "gelu-checkpoint", "hf", "gelu");
    export(&bench, &checkpoint, "gguf", "swiglu.gguf");
    let ours = [
        write_ours(&bench, &checkpoint, "swiglu", "LlamaForCausalLM"),
        write_ours(&bench, "gelu-checkpoint", "gelu", "ArceeForCausalLM"),
    ];
    eprint!("{}", python("exported.py", &[&ours[0], &ours[1]]));
    eprint!("{}", python("gguf_file.py", &[&bench.path("swiglu.gguf"), &bench.path("swiglu")]));
    eprint!("{}", python("llama_cpp.py", &[&bench.path("swiglu.gguf"), &ours[0]]));
    for (checkpoint, out) in [(checkpoint.as_str(), "swiglu"), ("gelu-checkpoint", "gelu.gguf")] {
        let refused = bench.call(&["export", checkpoint, "--format", "gguf", "--out", out]);
        assert!(refused.code == 2 && refused.stderr.contains("hint: "), "{}", refused.stderr);
    }
    assert!(!bench.path("gelu.gguf").exists());
}

#[test]
fn we_open_what_transformers_saves() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml"]).code, 0);
    python("saved.py", &[&bench.path("runs/small/shards/music/tokenizer.json"), &bench.path("saved")]);
    for name in ["f32", "bf16-in-files", "f16", "gelu"] {
        let folder = bench.path("saved").join(name);
        let theirs: Value = serde_json::from_slice(&fs::read(folder.join("logits.json")).unwrap()).unwrap();
        let tokens: Vec<u32> = serde_json::from_value(theirs["tokens"].clone()).unwrap();
        let expected: Vec<Vec<f32>> = serde_json::from_value(theirs["logits"].clone()).unwrap();
        let ours = logits(&checkpoint::read_model(&folder).unwrap(), &tokens);
        assert_eq!(ours.len(), expected.len());
        for (ours, expected) in ours.iter().flatten().zip(expected.iter().flatten()) {
            assert!((ours - expected).abs() <= 1e-4, "{name}: {ours} for {expected}");
        }
    }
    let start = "saved/bf16-in-files";
    let before = bench.call(&["eval", start, "music/test.jsonl", "--json"]).json();
    let tuned = bench.call(&["finetune", start, "music/train.jsonl", "--tokens", "8k", "--out", "tuned", "--json"]).json();
    let after = bench.call(&["eval", tuned["checkpoint"].as_str().unwrap(), "music/test.jsonl", "--json"]).json();
    assert!(after["perplexity"].as_f64() < before["perplexity"].as_f64(), "{after} {before}");
    assert_eq!(bench.call(&["generate", start, "--prompt", "the violin", "--max-tokens", "8"]).code, 0);
    export(&bench, start, "hf", "again");
    let [read, again] = [start, "again"].map(|name| checkpoint::read_model(&bench.path(name)).unwrap());
    assert_eq!((read.config, read.end_of_text, read.parameters), (again.config, again.end_of_text, again.parameters));
    fs::remove_file(bench.path("again/tokenizer.json")).unwrap();
    for command in [&["eval", "again", "music/test.jsonl"][..], &["finetune", "again", "music/train.jsonl", "--out", "none"]] {
        let refused = bench.call(command);
        assert!(
            refused.code == 1 && refused.stderr.contains("tokenizer.json: the tokenizer cannot be read"),
            "{}",
            refused.stderr
        );
    }
    assert!(!bench.path("none").exists());
    for (name, said) in [
        ("untied", "config.json: `tie_word_embeddings` is false, supported is true"),
        ("grouped", "config.json: `num_key_value_heads` is 2, supported is 4"),
        ("biased", "config.json: `attention_bias` is true, supported is false"),
        ("scaled", "config.json: `rope_parameters.rope_type` is \"linear\", supported is \"default\""),
    ] {
        let refused = bench.call(&["eval", &format!("saved/{name}"), "music/test.jsonl"]);
        assert!(refused.code == 1 && refused.stderr.contains(said), "{}", refused.stderr);
    }
}
