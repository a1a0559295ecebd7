//! Weights that are mixed from a basis, and what training does to the basis. [PE 2.5]
//!
//! A weight of an expert is `W = sum_r a_r T_r`, where the basis `T` is (h, size) and the coefficients `a` belong to the
//! expert. The basis is most of a projected network, and its gradient would be as large again: `dT_r = sum_e a_(e,r) dW_e`
//! over the experts `e` of a step. It is never formed. Its norm comes from the small matrix of products of the `dW_e`, and
//! each of its numbers is made where the optimizer needs it.
//!
//! ```text
//!   per step    read T            mix            W_e for all experts
//!               read T            coefficients   da_(e,r) = <T_r, dW_e>
//!               read dW           gram           <dW_e, dW_f>, for the norm
//!               read, write T m v step           dT on the fly
//! ```

use rayon::prelude::*;

use crate::adamw::{Factors, step_chunk};
use crate::vectorize::{LANES, fold, vectorized};

/// Writes `sum_r coefficients[e][r] * basis[r]` to `out[e]` (size) for each expert `e`, for `basis` (h, size). The basis is read
/// once for all of them.
pub fn mix(basis: &[f32], coefficients: &[&[f32]], out: &mut [&mut [f32]]) {
    let Some(size) = out.first().map(|out| out.len()) else { return };
    assert!(coefficients.len() == out.len() && coefficients.iter().all(|row| basis.len() == row.len() * size));
    let mut tasks: Vec<Vec<&mut [f32]>> = (0..size.div_ceil(BLOCK)).map(|_| Vec::with_capacity(out.len())).collect();
    for out in out.iter_mut() {
        tasks.iter_mut().zip(out.chunks_mut(BLOCK)).for_each(|(task, block)| task.push(block));
    }
    tasks.into_par_iter().enumerate().for_each(|(task, blocks)| {
        for (coefficients, out) in coefficients.iter().zip(blocks) {
            out.fill(0.0);
            let at = task * BLOCK..task * BLOCK + out.len();
            for (basis, coefficient) in basis.chunks_exact(size).zip(*coefficients) {
                // A basis that no one uses yet costs nothing.
                if *coefficient != 0.0 {
                    add_scaled(out, *coefficient, &basis[at.clone()]);
                }
            }
        }
    });
}

/// The gradient of each expert's coefficients, `<basis[r], gradients[e]>` as (experts, h), for `gradients` of `size` each.
pub fn coefficient_gradients(basis: &[f32], gradients: &[&[f32]]) -> Vec<f32> {
    let Some(size) = gradients.first().map(|g| g.len()) else { return Vec::new() };
    let rows: Vec<&[f32]> = basis.chunks_exact(size).collect();
    products(gradients, &rows).into_iter().map(|product| product as f32).collect()
}

/// The products of all pairs of `gradients`, as (experts, experts).
pub fn gram(gradients: &[&[f32]]) -> Vec<f64> {
    products(gradients, gradients)
}

/// The squared norm of the basis' gradient: `sum_r sum_(e,f) a_(e,r) a_(f,r) <dW_e, dW_f>`.
pub fn squared_norm(coefficients: &[&[f32]], gram: &[f64]) -> f64 {
    let n = coefficients.len();
    let mut sum = 0.0;
    for e in 0..n {
        for f in 0..n {
            let along: f64 = coefficients[e].iter().zip(coefficients[f]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            sum += along * gram[e * n + f];
        }
    }
    // Rounding may leave a sum of squares a little below zero.
    sum.max(0.0)
}

/// One step of `AdamW` on the basis (h, size) and its moments, with the gradient `sum_e coefficients[e][r] * gradients[e]` and the
/// factors of each `r`. The gradients are read once for the whole basis.
pub fn step(
    basis: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    coefficients: &[&[f32]],
    gradients: &[&[f32]],
    factors: impl Fn(usize) -> Factors + Sync,
) {
    let Some(size) = gradients.first().map(|g| g.len()) else { return };
    assert!(basis.len() == m.len() && basis.len() == v.len() && basis.len().is_multiple_of(size));
    let rows = basis.chunks_exact_mut(size).zip(m.chunks_exact_mut(size)).zip(v.chunks_exact_mut(size));
    let mut tasks: Vec<Vec<_>> = (0..size.div_ceil(BLOCK)).map(|_| Vec::with_capacity(rows.len())).collect();
    for ((basis, m), v) in rows {
        let blocks = basis.chunks_mut(BLOCK).zip(m.chunks_mut(BLOCK)).zip(v.chunks_mut(BLOCK));
        tasks.iter_mut().zip(blocks).for_each(|(task, block)| task.push(block));
    }
    tasks.into_par_iter().enumerate().for_each(|(task, rows)| {
        let mut gradient = [0.0; BLOCK];
        for (r, ((basis, m), v)) in rows.into_iter().enumerate() {
            let gradient = &mut gradient[..basis.len()];
            gradient.fill(0.0);
            let at = task * BLOCK..task * BLOCK + basis.len();
            for (coefficients, from) in coefficients.iter().zip(gradients) {
                if coefficients[r] != 0.0 {
                    add_scaled(gradient, coefficients[r], &from[at.clone()]);
                }
            }
            step_chunk(basis, gradient, m, v, factors(r));
        }
    });
}

/// Numbers of each vector that are worked on at once: those of all vectors stay in the second cache.
const BLOCK: usize = 2048;
/// Blocks whose products one task sums.
const TASK_BLOCKS: usize = 16;

/// The product of each vector of `left` with each of `right`, as (left, right). Every vector is read once: sums are `f32` within
/// a block and `f64` over blocks, in a fixed order.
fn products(left: &[&[f32]], right: &[&[f32]]) -> Vec<f64> {
    let Some(size) = left.first().map(|vector| vector.len()) else { return Vec::new() };
    let sums_of = |task: usize| {
        let mut sums = vec![0.0; left.len() * right.len()];
        let end = ((task + 1) * TASK_BLOCKS * BLOCK).min(size);
        for first in (task * TASK_BLOCKS * BLOCK..end).step_by(BLOCK) {
            let at = first..end.min(first + BLOCK);
            for (left, sums) in left.iter().zip(sums.chunks_exact_mut(right.len())) {
                for (right, sums) in right.chunks(4).zip(sums.chunks_mut(4)) {
                    let four = std::array::from_fn(|i| &right[i.min(right.len() - 1)][at.clone()]);
                    let found = dots(&left[at.clone()], four);
                    sums.iter_mut().zip(found).for_each(|(sum, product)| *sum += f64::from(product));
                }
            }
        }
        sums
    };
    let tasks = (0..size.div_ceil(TASK_BLOCKS * BLOCK)).into_par_iter().map(sums_of);
    let mut total = vec![0.0; left.len() * right.len()];
    for sums in tasks.collect::<Vec<_>>() {
        total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    total
}

vectorized! {
    /// The products of one vector with four.
    fn dots(a: &[f32], b: [&[f32]; 4]) -> [f32; 4] {
        let whole = a.len() / LANES * LANES;
        let mut sums = [[0f32; LANES]; 4];
        for at in (0..whole).step_by(LANES) {
            let a = &a[at..at + LANES];
            for (sums, b) in sums.iter_mut().zip(b) {
                let b = &b[at..at + LANES];
                for lane in 0..LANES {
                    sums[lane] += a[lane] * b[lane];
                }
            }
        }
        let mut products = sums.map(fold);
        for (product, b) in products.iter_mut().zip(b) {
            *product += a[whole..].iter().zip(&b[whole..]).map(|(x, y)| x * y).sum::<f32>();
        }
        products
    }
}

vectorized! {
    fn add_scaled(out: &mut [f32], scale: f32, x: &[f32]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += scale * x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adamw;
    use crate::probe::{close, numbers};

    #[test]
    fn everything_equals_the_explicit_gradient_of_the_basis() {
        // More than one block, and an odd tail.
        let (size, capacity, experts) = (BLOCK + 5, 3, 2);
        let basis = numbers(capacity * size, 1);
        let coefficients = [numbers(capacity, 2), vec![0.0, 0.5, -2.0]];
        let gradients = [numbers(size, 3), numbers(size, 4)];
        let coefficients: Vec<&[f32]> = coefficients.iter().map(Vec::as_slice).collect();
        let gradients: Vec<&[f32]> = gradients.iter().map(Vec::as_slice).collect();

        let mut mixed = [vec![7.0; size], vec![7.0; size]];
        let [first, second] = &mut mixed;
        mix(&basis, &coefficients, &mut [first, second]);
        for (mixed, coefficients) in mixed.iter().zip(&coefficients) {
            for i in (0..size).step_by(311).chain([size - 1]) {
                let expected: f64 = (0..capacity).map(|r| f64::from(coefficients[r]) * f64::from(basis[r * size + i])).sum();
                close(f64::from(mixed[i]), expected, 1e-6);
            }
        }

        let mut explicit: Vec<f32> = (0..capacity * size)
            .map(|i| (0..experts).map(|e| coefficients[e][i / size] * gradients[e][i % size]).sum())
            .collect();
        let norm = squared_norm(&coefficients, &gram(&gradients)).sqrt();
        assert!((norm / adamw::norm(&explicit) - 1.0).abs() < 1e-6);

        let found = coefficient_gradients(&basis, &gradients);
        for e in 0..experts {
            for r in 0..capacity {
                let row = &basis[r * size..(r + 1) * size];
                let expected: f64 = row.iter().zip(gradients[e]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                close(f64::from(found[e * capacity + r]), expected, 1e-5);
            }
        }

        let factors = Factors {
            learning_rate: 0.01,
            decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            correction1: 0.1,
            correction2: 0.05,
            gradient_scale: 0.5,
        };
        let start = || (basis.clone(), vec![0.1; basis.len()], vec![0.2; basis.len()]);
        let (mut p, mut m, mut v) = start();
        step(&mut p, &mut m, &mut v, &coefficients, &gradients, |_| factors);
        let (mut p2, mut m2, mut v2) = start();
        adamw::step(&mut p2, &mut explicit, &mut m2, &mut v2, factors);
        assert!(p == p2 && m == m2 && v == v2);
    }

    #[test]
    fn no_experts_change_nothing() {
        assert_eq!(coefficient_gradients(&[1.0], &[]), Vec::<f32>::new());
        assert_eq!(squared_norm(&[], &gram(&[])), 0.0);
    }
}
