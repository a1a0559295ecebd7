//! Gradients of the whole model against the tape and finite differences, and what the mask hides.

use candle_core::Device;
use trommel_kernels::panels::Precision;
use trommel_trainer::engine::{Engine, Teacher};
use trommel_trainer::model::{Activation, Config};
use trommel_trainer::parameters::Layout;
use trommel_trainer::recipe::Recipe;
use trommel_trainer::tape::Tape;

use crate::fixtures::{batch, close, device, factors, noise, tiny};

/// Weights large enough that every part of the model matters.
fn parameters(config: &Config) -> Vec<f32> {
    Layout::new(config).initial(3).iter().map(|p| p * 2.0).collect()
}

fn engine(config: &Config) -> Engine {
    Engine::new(config, parameters(config), &device(), Precision::F32).unwrap()
}

#[test]
fn losses_logits_and_gradients_equal_the_tape() {
    for activation in [Activation::SwiGlu, Activation::Gelu] {
        // Long enough for a second and a third of the blocks in which positions are taken.
        let config = Config { context: 160, ..tiny(activation) };
        let mut engine = engine(&config);
        let mut tape = Tape::new(&config, &parameters(&config), &Device::Cpu, Precision::F32).unwrap();
        for (sequences, time) in [(1, 1), (3, 7), (2, 32), (2, 133)] {
            let batch = batch(sequences, time, 2);
            let losses = tape.losses_and_gradient(&batch, 0.1).unwrap().to_vec1::<f32>().unwrap();
            close(&engine.losses(&batch).unwrap(), &losses, 1e-5, "losses");
            close(&engine.logits(&batch).unwrap(), &tape.logits(&batch).unwrap(), 1e-5, "logits");
            engine.accumulate(&batch, 0.1).unwrap();
            let sum = engine.take_losses().unwrap();
            let expected: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
            assert!((sum / expected - 1.0).abs() < 1e-5);
        }
        // Both have added up four batches by now.
        let (gradient, expected) = (engine.gradient().unwrap(), tape.gradient().unwrap());
        for slot in Layout::new(&config).slots() {
            close(&gradient[slot.range.clone()], &expected[slot.range.clone()], 1e-4, &slot.name);
        }
        assert!((engine.gradient_norm().unwrap() / tape.gradient_norm().unwrap() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn bf16_is_as_near_to_f32_as_the_tape_in_bf16() {
    for activation in [Activation::SwiGlu, Activation::Gelu] {
        let config = Config { context: 160, ..tiny(activation) };
        let mut exact = engine(&config);
        let mut rounded = Engine::new(&config, parameters(&config), &Device::Cpu, Precision::Bf16).unwrap();
        let mut tape = Tape::new(&config, &parameters(&config), &Device::Cpu, Precision::Bf16).unwrap();
        let (mut losses, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for first in 0..8 {
            let batch = batch(2, 133, first);
            losses.extend(exact.losses(&batch).unwrap());
            ours.extend(rounded.losses(&batch).unwrap());
            theirs.extend(tape.losses_and_gradient(&batch, 1.0).unwrap().to_vec1::<f32>().unwrap());
            exact.accumulate(&batch, 1.0).unwrap();
            rounded.accumulate(&batch, 1.0).unwrap();
        }
        let gradient = exact.gradient().unwrap();
        for (what, [ours, theirs]) in [
            ("losses", [ours, theirs].map(|each| noise(&each, &losses))),
            ("gradient", [rounded.gradient().unwrap(), tape.gradient().unwrap()].map(|each| noise(&each, &gradient))),
        ] {
            // Both round the same rows. Batches by themselves differ more, in both directions.
            assert!(ours > 0.0 && ours < 1.1 * theirs, "{activation:?}, {what}: {ours} {theirs}");
        }
    }
}

#[test]
fn steps_equal_the_tape() {
    let config = tiny(Activation::SwiGlu);
    let recipe = Recipe { clip: 0.5, ..Recipe::pretraining(&config, 1000) };
    let (mut engine, mut tape) =
        (engine(&config), Tape::new(&config, &parameters(&config), &Device::Cpu, Precision::F32).unwrap());
    let mut on_tape = engine.parameters().unwrap();
    for step in 0..3 {
        let batch = batch(2, 9, step);
        engine.accumulate(&batch, 0.1).unwrap();
        let norm = engine.gradient_norm().unwrap();
        engine.step(&recipe, step as u64, 1e-3, norm).unwrap();

        tape.losses_and_gradient(&batch, 0.1).unwrap();
        let norm = tape.gradient_norm().unwrap();
        tape.step(factors(&recipe, step as i32, norm)).unwrap();
        tape.clear_gradient();
        on_tape = tape.parameters().unwrap();
    }
    let (got, start) = (engine.parameters().unwrap(), parameters(&config));
    let moved = got.iter().zip(&start).filter(|(a, b)| a != b).count();
    assert!(moved > got.len() / 2);
    // Where a gradient is nearly zero, Adam divides noise by noise; the mean over all numbers is a steadier measure.
    let off: f64 = got.iter().zip(&on_tape).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / got.len() as f64;
    assert!(off < 3e-6, "{off}");
}

#[test]
fn what_a_teacher_adds_equals_the_tape() {
    let config = tiny(Activation::SwiGlu);
    let larger = Config { width: 32, mlp: 56, ..tiny(Activation::Gelu) };
    let teacher = Teacher { parameters: parameters(&larger), config: larger, weight: 0.6, temperature: 2.0 };
    let mut engine = engine(&config);
    let mut tape = Tape::new(&config, &parameters(&config), &Device::Cpu, Precision::F32).unwrap();
    let batch = batch(3, 11, 2);
    let plain = engine.losses(&batch).unwrap();
    engine.learn_from(teacher.clone(), Precision::F32).unwrap();
    tape.learn_from(&teacher, Precision::F32).unwrap();
    let losses = tape.losses_and_gradient(&batch, 0.1).unwrap().to_vec1::<f32>().unwrap();
    engine.accumulate(&batch, 0.1).unwrap();
    let sum = engine.take_losses().unwrap();
    let expected: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
    assert!((sum / expected - 1.0).abs() < 1e-5, "{sum} {expected}");
    assert!((expected / plain.iter().map(|loss| f64::from(*loss)).sum::<f64>() - 1.0).abs() > 0.05);
    let (gradient, expected) = (engine.gradient().unwrap(), tape.gradient().unwrap());
    for slot in Layout::new(&config).slots() {
        close(&gradient[slot.range.clone()], &expected[slot.range.clone()], 1e-4, &slot.name);
    }
    // What is measured stays the loss of the targets; a GPU's tape, which knows teachers, rounds elsewhere.
    let measured = engine.losses(&batch).unwrap();
    if device().is_cpu() {
        assert_eq!(measured, plain);
    }
    close(&measured, &plain, 1e-6, "losses of the targets");
}

#[test]
fn gradients_equal_finite_differences() {
    let config = tiny(Activation::Gelu);
    let batch = batch(2, 11, 5);
    let mut engine = engine(&config);
    engine.accumulate(&batch, 1.0).unwrap();
    let (gradient, start) = (engine.gradient().unwrap(), parameters(&config));
    let loss = |i: usize, change: f32| {
        let mut parameters = start.clone();
        parameters[i] += change;
        let mut engine = Engine::new(&config, parameters, &Device::Cpu, Precision::F32).unwrap();
        engine.losses(&batch).unwrap().iter().map(|loss| f64::from(*loss)).sum::<f64>()
    };
    for slot in Layout::new(&config).slots() {
        let i = slot.range.start + slot.range.len() / 3;
        let slope = (loss(i, 1e-2) - loss(i, -1e-2)) / 2e-2;
        assert!(
            (slope - f64::from(gradient[i])).abs() < 2e-2 * slope.abs().max(1.0),
            "{}: {} for {slope}",
            slot.name,
            gradient[i]
        );
    }
}

#[test]
fn a_document_does_not_see_its_neighbour() {
    let config = tiny(Activation::SwiGlu);
    let mut engine = engine(&config);
    let second = [0, 9, 8, 7, 6, 5];
    let mut with_neighbour = |neighbour: [u32; 5]| {
        let mut batch = trommel_trainer::batch::Batch::new(11);
        let stream: Vec<u32> = neighbour.into_iter().chain(second).chain([0]).collect();
        batch.push(0, &stream[..11], 0);
        engine.losses(&batch).unwrap()[6..].to_vec()
    };
    assert_eq!(with_neighbour([1, 2, 3, 4, 5]), with_neighbour([20, 21, 22, 23, 24]));
}

#[test]
fn later_tokens_do_not_change_earlier_losses() {
    let config = tiny(Activation::SwiGlu);
    let mut engine = engine(&config);
    let mut batch = batch(1, 20, 0);
    let before = engine.losses(&batch).unwrap();
    batch.tokens[15] = 29;
    let after = engine.losses(&batch).unwrap();
    assert_eq!(before[..15], after[..15]);
    assert_ne!(before[15..], after[15..]);
}

#[test]
fn one_thread_and_two_threads_agree_to_the_bit() {
    let config = Config { vocab: 700, ..tiny(Activation::SwiGlu) };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut engine = engine(&config);
            let batch = batch(13, 31, 0);
            let recipe = Recipe::pretraining(&config, 1000);
            let mut losses = Vec::new();
            for step in 0..3 {
                engine.accumulate(&batch, 0.01).unwrap();
                losses.push(engine.take_losses().unwrap());
                let norm = engine.gradient_norm().unwrap();
                engine.step(&recipe, step, 1e-2, norm).unwrap();
            }
            (losses, engine.parameters().unwrap())
        })
    };
    let (one, two, three) = (run(1), run(2), run(3));
    assert!(one == two && two == three);
}
