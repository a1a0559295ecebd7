//! Low-rank adapters: a matrix becomes `W + scale * B A`, with `A` (rank, in) and `B` (out, rank). [Hu et al., arXiv 2106.09685]
//!
//! Fine-tuning trains the adapters of one expert on a frozen model; a mixture trains those of several, one per cluster, with
//! the model that they share. Either way the adapted matrices are formed once per step, the ordinary pass runs through them,
//! and the chain rule is applied to their gradient `dW` once:
//!
//! ```text
//!   dA = scale * B^T dW        dB = scale * dW A^T        and dW itself, where the model is not frozen
//! ```
//!
//! So a step costs what it costs without adapters, in time and in memory. What they save is what has to be stored for each domain.

use std::ops::Range;

use trommel_kernels::adamw::{self, Factors};
use trommel_kernels::matmul::{Matrix, MatrixMut, Target, multiply};
use trommel_kernels::panels::Precision;

use crate::batch::Batch;
use crate::engine::Network;
use crate::model::{Adapters, Config};
use crate::native::Native;
use crate::parameters::{Layout, Slot};

/// An adapted model on the CPU, with its gradient and the moments of `AdamW`.
#[derive(Debug)]
pub(crate) struct Adapted {
    tensors: Tensors,
    native: Native,
    parameters: Vec<f32>,   // the model, then the adapters
    moments: [Vec<f32>; 2], // as long, or empty until they are needed
    gradient: Vec<f32>,     // as long
    model: Vec<f32>,        // of the plain model of `expert`
    pass: Vec<f32>,         // the gradient of `model` since it was formed
    expert: usize,
    formed: bool,
}

/// Where the tensors of an adapted model lie.
#[derive(Debug, Clone)]
pub(crate) struct Tensors {
    adapters: Adapters,
    pairs: Vec<Pair>,
    slots: Vec<Slot>,
    plain_len: usize,
}

/// One adapted matrix.
#[derive(Debug, Clone)]
struct Pair {
    matrix: Range<usize>, // (outputs, inputs)
    a: Range<usize>,      // (experts, rank, inputs)
    b: Range<usize>,      // (experts, outputs, rank)
    outputs: usize,
    inputs: usize,
}

impl Tensors {
    /// Those of an adapted model; `None` for any other.
    pub(crate) fn of(config: &Config) -> Option<Tensors> {
        let adapters = config.adapters.clone()?;
        let layout = Layout::new(config);
        let pair = |slot: &Slot| {
            let name = slot.name.strip_suffix(".weight")?;
            let [a, b] = ["lora_A", "lora_B"].map(|part| layout.slot(&format!("{name}.{part}.weight")));
            let (matrix, [outputs, inputs]) = (slot.range.clone(), [slot.shape[0], *slot.shape.get(1)?]);
            Some(Pair { matrix, a: a?.range.clone(), b: b?.range.clone(), outputs, inputs })
        };
        let pairs = layout.slots().iter().filter_map(pair).collect();
        Some(Tensors { adapters, pairs, slots: layout.slots().to_vec(), plain_len: Layout::new(&config.plain()).len() })
    }

    /// `A` and `B` of expert `i`, as places in the flat buffer.
    fn parts(&self, pair: &Pair, i: usize) -> [Range<usize>; 2] {
        let part = |whole: &Range<usize>, len: usize| whole.start + i * len..whole.start + (i + 1) * len;
        let rank = self.adapters.rank;
        [part(&pair.a, rank * pair.inputs), part(&pair.b, pair.outputs * rank)]
    }

    /// Writes the plain model that `shares` (k) of the experts' adapters make.
    pub(crate) fn merge(&self, parameters: &[f32], shares: &[f64], model: &mut [f32]) {
        model.copy_from_slice(&parameters[..self.plain_len]);
        let rank = self.adapters.rank;
        for (i, share) in shares.iter().enumerate().filter(|(_, share)| **share != 0.0) {
            for pair in &self.pairs {
                let [a, b] = self.parts(pair, i).map(|part| &parameters[part]);
                let (a, b) = (Matrix::new(a, rank, pair.inputs), Matrix::new(b, pair.outputs, rank));
                let out = MatrixMut::new(&mut model[pair.matrix.clone()], pair.outputs, pair.inputs);
                multiply(out, Target::Add, self.adapters.scale() * *share as f32, b, a);
            }
        }
    }

    /// Numbers of the plain model.
    pub(crate) fn plain_len(&self) -> usize {
        self.plain_len
    }
}

impl Adapted {
    /// The model with the flat `parameters`, whose tensors lie as `tensors` says.
    pub(crate) fn new(config: &Config, tensors: Tensors, parameters: Vec<f32>, precision: Precision) -> Adapted {
        let plain = vec![0.0; tensors.plain_len];
        Adapted {
            native: Native::new(&config.plain(), precision),
            gradient: vec![0.0; parameters.len()],
            parameters,
            moments: Default::default(),
            model: plain.clone(),
            pass: plain,
            expert: 0,
            formed: false,
            tensors,
        }
    }

    fn form(&mut self) {
        if !self.formed {
            let shares: Vec<f64> = (0..=self.expert).map(|i| f64::from(u8::from(i == self.expert))).collect();
            self.tensors.merge(&self.parameters, &shares, &mut self.model);
            self.formed = true;
        }
    }

    /// Takes the gradient of the model at hand to that of all parameters.
    fn chain(&mut self) {
        if !std::mem::take(&mut self.formed) {
            return;
        }
        let (rank, scale) = (self.tensors.adapters.rank, self.tensors.adapters.scale());
        for pair in &self.tensors.pairs {
            let change = Matrix::new(&self.pass[pair.matrix.clone()], pair.outputs, pair.inputs);
            let [a_at, b_at] = self.tensors.parts(pair, self.expert);
            let a = Matrix::new(&self.parameters[a_at.clone()], rank, pair.inputs);
            let b = Matrix::new(&self.parameters[b_at.clone()], pair.outputs, rank);
            let out = MatrixMut::new(&mut self.gradient[a_at], rank, pair.inputs);
            multiply(out, Target::Add, scale, b.transposed(), change);
            let out = MatrixMut::new(&mut self.gradient[b_at], pair.outputs, rank);
            multiply(out, Target::Add, scale, change, a.transposed());
        }
        if !self.tensors.adapters.frozen {
            self.gradient.iter_mut().zip(&self.pass).for_each(|(sum, g)| *sum += g);
        }
        self.pass.fill(0.0);
    }
}

impl Network for Adapted {
    fn select(&mut self, i: usize) {
        assert!(i < self.tensors.adapters.experts, "expert {i} is beyond the model's");
        if self.expert != i {
            self.chain();
            self.expert = i;
        }
    }

    fn native(&mut self) -> (&mut Native, &[f32]) {
        self.form();
        (&mut self.native, &self.model)
    }

    fn accumulate(&mut self, batch: &Batch, scale: f32) -> &[f32] {
        self.form();
        self.native.losses_and_gradient(&self.model, batch, None, scale, &mut self.pass)
    }

    fn gradient_norm(&mut self) -> f64 {
        self.chain();
        adamw::norm(&self.gradient)
    }

    /// The flat gradient that was accumulated; zeros for a frozen model.
    fn gradient(&mut self) -> Vec<f32> {
        self.chain();
        self.gradient.clone()
    }

    fn step(&mut self, factors: Factors) {
        self.chain();
        let [m, v] = &mut self.moments;
        m.resize(self.parameters.len(), 0.0);
        v.resize(self.parameters.len(), 0.0);
        let first = if self.tensors.adapters.frozen { self.tensors.plain_len } else { 0 };
        for slot in self.tensors.slots.iter().filter(|slot| slot.range.start >= first) {
            let at = slot.range.clone();
            let factors = if slot.decays() { factors } else { Factors { decay: 0.0, ..factors } };
            let (parameters, gradient) = (&mut self.parameters[at.clone()], &mut self.gradient[at.clone()]);
            adamw::step(parameters, gradient, &mut m[at.clone()], &mut v[at], factors);
        }
    }

    fn parameters(&self) -> &[f32] {
        &self.parameters
    }

    fn moments(&self) -> &[Vec<f32>; 2] {
        &self.moments
    }

    fn set_moments(&mut self, moments: [Vec<f32>; 2]) {
        self.moments = moments;
    }
}
