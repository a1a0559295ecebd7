//! What the passes of a GPU are made of.

use candle_core::{DType, Result, Tensor};
use trommel_kernels::adamw::Factors;

use crate::model::Activation;

/// Sequences of equal length, and the heads of their rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) sequences: usize,
    pub(super) time: usize,
    pub(super) heads: usize,
    pub(super) head: usize,
}

/// Queries that meet the same keys: all up to the last one of their block, so that half of the square is left out.
pub(super) const QUERIES: usize = 256;

impl Heads {
    /// Blocks of queries: the first one and the end.
    pub(super) fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.time).step_by(QUERIES).map(move |first| (first, self.time.min(first + QUERIES)))
    }

    /// Positions of all sequences.
    pub(super) fn rows(self) -> usize {
        self.sequences * self.time
    }

    /// The factor of the scores of attention.
    pub(super) fn scale(self) -> f32 {
        1.0 / (self.head as f32).sqrt()
    }
}

/// A matrix, or a batch of them, as it is or transposed.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    pub(super) tensor: &'a Tensor, // (.., rows, columns), the numbers of a row side by side
    pub(super) transposed: bool,
}

/// The matrix as it is.
pub(super) fn as_is(tensor: &Tensor) -> Factor<'_> {
    Factor { tensor, transposed: false }
}

/// The matrix with rows and columns exchanged.
pub(super) fn transposed(tensor: &Tensor) -> Factor<'_> {
    Factor { tensor, transposed: true }
}

/// Matrices, rows and columns of a factor, as it is multiplied.
pub(super) fn dims(factor: Factor<'_>) -> Result<(usize, usize, usize)> {
    let (batch, rows, columns) = match factor.tensor.dims() {
        [rows, columns] => (1, *rows, *columns),
        [batch, rows, columns] => (*batch, *rows, *columns),
        other => candle_core::bail!("{other:?} is no matrix"),
    };
    Ok(if factor.transposed { (batch, columns, rows) } else { (batch, rows, columns) })
}

/// A part of a flat buffer, which operations change in place.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    pub(super) buffer: Tensor, // flat, `f32`
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) fresh: bool, // whether a product overwrites what is there
}

/// What a norm leaves.
#[derive(Debug)]
pub(super) struct Normed {
    pub(super) stream: Tensor,  // (rows, width) `f32`, what was normed
    pub(super) rows: Tensor,    // (rows, width)
    pub(super) inverse: Tensor, // (rows) `f32`, one over the root mean square
}

/// Rows by their token, for sums that have an order.
#[derive(Debug)]
pub(super) struct ByToken {
    pub(super) tokens: Vec<u32>, // distinct, ascending
    pub(super) bounds: Vec<u32>, // the rows of `tokens[i]` are `order[bounds[i]..bounds[i + 1]]`
    pub(super) order: Vec<u32>,
}

impl ByToken {
    pub(super) fn new(tokens: &[u32]) -> ByToken {
        let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
        order.sort_by_key(|row| tokens[*row as usize]); // stable
        let mut of = ByToken { tokens: Vec::new(), bounds: Vec::new(), order };
        for (place, row) in of.order.iter().enumerate() {
            if of.tokens.last() != Some(&tokens[*row as usize]) {
                of.tokens.push(tokens[*row as usize]);
                of.bounds.push(place as u32);
            }
        }
        of.bounds.push(tokens.len() as u32);
        of
    }
}

/// The operations, on the device of their tensors. Rows are in `f32` or `bf16`, as the tensors that come in say; sums are `f32`.
pub(super) trait Kernels: std::fmt::Debug {
    /// The device's memory, in bytes.
    fn memory(&self) -> usize;

    /// `a b` in `dtype`, (.., rows, columns).
    fn multiply(&self, a: Factor<'_>, b: Factor<'_>, dtype: DType) -> Result<Tensor>;

    /// Writes `a b` (.., m, n) to `out` (.., rows, columns): to the rows from `row` on, and their first `n` columns.
    fn multiply_into(&self, a: Factor<'_>, b: Factor<'_>, out: &Tensor, row: usize) -> Result<()>;

    /// A tensor to write to, with anything in it.
    fn room(&self, shape: &[usize], dtype: DType) -> Result<Tensor>;

    /// `alpha basis` in `dtype`, (experts, numbers), for `alpha` (experts, h) and a `basis` (h, numbers) that is read once.
    fn mix(&self, alpha: &Tensor, basis: &Tensor, dtype: DType) -> Result<Tensor>;

    /// Adds `a b` to a part of a buffer, or overwrites it if that is fresh.
    fn add_product(&self, a: Factor<'_>, b: Factor<'_>, sum: &Spot) -> Result<()>;

    /// Norms `x + branch` (rows, width), each row, times `gain` (width), to rows of `dtype`. [Zhang and Sennrich, arXiv 1910.07467]
    fn norm(&self, x: &Tensor, branch: Option<&Tensor>, gain: &Tensor, epsilon: f64, dtype: DType) -> Result<Normed>;

    /// The gradient of `normed.stream`, to which `stream` comes if it is given (its buffer may be taken), in `f32` and as rows;
    /// adds that of the gain to `gain_gradient`.
    fn norm_backward(
        &self,
        normed: &Normed,
        gain: &Tensor,
        gradient: &Tensor,
        stream: Option<Tensor>,
        gain_gradient: &Spot,
    ) -> Result<(Tensor, Tensor)>;

    /// Queries, keys and values of packed rows (rows, 3 width), the first two turned by their positions: three tensors
    /// (sequences * heads, time, head). `turns` are the cosines and the sines, (time, head / 2) each.
    fn split_heads(&self, qkv: &Tensor, heads: Heads, turns: &[Tensor; 2]) -> Result<[Tensor; 3]>;

    /// From the gradients of what [`Kernels::split_heads`] gives to that of the packed rows.
    fn join_heads(&self, parts: [&Tensor; 3], heads: Heads, turns: &[Tensor; 2]) -> Result<Tensor>;

    /// (outer, a, b, inner) to (outer, b, a, inner), flat.
    fn swap(&self, x: &Tensor, dims: [usize; 4]) -> Result<Tensor>;

    /// The shares of attention (sequences * heads, time, time), in `dtype`, of scores that are not scaled yet; a query sees the keys
    /// from the start of its document (sequences * time) to itself. What lies beyond the block of a query is neither read nor written.
    fn softmax(&self, scores: &Tensor, starts: &Tensor, heads: Heads, dtype: DType) -> Result<Tensor>;

    /// From the gradient of the shares to that of the scores, as rows.
    fn softmax_backward(&self, shares: &Tensor, gradient: &Tensor, starts: &Tensor, heads: Heads) -> Result<Tensor>;

    /// The nonlinearity over packed rows (rows, packed * mlp), giving (rows, mlp).
    fn activate(&self, packed: &Tensor, activation: Activation) -> Result<Tensor>;

    /// What [`Kernels::activate`] gave, and the gradient of the packed rows.
    fn activate_backward(&self, packed: &Tensor, gradient: &Tensor, activation: Activation) -> Result<(Tensor, Tensor)>;

    /// The negative log-likelihoods (rows) of `targets` under `logits` (rows, vocab), zero where there is none; and the gradient of
    /// `scale` times their sum, in `dtype`, if a scale is given.
    fn cross_entropy(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        scale: Option<f32>,
        dtype: DType,
    ) -> Result<(Tensor, Option<Tensor>)>;

    /// Adds each row (rows, width) to that of its token in a table.
    fn add_rows(&self, rows: &Tensor, by_token: &ByToken, table: &Spot) -> Result<()>;

    /// The sum of squares of parts of a buffer.
    fn squares(&self, parts: &[Spot]) -> Result<f64>;

    /// One step of `AdamW` of a part of the parameters, as [`trommel_kernels::adamw::step`]. `rates` (parts), if given, multiply the
    /// learning rate of equal parts of it.
    fn adamw(
        &self,
        parameters: &Spot,
        gradient: &Spot,
        moments: [&Spot; 2],
        factors: Factors,
        rates: Option<&[f32]>,
    ) -> Result<()>;
}
