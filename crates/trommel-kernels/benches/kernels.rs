//! Speed of each kernel: `cargo bench -p trommel-kernels`, with a part of a name behind `--` to choose.
//!
//! Products print operations per second (`Gelem/s` are GFLOP/s; a multiply-add is two), on one thread where the kernel runs
//! on the calling thread; passes over memory print the numbers that they handle. Sizes are those of `slm-9m`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use trommel_kernels::adamw::{self, Factors};
use trommel_kernels::attention::{self, Shape};
use trommel_kernels::cross_entropy::{self, Output};
use trommel_kernels::matmul::{Matrix, MatrixMut, Target};
use trommel_kernels::nearest::{Centroids, FirstLook};
use trommel_kernels::panels::{Panels, Precision};
use trommel_kernels::rows::Rows;

const BOTH: [(&str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];

/// Reproducible numbers in [-1, 1).
fn numbers(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Rows of a sequence with a weight: the product that most of a training step consists of.
fn products(criterion: &mut Criterion) {
    let (rows, depth, columns) = (256, 256, 2176);
    let (x, weight, mut out) = (numbers(rows * depth), numbers(depth * columns), vec![0.0; rows * columns]);
    let mut group = criterion.benchmark_group("panels");
    for (name, precision) in BOTH {
        group.throughput(Throughput::Elements(2 * (rows * depth * columns) as u64));
        let (mut panels, mut left) = (Panels::new(precision), Rows::new(precision));
        panels.pack_here(Matrix::new(&weight, depth, columns));
        left.pack(Matrix::new(&x, rows, depth));
        group.bench_function(format!("multiply/{name}"), |bencher| {
            let x = Matrix::new(&x, rows, depth);
            bencher.iter(|| panels.multiply(MatrixMut::new(black_box(&mut out), rows, columns), Target::Overwrite, x));
        });
        group.bench_function(format!("multiply_rows/{name}"), |bencher| {
            bencher.iter(|| {
                let out = MatrixMut::new(black_box(&mut out), rows, columns);
                panels.multiply_rows(out, Target::Overwrite, &left, 0);
            });
        });
        // One panel and a left operand that the first cache holds: what the tile itself reaches.
        let mut panel = Panels::new(precision);
        panel.pack_here(Matrix::new(&weight, depth / 4, 64));
        let mut small = Rows::new(precision);
        small.pack(Matrix::new(&x, 24, depth / 4));
        group.throughput(Throughput::Elements(2 * (24 * depth / 4 * 64) as u64));
        group.bench_function(format!("few rows/{name}"), |bencher| {
            bencher.iter(|| {
                let out = MatrixMut::new(black_box(&mut out[..24 * 64]), 24, 64);
                panel.multiply_rows(out, Target::Overwrite, &small, 0);
            });
        });
    }
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let shape = Shape { time: 256, heads: 8, head: 32 };
    let width = shape.heads * shape.head;
    let (qkv, out_gradient) = (numbers(shape.time * 3 * width), numbers(shape.time * width));
    let starts = vec![0; shape.time];
    let (mut out, mut log_sums) = (vec![0.0; shape.time * width], vec![0.0; shape.time * shape.heads]);
    let (mut gradient, mut scratch) = (vec![0.0; qkv.len()], attention::Scratch::default());
    // Two operations for each number of a head, of each query and each key that it sees.
    let product = (shape.heads * shape.head * shape.time * (shape.time + 1)) as u64;
    let mut group = criterion.benchmark_group("attention");
    for (name, precision) in BOTH {
        let (mut rows, mut out_rows) = (Rows::new(precision), Rows::new(precision));
        rows.pack(Matrix::new(&qkv, shape.time, 3 * width));
        group.throughput(Throughput::Elements(2 * product));
        group.bench_function(format!("forward/{name}"), |bencher| {
            bencher.iter(|| attention::forward(shape, &rows, &starts, black_box(&mut out), &mut log_sums, &mut scratch));
        });
        out_rows.pack(Matrix::new(&out, shape.time, width));
        group.throughput(Throughput::Elements(5 * product));
        group.bench_function(format!("backward/{name}"), |bencher| {
            bencher.iter(|| {
                let gradient = black_box(&mut gradient);
                attention::backward(shape, &rows, &starts, &out_rows, &log_sums, &out_gradient, gradient, &mut scratch);
            });
        });
    }
    group.finish();
}

/// On all threads.
fn cross_entropy(criterion: &mut Criterion) {
    let (rows, width, vocab) = (512, 256, 8192);
    let (hidden, embedding) = (numbers(rows * width), numbers(vocab * width));
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 13 % vocab as u32).collect();
    let output = Output { hidden: &hidden, embedding: &embedding, width, targets: &targets };
    let (mut losses, mut gradient) = (vec![0.0; rows], vec![0.0; hidden.len()]);
    let mut embedding_gradient = vec![0.0; embedding.len()];
    let mut group = criterion.benchmark_group("cross entropy");
    group.throughput(Throughput::Elements(6 * (rows * width * vocab) as u64));
    for (name, precision) in BOTH {
        let mut scratch = cross_entropy::Scratch::new(precision);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let gradient = black_box(&mut gradient);
                output.losses_and_gradients(None, 1.0, &mut losses, gradient, &mut embedding_gradient, &mut scratch);
            });
        });
    }
    group.finish();
}

/// On all threads.
fn nearest(criterion: &mut Criterion) {
    let (rows, count, dimensions) = (4096, 1024, 256);
    let (vectors, points) = (numbers(rows * dimensions), numbers(count * dimensions));
    let mut group = criterion.benchmark_group("nearest centroid");
    group.throughput(Throughput::Elements(2 * (rows * count * dimensions) as u64));
    for look in FirstLook::all(dimensions) {
        let centroids = Centroids::with_first_look(look, points.clone(), dimensions);
        group.bench_function(format!("{look:?}"), |bencher| bencher.iter(|| centroids.nearest(black_box(&vectors))));
    }
    group.finish();
}

/// On all threads.
fn adamw(criterion: &mut Criterion) {
    let n = 1 << 23;
    let (mut parameters, mut gradient, mut m, mut v) = (numbers(n), numbers(n), vec![0.0; n], vec![0.0; n]);
    let factors = Factors {
        learning_rate: 1e-3,
        decay: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        correction1: 0.1,
        correction2: 0.05,
        gradient_scale: 1.0,
    };
    let mut group = criterion.benchmark_group("adamw");
    group.throughput(Throughput::Elements(n as u64));
    group.bench_function("step", |bencher| {
        bencher.iter(|| adamw::step(black_box(&mut parameters), &mut gradient, &mut m, &mut v, factors));
    });
    group.bench_function("norm", |bencher| bencher.iter(|| adamw::norm(black_box(&gradient))));
    group.finish();
}

criterion_group!(kernels, products, attention, cross_entropy, nearest, adamw);
criterion_main!(kernels);
