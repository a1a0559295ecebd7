//! Our side of `tests/peers`: loads its data, says `ready`, and does one round for each line `go`.
//!
//! ```text
//! trommel-bench embed MODEL TEXTS.jsonl OUT.f32 THREADS f32|bf16
//! trommel-bench nearest VECTORS.f32 CENTROIDS.f32 DIMENSIONS OUT.u32 THREADS f32|fastest      the numbers of the first look
//! trommel-bench kmeans VECTORS.f32 START.f32 DIMENSIONS ITERATIONS OUT.f32 THREADS
//! trommel-bench weights FOLDER OUT.json THREADS       of assignments in its `.parquet` files, and clusters in `tree.parquet`
//! trommel-bench train VOCAB BATCH CONTEXT f32|bf16 STEPS THREADS [EXPERTS]      a projected network with EXPERTS
//! ```
//!
//! Each round prints one line of JSON with its `seconds`; results go to `OUT`, after the clock has stopped.

#![expect(clippy::print_stdout, reason = "the protocol's lines go there")]

use std::fs;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::Device;
use serde_json::{Value, json};
use trommel_core::progress::{Interrupt, Silent};
use trommel_core::seed::Stream;
use trommel_embed::load::load;
use trommel_kernels::nearest::{Centroids, FirstLook};
use trommel_kernels::panels::Precision;
use trommel_pipeline::cluster::kmeans::{self, Settings};
use trommel_pipeline::engine::{Engine, register_batches};
use trommel_pipeline::{histogram, weigh};
use trommel_spec::pipeline::Weigh;
use trommel_trainer::batch::Batch;
use trommel_trainer::model::{Config, Projection, preset};
use trommel_trainer::parameters::Layout;
use trommel_trainer::recipe::Recipe;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    trommel_kernels::isa::Isa::check().map_err(anyhow::Error::msg)?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let threads = |threads: &str| -> anyhow::Result<()> {
        Ok(rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?).build_global()?)
    };
    match arguments[..] {
        ["embed", model, texts, out, count, precision] => {
            threads(count)?;
            embed(model, texts, out, precision)
        }
        ["nearest", vectors, points, dimensions, out, count, look] => {
            threads(count)?;
            nearest(vectors, points, dimensions.parse()?, out, look)
        }
        ["kmeans", vectors, start, dimensions, iterations, out, count] => {
            threads(count)?;
            fit(vectors, start, dimensions.parse()?, iterations.parse()?, out)
        }
        ["weights", folder, out, count] => weights(Path::new(folder), out, count.parse()?),
        ["train", vocab, batch, context, precision, steps, count, ref experts @ ..] => {
            threads(count)?;
            let experts = experts.first().map(|n| n.parse()).transpose()?;
            train(vocab.parse()?, batch.parse()?, context.parse()?, precision, steps.parse()?, experts)
        }
        _ => bail!("see the head of this program's source for what it takes"),
    }
}

fn embed(model: &str, texts: &str, out: &str, precision: &str) -> anyhow::Result<()> {
    let embedder = load(model, parse(precision)?)?;
    let text = |line: &str| -> anyhow::Result<String> {
        Ok(serde_json::from_str::<Value>(line)?["text"].as_str().context("a line has no `text`")?.to_owned())
    };
    let texts = fs::read_to_string(texts)?.lines().map(text).collect::<anyhow::Result<Vec<String>>>()?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut vectors = vec![0.0; texts.len() * embedder.dimensions()];
    serve(|| {
        let start = Instant::now();
        embedder.embed(&texts, &mut vectors)?;
        let seconds = start.elapsed().as_secs_f64();
        write(out, vectors.iter().map(|x| x.to_le_bytes()))?;
        Ok(json!({ "seconds": seconds }))
    })
}

fn nearest(vectors: &str, points: &str, dimensions: usize, out: &str, look: &str) -> anyhow::Result<()> {
    let (vectors, points) = (read(vectors)?, read(points)?);
    let centroids = match look {
        "f32" => Centroids::with_first_look(FirstLook::F32, points, dimensions),
        "fastest" => Centroids::new(points, dimensions),
        other => bail!("`{other}` is neither `f32` nor `fastest`"),
    };
    serve(|| {
        let start = Instant::now();
        let found = centroids.nearest(&vectors);
        let seconds = start.elapsed().as_secs_f64();
        write(out, found.iter().map(|found| found.index.to_le_bytes()))?;
        Ok(json!({ "seconds": seconds }))
    })
}

fn fit(vectors: &str, start: &str, dimensions: usize, iterations: u32, out: &str) -> anyhow::Result<()> {
    let (vectors, points) = (read(vectors)?, read(start)?);
    let settings = Settings { k: points.len() / dimensions, iterations, balance: None, stream: Stream::new(0, "peers") };
    serve(|| {
        let start = Instant::now();
        let centroids = kmeans::refine(points.clone(), &vectors, dimensions, &settings, &mut settings.stream.generator());
        let seconds = start.elapsed().as_secs_f64();
        write(out, centroids.points().iter().map(|x| x.to_le_bytes()))?;
        Ok(json!({ "seconds": seconds }))
    })
}

fn weights(folder: &Path, out: &str, threads: usize) -> anyhow::Result<()> {
    let engine = Engine::new(threads, folder.join("spill"), Arc::new(Silent), Interrupt::default())?;
    let mut files = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "parquet") && !path.ends_with("tree.parquet"));
    files.sort();
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    serve(|| {
        let start = Instant::now();
        let session = engine.parallel_session([]);
        histogram::register_counts(&engine, &session, &files)?;
        engine.register(&session, "tree", &[&folder.join("tree.parquet")])?;
        let histograms = engine.collect(&session, include_str!("../../trommel-pipeline/src/sql/histogram.sql"))?;
        register_batches(&session, "histograms", histograms, &histogram::schema())?;
        let weights = engine.collect(&session, &weigh::sql(&Weigh::default()))?;
        let seconds = start.elapsed().as_secs_f64();
        let mut writer = arrow::json::ArrayWriter::new(fs::File::create(out)?);
        writer.write_batches(&weights.iter().collect::<Vec<_>>())?;
        writer.finish()?;
        Ok(json!({ "seconds": seconds }))
    })
}

fn train(
    vocab: usize,
    sequences: usize,
    context: usize,
    precision: &str,
    steps: u64,
    experts: Option<usize>,
) -> anyhow::Result<()> {
    let config = Config { projection: experts.map(Projection::new), ..preset("slm-9m", vocab)? };
    let recipe = Recipe { precision: parse(precision)?, ..Recipe::pretraining(&config, 1_000_000) };
    let mut engine =
        trommel_trainer::engine::Engine::new(&config, Layout::new(&config).initial(1), &Device::Cpu, recipe.precision)?;
    let stream = Stream::new(1, "peers");
    let mut batch = Batch::new(context);
    for sequence in 0..sequences {
        let token = |i: usize| (stream.bits(&(sequence * context + i).to_le_bytes()) as usize % vocab) as u32;
        batch.push(0, &(0..context).map(token).collect::<Vec<_>>(), 0);
    }
    let tokens = sequences * context;
    // Equal parts of the sequences for each expert; all of them for a plain model.
    let parts: Vec<(usize, Batch)> = batch.parts(sequences.div_ceil(experts.unwrap_or(1))).enumerate().collect();
    let mut step = 0;
    serve(|| {
        let start = Instant::now();
        let mut loss = 0.0;
        for _ in 0..steps {
            engine.accumulate_all(&parts, 1.0 / tokens as f32)?;
            let norm = engine.gradient_norm()?;
            loss = engine.take_losses()? / tokens as f64;
            // So low a rate that the loss stays that of the start, which both sides are compared by.
            engine.step(&recipe, step, 1e-9, norm)?;
            step += 1;
        }
        let seconds = start.elapsed().as_secs_f64();
        let trained = tokens as u64 * steps;
        Ok(json!({ "seconds": seconds, "tokens": trained, "loss": loss, "peak_rss_bytes": peak_memory()? }))
    })
}

/// Does a round for each line `go`.
fn serve(mut round: impl FnMut() -> anyhow::Result<Value>) -> anyhow::Result<()> {
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        match line?.as_str() {
            "go" => println!("{}", round()?),
            "quit" => break,
            other => bail!("`{other}` is neither `go` nor `quit`"),
        }
    }
    Ok(())
}

fn parse(precision: &str) -> anyhow::Result<Precision> {
    match precision {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        other => bail!("`{other}` is neither `f32` nor `bf16`"),
    }
}

fn read(path: &str) -> anyhow::Result<Vec<f32>> {
    let bytes = fs::read(path).with_context(|| path.to_owned())?;
    Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

fn write(path: &str, numbers: impl Iterator<Item = [u8; 4]>) -> anyhow::Result<()> {
    Ok(fs::write(path, numbers.flatten().collect::<Vec<u8>>())?)
}

/// The most memory that this process ever held, in bytes. [proc(5), `VmHWM`]
fn peak_memory() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no `VmHWM`")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
