//! Low-rank adapters: gradients, starts, merging, and fine-tuning through them.

use candle_core::Device;
use trommel_core::progress::{Interrupt, Silent};
use trommel_kernels::panels::Precision;
use trommel_trainer::checkpoint;
use trommel_trainer::engine::Engine;
use trommel_trainer::finetune::{FinetunePlan, Start, finetune};
use trommel_trainer::mixture::Share;
use trommel_trainer::model::{Activation, Adapters, Config};
use trommel_trainer::parameters::Layout;
use trommel_trainer::pretrain::{PretrainPlan, pretrain};
use trommel_trainer::projected::project;
use trommel_trainer::recipe::Recipe;
use trommel_trainer::tape::Tape;

use crate::fixtures::{CONTEXT, batch, device, off_start, plan, tiny, write_cluster_shards, write_shards};
use crate::specialise::finetune_plan;

fn adapters(experts: usize, frozen: bool) -> Adapters {
    let targets = ["q_proj", "o_proj", "up_proj", "down_proj"].map(str::to_owned).into();
    Adapters { experts, rank: 3, alpha: 4.0, targets, frozen }
}

fn adapted(activation: Activation, adapters: Adapters) -> Config {
    Config { adapters: Some(adapters), ..tiny(activation) }
}

fn engine(config: &Config, parameters: &[f32]) -> Engine {
    Engine::new(config, parameters.to_vec(), &device(), Precision::F32).unwrap()
}

#[test]
fn losses_gradients_and_steps_equal_the_tape() {
    for (activation, frozen) in [(Activation::SwiGlu, true), (Activation::SwiGlu, false), (Activation::Gelu, false)] {
        let config = adapted(activation, adapters(2, frozen));
        let layout = Layout::new(&config);
        assert_eq!(layout.len(), config.parameters());
        let start = off_start(&config);
        let mut engine = engine(&config, &start);
        let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::F32).unwrap();
        // Expert 1 comes twice.
        for (expert, sequences, time) in [(1, 2, 7), (0, 1, 12), (1, 3, 5)] {
            let batch = batch(sequences, time, expert);
            engine.select_expert(expert).unwrap();
            tape.select_expert(expert);
            let losses = tape.losses_and_gradient(&batch, 0.1).unwrap().to_vec1::<f32>().unwrap();
            engine.accumulate(&batch, 0.1).unwrap();
            let sum = engine.take_losses().unwrap();
            let expected: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
            assert!((sum / expected - 1.0).abs() < 1e-5);
        }
        let norm = engine.gradient_norm().unwrap();
        assert!((norm / tape.gradient_norm().unwrap() - 1.0).abs() < 1e-5);
        let (gradient, expected) = (engine.gradient().unwrap(), tape.gradient().unwrap());
        for slot in layout.slots() {
            let (got, expected) = (&gradient[slot.range.clone()], &expected[slot.range.clone()]);
            let size = expected.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
            assert_eq!(size > 1e-6, !frozen || slot.name.contains("lora"), "{}", slot.name);
            assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-4 * size), "{}", slot.name);
        }
        engine.step(&Recipe::pretraining(&config, 1000), 0, 1e-3, norm).unwrap();
        let moved = engine.parameters().unwrap();
        for slot in layout.slots() {
            let same = moved[slot.range.clone()] == start[slot.range.clone()];
            assert_eq!(same, frozen && !slot.name.contains("lora"), "{}", slot.name);
        }
    }
}

#[test]
fn the_start_is_the_model_and_merging_is_what_ran() {
    let config = adapted(Activation::SwiGlu, adapters(2, false));
    let (start, plain) = (Layout::new(&config).initial(3), Layout::new(&config.plain()).initial(3));
    let batch = batch(2, 9, 4);
    let mut plain_engine = engine(&config.plain(), &plain);
    let (got, expected) = (engine(&config, &start).losses(&batch).unwrap(), plain_engine.losses(&batch).unwrap());
    // A GPU runs adapters on the tape, which rounds elsewhere.
    if device().is_cpu() {
        assert_eq!(got, expected);
    }
    assert!(got.iter().zip(&expected).all(|(got, expected)| (got - expected).abs() <= 1e-6 * expected), "{got:?} {expected:?}");

    let trained = off_start(&config);
    for expert in 0..2 {
        let mut network = engine(&config, &trained);
        network.select_expert(expert).unwrap();
        let shares = [f64::from(u8::from(expert == 0)), f64::from(u8::from(expert == 1))];
        let merged = project(&config, &trained, &shares).unwrap();
        assert_eq!(network.losses(&batch).unwrap(), engine(&config.plain(), &merged).losses(&batch).unwrap());
    }
    // A mixture of adapters is linear.
    let of = |shares: [f64; 2]| project(&config, &trained, &shares).unwrap();
    let (one, two, mixed) = (of([1.0, 0.0]), of([0.0, 1.0]), of([0.25, 0.75]));
    assert!(mixed.iter().zip(one.iter().zip(&two)).all(|(m, (a, b))| (m - 0.25 * a - 0.75 * b).abs() < 1e-5));
}

#[test]
fn fine_tuning_through_adapters_ends_in_a_plain_model() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(&folder.path().join("shards"));
    let interrupt = Interrupt::default();
    let pretrained = pretrain(&plan(folder.path(), "pretrained"), &device(), &Silent, &interrupt).unwrap();
    let whole = finetune_plan(folder.path(), Start::Checkpoint(pretrained.checkpoint.clone()), "adapted");
    let plan = FinetunePlan { adapters: Some(adapters(1, true)), ..whole };
    let report = finetune(&plan, &device(), &Silent, &interrupt).unwrap();
    assert!(report.best_step > 0 && report.loss_after < report.loss_before - 0.05, "{report:?}");
    let [before, after] = [&pretrained.checkpoint, &report.checkpoint].map(|path| checkpoint::read_model(path).unwrap());
    assert_eq!(after.config, before.config);
    for slot in Layout::new(&after.config).slots() {
        let same = before.parameters[slot.range.clone()] == after.parameters[slot.range.clone()];
        let target = ["q_proj", "o_proj", "up_proj", "down_proj"].iter().any(|name| slot.name.contains(name));
        assert_eq!(same, !target, "{}", slot.name);
    }
    assert!(finetune(&plan, &device(), &Silent, &interrupt).unwrap().cached);

    let refused = |adapters: Adapters| {
        let plan = FinetunePlan { adapters: Some(adapters), out: folder.path().join("refused"), ..plan.clone() };
        finetune(&plan, &device(), &Silent, &interrupt).unwrap_err().to_string()
    };
    let error = refused(Adapters { targets: vec!["x_proj".into()], ..adapters(1, true) });
    assert!(error.contains("no matrix `x_proj`") && error.contains("down_proj"), "{error}");
    assert!(refused(Adapters { rank: 0, ..adapters(1, true) }).contains("rank 0"));
    assert!(!folder.path().join("refused").exists());
}

#[test]
fn adapters_of_clusters_train_beside_their_model() {
    let folder = tempfile::tempdir().unwrap();
    write_cluster_shards(&folder.path().join("shards"), 3);
    let base = plan(folder.path(), "network");
    let model = Config { adapters: Some(Adapters::of_experts(3, &base.model)), ..base.model.clone() };
    let share = |i: usize| Share { cluster_id: i as u32 * 10, share: 1.0, expert: i };
    let plan = PretrainPlan { model, mixture: Some((0..3).map(share).collect()), ..base };
    let report = pretrain(&plan, &device(), &Silent, &Interrupt::default()).unwrap();
    let network = checkpoint::read_model(&report.checkpoint).unwrap();
    assert_eq!(network.config, plan.model);
    assert!(report.loss < 3.0, "{report:?}");
    assert_eq!(plan.context, CONTEXT);
}
