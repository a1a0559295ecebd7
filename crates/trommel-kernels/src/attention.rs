//! Causal attention within documents, for one sequence and all its heads, forward and backward.
//!
//! Queries are taken in blocks of `BLOCK`; a block meets only the keys that any of its queries may see, so neither the
//! (time, time) matrix nor the masked upper half of it is ever formed. The backward pass forms each block again from the
//! row sums that the forward pass kept. [Dao et al., arXiv 2205.14135, without the tiling over keys]
//!
//! ```text
//!   keys      0 . . . . . . . . t          starts[t] = first position of the document that t belongs to;
//!   query t   . . . s x x x x x x          t sees starts[t] ..= t
//! ```
//!
//! A sequence arrives as packed rows: `qkv` is (time, 3 * heads * head), queries first, already turned to their positions.

use crate::matmul::{Matrix, MatrixMut, Target, multiply};
use crate::vectorize::{LANES, dot, exp, fold, vectorized};

/// Queries that are handled together.
const BLOCK: usize = 64;

/// Sizes of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Positions.
    pub time: usize,
    /// Heads.
    pub heads: usize,
    /// Numbers per head.
    pub head: usize,
}

impl Shape {
    fn width(self) -> usize {
        self.heads * self.head
    }

    fn check(self, qkv: &[f32], starts: &[u32], out: &[f32], log_sums: &[f32]) {
        assert_eq!(qkv.len(), self.time * 3 * self.width());
        assert_eq!(out.len(), self.time * self.width());
        assert_eq!(log_sums.len(), self.time * self.heads);
        assert_eq!(starts.len(), self.time);
        assert!(starts.is_sorted(), "documents begin in the order of positions");
        assert!(starts.iter().enumerate().all(|(t, start)| *start as usize <= t), "a document begins after its token");
    }

    /// Query blocks as (first query, end, first key); the keys of a block end where its queries end.
    fn blocks(self, starts: &[u32]) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..self.time).step_by(BLOCK).map(move |from| (from, (from + BLOCK).min(self.time), starts[from] as usize))
    }
}

/// Memory that calls on one thread share.
#[derive(Debug, Default)]
pub struct Scratch {
    scores: Vec<f32>,          // (BLOCK, time)
    score_gradients: Vec<f32>, // (BLOCK, time)
}

impl Scratch {
    fn reserve(&mut self, time: usize) {
        for buffer in [&mut self.scores, &mut self.score_gradients] {
            if buffer.len() < BLOCK * time {
                buffer.resize(BLOCK * time, 0.0);
            }
        }
    }
}

/// Writes the heads' outputs to `out` (time, heads * head) and the logarithm of each query's sum of exponentials to
/// `log_sums` (heads, time), which the backward pass needs.
pub fn forward(shape: Shape, qkv: &[f32], starts: &[u32], out: &mut [f32], log_sums: &mut [f32], scratch: &mut Scratch) {
    shape.check(qkv, starts, out, log_sums);
    scratch.reserve(shape.time);
    let (width, head, row) = (shape.width(), shape.head, 3 * shape.width());
    let scale = 1.0 / (head as f32).sqrt();
    for (h, log_sums) in log_sums.chunks_exact_mut(shape.time).enumerate() {
        for (from, to, key) in shape.blocks(starts) {
            let (queries, keys) = (to - from, to - key);
            let scores = &mut scratch.scores[..queries * keys];
            let q = Matrix::strided(&qkv[from * row + h * head..], queries, head, row);
            let k = Matrix::strided(&qkv[key * row + width + h * head..], keys, head, row);
            let v = Matrix::strided(&qkv[key * row + 2 * width + h * head..], keys, head, row);
            multiply(MatrixMut::new(scores, queries, keys), Target::Overwrite, scale, q, k.transposed());
            softmax(scores, from, key, &starts[from..to], &mut log_sums[from..to]);
            let out = MatrixMut::strided(&mut out[from * width + h * head..], queries, head, width);
            multiply(out, Target::Overwrite, 1.0, Matrix::new(scores, queries, keys), v);
        }
    }
}

/// Writes the gradient of `qkv` to `qkv_gradient`, from what the forward pass was given and returned and the gradient
/// `out_gradient` (time, heads * head) of its output.
#[expect(clippy::too_many_arguments, reason = "the operands and results of one gradient")]
pub fn backward(
    shape: Shape,
    qkv: &[f32],
    starts: &[u32],
    out: &[f32],
    log_sums: &[f32],
    out_gradient: &[f32],
    qkv_gradient: &mut [f32],
    scratch: &mut Scratch,
) {
    shape.check(qkv, starts, out, log_sums);
    assert!(out_gradient.len() == out.len() && qkv_gradient.len() == qkv.len());
    scratch.reserve(shape.time);
    qkv_gradient.fill(0.0);
    let (width, head, row) = (shape.width(), shape.head, 3 * shape.width());
    let scale = 1.0 / (head as f32).sqrt();
    for (h, log_sums) in log_sums.chunks_exact(shape.time).enumerate() {
        for (from, to, key) in shape.blocks(starts) {
            let (queries, keys) = (to - from, to - key);
            let scores = &mut scratch.scores[..queries * keys];
            let score_gradients = &mut scratch.score_gradients[..queries * keys];
            let (q_at, k_at, v_at) = (from * row + h * head, key * row + width + h * head, key * row + 2 * width + h * head);
            let q = Matrix::strided(&qkv[q_at..], queries, head, row);
            let k = Matrix::strided(&qkv[k_at..], keys, head, row);
            let v = Matrix::strided(&qkv[v_at..], keys, head, row);
            let o_at = from * width + h * head;
            let o_gradient = Matrix::strided(&out_gradient[o_at..], queries, head, width);

            multiply(MatrixMut::new(scores, queries, keys), Target::Overwrite, scale, q, k.transposed());
            multiply(MatrixMut::new(score_gradients, queries, keys), Target::Overwrite, 1.0, o_gradient, v.transposed());
            let rows = Rows { out: &out[o_at..], out_gradient: &out_gradient[o_at..], width, head };
            softmax_backward(scores, score_gradients, from, key, &starts[from..to], &log_sums[from..to], rows);

            let (p, s) = (Matrix::new(scores, queries, keys), Matrix::new(score_gradients, queries, keys));
            multiply(MatrixMut::strided(&mut qkv_gradient[q_at..], queries, head, row), Target::Overwrite, scale, s, k);
            multiply(MatrixMut::strided(&mut qkv_gradient[k_at..], keys, head, row), Target::Add, scale, s.transposed(), q);
            multiply(
                MatrixMut::strided(&mut qkv_gradient[v_at..], keys, head, row),
                Target::Add,
                1.0,
                p.transposed(),
                o_gradient,
            );
        }
    }
}

vectorized! {
    /// Turns each row of scores into shares of one over the keys that its query sees, and zero elsewhere.
    fn softmax(scores: &mut [f32], from: usize, key: usize, starts: &[u32], log_sums: &mut [f32]) {
        let keys = scores.len() / starts.len();
        for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
            let (begin, end) = (starts[i] as usize - key, from + i + 1 - key);
            row[..begin].fill(0.0);
            row[end..].fill(0.0);
            let seen = &mut row[begin..end];
            let largest = maximum(seen);
            let sum = exp_sum(seen, largest);
            let share = 1.0 / sum;
            for score in seen {
                *score *= share;
            }
            log_sums[i] = largest + sum.ln();
        }
    }
}

/// Rows of one head's output and of its gradient, at a stride of `width`.
#[derive(Clone, Copy)]
struct Rows<'a> {
    out: &'a [f32],
    out_gradient: &'a [f32],
    width: usize,
    head: usize,
}

vectorized! {
    /// Turns scores into shares `p`, and the gradient `g` of the shares into that of the scores: `p (g - sum p g)`, where the
    /// sum equals the product of the output row and its gradient.
    fn softmax_backward(
        scores: &mut [f32],
        gradients: &mut [f32],
        from: usize,
        key: usize,
        starts: &[u32],
        log_sums: &[f32],
        rows: Rows<'_>,
    ) {
        let keys = scores.len() / starts.len();
        for (i, (scores, gradients)) in scores.chunks_exact_mut(keys).zip(gradients.chunks_exact_mut(keys)).enumerate() {
            let (begin, end) = (starts[i] as usize - key, from + i + 1 - key);
            for unseen in [0..begin, end..keys] {
                scores[unseen.clone()].fill(0.0);
                gradients[unseen].fill(0.0);
            }
            let at = i * rows.width..i * rows.width + rows.head;
            let along = dot(&rows.out[at.clone()], &rows.out_gradient[at]);
            for (score, gradient) in scores[begin..end].iter_mut().zip(&mut gradients[begin..end]) {
                let share = exp(*score - log_sums[i]);
                *score = share;
                *gradient = share * (*gradient - along);
            }
        }
    }
}

#[inline(always)]
pub(crate) fn maximum(x: &[f32]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let lanes = x.chunks_exact(LANES);
    let tail = lanes.remainder();
    for x in lanes {
        for lane in 0..LANES {
            largest[lane] = if x[lane] > largest[lane] { x[lane] } else { largest[lane] };
        }
    }
    tail.iter().chain(&largest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

/// Replaces each number by `e^(x - largest)` and returns their sum.
#[inline(always)]
pub(crate) fn exp_sum(x: &mut [f32], largest: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let mut lanes = x.chunks_exact_mut(LANES);
    for x in &mut lanes {
        for lane in 0..LANES {
            x[lane] = exp(x[lane] - largest);
            sums[lane] += x[lane];
        }
    }
    let mut sum = fold(sums);
    for x in lanes.into_remainder() {
        *x = exp(*x - largest);
        sum += *x;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers, slope};

    /// The definition, one query and one key at a time.
    fn naive(shape: Shape, qkv: &[f32], starts: &[u32]) -> Vec<f64> {
        let (width, row) = (shape.width(), 3 * shape.width());
        let mut out = vec![0.0; shape.time * width];
        for h in 0..shape.heads {
            for t in 0..shape.time {
                let seen = starts[t] as usize..t + 1;
                let product = |s: usize| -> f64 {
                    let pair =
                        |i: usize| f64::from(qkv[t * row + h * shape.head + i] * qkv[s * row + width + h * shape.head + i]);
                    ((0..shape.head).map(pair).sum::<f64>() / (shape.head as f64).sqrt()).exp()
                };
                let sum: f64 = seen.clone().map(product).sum();
                for i in 0..shape.head {
                    let value = |s: usize| product(s) / sum * f64::from(qkv[s * row + 2 * width + h * shape.head + i]);
                    out[t * width + h * shape.head + i] = seen.clone().map(value).sum();
                }
            }
        }
        out
    }

    fn documents(time: usize, borders: &[usize]) -> Vec<u32> {
        (0..time).map(|t| borders.iter().copied().filter(|b| *b <= t).max().unwrap_or(0) as u32).collect()
    }

    #[test]
    fn outputs_equal_the_definition() {
        for (time, borders) in [(1, vec![]), (7, vec![3]), (65, vec![1, 2, 40]), (150, vec![64, 100])] {
            let shape = Shape { time, heads: 2, head: 6 };
            let (qkv, starts) = (numbers(time * 36, 1), documents(time, &borders));
            let (mut out, mut log_sums) = (vec![0.0; time * 12], vec![0.0; time * 2]);
            forward(shape, &qkv, &starts, &mut out, &mut log_sums, &mut Scratch::default());
            for (got, expected) in out.iter().zip(naive(shape, &qkv, &starts)) {
                close(f64::from(*got), expected, 1e-5);
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for (time, borders) in [(1, vec![]), (5, vec![2]), (67, vec![1, 63])] {
            let shape = Shape { time, heads: 2, head: 2 };
            let (qkv, starts, weight) = (numbers(time * 12, 1), documents(time, &borders), numbers(time * 4, 2));
            let (mut out, mut log_sums, mut gradient) = (vec![0.0; time * 4], vec![0.0; time * 2], vec![7.0; time * 12]);
            let mut scratch = Scratch::default();
            forward(shape, &qkv, &starts, &mut out, &mut log_sums, &mut scratch);
            backward(shape, &qkv, &starts, &out, &log_sums, &weight, &mut gradient, &mut scratch);
            let value = |qkv: &[f32]| naive(shape, qkv, &starts).iter().zip(&weight).map(|(y, w)| y * f64::from(*w)).sum();
            for i in (0..qkv.len()).step_by(if time > 8 { 11 } else { 1 }) {
                close(f64::from(gradient[i]), slope(&qkv, i, value), 2e-3);
            }
        }
    }

    #[test]
    fn another_document_has_no_influence() {
        let shape = Shape { time: 100, heads: 1, head: 4 };
        let starts = documents(100, &[37]);
        let run = |qkv: &[f32]| {
            let (mut out, mut log_sums) = (vec![0.0; 400], vec![0.0; 100]);
            forward(shape, qkv, &starts, &mut out, &mut log_sums, &mut Scratch::default());
            out
        };
        let mut qkv = numbers(1200, 1);
        let before = run(&qkv);
        qkv[..37 * 12].fill(3.0);
        assert_eq!(run(&qkv)[37 * 4..], before[37 * 4..]);
    }
}
