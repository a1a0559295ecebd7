//! The model on the CPU: forward and backward pass by hand, over the kernels of `trommel-kernels`.
//!
//! candle's tape allocates every intermediate tensor and adds up gradients in fresh ones, which costs more than the
//! products themselves at this size. Here one task takes a whole sequence through all layers, so its rows stay in the
//! cache of one core; only the gradients of weights, which sum over sequences, need the tasks to meet, once per layer.
//!
//! ```text
//!   forward    per sequence: embedding, layers, norm            | meet |  logits and loss, by chunks of rows
//!   backward   per layer:    per sequence: gradients of rows    | meet |  per block of weight rows: sum over sequences
//! ```
//!
//! Tasks are cut by the problem (a sequence, a block of rows) and sums run in the order of sequences, so results have the
//! same bits at any thread count. The tape of `crate::tape` is the oracle in the tests.

use std::cell::RefCell;

use rayon::prelude::*;
use trommel_kernels::attention::{self, Shape};
use trommel_kernels::cross_entropy::{self, Output, Teacher};
use trommel_kernels::lines::Lines;
use trommel_kernels::matmul::{Matrix, MatrixMut, Target, multiply};
use trommel_kernels::panels::{Panels, Precision};
use trommel_kernels::rotary::{Table, Turn};
use trommel_kernels::rows::Rows;
use trommel_kernels::{activation, embedding, norm};

use crate::batch::Batch;
use crate::model::{Activation, Config};
use crate::parameters::{layer_ranges, layer_sizes};

/// Rows of a weight whose gradient one task sums.
const WEIGHT_ROWS: usize = 96;
/// Positions that go through a product of a layer together: what they need beside the weights stays in the second cache. A
/// multiple of the rows of a block of AMX, which costs as much when it is not full, and even, as [`Panels::store`] wants it.
const POSITIONS: usize = 64;

/// The memory of one model's passes, kept from batch to batch.
#[derive(Debug)]
pub(crate) struct Native {
    config: Config,
    precision: Precision,
    rotary: Table,
    panels: Vec<LayerPanels>,
    backward_panels: LayerPanels,
    sequences: Vec<Sequence>,
    hidden: Lines<f32>,          // (sequences, time, width)
    hidden_gradient: Lines<f32>, // (sequences, time, width)
    losses: Lines<f32>,          // (sequences, time)
    scratch: cross_entropy::Scratch,
}

/// What the forward pass of one sequence keeps for the backward pass, and what that has of it at hand. Rows that products read
/// are kept as these read them.
#[derive(Debug)]
struct Sequence {
    inputs: Vec<Lines<f32>>, // layers + 1 times (time, width): the residual stream before each layer and after the last
    layers: Vec<LayerRows>,
    gradient: Lines<f32>, // (time, width), of the residual stream where the backward pass is
    normed: Lines<f32>,   // (time, width)
    operands: Operands,   // of the layer at hand
}

/// What one layer's backward pass of one sequence leaves for the gradients of its weights, as the products read it.
#[derive(Debug)]
struct Operands {
    out_rows: Rows,         // (time, width), the gradient of the residual stream after the layer
    packed_rows: Rows,      // (time, packed * mlp), the gradient of `LayerRows::packed`
    middle_rows: Rows,      // (time, width), the gradient of the residual stream between attention and MLP
    qkv_rows: Rows,         // (time, 3 * width), the gradient of `LayerRows::qkv`
    mlp_inputs: Panels,     // (time, mlp), what went into the layer's weights; see `weight_gradients`
    up_inputs: Panels,      // (time, width)
    output_inputs: Panels,  // (time, width)
    qkv_inputs: Panels,     // (time, width)
    gains: [Lines<f32>; 2], // (width) each: gradients of the two norms' gains
}

#[derive(Debug)]
struct LayerRows {
    qkv: Rows,            // (time, 3 * width), queries and keys turned
    attended: Rows,       // (time, width)
    log_sums: Lines<f32>, // (heads, time)
    middle: Lines<f32>,   // (time, width), residual stream
    packed: Rows,         // (time, packed * mlp), before the activation
}

/// The weights of one layer, packed once per batch: transposed for the forward pass, as they are for the backward pass.
#[derive(Debug)]
struct LayerPanels {
    precision: Precision,
    qkv: Panels,
    output: Panels,
    up: Panels,
    down: Panels,
}

impl LayerPanels {
    fn new(precision: Precision) -> Self {
        let panels = || Panels::new(precision);
        LayerPanels { precision, qkv: panels(), output: panels(), up: panels(), down: panels() }
    }

    fn pack<'a>(&mut self, weights: Weights<'a>, config: &Config, turn: impl Fn(Matrix<'a>) -> Matrix<'a>) {
        let (width, mlp) = (config.width, config.mlp);
        self.qkv.pack(turn(Matrix::new(weights.qkv, 3 * width, width)));
        self.output.pack(turn(Matrix::new(weights.output, width, width)));
        self.up.pack(turn(Matrix::new(weights.up, config.activation.packed() * mlp, width)));
        self.down.pack(turn(Matrix::new(weights.down, width, mlp)));
    }
}

#[derive(Default)]
struct Scratch {
    attention: attention::Scratch,
    rows: Lines<f32>,            // (time, width)
    qkv: Lines<f32>,             // (POSITIONS, 3 * width)
    qkv_gradient: Lines<f32>,    // (time, 3 * width)
    packed: Lines<f32>,          // (POSITIONS, packed * mlp); in the backward pass one of them is used
    packed_gradient: Lines<f32>, // (packed * mlp)
    mlp_rows: Lines<f32>,        // (POSITIONS, mlp), the activation; in the forward pass one of them is used
}

impl Scratch {
    fn resize(&mut self, time: usize, config: &Config) {
        self.rows.resize(time * config.width, 0.0);
        self.qkv.resize(POSITIONS * 3 * config.width, 0.0);
        self.qkv_gradient.resize(time * 3 * config.width, 0.0);
        let packed = config.activation.packed() * config.mlp;
        self.packed.resize(POSITIONS * packed, 0.0);
        self.packed_gradient.resize(packed, 0.0);
        self.mlp_rows.resize(POSITIONS * config.mlp, 0.0);
    }
}

thread_local! {
    /// Rows that live within one task; one set per thread stays in its cache.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The weights of one layer, as slices of the flat buffer; see [`layer_sizes`].
#[derive(Clone, Copy)]
struct Weights<'a> {
    attention_gain: &'a [f32], // (width)
    qkv: &'a [f32],            // (3 * width, width)
    output: &'a [f32],         // (width, width)
    mlp_gain: &'a [f32],       // (width)
    up: &'a [f32],             // (packed * mlp, width)
    down: &'a [f32],           // (width, mlp)
}

impl<'a> Weights<'a> {
    fn of(config: &Config, parameters: &'a [f32], layer: usize) -> Self {
        let [attention_gain, qkv, output, mlp_gain, up, down] = layer_ranges(config, layer).map(|range| &parameters[range]);
        Weights { attention_gain, qkv, output, mlp_gain, up, down }
    }
}

impl Native {
    /// Memory for a model of this shape, whose weights and rows are multiplied in `precision`.
    pub(crate) fn new(config: &Config, precision: Precision) -> Self {
        Native {
            precision,
            rotary: Table::new(config.context, config.head(), config.rope_theta),
            config: config.clone(),
            panels: Vec::new(),
            backward_panels: LayerPanels::new(precision),
            sequences: Vec::new(),
            hidden: Lines::default(),
            hidden_gradient: Lines::default(),
            losses: Lines::default(),
            scratch: cross_entropy::Scratch::new(precision),
        }
    }

    /// The negative log-likelihood in nats of each target of `batch`, (sequences, time); zero where there is none.
    pub(crate) fn losses(&mut self, parameters: &[f32], batch: &Batch) -> &[f32] {
        rayon::scope(|_| self.forward(parameters, batch));
        let embedding = &parameters[..self.config.vocab * self.config.width];
        let output = Output { hidden: &self.hidden, embedding, width: self.config.width, targets: &batch.targets };
        output.losses(&mut self.losses, &mut self.scratch);
        &self.losses
    }

    /// The logits after the last position of each sequence, (sequences, vocab).
    pub(crate) fn logits(&mut self, parameters: &[f32], batch: &Batch) -> Vec<f32> {
        self.forward(parameters, batch);
        let (vocab, width, sequences) = (self.config.vocab, self.config.width, batch.sequences());
        let mut logits = vec![0.0; sequences * vocab];
        let last = Matrix::strided(&self.hidden[(batch.time - 1) * width..], sequences, width, batch.time * width);
        let embedding = Matrix::new(&parameters[..vocab * width], vocab, width);
        multiply(MatrixMut::new(&mut logits, sequences, vocab), Target::Overwrite, 1.0, last, embedding.transposed());
        logits
    }

    /// The rows of the last layer, (sequences, time, width), normalised.
    pub(crate) fn hidden(&mut self, parameters: &[f32], batch: &Batch) -> &[f32] {
        rayon::scope(|_| self.forward(parameters, batch));
        &self.hidden
    }

    /// [`Native::losses`], mixed with those against a `teacher`, and adds the gradient of `scale * sum of losses` to `gradient`,
    /// which is as long as `parameters`.
    pub(crate) fn losses_and_gradient(
        &mut self,
        parameters: &[f32],
        batch: &Batch,
        teacher: Option<Teacher<'_>>,
        scale: f32,
        gradient: &mut [f32],
    ) -> &[f32] {
        // One visit to the pool's threads, not one for each meeting of the tasks.
        rayon::scope(|_| self.forward_and_backward(parameters, batch, teacher, scale, gradient));
        &self.losses
    }

    fn forward_and_backward(
        &mut self,
        parameters: &[f32],
        batch: &Batch,
        teacher: Option<Teacher<'_>>,
        scale: f32,
        gradient: &mut [f32],
    ) {
        assert_eq!(parameters.len(), gradient.len());
        self.forward(parameters, batch);
        let config = &self.config;
        let width = config.width;
        let (table_gradient, layer_gradients) = gradient.split_at_mut(config.vocab * width);
        let (layer_gradients, last_gain_gradient) = layer_gradients.split_at_mut(layer_gradients.len() - width);
        let (table, last_gain) = (&parameters[..config.vocab * width], &parameters[parameters.len() - width..]);

        let output = Output { hidden: &self.hidden, embedding: table, width, targets: &batch.targets };
        let (losses, hidden_gradient) = (&mut self.losses, &mut self.hidden_gradient);
        output.losses_and_gradients(teacher, scale, losses, hidden_gradient, table_gradient, &mut self.scratch);

        let rows = self.hidden_gradient.par_chunks(batch.time * width);
        let sequences = self.sequences.par_iter_mut().zip(rows).with_max_len(1);
        sequences.for_each(|(sequence, gradient)| sequence.leave(config, last_gain, gradient));
        add_gains(&self.sequences, 0, last_gain_gradient);

        let size = layer_sizes(config).iter().sum();
        for (layer, gradient) in layer_gradients.chunks_exact_mut(size).enumerate().rev() {
            let weights = Weights::of(config, parameters, layer);
            self.backward_panels.pack(weights, config, |weight| weight);
            let (panels, rotary) = (&self.backward_panels, &self.rotary);
            let starts = batch.starts.par_chunks(batch.time);
            self.sequences.par_iter_mut().zip(starts).with_max_len(1).for_each(|(sequence, starts)| {
                SCRATCH.with_borrow_mut(|scratch| sequence.backward(config, layer, weights, panels, starts, rotary, scratch));
            });
            weight_gradients(config, &self.sequences, gradient);
        }
        for (sequence, tokens) in self.sequences.iter().zip(batch.tokens.chunks_exact(batch.time)) {
            embedding::backward(&sequence.gradient, width, tokens, table_gradient);
        }
    }

    /// Leaves the normalised last rows in `hidden` and what the backward pass needs in `sequences`.
    fn forward(&mut self, parameters: &[f32], batch: &Batch) {
        assert!(batch.time <= self.config.context, "a sequence is longer than the model's context");
        assert!(batch.tokens.iter().all(|token| (*token as usize) < self.config.vocab), "a token exceeds the vocabulary");
        let (config, width) = (&self.config, self.config.width);
        self.sequences.resize_with(batch.sequences(), || Sequence::new(self.precision));
        for buffer in [&mut self.hidden, &mut self.hidden_gradient] {
            buffer.resize(batch.tokens.len() * width, 0.0);
        }
        self.losses.resize(batch.tokens.len(), 0.0);
        self.panels.resize_with(config.layers, || LayerPanels::new(self.precision));
        for (layer, panels) in self.panels.iter_mut().enumerate() {
            panels.pack(Weights::of(config, parameters, layer), config, Matrix::transposed);
        }
        let (panels, rotary) = (&self.panels, &self.rotary);
        let rows = batch.tokens.par_chunks(batch.time).zip(batch.starts.par_chunks(batch.time));
        let hidden = self.hidden.par_chunks_mut(batch.time * width);
        self.sequences.par_iter_mut().zip(rows).zip(hidden).with_max_len(1).for_each(
            |((sequence, (tokens, starts)), hidden)| {
                SCRATCH.with_borrow_mut(|scratch| {
                    sequence.forward(config, parameters, panels, tokens, starts, rotary, hidden, scratch)
                });
            },
        );
    }
}

impl Sequence {
    fn new(precision: Precision) -> Self {
        Sequence {
            inputs: Vec::new(),
            layers: Vec::new(),
            gradient: Lines::default(),
            normed: Lines::default(),
            operands: Operands::new(precision),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the model, one sequence, and where its rows go")]
    fn forward(
        &mut self,
        config: &Config,
        parameters: &[f32],
        panels: &[LayerPanels],
        tokens: &[u32],
        starts: &[u32],
        rotary: &Table,
        hidden: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let (time, width) = (tokens.len(), config.width);
        let shape = Shape { time, heads: config.heads, head: config.head() };
        self.inputs.resize_with(config.layers + 1, Lines::default);
        self.layers.resize_with(config.layers, || LayerRows::new(panels[0].precision));
        self.inputs.iter_mut().for_each(|rows| rows.resize(time * width, 0.0));
        scratch.resize(time, config);

        embedding::forward(&parameters[..config.vocab * width], width, tokens, &mut self.inputs[0]);
        for (layer, (rows, panels)) in self.layers.iter_mut().zip(panels).enumerate() {
            rows.resize(time, config);
            let weights = Weights::of(config, parameters, layer);
            let [input, next] = &mut self.inputs[layer..layer + 2] else { unreachable!("two streams border a layer") };

            let (gain, eps) = (weights.attention_gain, config.norm_eps as f32);
            for first in (0..time).step_by(POSITIONS) {
                let here = POSITIONS.min(time - first);
                let qkv = &mut scratch.qkv[..here * 3 * width];
                let out = MatrixMut::new(qkv, here, 3 * width);
                panels.qkv.multiply_made(out, Target::Overwrite, &mut scratch.rows[..width], |t, normed| {
                    norm::forward(&input[(first + t) * width..][..width], gain, eps, normed);
                });
                rotary.apply(qkv, 3 * width, 2 * config.heads, first, Turn::Forward);
                rows.qkv.store(first, Matrix::new(qkv, here, 3 * width));
            }
            let (attended, log_sums) = (&mut scratch.rows, &mut rows.log_sums);
            attention::forward(shape, &rows.qkv, starts, attended, log_sums, &mut scratch.attention);
            rows.attended.store(0, Matrix::new(attended, time, width));
            rows.middle.copy_from_slice(input);
            let middle = MatrixMut::new(&mut rows.middle, time, width);
            panels.output.multiply_rows(middle, Target::Add, &rows.attended, 0);

            next.copy_from_slice(&rows.middle);
            mlp_forward(config, panels, weights.mlp_gain, &rows.middle, &mut rows.packed, next, scratch);
        }
        let last_gain = &parameters[parameters.len() - width..];
        norm::forward(&self.inputs[config.layers], last_gain, config.norm_eps as f32, hidden);
    }

    /// The backward pass of the last norm: from the gradient of its rows to that of the residual stream.
    fn leave(&mut self, config: &Config, gain: &[f32], gradient: &[f32]) {
        let [gain_gradient, _] = &mut self.operands.gains;
        self.normed.resize(gradient.len(), 0.0);
        clear(&mut self.gradient, gradient.len());
        clear(gain_gradient, config.width);
        let (input, normed) = (&self.inputs[config.layers], &mut self.normed);
        norm::backward(input, gain, config.norm_eps as f32, gradient, normed, &mut self.gradient, gain_gradient);
    }

    /// The backward pass of one layer's rows, which takes `gradient` from behind the layer to before it.
    #[expect(clippy::too_many_arguments, reason = "the model, one layer, and one sequence")]
    fn backward(
        &mut self,
        config: &Config,
        layer: usize,
        weights: Weights<'_>,
        panels: &LayerPanels,
        starts: &[u32],
        rotary: &Table,
        scratch: &mut Scratch,
    ) {
        let (time, width, eps) = (starts.len(), config.width, config.norm_eps as f32);
        let shape = Shape { time, heads: config.heads, head: config.head() };
        scratch.resize(time, config);
        let Sequence { inputs, layers, gradient: stream, normed, operands } = self;
        let rows = &layers[layer];

        operands.out_rows.pack(Matrix::new(stream, time, width));
        mlp_backward(config, panels, &rows.packed, operands, scratch);
        operands.gains.iter_mut().for_each(|gain| clear(gain, width));
        let [attention_gain, mlp_gain] = &mut operands.gains;
        norm::backward(&rows.middle, weights.mlp_gain, eps, &scratch.rows, normed, stream, mlp_gain);
        operands.up_inputs.pack_here(Matrix::new(normed, time, width));

        operands.middle_rows.pack(Matrix::new(stream, time, width));
        let out = MatrixMut::new(&mut scratch.rows, time, width);
        panels.output.multiply_rows(out, Target::Overwrite, &operands.middle_rows, 0);
        operands.output_inputs.pack_columns(&rows.attended, 0..time, &(0..width));
        attention::backward(
            shape,
            &rows.qkv,
            starts,
            &rows.attended,
            &rows.log_sums,
            &scratch.rows,
            &mut scratch.qkv_gradient,
            &mut scratch.attention,
        );
        rotary.apply(&mut scratch.qkv_gradient, 3 * width, 2 * config.heads, 0, Turn::Backward);
        operands.qkv_rows.pack(Matrix::new(&scratch.qkv_gradient, time, 3 * width));
        let out = MatrixMut::new(&mut scratch.rows, time, width);
        panels.qkv.multiply_rows(out, Target::Overwrite, &operands.qkv_rows, 0);
        norm::backward(&inputs[layer], weights.attention_gain, eps, &scratch.rows, normed, stream, attention_gain);
        operands.qkv_inputs.pack_here(Matrix::new(normed, time, width));
    }
}

impl Operands {
    fn new(precision: Precision) -> Self {
        let (panels, rows) = (|| Panels::new(precision), || Rows::new(precision));
        Operands {
            out_rows: rows(),
            packed_rows: rows(),
            middle_rows: rows(),
            qkv_rows: rows(),
            mlp_inputs: panels(),
            up_inputs: panels(),
            output_inputs: panels(),
            qkv_inputs: panels(),
            gains: Default::default(),
        }
    }
}

impl LayerRows {
    fn new(precision: Precision) -> Self {
        let (rows, empty) = (|| Rows::new(precision), Lines::default);
        LayerRows { qkv: rows(), attended: rows(), log_sums: empty(), middle: empty(), packed: rows() }
    }

    fn resize(&mut self, time: usize, config: &Config) {
        self.qkv.reserve(time, 3 * config.width);
        self.attended.reserve(time, config.width);
        self.log_sums.resize(time * config.heads, 0.0);
        self.middle.resize(time * config.width, 0.0);
        self.packed.reserve(time, config.activation.packed() * config.mlp);
    }
}

/// Adds one layer's MLP of the rows `middle`, normed, to the residual stream `next`; keeps what goes into the activation in
/// `packed_rows`.
fn mlp_forward(
    config: &Config,
    panels: &LayerPanels,
    gain: &[f32],
    middle: &[f32],
    packed_rows: &mut Rows,
    next: &mut [f32],
    scratch: &mut Scratch,
) {
    let (width, mlp, packed) = (config.width, config.mlp, config.activation.packed() * config.mlp);
    let blocks = middle.chunks(POSITIONS * width).zip(next.chunks_mut(POSITIONS * width)).enumerate();
    for (block, (middle, next)) in blocks {
        let here = next.len() / width;
        let rows = &mut scratch.packed[..here * packed];
        let out = MatrixMut::new(rows, here, packed);
        panels.up.multiply_made(out, Target::Overwrite, &mut scratch.rows[..width], |t, normed| {
            norm::forward(&middle[t * width..(t + 1) * width], gain, config.norm_eps as f32, normed);
        });
        let out = MatrixMut::new(next, here, width);
        panels.down.multiply_made(out, Target::Add, &mut scratch.mlp_rows[..mlp], |t, mlp_row| {
            let row = &rows[t * packed..(t + 1) * packed];
            packed_rows.store(block * POSITIONS + t, Matrix::new(row, 1, packed));
            match config.activation {
                Activation::SwiGlu => activation::swiglu_forward(row, mlp, mlp_row),
                Activation::Gelu => activation::gelu_forward(row, mlp_row),
            }
        });
    }
}

/// The backward pass of one layer's MLP, whose `packed` rows the forward pass has kept: from the operands' `out_rows` to the
/// gradient of the normed rows, in `scratch.rows`.
fn mlp_backward(config: &Config, panels: &LayerPanels, packed: &Rows, operands: &mut Operands, scratch: &mut Scratch) {
    let Operands { out_rows, packed_rows, mlp_inputs, .. } = operands;
    let (width, mlp, packed_width) = (config.width, config.mlp, config.activation.packed() * config.mlp);
    let time = scratch.rows.len() / width;
    mlp_inputs.reserve(time, mlp);
    packed_rows.reserve(time, packed_width);
    for first in (0..time).step_by(POSITIONS) {
        let here = POSITIONS.min(time - first);
        let mlp_rows = &mut scratch.mlp_rows[..here * mlp];
        panels.down.multiply_rows(MatrixMut::new(mlp_rows, here, mlp), Target::Overwrite, out_rows, first);
        // Row by row, so that what is rounded and what is read again lies in the first cache.
        let (row, gradient) = (&mut scratch.packed[..packed_width], &mut scratch.packed_gradient);
        for (t, mlp_row) in (first..).zip(mlp_rows.chunks_exact_mut(mlp)) {
            packed.load(t, row);
            match config.activation {
                Activation::SwiGlu => activation::swiglu_backward(row, mlp, mlp_row, gradient),
                Activation::Gelu => activation::gelu_backward(row, mlp_row, gradient),
            }
            packed_rows.store(t, Matrix::new(gradient, 1, packed_width));
        }
        mlp_inputs.store(first, Matrix::new(mlp_rows, here, mlp));
        let out = MatrixMut::new(&mut scratch.rows[first * width..(first + here) * width], here, width);
        panels.up.multiply_rows(out, Target::Overwrite, packed_rows, first);
    }
}

/// Replaces the content by `len` zeros.
fn clear(sums: &mut Lines<f32>, len: usize) {
    sums.clear();
    sums.resize(len, 0.0);
}

/// A product whose sum over sequences is the gradient of some rows of a weight.
struct WeightTask<'a> {
    gradient: &'a mut [f32], // (rows, in), rows of the weight from `first`
    first: usize,
    inputs: usize,
    operands: fn(&Operands) -> (&Rows, &Panels),
}

/// Adds the gradients of a layer's weights, which the backward pass of its rows has prepared, to `gradient`.
fn weight_gradients(config: &Config, sequences: &[Sequence], gradient: &mut [f32]) {
    let mut rest = gradient;
    let parts = layer_sizes(config).map(|size| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(size);
        rest = after;
        part
    });
    add_gains(sequences, 0, parts[0]);
    add_gains(sequences, 1, parts[3]);
    let [_, qkv, output, _, up, down] = parts;
    let mut tasks = Vec::new();
    add_tasks(&mut tasks, down, config.mlp, |operands| (&operands.out_rows, &operands.mlp_inputs));
    add_tasks(&mut tasks, up, config.width, |operands| (&operands.packed_rows, &operands.up_inputs));
    add_tasks(&mut tasks, output, config.width, |operands| (&operands.middle_rows, &operands.output_inputs));
    add_tasks(&mut tasks, qkv, config.width, |operands| (&operands.qkv_rows, &operands.qkv_inputs));
    tasks.into_par_iter().with_max_len(1).for_each(|task| task.run(sequences));
}

/// Cuts the gradient of one weight into tasks. `operands` names the gradient of the product's rows (time, out) and what went
/// into it (time, in).
fn add_tasks<'a>(
    tasks: &mut Vec<WeightTask<'a>>,
    gradient: &'a mut [f32],
    inputs: usize,
    operands: fn(&Operands) -> (&Rows, &Panels),
) {
    for (block, gradient) in gradient.chunks_mut(WEIGHT_ROWS * inputs).enumerate() {
        tasks.push(WeightTask { gradient, first: block * WEIGHT_ROWS, inputs, operands });
    }
}

impl WeightTask<'_> {
    fn run(self, sequences: &[Sequence]) {
        let here = self.gradient.len() / self.inputs;
        for sequence in sequences {
            let (gradient, inputs) = (self.operands)(&sequence.operands);
            let sums = MatrixMut::new(self.gradient, here, self.inputs);
            inputs.multiply_turned(sums, Target::Add, gradient, self.first);
        }
    }
}

/// Adds each sequence's gradient of a gain, in the order of sequences.
fn add_gains(sequences: &[Sequence], which: usize, gradient: &mut [f32]) {
    for sequence in sequences {
        for (sum, gain) in gradient.iter_mut().zip(sequence.operands.gains[which].iter()) {
            *sum += gain;
        }
    }
}
