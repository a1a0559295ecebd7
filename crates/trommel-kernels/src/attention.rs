//! Attention for one sequence and all its heads: causal and within documents, forward and backward, and without a mask, forward.
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
//! A block's scores lie as (keys, queries): the queries side by side in the lanes of registers, so that largest scores and
//! sums need nothing across lanes. In this form the shares are at once the panel of one product and the left operand of the
//! others:
//!
//! ```text
//!   scores  = K Q'      O  = shares' V                        ' is transposed; dX is the gradient of X,
//!   dshares = V dO'     dQ = dscores' K                       and `shares` are divided by their sums
//!   dV = shares dO      dK = dscores Q                        in O only, after the product
//! ```
//!
//! All products are in the precision of the rows that the caller hands in; scores, like every sum, are `f32`.
//!
//! A sequence arrives as packed rows: `qkv` is (time, 3 * heads * head), queries first, already turned to their positions. A
//! head has an even count of numbers.

use std::ops::Range;

use crate::lines::Lines;
use crate::matmul::{Matrix, MatrixMut, Target};
use crate::panels::{Panels, Precision};
use crate::rows::Rows;
use crate::vectorize::{LANES, dot, exp, fold, vectorized};

/// Queries that are handled together: the columns of one panel.
const BLOCK: usize = 64;
/// Registers that hold one number for each of them.
const PARTS: usize = BLOCK / LANES;

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

    /// What scores are multiplied with.
    fn scale(self) -> f32 {
        1.0 / (self.head as f32).sqrt()
    }

    fn check(self, qkv: &Rows, out: &[f32], log_sums: &[f32]) {
        assert_eq!((qkv.rows, qkv.columns), (self.time, 3 * self.width()));
        assert_eq!(out.len(), self.time * self.width());
        assert_eq!(log_sums.len(), self.time * self.heads);
    }

    /// What the queries see that see their own document up to themselves.
    fn causal_blocks(self, starts: &[u32]) -> Vec<Block> {
        assert_eq!(starts.len(), self.time);
        assert!(starts.is_sorted(), "documents begin in the order of positions");
        assert!(starts.iter().enumerate().all(|(t, start)| *start as usize <= t), "a document begins after its token");
        (0..self.time).step_by(BLOCK).map(|from| Block::causal(from, starts)).collect()
    }

    /// The columns of the queries, keys and values of head `h`.
    fn columns(self, h: usize) -> [Range<usize>; 3] {
        [0, 1, 2].map(|part| {
            let from = part * self.width() + h * self.head;
            from..from + self.head
        })
    }
}

/// Some queries, and what they see.
struct Block {
    /// The first query.
    from: usize,
    queries: usize,
    /// What any of them sees; the first one is even.
    keys: Range<usize>,
    parts: [Seen; PARTS],
}

/// The keys that each of 16 queries sees, counted from the first key of the block: `key` is seen if `key - first < count`,
/// without a sign.
#[derive(Clone, Copy, Default)]
struct Seen {
    first: [u32; LANES],
    count: [u32; LANES], // 0 for the lanes after the last query
}

impl Seen {
    /// The keys that any of the queries may see.
    fn keys(&self) -> Range<usize> {
        let ends = self.first.iter().zip(&self.count).map(|(first, count)| first + count);
        let end = ends.max().unwrap_or(0);
        self.first[0].min(end) as usize..end as usize
    }
}

impl Block {
    fn causal(from: usize, starts: &[u32]) -> Block {
        let queries = BLOCK.min(starts.len() - from);
        let first = starts[from] as usize & !1;
        let seen = |lane: usize| {
            let start = starts[from + lane];
            (start - first as u32, (from + lane + 1) as u32 - start)
        };
        Block { from, queries, keys: first..from + queries, parts: parts(queries, seen) }
    }

    fn unmasked(from: usize, time: usize) -> Block {
        let queries = BLOCK.min(time - from);
        Block { from, queries, keys: 0..time, parts: parts(queries, |_| (0, time as u32)) }
    }
}

/// What the `queries` lanes see, from the first key and the count of each.
fn parts(queries: usize, seen: impl Fn(usize) -> (u32, u32)) -> [Seen; PARTS] {
    let mut parts = [Seen::default(); PARTS];
    for lane in 0..queries {
        let part = &mut parts[lane / LANES];
        (part.first[lane % LANES], part.count[lane % LANES]) = seen(lane);
    }
    parts
}

/// Memory that calls on one thread share.
#[derive(Debug)]
pub struct Scratch {
    precision: Precision,
    key_panels: Panels,          // (time, head)
    value_panels: Panels,        // (time, head)
    query_panels: Panels,        // (time, head)
    gradient_panels: Panels,     // (time, head)
    queries: Panels,             // (head, BLOCK)
    gradients: Panels,           // (head, BLOCK)
    shares: Panels,              // (keys, BLOCK)
    share_rows: Rows,            // (keys, BLOCK)
    out_row: Lines<f32>,         // (heads * head)
    out_dots: Lines<f32>,        // (heads, time), see `out_dots`
    scores: Lines<f32>,          // (time, BLOCK)
    score_gradients: Lines<f32>, // (time, BLOCK)
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new(Precision::F32)
    }
}

impl Scratch {
    fn new(precision: Precision) -> Self {
        let narrow = || Panels::narrow(precision);
        Scratch {
            precision,
            key_panels: narrow(),
            value_panels: narrow(),
            query_panels: narrow(),
            gradient_panels: narrow(),
            queries: Panels::new(precision),
            gradients: Panels::new(precision),
            shares: Panels::wide(precision),
            share_rows: Rows::new(precision),
            out_row: Lines::default(),
            out_dots: Lines::default(),
            scores: Lines::default(),
            score_gradients: Lines::default(),
        }
    }

    fn reserve(&mut self, precision: Precision, time: usize) {
        if self.precision != precision {
            *self = Self::new(precision);
        }
        for buffer in [&mut self.scores, &mut self.score_gradients] {
            if buffer.len() < BLOCK * time {
                buffer.resize(BLOCK * time, 0.0);
            }
        }
    }
}

/// Writes the heads' outputs to `out` (time, heads * head) and the logarithm of each query's sum of exponentials to
/// `log_sums` (heads, time), which the backward pass needs.
pub fn forward(shape: Shape, qkv: &Rows, starts: &[u32], out: &mut [f32], log_sums: &mut [f32], scratch: &mut Scratch) {
    attend(shape, qkv, &shape.causal_blocks(starts), out, log_sums, scratch);
}

/// [`forward`] where every query sees every key, as in an encoder.
pub fn forward_unmasked(shape: Shape, qkv: &Rows, out: &mut [f32], scratch: &mut Scratch) {
    let blocks: Vec<Block> = (0..shape.time).step_by(BLOCK).map(|from| Block::unmasked(from, shape.time)).collect();
    attend(shape, qkv, &blocks, out, &mut vec![0.0; shape.heads * shape.time], scratch);
}

fn attend(shape: Shape, qkv: &Rows, blocks: &[Block], out: &mut [f32], log_sums: &mut [f32], scratch: &mut Scratch) {
    shape.check(qkv, out, log_sums);
    scratch.reserve(qkv.precision(), shape.time);
    let (time, width, head) = (shape.time, shape.width(), shape.head);
    let Scratch { value_panels, queries, shares, scores, .. } = scratch;
    for (h, log_sums) in log_sums.chunks_exact_mut(time).enumerate() {
        let [query, key, value] = shape.columns(h);
        value_panels.pack_columns(qkv, 0..time, &value);
        for block in blocks {
            let scores = &mut scores[..block.keys.len() * BLOCK];
            queries.pack_columns_turned(qkv, block.from..block.from + block.queries, &query);
            let products = MatrixMut::strided(scores, block.keys.len(), block.queries, BLOCK);
            queries.multiply_from(0, products, Target::Overwrite, qkv.operand_of(&block.keys, &key));
            let mut sums = [0.0; BLOCK];
            let log_sums = &mut log_sums[block.from..block.from + block.queries];
            softmax(scores, block, shape.scale(), &mut sums, log_sums);
            shares.pack_here(Matrix::new(scores, block.keys.len(), BLOCK));
            let out = &mut out[block.from * width + h * head..];
            let rows = MatrixMut::strided(out, block.queries, head, width);
            value_panels.multiply_from(block.keys.start, rows, Target::Overwrite, shares.turned());
            divide(out, width, head, &sums[..block.queries]);
        }
    }
}

/// Writes the gradient of `qkv` to `qkv_gradient`, from what the forward pass was given and returned, `out` as products read it,
/// and the gradient `out_gradient` (time, heads * head) of its output.
#[expect(clippy::too_many_arguments, reason = "the operands and results of one gradient")]
pub fn backward(
    shape: Shape,
    qkv: &Rows,
    starts: &[u32],
    out: &Rows,
    log_sums: &[f32],
    out_gradient: &[f32],
    qkv_gradient: &mut [f32],
    scratch: &mut Scratch,
) {
    shape.check(qkv, out_gradient, log_sums);
    let blocks = shape.causal_blocks(starts);
    assert_eq!((out.rows, out.columns), (shape.time, shape.width()));
    assert_eq!(qkv_gradient.len(), 3 * out_gradient.len());
    scratch.reserve(qkv.precision(), shape.time);
    let (time, width, head, row) = (shape.time, shape.width(), shape.head, 3 * shape.width());
    scratch.out_row.resize(width, 0.0);
    scratch.out_dots.resize(shape.heads * time, 0.0);
    for (t, gradient) in out_gradient.chunks_exact(width).enumerate() {
        out.load(t, &mut scratch.out_row);
        out_dots(&scratch.out_row, gradient, head, &mut scratch.out_dots[t..], time);
    }
    for (h, log_sums) in log_sums.chunks_exact(time).enumerate() {
        let [query, key, value] = shape.columns(h);
        let out_gradient_from =
            |first: usize, count: usize| Matrix::strided(&out_gradient[first * width + h * head..], count, head, width);
        scratch.key_panels.pack_columns(qkv, 0..time, &key);
        scratch.query_panels.pack_columns(qkv, 0..time, &query);
        scratch.gradient_panels.pack_here(out_gradient_from(0, time));
        for block in &blocks {
            let (from, queries, keys) = (block.from, block.queries, block.keys.len());
            let scores = &mut scratch.scores[..keys * BLOCK];
            let score_gradients = &mut scratch.score_gradients[..keys * BLOCK];

            scratch.queries.pack_columns_turned(qkv, from..from + queries, &query);
            scratch.gradients.pack_here(out_gradient_from(from, queries).transposed());
            let products = MatrixMut::strided(scores, keys, queries, BLOCK);
            scratch.queries.multiply_from(0, products, Target::Overwrite, qkv.operand_of(&block.keys, &key));
            let products = MatrixMut::strided(score_gradients, keys, queries, BLOCK);
            scratch.gradients.multiply_from(0, products, Target::Overwrite, qkv.operand_of(&block.keys, &value));

            let out_dots = &scratch.out_dots[h * time + from..][..queries];
            softmax_backward(scores, score_gradients, block, shape.scale(), out_dots, &log_sums[from..from + queries]);

            // The keys of earlier blocks have a gradient already; that of the block's own begins here.
            let earlier = from - block.keys.start;
            let mut add = |at: usize, right: &Panels, left: &[f32]| {
                scratch.share_rows.pack(Matrix::strided(left, keys, queries, BLOCK));
                for (key, count, target) in [(0, earlier, Target::Add), (earlier, queries, Target::Overwrite)] {
                    let sums = MatrixMut::strided(&mut qkv_gradient[(block.keys.start + key) * row + at..], count, head, row);
                    right.multiply_from(from, sums, target, scratch.share_rows.operand(key));
                }
            };
            add(value.start, &scratch.gradient_panels, scores);
            add(key.start, &scratch.query_panels, score_gradients);
            scratch.shares.pack_here(Matrix::new(score_gradients, keys, BLOCK));
            let rows = MatrixMut::strided(&mut qkv_gradient[from * row + query.start..], queries, head, row);
            scratch.key_panels.multiply_from(block.keys.start, rows, Target::Overwrite, scratch.shares.turned());
        }
    }
}

vectorized! {
    /// Turns the scores of a block (keys, BLOCK), not scaled yet, into exponentials below 1 where a query sees a key, and into
    /// zero elsewhere; writes each query's sum to `sums` and its logarithm, before any shift, to `log_sums`.
    fn softmax(scores: &mut [f32], block: &Block, scale: f32, sums: &mut [f32; BLOCK], log_sums: &mut [f32]) {
        let (scores, _) = scores.as_chunks_mut::<LANES>();
        for (part, seen) in block.parts.iter().enumerate() {
            let keys = seen.keys();
            let mut largest = [f32::NEG_INFINITY; LANES];
            for key in keys.clone() {
                let row = &scores[key * PARTS + part];
                for lane in 0..LANES {
                    let visible = (key as u32).wrapping_sub(seen.first[lane]) < seen.count[lane];
                    let score = if visible { row[lane] } else { f32::NEG_INFINITY };
                    largest[lane] = if score > largest[lane] { score } else { largest[lane] };
                }
            }
            let mut sum = [0f32; LANES];
            for key in 0..block.keys.len() {
                let row = &mut scores[key * PARTS + part];
                if !keys.contains(&key) {
                    row.fill(0.0);
                    continue;
                }
                for lane in 0..LANES {
                    let visible = (key as u32).wrapping_sub(seen.first[lane]) < seen.count[lane];
                    let share = exp(scale * (row[lane] - largest[lane]));
                    row[lane] = if visible { share } else { 0.0 };
                    sum[lane] += row[lane];
                }
            }
            sums[part * LANES..(part + 1) * LANES].copy_from_slice(&sum);
            for (lane, log_sum) in log_sums.iter_mut().skip(part * LANES).take(LANES).enumerate() {
                *log_sum = scale * largest[lane] + sum[lane].ln();
            }
        }
    }
}

vectorized! {
    /// Divides row i of `rows` (_, head), which are `width` apart, by sum i.
    fn divide(rows: &mut [f32], width: usize, head: usize, sums: &[f32]) {
        for (row, sum) in rows.chunks_mut(width).zip(sums) {
            let share = 1.0 / sum;
            row[..head].iter_mut().for_each(|x| *x *= share);
        }
    }
}

vectorized! {
    /// The product of each head's output and its gradient at one position, `D` of the paper; those of two heads are `stride`
    /// apart.
    fn out_dots(out: &[f32], gradient: &[f32], head: usize, dots: &mut [f32], stride: usize) {
        let heads = out.chunks_exact(head).zip(gradient.chunks_exact(head));
        for ((out, gradient), out_dot) in heads.zip(dots.iter_mut().step_by(stride)) {
            *out_dot = dot(out, gradient);
        }
    }
}

vectorized! {
    /// Turns scores into shares `p`, and the gradient `g` of the shares into that of the scores before they were scaled:
    /// `scale p (g - sum p g)`, where the sum is what [`out_dots`] gives.
    fn softmax_backward(
        scores: &mut [f32],
        gradients: &mut [f32],
        block: &Block,
        scale: f32,
        out_dots: &[f32],
        log_sums: &[f32],
    ) {
        let ((scores, _), (gradients, _)) = (scores.as_chunks_mut::<LANES>(), gradients.as_chunks_mut::<LANES>());
        for (part, seen) in block.parts.iter().enumerate() {
            let keys = seen.keys();
            let [out_dot, log_sum] = [out_dots, log_sums].map(|numbers| {
                let mut lanes = [0f32; LANES];
                lanes.iter_mut().zip(numbers.iter().skip(part * LANES)).for_each(|(lane, x)| *lane = *x);
                lanes
            });
            for key in 0..block.keys.len() {
                let (scores, gradients) = (&mut scores[key * PARTS + part], &mut gradients[key * PARTS + part]);
                if !keys.contains(&key) {
                    scores.fill(0.0);
                    gradients.fill(0.0);
                    continue;
                }
                for lane in 0..LANES {
                    let visible = (key as u32).wrapping_sub(seen.first[lane]) < seen.count[lane];
                    let share = exp(scale * scores[lane] - log_sum[lane]);
                    let gradient = scale * share * (gradients[lane] - out_dot[lane]);
                    scores[lane] = if visible { share } else { 0.0 };
                    gradients[lane] = if visible { gradient } else { 0.0 };
                }
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

    fn rows(shape: Shape, precision: Precision, numbers: &[f32]) -> Rows {
        let mut rows = Rows::new(precision);
        rows.pack(Matrix::new(numbers, shape.time, numbers.len() / shape.time));
        rows
    }

    /// Of the products of outputs and `weight`, by `qkv`.
    fn gradient(shape: Shape, precision: Precision, qkv: &[f32], starts: &[u32], weight: &[f32]) -> Vec<f32> {
        let (mut out, mut log_sums) = (vec![0.0; weight.len()], vec![0.0; shape.time * shape.heads]);
        let (mut gradient, mut scratch) = (vec![7.0; qkv.len()], Scratch::default());
        let qkv = rows(shape, precision, qkv);
        forward(shape, &qkv, starts, &mut out, &mut log_sums, &mut scratch);
        let out = rows(shape, precision, &out);
        backward(shape, &qkv, starts, &out, &log_sums, weight, &mut gradient, &mut scratch);
        gradient
    }

    /// The definition, one query and one key at a time.
    fn naive(shape: Shape, qkv: &[f32], seen: impl Fn(usize) -> Range<usize>) -> Vec<f64> {
        let (width, row) = (shape.width(), 3 * shape.width());
        let mut out = vec![0.0; shape.time * width];
        for h in 0..shape.heads {
            for t in 0..shape.time {
                let seen = seen(t);
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

    fn causal(starts: &[u32]) -> impl Fn(usize) -> Range<usize> + '_ {
        |t| starts[t] as usize..t + 1
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
            let mut scratch = Scratch::default();
            // A number of `bf16` is off by up to 2^-9 of its size; scores, shares and values are of size 1.
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 1e-2)] {
                forward(shape, &rows(shape, precision, &qkv), &starts, &mut out, &mut log_sums, &mut scratch);
                for (got, expected) in out.iter().zip(naive(shape, &qkv, causal(&starts))) {
                    close(f64::from(*got), expected, tolerance);
                }
            }
        }
    }

    #[test]
    fn outputs_without_a_mask_equal_the_definition() {
        for time in [1, 19, 64, 131] {
            let shape = Shape { time, heads: 2, head: 6 };
            let (qkv, mut out) = (numbers(time * 36, 1), vec![0.0; time * 12]);
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 1e-2)] {
                forward_unmasked(shape, &rows(shape, precision, &qkv), &mut out, &mut Scratch::default());
                for (got, expected) in out.iter().zip(naive(shape, &qkv, |_| 0..time)) {
                    close(f64::from(*got), expected, tolerance);
                }
            }
        }
    }

    #[test]
    fn gradients_in_bf16_are_near_those_in_f32() {
        let (shape, time) = (Shape { time: 131, heads: 2, head: 36 }, 131);
        let width = shape.width();
        let (qkv, starts, weight) = (numbers(time * 3 * width, 1), documents(time, &[5, 70]), numbers(time * width, 2));
        let [exact, rounded] =
            [Precision::F32, Precision::Bf16].map(|precision| gradient(shape, precision, &qkv, &starts, &weight));
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
        let off = squares(&mut exact.iter().zip(&rounded).map(|(a, b)| a - b)) / squares(&mut exact.iter().copied());
        assert!(off > 0.0 && off.sqrt() < 1e-2, "{}", off.sqrt());
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for (time, borders) in [(1, vec![]), (5, vec![2]), (67, vec![1, 63])] {
            let shape = Shape { time, heads: 2, head: 2 };
            let (qkv, starts, weight) = (numbers(time * 12, 1), documents(time, &borders), numbers(time * 4, 2));
            let gradient = gradient(shape, Precision::F32, &qkv, &starts, &weight);
            let value =
                |qkv: &[f32]| naive(shape, qkv, causal(&starts)).iter().zip(&weight).map(|(y, w)| y * f64::from(*w)).sum();
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
            forward(shape, &rows(shape, Precision::F32, qkv), &starts, &mut out, &mut log_sums, &mut Scratch::default());
            out
        };
        let mut qkv = numbers(1200, 1);
        let before = run(&qkv);
        qkv[..37 * 12].fill(3.0);
        assert_eq!(run(&qkv)[37 * 4..], before[37 * 4..]);
    }
}
