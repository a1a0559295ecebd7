//! The passes of a GPU against the tape: on its kernels where there is a GPU, and always on their twins in plain Rust.

use candle_core::Device;
use trommel_kernels::panels::Precision;
use trommel_trainer::gpu::Gpu;
use trommel_trainer::model::{Activation, Config, Projection};
use trommel_trainer::parameters::Layout;
use trommel_trainer::recipe::Recipe;
use trommel_trainer::tape::Tape;

use crate::fixtures::{batch, close, device, factors, noise, off_start, tiny};

/// The CPU, where the twins run, and the GPU that is tested if there is one.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    devices.extend(Some(device()).filter(|device| !device.is_cpu()));
    devices
}

/// Plain models and networks of odd sizes.
fn shapes() -> Vec<Config> {
    let projection = Projection { experts: 3, expert_size: 2, capacity: 4, frozen: false };
    let mut shapes = Vec::new();
    for activation in [Activation::SwiGlu, Activation::Gelu] {
        shapes.push(tiny(activation));
        for projection in [projection, Projection::hard_mixture(3)] {
            shapes.push(Config { projection: Some(projection), ..tiny(activation) });
        }
    }
    shapes
}

#[test]
fn losses_logits_and_gradients_equal_the_tape() {
    for (device, config) in devices().iter().flat_map(|device| shapes().into_iter().map(move |config| (device, config))) {
        let start = off_start(&config);
        let mut gpu = Gpu::new(&config, &start, device, Precision::F32).unwrap();
        let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::F32).unwrap();
        gpu.prepare_experts(&[2, 1]).unwrap();
        // Expert 2 comes twice, with one between that was not announced.
        for (expert, sequences, time) in [(2, 2, 7), (0, 1, 1), (2, 3, 32)] {
            let batch = batch(sequences, time, expert);
            gpu.select_expert(expert).unwrap();
            tape.select_expert(expert);
            let losses = tape.losses_and_gradient(&batch, 0.1).unwrap().to_vec1::<f32>().unwrap();
            close(&gpu.losses(&batch).unwrap().to_vec1::<f32>().unwrap(), &losses, 1e-5, "losses");
            close(&gpu.logits(&batch).unwrap(), &tape.logits(&batch).unwrap(), 1e-5, "logits");
            let with_gradient = gpu.losses_and_gradient(&batch, 0.1).unwrap().to_vec1::<f32>().unwrap();
            close(&with_gradient, &losses, 1e-5, "losses with the gradient");
        }
        assert!((gpu.gradient_norm().unwrap() / tape.gradient_norm().unwrap() - 1.0).abs() < 1e-4);
        let (gradient, expected) = (gpu.gradient().unwrap(), tape.gradient().unwrap());
        let frozen = config.projection.is_some_and(|projection| projection.frozen);
        for slot in Layout::new(&config).slots() {
            let what = format!("{} on {device:?}", slot.name);
            let (got, expected) = (&gradient[slot.range.clone()], &expected[slot.range.clone()]);
            assert!(frozen || expected.iter().any(|g| *g != 0.0), "{what} has a gradient");
            close(got, expected, 2e-4, &what);
        }
    }
}

#[test]
fn the_experts_of_a_step_run_together() {
    for (device, config) in devices().iter().flat_map(|device| shapes().into_iter().map(move |config| (device, config))) {
        let start = off_start(&config);
        let mut gpu = Gpu::new(&config, &start, device, Precision::F32).unwrap();
        let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::F32).unwrap();
        let batches: Vec<_> = [(2, 2), (0, 1), (2, 3)].map(|(expert, sequences)| (expert, batch(sequences, 11, expert))).into();
        let mut losses = 0.0;
        for (expert, batch) in &batches {
            tape.select_expert(*expert);
            losses += tape.losses_and_gradient(batch, 0.1).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        }
        gpu.accumulate_all(&batches, 0.1).unwrap();
        close(&[gpu.take_losses().unwrap() as f32], &[losses], 1e-5, "the sum of losses");
        assert_eq!(gpu.take_losses().unwrap(), 0.0);
        let (gradient, expected) = (gpu.gradient().unwrap(), tape.gradient().unwrap());
        for slot in Layout::new(&config).slots() {
            close(&gradient[slot.range.clone()], &expected[slot.range.clone()], 2e-4, &format!("{} on {device:?}", slot.name));
        }
    }
}

#[test]
fn steps_equal_the_tape() {
    for (device, config) in devices().iter().flat_map(|device| shapes().into_iter().map(move |config| (device, config))) {
        let recipe = Recipe { clip: 0.5, ..Recipe::pretraining(&config, 1000) };
        let start = off_start(&config);
        let mut gpu = Gpu::new(&config, &start, device, Precision::F32).unwrap();
        let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::F32).unwrap();
        for step in 0..3 {
            gpu.prepare_experts(&[step, 2]).unwrap();
            for expert in [step, 2] {
                let batch = batch(2, 9, expert);
                gpu.select_expert(expert).unwrap();
                gpu.losses_and_gradient(&batch, 0.1).unwrap();
                tape.select_expert(expert);
                tape.losses_and_gradient(&batch, 0.1).unwrap();
            }
            let factors = factors(&recipe, step as i32, tape.gradient_norm().unwrap());
            gpu.step(factors).unwrap();
            tape.step(factors).unwrap();
            tape.clear_gradient();
        }
        let (got, expected) = (gpu.parameters().unwrap(), tape.parameters().unwrap());
        let moved = got.iter().zip(&start).filter(|(a, b)| a != b).count();
        assert!(moved > got.len() / 2);
        // Where a gradient is nearly zero, Adam divides noise by noise; the mean over all numbers is a steadier measure.
        let off: f64 = got.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / got.len() as f64;
        assert!(off < 5e-6, "{off} on {device:?}");
        let ([m, v], [expected_m, expected_v]) = (gpu.moments().unwrap(), tape.moments().unwrap());
        close(&m, &expected_m, 1e-3, "first moments");
        close(&v, &expected_v, 1e-3, "second moments");
    }
}

#[test]
fn rows_in_bf16_add_about_the_noise_of_the_tape() {
    for (device, config) in devices().iter().flat_map(|device| shapes().into_iter().map(move |config| (device, config))) {
        let (start, batch) = (off_start(&config), batch(3, 29, 2));
        let gpu = |precision| {
            let mut gpu = Gpu::new(&config, &start, device, precision).unwrap();
            gpu.select_expert(1).unwrap();
            let losses = gpu.losses_and_gradient(&batch, 1e-4).unwrap().to_vec1::<f32>().unwrap();
            (losses, gpu.gradient().unwrap())
        };
        let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::Bf16).unwrap();
        tape.select_expert(1);
        let tape_losses = tape.losses_and_gradient(&batch, 1e-4).unwrap().to_vec1::<f32>().unwrap();
        let ((losses, gradient), (rounded_losses, rounded)) = (gpu(Precision::F32), gpu(Precision::Bf16));
        for (what, rounded, tape, exact) in
            [("losses", rounded_losses, tape_losses, losses), ("gradient", rounded, tape.gradient().unwrap(), gradient)]
        {
            let (ours, theirs) = (noise(&rounded, &exact), noise(&tape, &exact));
            // The tape does not round the output layer.
            assert!(ours > 0.0 && ours < 2.0 * theirs, "{what}: {ours}, on the tape {theirs}, on {device:?}");
        }
    }
}

/// The presets' widths fill blocks of threads that the small models leave half empty.
#[test]
fn a_preset_equals_the_tape() {
    let config = trommel_trainer::model::preset("slm-1m", 1000).unwrap();
    let start = Layout::new(&config).initial(5);
    let batch = batch(2, 300, 0);
    let mut tape = Tape::new(&config, &start, &Device::Cpu, Precision::F32).unwrap();
    let losses = tape.losses_and_gradient(&batch, 0.01).unwrap().to_vec1::<f32>().unwrap();
    for device in devices() {
        let mut gpu = Gpu::new(&config, &start, &device, Precision::F32).unwrap();
        close(&gpu.losses_and_gradient(&batch, 0.01).unwrap().to_vec1::<f32>().unwrap(), &losses, 1e-5, "losses");
        let off = noise(&gpu.gradient().unwrap(), &tape.gradient().unwrap());
        assert!(off < 1e-4, "{off} on {device:?}");
    }
}
