//! Training speed on this machine: `cargo run --release -p trommel-trainer --example throughput -- [MODEL [CONTEXT [VOCAB
//! [f32|bf16 [TOKENS PER STEP [DEVICE [EXPERTS]]]]]]]`.
//!
//! Prints tokens per second of whole training steps on synthetic tokens, the operations per second that they amount to,
//! and, on the CPU, their share of what the same threads reach on a large product of `f32` matrices. With `EXPERTS`, a projected
//! network of so many takes the steps, each expert an equal part of every step.

#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::time::Instant;

use rayon::prelude::*;
use trommel_core::error::Result;
use trommel_kernels::matmul::{Matrix, MatrixMut, Target, multiply};
use trommel_kernels::panels::Precision;
use trommel_trainer::batch::Batch;
use trommel_trainer::engine::Engine;
use trommel_trainer::model::{Config, Projection, preset};
use trommel_trainer::parameters::Layout;
use trommel_trainer::recipe::Recipe;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "slm-3m".to_owned());
    let context: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(256);
    let vocab: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(4096);
    let precision = if arguments.next().as_deref() == Some("bf16") { Precision::Bf16 } else { Precision::F32 };
    let step_tokens: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(4096);
    let device = trommel_trainer::device::parse(&arguments.next().unwrap_or_else(|| "cpu".to_owned()))?;
    let experts: usize = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(0);
    let projection = (experts > 0).then(|| Projection::new(experts));
    let config = Config { projection, ..preset(&name, vocab)? };
    let recipe = Recipe::pretraining(&config, 1_500_000);
    let sequences = step_tokens.div_ceil(context);
    let mut engine = Engine::new(&config, Layout::new(&config).initial(1), &device, precision)?;

    let mut batch = Batch::new(context);
    for sequence in 0..sequences {
        // Documents of about 300 tokens, as windows of 1-4 KB are.
        let token =
            |i: usize| if (sequence * context + i).is_multiple_of(300) { 0 } else { (i * 7919 + sequence * 104_729) % vocab };
        batch.push(0, &(1..=context).map(|i| token(i) as u32).collect::<Vec<_>>(), 0);
    }
    let tokens = batch.tokens.len();
    let batches: Vec<_> = batch.parts(sequences.div_ceil(experts.max(1))).enumerate().collect();
    let mut steps = Vec::new();
    // Ten steps of 4,096 tokens, or as many more as they are smaller.
    for step in 0..2 + 10 * 4096u64.div_ceil(tokens as u64) {
        let start = Instant::now();
        engine.accumulate_all(&batches, 1.0 / tokens as f32)?;
        let norm = engine.gradient_norm()?;
        let loss = engine.take_losses()? / tokens as f64;
        if step == 0 {
            println!("first loss {loss:.4}");
        }
        engine.step(&recipe, step, 1e-4, norm)?;
        steps.push(start.elapsed().as_secs_f64());
    }
    // The first two steps fault in their memory.
    let mut steps = steps.split_off(2);
    steps.sort_by(f64::total_cmp);
    let (median, best) = (steps[steps.len() / 2], steps[0]);
    let flops = config.training_flops_per_token(context);
    println!(
        "{name}: {} parameters, {sequences} sequences of {context} tokens, {} at once, {} threads, {device:?}",
        config.parameters(),
        engine.micro_batch(context).min(sequences),
        rayon::current_num_threads()
    );
    let peak = device.is_cpu().then(sgemm);
    for (label, seconds) in [("median", median), ("best", best)] {
        let rate = tokens as f64 / seconds;
        let share = |peak: f64| format!(" {:5.1}% of SGEMM at {:.1}", 100.0 * rate * flops / peak, peak / 1e9);
        let share = peak.map_or_else(String::new, share);
        println!("{label:6} {rate:8.0} tokens/s {:7.1} GFLOP/s{share}", rate * flops / 1e9);
    }
    Ok(())
}

/// Operations per second of products of matrices with 1,024 rows and columns, one on each thread; the best of some rounds.
fn sgemm() -> f64 {
    const N: usize = 1024;
    let threads = rayon::current_num_threads();
    let (a, b) = (vec![0.5f32; N * N], vec![0.25f32; N * N]);
    let mut outs = vec![vec![0f32; N * N]; threads];
    let round = |outs: &mut Vec<Vec<f32>>| {
        let start = Instant::now();
        outs.par_iter_mut().for_each(|out| {
            multiply(MatrixMut::new(out, N, N), Target::Overwrite, 1.0, Matrix::new(&a, N, N), Matrix::new(&b, N, N));
        });
        (threads * 2 * N * N * N) as f64 / start.elapsed().as_secs_f64()
    };
    (0..12).map(|_| round(&mut outs)).fold(0.0, f64::max)
}
