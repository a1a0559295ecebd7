//! Small folders of shards, tokenizers and plans.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListBuilder, UInt32Builder};
use arrow::record_batch::RecordBatch;
use candle_core::Device;
use parquet::arrow::ArrowWriter;
use trommel_core::key::checksum_file;
use trommel_core::manifest::{Manifest, Shard};
use trommel_kernels::adamw::Factors;
use trommel_trainer::batch::Batch;
use trommel_trainer::model::{Activation, Config};
use trommel_trainer::parameters::Layout;
use trommel_trainer::pretrain::{Part, PretrainPlan};
use trommel_trainer::recipe::Recipe;

/// Where runs are tested: on the CPU unless `TROMMEL_TEST_DEVICE` names a GPU, such as `cuda:0`.
pub(crate) fn device() -> Device {
    trommel_trainer::device::parse(&std::env::var("TROMMEL_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())).unwrap()
}

/// Parameters whose every tensor is away from its start, so that no gradient is zero by symmetry.
pub(crate) fn off_start(config: &Config) -> Vec<f32> {
    let start = Layout::new(config).initial(3);
    start.iter().enumerate().map(|(i, p)| p * 1.5 + 0.05 * ((i * 7919 % 101) as f32 / 50.0 - 1.0)).collect()
}

/// Asserts that no number is off by more than `tolerance` times the largest one that is expected.
pub(crate) fn close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len());
    let size = expected.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance * size, "{what}, number {i}: {got} for {expected}");
    }
}

/// Root of the mean square of what differs, relative to the expected numbers.
pub(crate) fn noise(got: &[f32], expected: &[f32]) -> f64 {
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
    let off = squares(&mut got.iter().zip(expected).map(|(a, b)| a - b));
    (off / squares(&mut expected.iter().copied())).sqrt()
}

/// What `Engine::step` hands on in step `step`, from 0, at a rate of 0.001.
pub(crate) fn factors(recipe: &Recipe, step: i32, norm: f64) -> Factors {
    Factors {
        learning_rate: 1e-3,
        decay: recipe.decay as f32,
        beta1: recipe.beta1 as f32,
        beta2: recipe.beta2 as f32,
        epsilon: recipe.epsilon as f32,
        correction1: (1.0 - recipe.beta1.powi(step + 1)) as f32,
        correction2: (1.0 - recipe.beta2.powi(step + 1)) as f32,
        gradient_scale: (recipe.clip / norm).min(1.0) as f32,
    }
}

/// Words of the toy language; word 0 is the end of text.
pub(crate) const VOCAB: usize = 30;
/// Tokens per sequence.
pub(crate) const CONTEXT: usize = 16;

/// A model of 8,000 parameters.
pub(crate) fn tiny(activation: Activation) -> Config {
    Config {
        vocab: VOCAB,
        width: 24,
        layers: 2,
        heads: 2,
        mlp: 40,
        activation,
        context: 32,
        rope_theta: 1e4,
        norm_eps: 1e-5,
        projection: None,
        adapters: None,
    }
}

/// A document of the toy language: each word follows from the one before and the document's stride.
pub(crate) fn document(i: usize) -> Vec<u32> {
    let (len, stride) = (5 + i * 7 % 23, 1 + i % 3);
    (0..len).map(|t| ((i + t * stride) % (VOCAB - 1) + 1) as u32).collect()
}

/// The words of a document.
pub(crate) fn text(i: usize) -> String {
    document(i).iter().map(|word| format!("w{word}")).collect::<Vec<_>>().join(" ")
}

/// Sequences of documents from `first` on.
pub(crate) fn batch(sequences: usize, time: usize, first: usize) -> Batch {
    let mut stream = (first..).flat_map(|i| document(i).into_iter().chain([0]));
    let mut batch = Batch::new(time);
    let mut previous = 0;
    for _ in 0..sequences {
        let next: Vec<u32> = stream.by_ref().take(time).collect();
        batch.push(previous, &next, 0);
        previous = next[time - 1];
    }
    batch
}

/// Writes two shards of 20 documents each, their manifest and the tokenizer.
pub(crate) fn write_shards(folder: &Path) {
    write(folder, &[None, None]);
}

/// Writes a shard of 20 documents for each of some clusters, whose ids are multiples of 10.
pub(crate) fn write_cluster_shards(folder: &Path, clusters: u32) {
    write(folder, &(0..clusters).map(|i| Some(i * 10)).collect::<Vec<_>>());
}

fn write(folder: &Path, clusters: &[Option<u32>]) {
    fs::create_dir_all(folder).unwrap();
    let mut shards = Vec::new();
    for (shard, &cluster_id) in clusters.iter().enumerate() {
        let mut builder = ListBuilder::new(UInt32Builder::new());
        let documents: Vec<Vec<u32>> = (shard * 20..shard * 20 + 20).map(document).collect();
        documents.iter().for_each(|tokens| builder.append_value(tokens.iter().map(|token| Some(*token))));
        let batch = RecordBatch::try_from_iter([("tokens", Arc::new(builder.finish()) as ArrayRef)]).unwrap();
        let path = format!("shard-{shard}.parquet");
        let mut writer = ArrowWriter::try_new(File::create(folder.join(&path)).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let tokens = documents.iter().map(Vec::len).sum::<usize>() as u64;
        let checksum = checksum_file(&folder.join(&path)).unwrap();
        shards.push(Shard { shard: shard as u32, path, rows: 20, tokens, bytes: 0, checksum, cluster_id });
    }
    let tokens = shards.iter().map(|shard| shard.tokens).sum();
    let manifest = Manifest { domain: "toy".into(), vocab: VOCAB as u32, end_of_text: 0, tokens, shards };
    fs::write(folder.join(Manifest::FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
    let words = (1..VOCAB).map(|word| format!("\"w{word}\": {word}")).collect::<Vec<_>>().join(", ");
    let tokenizer = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {{"type": "Whitespace"}}, "post_processor": null, "decoder": null,
            "model": {{"type": "WordLevel", "vocab": {{"<end>": 0, {words}}}, "unk_token": "<end>"}}}}"#
    );
    fs::write(folder.join(Manifest::TOKENIZER), tokenizer).unwrap();
}

/// 30 steps of 4 sequences on the shards in `folder/shards`, written to `folder/out`.
pub(crate) fn plan(folder: &Path, out: &str) -> PretrainPlan {
    let model = tiny(Activation::SwiGlu);
    let recipe = Recipe { batch_tokens: 4 * CONTEXT, warmup_steps: 3, learning_rate: 1e-2, ..Recipe::pretraining(&model, 1) };
    PretrainPlan {
        model,
        context: CONTEXT,
        tokens: (30 * 4 * CONTEXT) as u64,
        recipe,
        seed: 11,
        shards: folder.join("shards"),
        mixture: None,
        part: Part::Whole,
        out: folder.join(out),
    }
}
