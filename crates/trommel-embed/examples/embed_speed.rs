//! Measures a model on a JSON Lines file with a `text` member, and writes its vectors as little-endian f32:
//! `cargo run --release -p trommel-embed --example embed_speed -- MODEL TEXTS.jsonl [VECTORS.f32]`.

use std::time::Instant;

use trommel_core::error::{Error, Result};
use trommel_core::storage::write_bytes;
use trommel_embed::load::load;
use trommel_kernels::panels::Precision;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, path) = match &arguments[..] {
        [model, path] | [model, path, _] => (load(model, Precision::Bf16)?, path),
        _ => return Err(Error::config("usage: embed_speed MODEL TEXTS.jsonl [VECTORS.f32]")),
    };
    let lines = std::fs::read_to_string(path).map_err(|e| Error::data("cannot read the texts").file(path).source(e))?;
    let texts: Vec<String> = lines
        .lines()
        .map(|line| Ok(serde_json::from_str::<serde_json::Value>(line)?["text"].as_str().unwrap_or_default().to_string()))
        .collect::<serde_json::Result<_>>()
        .map_err(|e| Error::data("not JSON Lines").file(path).source(e))?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut vectors = vec![0.0; texts.len() * model.dimensions()];
    let start = Instant::now();
    model.embed(&texts, &mut vectors)?;
    let seconds = start.elapsed().as_secs_f64();
    let megabytes = texts.iter().map(|text| text.len()).sum::<usize>() as f64 / 1e6;
    eprintln!(
        "{} texts, {megabytes:.1} MB in {seconds:.2} s: {:.1} texts/s, {:.2} MB/s",
        texts.len(),
        texts.len() as f64 / seconds,
        megabytes / seconds
    );
    if let Some(output) = arguments.get(2) {
        let bytes: Vec<u8> = vectors.iter().flat_map(|x| x.to_le_bytes()).collect();
        write_bytes(output.as_ref(), &bytes)?;
    }
    Ok(())
}
