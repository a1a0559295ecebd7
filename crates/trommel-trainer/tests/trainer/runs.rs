//! Runs that are cut short, repeated, damaged.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use trommel_core::error::{Kind, Result};
use trommel_core::progress::{Interrupt, Progress, Silent};
use trommel_kernels::panels::Precision;
use trommel_trainer::log::Entry;
use trommel_trainer::pretrain::{PretrainPlan, TrainReport, pretrain};
use trommel_trainer::recipe::Recipe;

use crate::fixtures::{device, plan, write_shards};

/// Asks for a stop after some steps.
struct StopAfter {
    steps: AtomicU64,
    interrupt: Interrupt,
}

impl Progress for StopAfter {
    fn begin(&self, _: &str, _: Option<u64>, _: &str) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {
        if self.steps.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.interrupt.request();
        }
    }
    fn end(&self) {}
    fn line(&self, _: &str) {}
}

fn run(plan: &PretrainPlan) -> Result<TrainReport> {
    pretrain(plan, &device(), &Silent, &Interrupt::default())
}

/// Runs until some steps are done.
pub(crate) fn run_for(plan: &PretrainPlan, steps: u64) -> Result<TrainReport> {
    let interrupt = Interrupt::default();
    let progress = StopAfter { steps: AtomicU64::new(steps), interrupt: interrupt.clone() };
    pretrain(plan, &device(), &progress, &interrupt)
}

fn log(out: &Path) -> Vec<(u64, f64, f64)> {
    let text = fs::read_to_string(out.join("log.jsonl")).unwrap();
    let entry = |line: &str| {
        let entry: Entry = serde_json::from_str(line).unwrap();
        (entry.step, entry.loss, entry.gradient_norm)
    };
    text.lines().map(entry).collect()
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("checkpoint/model.safetensors")).unwrap()
}

#[test]
fn a_run_learns_and_is_found_finished() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let plan = plan(folder.path(), "out");
    let report = run(&plan).unwrap();
    let log = log(&plan.out);
    assert!((log[0].1 - 30f64.ln()).abs() < 0.2, "the first loss is {}", log[0].1);
    assert!(report.loss < log[0].1 - 1.0, "{} after {}", report.loss, log[0].1);
    assert_eq!((report.steps, report.tokens, log.len(), report.cached), (30, 1920, 30, false));
    assert_eq!(report.epochs, 1);
    let mut files: Vec<_> = fs::read_dir(&report.checkpoint).unwrap().map(|f| f.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["config.json", "model.safetensors", "state.json", "tokenizer.json"]);

    let again = run(&plan).unwrap();
    assert_eq!(again, TrainReport { cached: true, ..report });
    let error = run(&PretrainPlan { seed: 12, ..plan }).unwrap_err();
    assert!(error.kind() == Kind::Config && error.message().contains("another plan"), "{error}");
}

#[test]
fn an_interrupted_run_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let (whole, parts) = (plan(folder.path(), "whole"), plan(folder.path(), "parts"));
    run(&whole).unwrap();
    for steps in [1, 7, 12] {
        assert_eq!(run_for(&parts, steps).unwrap_err().kind(), Kind::Interrupted);
        // A killed run has logged steps that its checkpoint does not hold.
        let file = parts.out.join("log.jsonl");
        let text = fs::read_to_string(&file).unwrap();
        let last = text.lines().last().unwrap().to_owned();
        let mut lost: Entry = serde_json::from_str(&last).unwrap();
        lost.step += 1;
        fs::write(&file, format!("{text}{}\n{{\"step\": 9", serde_json::to_string(&lost).unwrap())).unwrap();
    }
    let report = run(&parts).unwrap();
    assert_eq!(report.steps, 30);
    assert_eq!(weights(&parts.out), weights(&whole.out));
    assert_eq!(log(&parts.out), log(&whole.out));
}

#[test]
fn micro_batches_only_change_rounding() {
    // A step of 16 sequences at once, and of one sequence of the same tokens at a time.
    use trommel_trainer::engine::Engine;
    use trommel_trainer::parameters::Layout;
    let config = crate::fixtures::tiny(trommel_trainer::model::Activation::SwiGlu);
    let gradient = |micro: usize| {
        let mut engine = Engine::new(&config, Layout::new(&config).initial(1), &device(), Precision::F32).unwrap();
        let all = crate::fixtures::batch(16, 8, 0);
        for first in (0..16).step_by(micro) {
            let at = first * 8..(first + micro) * 8;
            let part = |x: &[u32]| x[at.clone()].to_vec();
            let batch = trommel_trainer::batch::Batch {
                time: 8,
                tokens: part(&all.tokens),
                targets: part(&all.targets),
                starts: part(&all.starts),
            };
            engine.accumulate(&batch, 1.0 / 128.0).unwrap();
        }
        engine.gradient().unwrap()
    };
    for (a, b) in gradient(16).iter().zip(gradient(1)) {
        assert!((a - b).abs() < 1e-6);
    }
}

#[test]
fn a_diverging_run_says_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let plan = plan(folder.path(), "out");
    let plan = PretrainPlan { recipe: Recipe { learning_rate: 1e30, warmup_steps: 1, ..plan.recipe.clone() }, ..plan };
    let error = run(&plan).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("step ") && text.contains("shard-0.parquet") && text.contains("row") && text.contains("hint"),
        "{text}"
    );
}

#[test]
fn a_damaged_checkpoint_is_not_continued() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let plan = plan(folder.path(), "out");
    run_for(&plan, 4).unwrap_err();
    let file = plan.out.join("checkpoint/first_moment.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let error = run(&plan).unwrap_err();
    assert!(
        error.kind() == Kind::Data && error.to_string().contains("first_moment.safetensors") && error.remedy().is_some(),
        "{error}"
    );
}

#[test]
fn plans_that_cannot_run_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let plan = plan(folder.path(), "out");
    for wrong in [PretrainPlan { context: 33, ..plan.clone() }, PretrainPlan { tokens: 0, ..plan.clone() }] {
        assert_eq!(run(&wrong).unwrap_err().kind(), Kind::Config);
    }
    let missing = PretrainPlan { shards: folder.path().join("none"), ..plan };
    assert_eq!(run(&missing).unwrap_err().kind(), Kind::Data);
}
