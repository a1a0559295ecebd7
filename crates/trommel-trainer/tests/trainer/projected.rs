//! Projected networks: gradients, starts, special cases, and training on clusters.

use std::fs;
use std::path::Path;

use candle_core::Device;
use trommel_core::progress::{Interrupt, Silent};
use trommel_kernels::panels::Precision;
use trommel_trainer::engine::Engine;
use trommel_trainer::mixture::{Mixture, Share};
use trommel_trainer::model::{Activation, Config, Projection};
use trommel_trainer::parameters::Layout;
use trommel_trainer::pretrain::{Part, PretrainPlan, pretrain};
use trommel_trainer::projected::project;
use trommel_trainer::recipe::{Recipe, Schedule};
use trommel_trainer::tape::Tape;

use crate::fixtures::{CONTEXT, VOCAB, batch, close, device, factors, off_start, plan, tiny, write_cluster_shards};

fn network(activation: Activation, projection: Projection) -> Config {
    Config { projection: Some(projection), ..tiny(activation) }
}

fn engine(config: &Config, parameters: Vec<f32>) -> Engine {
    Engine::new(config, parameters, &device(), Precision::F32).unwrap()
}

/// `k = 3, m = 2, h = 4`: no size equals another.
const ODD: Projection = Projection { experts: 3, expert_size: 2, capacity: 4, frozen: false };

#[test]
fn losses_and_gradients_equal_the_tape_that_mixes_for_each_batch() {
    for activation in [Activation::SwiGlu, Activation::Gelu] {
        let config = network(activation, ODD);
        let start = off_start(&config);
        let mut engine = engine(&config, start.clone());
        let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::F32).unwrap();
        // Expert 2 comes twice, expert 1 never, though it was announced.
        engine.prepare_experts(&[2, 1]).unwrap();
        for (expert, sequences, time) in [(2, 2, 7), (0, 1, 12), (2, 3, 5)] {
            let batch = batch(sequences, time, expert);
            engine.select_expert(expert).unwrap();
            tape.select_expert(expert);
            let losses = tape.losses_and_gradient(&batch, 0.1).unwrap().to_vec1::<f32>().unwrap();
            close(&engine.losses(&batch).unwrap(), &losses, 1e-5, "losses");
            engine.accumulate(&batch, 0.1).unwrap();
        }
        assert!((engine.gradient_norm().unwrap() / tape.gradient_norm().unwrap() - 1.0).abs() < 1e-5);
        let (gradient, expected) = (engine.gradient().unwrap(), tape.gradient().unwrap());
        for slot in Layout::new(&config).slots() {
            let (got, expected) = (&gradient[slot.range.clone()], &expected[slot.range.clone()]);
            assert!(expected.iter().any(|g| *g != 0.0), "{} has a gradient", slot.name);
            close(got, expected, 1e-4, &slot.name);
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let config = network(Activation::SwiGlu, ODD);
    let start = off_start(&config);
    let batches = [(1, batch(1, 9, 4)), (2, batch(2, 6, 1))];
    let mut tuned = engine(&config, start.clone());
    for (expert, batch) in &batches {
        tuned.select_expert(*expert).unwrap();
        tuned.accumulate(batch, 1.0).unwrap();
    }
    let gradient = tuned.gradient().unwrap();
    let loss = |i: usize, change: f32| {
        let mut parameters = start.clone();
        parameters[i] += change;
        let mut engine = engine(&config, parameters);
        let sum = |(expert, batch): &(usize, _)| {
            engine.select_expert(*expert).unwrap();
            engine.losses(batch).unwrap().iter().map(|loss| f64::from(*loss)).sum::<f64>()
        };
        batches.iter().map(sum).sum::<f64>()
    };
    for slot in Layout::new(&config).slots() {
        let i = slot.range.start + slot.range.len() / 3;
        let slope = (loss(i, 1e-2) - loss(i, -1e-2)) / 2e-2;
        let got = f64::from(gradient[i]);
        assert!((slope - got).abs() < 2e-2 * slope.abs().max(1.0), "{}: {got} for {slope}", slot.name);
    }
}

#[test]
fn steps_equal_the_tape() {
    for projection in [ODD, Projection::hard_mixture(3)] {
        let config = network(Activation::SwiGlu, projection);
        let recipe = Recipe { clip: 0.5, ..Recipe::pretraining(&config, 1000) };
        let start = off_start(&config);
        let mut engine = engine(&config, start.clone());
        let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::F32).unwrap();
        for step in 0..3u64 {
            for expert in [step as usize, 2] {
                let batch = batch(2, 9, expert);
                engine.select_expert(expert).unwrap();
                engine.accumulate(&batch, 0.1).unwrap();
                tape.select_expert(expert);
                tape.losses_and_gradient(&batch, 0.1).unwrap();
            }
            let norm = engine.gradient_norm().unwrap();
            engine.step(&recipe, step, 1e-3, norm).unwrap();
            tape.step(factors(&recipe, step as i32, norm)).unwrap();
            tape.clear_gradient();
        }
        let (got, expected) = (engine.parameters().unwrap(), tape.parameters().unwrap());
        let off: f64 = got.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / got.len() as f64;
        assert!(off < 3e-6, "{off}");
        for slot in Layout::new(&config).slots() {
            let moved = got[slot.range.clone()] != start[slot.range.clone()];
            let mixes = slot.name.ends_with("mixing") || slot.name.ends_with("experts");
            assert_eq!(moved, !(projection.frozen && mixes), "{}", slot.name);
        }
    }
}

#[test]
fn every_expert_starts_as_the_plain_model() {
    for projection in [Projection::new(5), Projection { capacity: 3, ..Projection::new(5) }, Projection::hard_mixture(5)] {
        let config = network(Activation::SwiGlu, projection);
        let layout = Layout::new(&config);
        assert_eq!(layout.len(), config.parameters());
        let (start, plain) = (layout.initial(9), Layout::new(&config.plain()).initial(9));
        for shares in [[0.0, 0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.25, 0.25]] {
            let model = project(&config, &start, &shares).unwrap();
            close(&model, &plain, 1e-6, "the projected start");
        }
    }
    let error = project(&tiny(Activation::Gelu), &[], &[1.0]).unwrap_err();
    assert!(error.message().contains("plain model"), "{error}");
    let config = network(Activation::SwiGlu, ODD);
    assert!(project(&config, &Layout::new(&config).initial(1), &[1.0]).unwrap_err().message().contains("3 experts"));
}

/// A hard mixture trains the MLP of an expert as a plain model would train it, where nothing else is shared in the step.
#[test]
fn a_hard_mixture_of_one_expert_is_the_plain_model() {
    let config = network(Activation::SwiGlu, Projection::hard_mixture(1));
    let recipe = Recipe { clip: 1e9, ..Recipe::pretraining(&config, 1000) };
    let mut network = engine(&config, Layout::new(&config).initial(4));
    let mut plain = engine(&config.plain(), Layout::new(&config.plain()).initial(4));
    for step in 0..4 {
        let batch = batch(2, 11, step);
        network.select_expert(0).unwrap();
        let losses = [&mut network, &mut plain].map(|engine| {
            engine.accumulate(&batch, 0.05).unwrap();
            let loss = engine.take_losses().unwrap();
            let norm = engine.gradient_norm().unwrap();
            engine.step(&recipe, step as u64, 1e-2, norm).unwrap();
            loss
        });
        assert!((losses[0] / losses[1] - 1.0).abs() < 1e-5, "{losses:?}");
    }
    let projected = project(&config, &network.parameters().unwrap(), &[1.0]).unwrap();
    close(&projected, &plain.parameters().unwrap(), 1e-4, "the trained model");
}

/// With independent MLPs written out by hand: one plain engine per expert, whose shared tensors get the summed gradient.
#[test]
fn a_hard_mixture_has_the_gradients_of_separate_mlps() {
    let config = network(Activation::SwiGlu, Projection::hard_mixture(2));
    let start = Layout::new(&config).initial(6);
    let mut network = engine(&config, start.clone());
    let plain = Layout::new(&config.plain());
    let mut summed = vec![0.0; plain.len()];
    let mut own = Vec::new();
    for expert in 0..2 {
        let batch = batch(2, 10, 3 * expert);
        network.select_expert(expert).unwrap();
        network.accumulate(&batch, 0.1).unwrap();
        let shares = [1.0 - expert as f64, expert as f64];
        let mut alone = engine(&config.plain(), project(&config, &start, &shares).unwrap());
        alone.accumulate(&batch, 0.1).unwrap();
        own.push(alone.gradient().unwrap());
        summed.iter_mut().zip(&own[expert]).for_each(|(sum, g)| *sum += g);
    }
    let gradient = network.gradient().unwrap();
    for slot in Layout::new(&config).slots() {
        let got = &gradient[slot.range.clone()];
        if let Some(same) = plain.slot(&slot.name) {
            close(got, &summed[same.range.clone()], 1e-4, &slot.name);
        } else if let Some((layer, "basis")) = slot.name.split_once(".mlp.") {
            let of = |name: &str| plain.slot(&format!("{layer}.mlp.{name}.weight")).unwrap().range.clone();
            let mlp = of("gate_proj").start..of("down_proj").end;
            for (got, own) in got.chunks_exact(mlp.len()).zip(&own) {
                close(got, &own[mlp.clone()], 1e-4, &slot.name);
            }
        }
    }
}

fn shares(experts: bool) -> Vec<Share> {
    let share = |i: u32| Share { cluster_id: i * 10, share: f64::from(i + 1), expert: if experts { i as usize } else { 0 } };
    (0..3).map(share).collect()
}

fn network_plan(folder: &Path, out: &str) -> PretrainPlan {
    let plan = plan(folder, out);
    PretrainPlan {
        model: Config { projection: Some(Projection::new(3)), ..plan.model.clone() },
        mixture: Some(shares(true)),
        ..plan
    }
}

#[test]
fn a_network_trains_on_clusters_and_resumes_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    write_cluster_shards(&folder.path().join("shards"), 3);
    let whole = network_plan(folder.path(), "whole");
    let report = pretrain(&whole, &device(), &Silent, &Interrupt::default()).unwrap();
    assert!(report.loss < (VOCAB as f64).ln() - 0.5, "{}", report.loss);
    let parts = network_plan(folder.path(), "parts");
    for steps in [1, 9] {
        crate::runs::run_for(&parts, steps).unwrap_err();
    }
    pretrain(&parts, &device(), &Silent, &Interrupt::default()).unwrap();
    let weights = |plan: &PretrainPlan| fs::read(plan.out.join("checkpoint/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&parts));
}

#[test]
fn sequences_come_in_proportion_and_any_place_resumes() {
    let folder = tempfile::tempdir().unwrap();
    write_cluster_shards(folder.path(), 3);
    let open = |shares: &[Share]| Mixture::open(folder.path(), VOCAB, shares, 5);
    let mut mixture = open(&shares(true)).unwrap();
    let mut counts = [0usize; 3];
    for _ in 0..60 {
        let mut resumed = open(&shares(true)).unwrap();
        resumed.seek(&mixture.position()).unwrap();
        let dealt = mixture.deal(3, CONTEXT).unwrap();
        assert_eq!(resumed.deal(3, CONTEXT).unwrap(), dealt);
        dealt.iter().for_each(|(expert, batch)| counts[*expert] += batch.sequences());
    }
    // Shares are 1, 2 and 3 sixths of 180; the additive recurrence stays within a few sequences.
    for (count, expected) in counts.into_iter().zip([30, 60, 90]) {
        assert!(count.abs_diff(expected) <= 3, "{counts:?}");
    }
    let error = open(&[Share { cluster_id: 7, share: 1.0, expert: 0 }]).err().unwrap();
    assert!(error.message().contains("cluster 7"), "{error}");
    assert!(open(&[Share { cluster_id: 10, share: 0.0, expert: 0 }]).is_err());
}

#[test]
fn trunk_and_decay_of_the_same_mixture_are_one_whole_run() {
    let folder = tempfile::tempdir().unwrap();
    write_cluster_shards(&folder.path().join("shards"), 3);
    let base = plan(folder.path(), "whole");
    let recipe = Recipe { schedule: Schedule::Wsd, ..base.recipe.clone() };
    let whole = PretrainPlan { recipe, mixture: Some(shares(false)), ..base };
    let trunk = PretrainPlan { part: Part::Trunk, out: folder.path().join("trunk"), ..whole.clone() };
    let run = |plan: &PretrainPlan| pretrain(plan, &device(), &Silent, &Interrupt::default()).unwrap();
    let (all, first) = (run(&whole), run(&trunk));
    let part = Part::Decay(first.checkpoint.clone());
    let decay = PretrainPlan { part, out: folder.path().join("decay"), ..whole.clone() };
    let second = run(&decay);
    assert_eq!((all.steps, first.steps, second.steps), (30, 24, 6));
    assert_eq!(second.tokens, 6 * 4 * CONTEXT as u64);
    // The text of the decay begins anew, so the weights differ; the rate goes on where it was.
    let rates = |plan: &PretrainPlan| -> Vec<f64> {
        let log = fs::read_to_string(plan.out.join("log.jsonl")).unwrap();
        log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["learning_rate"].as_f64().unwrap()).collect()
    };
    assert_eq!([rates(&trunk), rates(&decay)].concat(), rates(&whole));
    let cosine = PretrainPlan { recipe: Recipe { schedule: Schedule::Cosine, ..trunk.recipe.clone() }, ..trunk };
    let error = pretrain(&cosine, &device(), &Silent, &Interrupt::default()).unwrap_err();
    assert!(error.message().contains("wsd"), "{error}");
}

#[test]
fn networks_that_do_not_fit_their_shards_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_cluster_shards(&folder.path().join("shards"), 3);
    let plan = network_plan(folder.path(), "out");
    let refused = |plan: &PretrainPlan| pretrain(plan, &device(), &Silent, &Interrupt::default()).unwrap_err().to_string();
    let fewer = Config { projection: Some(Projection::new(2)), ..plan.model.clone() };
    let error = refused(&PretrainPlan { model: fewer, ..plan.clone() });
    assert!(error.contains("expert 2, and the model has 2"), "{error}");
    let error = refused(&PretrainPlan { mixture: None, ..plan.clone() });
    assert!(error.contains("by cluster"), "{error}");
    let none = Config { projection: Some(Projection::new(0)), ..plan.model.clone() };
    assert!(refused(&PretrainPlan { model: none, ..plan }).contains("0 experts"));
}
