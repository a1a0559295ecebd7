//! The passes of a plain model, forward and backward by hand, as in `crate::native`, over whole micro-batches.
//!
//! The residual stream and every sum stay in `f32`; what products read and write has the type of rows. The matrix of attention
//! is stored, one layer's scores at a time in `f32` and each layer's shares as rows.

use candle_core::{DType, Device, Result, Tensor};
use trommel_kernels::cross_entropy::IGNORED;
use trommel_kernels::rotary::Table;

use super::ops::{ByToken, Factor, Heads, Kernels, Normed, Spot, as_is, transposed};
use crate::batch::Batch;
use crate::model::Config;

/// `q k^T` (sequences * heads, time, time) in `f32`, without what no query sees.
fn scores(k: &dyn Kernels, q: &Tensor, keys: &Tensor, heads: Heads) -> Result<Tensor> {
    let scores = k.room(&[heads.sequences * heads.heads, heads.time, heads.time], DType::F32)?;
    for (first, end) in heads.blocks() {
        let (q, keys) = (q.narrow(1, first, end - first)?, keys.narrow(1, 0, end)?);
        k.multiply_into(as_is(&q), transposed(&keys), &scores, first)?;
    }
    Ok(scores)
}

/// Logits that are held at once.
const LOGITS: usize = 128 << 20;

/// The numbers of a plain model, on the device.
pub(super) struct Weights {
    pub(super) table: Tensor,      // (vocab, width) `f32`
    pub(super) table_rows: Tensor, // (vocab, width)
    pub(super) layers: Vec<Layer>,
    pub(super) last_gain: Tensor, // (width) `f32`
}

/// Those of one layer.
pub(super) struct Layer {
    pub(super) attention_gain: Tensor, // (width) `f32`
    pub(super) qkv: Tensor,            // (3 width, width)
    pub(super) output: Tensor,         // (width, width)
    pub(super) mlp_gain: Tensor,       // (width) `f32`
    pub(super) mlps: Vec<Mlp>,         // one for each part of the batch
}

/// An MLP.
pub(super) struct Mlp {
    pub(super) up: Tensor,   // (packed * mlp, width)
    pub(super) down: Tensor, // (width, mlp)
}

/// Where their gradients are added up.
pub(super) struct Gradients {
    pub(super) table: Spot,
    pub(super) layers: Vec<LayerGradients>,
    pub(super) last_gain: Spot,
}

/// Those of one layer.
pub(super) struct LayerGradients {
    pub(super) attention_gain: Spot,
    pub(super) qkv: Spot,
    pub(super) output: Spot,
    pub(super) mlp_gain: Spot,
    pub(super) mlps: Vec<[Spot; 2]>, // up and down
}

/// Sequences, and the parts of them that have an MLP each: one for a plain model, one for each expert of a network. All else is
/// shared, so only the products of the MLPs are made part by part.
pub(super) struct Parts<'a> {
    pub(super) batch: &'a Batch,
    /// Sequences of each part.
    pub(super) sequences: Vec<usize>,
}

impl<'a> Parts<'a> {
    /// One part: all of the batch.
    pub(super) fn whole(batch: &'a Batch) -> Self {
        Parts { batch, sequences: vec![batch.sequences()] }
    }

    /// The rows of each part: the first one and how many.
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        self.sequences.iter().scan(0, |end, sequences| {
            let (first, rows) = (*end, sequences * self.batch.time);
            *end += rows;
            Some((first, rows))
        })
    }
}

/// The product of each part of `x` with its own matrix, (rows, columns).
fn multiply_parts<'a>(
    k: &dyn Kernels,
    x: &Tensor,
    parts: &Parts<'_>,
    matrices: impl Iterator<Item = Factor<'a>>,
    columns: usize,
) -> Result<Tensor> {
    let out = k.room(&[x.dim(0)?, columns], x.dtype())?;
    for ((first, rows), matrix) in parts.rows().zip(matrices) {
        k.multiply_into(as_is(&x.narrow(0, first, rows)?), matrix, &out, first)?;
    }
    Ok(out)
}

/// The shape of a model, and what its passes share.
#[derive(Debug)]
pub(super) struct Pass {
    config: Config,
    rows: DType,
    turns: [Tensor; 2], // (context, head / 2)
    device: Device,
}

/// A batch on the device.
struct Input {
    heads: Heads,
    turns: [Tensor; 2], // (time, head / 2)
    tokens: Tensor,     // (rows)
    starts: Tensor,     // (rows)
    targets: Tensor,    // (rows)
}

/// What the forward pass of one layer leaves for the backward pass.
struct Kept {
    attention: Normed,
    qkv: [Tensor; 3], // (sequences * heads, time, head)
    shares: Tensor,   // (sequences * heads, time, time)
    attended: Tensor, // (rows, width)
    mlp: Normed,
    packed: Tensor, // (rows, packed * mlp)
}

impl Pass {
    pub(super) fn new(config: &Config, rows: DType, device: &Device) -> Result<Pass> {
        let (table, shape) =
            (Table::new(config.context, config.head(), config.rope_theta), (config.context, config.head() / 2));
        let tensor = |numbers: &[f32]| Tensor::from_slice(numbers, shape, device);
        Ok(Pass {
            turns: [tensor(table.cosines())?, tensor(table.sines())?],
            config: config.clone(),
            rows,
            device: device.clone(),
        })
    }

    fn input(&self, batch: &Batch) -> Result<Input> {
        let vocab = self.config.vocab;
        let known = |token: &u32| (*token as usize) < vocab;
        if !batch.tokens.iter().all(known) || !batch.targets.iter().all(|target| known(target) || *target == IGNORED) {
            candle_core::bail!("a token exceeds the vocabulary of {vocab}");
        }
        if batch.time > self.config.context {
            candle_core::bail!("a sequence is longer than the model's context");
        }
        let heads =
            Heads { sequences: batch.sequences(), time: batch.time, heads: self.config.heads, head: self.config.head() };
        let tensor = |numbers: &[u32]| Tensor::from_slice(numbers, numbers.len(), &self.device);
        let [cosines, sines] = &self.turns;
        Ok(Input {
            heads,
            turns: [cosines.narrow(0, 0, batch.time)?, sines.narrow(0, 0, batch.time)?],
            tokens: tensor(&batch.tokens)?,
            starts: tensor(&batch.starts)?,
            targets: tensor(&batch.targets)?,
        })
    }

    /// The normed rows after the last layer, and what the layers leave if they are `kept`.
    fn forward(
        &self,
        k: &dyn Kernels,
        weights: &Weights,
        parts: &Parts<'_>,
        input: &Input,
        keep: bool,
    ) -> Result<(Normed, Vec<Kept>)> {
        let (config, heads, rows) = (&self.config, input.heads, self.rows);
        let shape = [heads.sequences, heads.heads, heads.time, heads.head];
        let mut kept = Vec::new();
        let mut stream = weights.table.index_select(&input.tokens, 0)?;
        let mut branch: Option<Tensor> = None;
        for layer in &weights.layers {
            let attention = k.norm(&stream, branch.as_ref(), &layer.attention_gain, config.norm_eps, rows)?;
            let packed = k.multiply(as_is(&attention.rows), transposed(&layer.qkv), rows)?;
            let qkv = k.split_heads(&packed, heads, &input.turns)?;
            drop(packed);
            let scores = scores(k, &qkv[0], &qkv[1], heads)?;
            let shares = k.softmax(&scores, &input.starts, heads, rows)?;
            drop(scores);
            let attended = k.room(qkv[2].dims(), rows)?;
            for (first, end) in heads.blocks() {
                let (shares, values) = (shares.narrow(1, first, end - first)?.narrow(2, 0, end)?, qkv[2].narrow(1, 0, end)?);
                k.multiply_into(as_is(&shares), as_is(&values), &attended, first)?;
            }
            let attended = k.swap(&attended, shape)?.reshape((heads.rows(), config.width))?;
            let out = k.multiply(as_is(&attended), transposed(&layer.output), rows)?;

            let mlp = k.norm(&attention.stream, Some(&out), &layer.mlp_gain, config.norm_eps, rows)?;
            let up = layer.mlps.iter().map(|mlp| transposed(&mlp.up));
            let packed = multiply_parts(k, &mlp.rows, parts, up, config.activation.packed() * config.mlp)?;
            let inner = k.activate(&packed, config.activation)?;
            let down = layer.mlps.iter().map(|mlp| transposed(&mlp.down));
            branch = Some(multiply_parts(k, &inner, parts, down, config.width)?);
            stream = mlp.stream.clone();
            if keep {
                kept.push(Kept { attention, qkv, shares, attended, mlp, packed });
            }
        }
        Ok((k.norm(&stream, branch.as_ref(), &weights.last_gain, config.norm_eps, rows)?, kept))
    }

    /// The losses of each position, (rows).
    pub(super) fn losses(&self, k: &dyn Kernels, weights: &Weights, batch: &Batch) -> Result<Tensor> {
        let input = self.input(batch)?;
        let (last, _) = self.forward(k, weights, &Parts::whole(batch), &input, false)?;
        let losses = |(first, len): (usize, usize)| {
            let hidden = last.rows.narrow(0, first, len)?;
            let logits = k.multiply(as_is(&hidden), transposed(&weights.table_rows), DType::F32)?;
            Ok(k.cross_entropy(&logits, &input.targets.narrow(0, first, len)?, None, self.rows)?.0)
        };
        Tensor::cat(&self.chunks(input.heads.rows()).map(losses).collect::<Result<Vec<_>>>()?, 0)
    }

    /// The logits after the last position of each sequence, (sequences, vocab).
    pub(super) fn logits(&self, k: &dyn Kernels, weights: &Weights, batch: &Batch) -> Result<Tensor> {
        let input = self.input(batch)?;
        let (last, _) = self.forward(k, weights, &Parts::whole(batch), &input, false)?;
        let hidden = last.rows.reshape((batch.sequences(), batch.time, self.config.width))?;
        let hidden = hidden.narrow(1, batch.time - 1, 1)?.squeeze(1)?.contiguous()?;
        k.multiply(as_is(&hidden), transposed(&weights.table_rows), DType::F32)
    }

    /// Chunks of rows whose logits fit into the memory for them; whole tiles of them.
    fn chunks(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> {
        let most = (LOGITS / self.config.vocab / 128).max(1) * 128;
        (0..rows).step_by(most).map(move |first| (first, most.min(rows - first)))
    }

    /// The losses of each position, (rows), and adds the gradient of `scale` times their sum.
    pub(super) fn losses_and_gradient(
        &self,
        k: &dyn Kernels,
        weights: &Weights,
        gradients: &Gradients,
        parts: &Parts<'_>,
        scale: f32,
    ) -> Result<Tensor> {
        let input = self.input(parts.batch)?;
        let (last, mut kept) = self.forward(k, weights, parts, &input, true)?;

        let (mut losses, mut hidden_gradient) = (Vec::new(), Vec::new());
        for (first, len) in self.chunks(input.heads.rows()) {
            let hidden = last.rows.narrow(0, first, len)?;
            let logits = k.multiply(as_is(&hidden), transposed(&weights.table_rows), DType::F32)?;
            let (loss, gradient) = k.cross_entropy(&logits, &input.targets.narrow(0, first, len)?, Some(scale), self.rows)?;
            drop(logits);
            let Some(gradient) = gradient else { candle_core::bail!("no gradient of the logits") };
            hidden_gradient.push(k.multiply(as_is(&gradient), as_is(&weights.table_rows), self.rows)?);
            k.add_product(transposed(&gradient), as_is(&hidden), &gradients.table)?;
            losses.push(loss);
        }
        let hidden_gradient = Tensor::cat(&hidden_gradient, 0)?;

        // `out` is the gradient of the residual stream, `rows` the same as rows.
        let (mut out, mut rows) = k.norm_backward(&last, &weights.last_gain, &hidden_gradient, None, &gradients.last_gain)?;
        for (layer, spots) in weights.layers.iter().zip(&gradients.layers).rev() {
            let Some(kept) = kept.pop() else { candle_core::bail!("a layer was not kept") };
            (out, rows) = self.layer_backward(k, layer, spots, kept, parts, &input, out, &rows)?;
        }
        k.add_rows(&out, &ByToken::new(&parts.batch.tokens), &gradients.table)?;
        Tensor::cat(&losses, 0)
    }

    #[expect(clippy::too_many_arguments, reason = "one layer, what it kept, and the gradient that flows through")]
    fn layer_backward(
        &self,
        k: &dyn Kernels,
        layer: &Layer,
        spots: &LayerGradients,
        kept: Kept,
        parts: &Parts<'_>,
        input: &Input,
        out: Tensor,
        rows: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (heads, config) = (input.heads, &self.config);
        let Kept { attention, qkv: [q, key, v], shares, attended, mlp, packed } = kept;

        let down = layer.mlps.iter().map(|mlp| as_is(&mlp.down));
        let inner_gradient = multiply_parts(k, rows, parts, down, config.mlp)?;
        let (inner, packed_gradient) = k.activate_backward(&packed, &inner_gradient, config.activation)?;
        for ((first, len), [up, down]) in parts.rows().zip(&spots.mlps) {
            let part = |x: &Tensor| x.narrow(0, first, len);
            k.add_product(transposed(&part(rows)?), as_is(&part(&inner)?), down)?;
            k.add_product(transposed(&part(&packed_gradient)?), as_is(&part(&mlp.rows)?), up)?;
        }
        let up = layer.mlps.iter().map(|mlp| as_is(&mlp.up));
        let normed_gradient = multiply_parts(k, &packed_gradient, parts, up, config.width)?;
        let (out, rows) = k.norm_backward(&mlp, &layer.mlp_gain, &normed_gradient, Some(out), &spots.mlp_gain)?;

        k.add_product(transposed(&rows), as_is(&attended), &spots.output)?;
        let gradient = k.multiply(as_is(&rows), as_is(&layer.output), self.rows)?;
        let gradient = k.swap(&gradient, [heads.sequences, heads.time, heads.heads, heads.head])?.reshape(q.dims())?;
        let shares_gradient = scores(k, &gradient, &v, heads)?;
        let scores = k.softmax_backward(&shares, &shares_gradient, &input.starts, heads)?;
        drop(shares_gradient);
        let [q_gradient, k_gradient, v_gradient] = [(); 3].map(|()| k.room(q.dims(), self.rows));
        let (q_gradient, k_gradient, v_gradient) = (q_gradient?, k_gradient?, v_gradient?);
        for (first, end) in heads.blocks() {
            // The keys that a block of queries sees, and the queries that see a block of keys.
            let (row, seen) = (scores.narrow(1, first, end - first)?.narrow(2, 0, end)?, key.narrow(1, 0, end)?);
            k.multiply_into(as_is(&row), as_is(&seen), &q_gradient, first)?;
            let from = |x: &Tensor| x.narrow(1, first, heads.time - first);
            let column = |x: &Tensor| from(x)?.narrow(2, first, end - first);
            k.multiply_into(transposed(&column(&scores)?), as_is(&from(&q)?), &k_gradient, first)?;
            k.multiply_into(transposed(&column(&shares)?), as_is(&from(&gradient)?), &v_gradient, first)?;
        }
        let packed = k.join_heads([&q_gradient, &k_gradient, &v_gradient], heads, &input.turns)?;
        k.add_product(transposed(&packed), as_is(&attention.rows), &spots.qkv)?;
        let normed_gradient = k.multiply(as_is(&packed), as_is(&layer.qkv), self.rows)?;
        k.norm_backward(&attention, &layer.attention_gain, &normed_gradient, Some(out), &spots.attention_gain)
    }
}
