//! The projected network: many experts that share most of their numbers, each of which projects to a small model. [PE 2.5]
//!
//! Training works on the plain model of one expert at a time. Its MLPs are mixed from the basis, its batches run through
//! the ordinary forward and backward pass, and the gradient of its MLPs is set aside; at the end of the step the chain rule
//! is applied once for all experts of the step:
//!
//! ```text
//!   E_i, M, T --mix--> W_i --batches of cluster i--> dW_i          for each expert i of the step
//!   dalpha_(i,r) = <T_r, dW_i>      dT_r = sum_i alpha_(i,r) dW_i  once per step
//!   dM[q,r] = sum_i E[i,q] dalpha_(i,r)      dE[i,q] = sum_(l,r) M^(l)[q,r] dalpha^(l)_(i,r)
//! ```
//!
//! Memory is 12 bytes per number of the basis (itself and two moments: its gradient is never formed, see
//! `trommel_kernels::projection`), and 4 bytes per number of an MLP for each expert of a step.

use std::ops::Range;
use std::path::Path;

use trommel_core::error::{Error, Result};
use trommel_kernels::adamw::{self, Factors};
use trommel_kernels::panels::Precision;
use trommel_kernels::projection as kernel;

use crate::batch::Batch;
use crate::checkpoint::{self, Model};
use crate::engine::Network;
use crate::lora;
use crate::model::{Config, Projection};
use crate::native::Native;
use crate::parameters::{Layout, Slot, mlp_range};

/// A projected network on the CPU, with its gradient and the moments of `AdamW`.
#[derive(Debug)]
pub(crate) struct Projected {
    tensors: Tensors,
    native: Native,
    parameters: Vec<f32>,   // of the network
    moments: [Vec<f32>; 2], // as long, or empty until they are needed
    model: Vec<f32>,        // of the plain model of `expert`
    gradient: Vec<f32>,     // of the plain model; its MLPs are those of `expert`
    expert: Option<usize>,
    own: Vec<Own>,        // of each expert that the step has seen
    spare: Vec<Vec<f32>>, // memory of the experts of earlier steps
    mixed: Option<MixedGradients>,
}

/// What a step holds for one expert: first its MLPs, once it is selected their gradient.
#[derive(Debug)]
struct Own {
    expert: usize,
    numbers: Vec<f32>, // (layers, numbers of an MLP)
    selected: bool,
}

/// Where the tensors of a network lie, and which of them the plain model has too.
#[derive(Debug, Clone)]
pub(crate) struct Tensors {
    pub(crate) projection: Projection,
    pub(crate) layers: Vec<Layer>,
    pub(crate) experts: Range<usize>,
    /// Plain slots, and their place in the network.
    shared: Vec<(Slot, Range<usize>)>,
    slots: Vec<Slot>,
    plain_len: usize,
}

/// Where the tensors of one layer lie.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) basis: Range<usize>,  // (h, numbers of an MLP), in the network
    pub(crate) mixing: Range<usize>, // (m, h), in the network
    mlp: Range<usize>,               // in the plain model
}

/// Gradients of what mixes the experts.
#[derive(Debug)]
struct MixedGradients {
    mixing: Vec<Vec<f32>>, // layers times (m, h)
    experts: Vec<f32>,     // (k, m)
}

impl Tensors {
    /// Those of a network; `None` for the shape of a plain model.
    pub(crate) fn of(config: &Config) -> Option<Tensors> {
        let projection = config.projection?;
        let (network, plain) = (Layout::new(config), Layout::new(&config.plain()));
        let shared =
            plain.slots().iter().filter_map(|slot| Some((slot.clone(), network.slot(&slot.name)?.range.clone()))).collect();
        // In the order of the buffer: a basis, then its mixing matrix, for each layer; the experts come last.
        let own: Vec<&Slot> = network.slots().iter().filter(|slot| plain.slot(&slot.name).is_none()).collect();
        let (experts, layers) = own.split_last()?;
        let layer = |(layer, pair): (usize, &[&Slot])| Layer {
            basis: pair[0].range.clone(),
            mixing: pair[1].range.clone(),
            mlp: mlp_range(&config.plain(), layer),
        };
        let layers = layers.chunks_exact(2).enumerate().map(layer).collect();
        let (experts, plain_len) = (experts.range.clone(), plain.len());
        Some(Tensors { projection, layers, experts, shared, slots: network.slots().to_vec(), plain_len })
    }

    /// `E_i` (m).
    fn expert<'a>(&self, parameters: &'a [f32], i: usize) -> &'a [f32] {
        let size = self.projection.expert_size;
        &parameters[self.experts.clone()][i * size..(i + 1) * size]
    }

    /// `alpha = M^T vector` (h) of one layer.
    fn coefficients(&self, parameters: &[f32], layer: usize, vector: &[f32]) -> Vec<f32> {
        let mut alpha = vec![0.0; self.projection.capacity];
        let mixing = &parameters[self.layers[layer].mixing.clone()];
        for (row, weight) in mixing.chunks_exact(self.projection.capacity).zip(vector) {
            alpha.iter_mut().zip(row).for_each(|(alpha, m)| *alpha += weight * m);
        }
        alpha
    }

    /// `alpha` of every expert in one layer, (k, h).
    pub(crate) fn alpha(&self, parameters: &[f32], layer: usize) -> Vec<Vec<f32>> {
        let of = |i: usize| self.coefficients(parameters, layer, self.expert(parameters, i));
        (0..self.projection.experts).map(of).collect()
    }

    /// The basis `T` of one layer, (h, numbers of an MLP).
    pub(crate) fn basis<'a>(&self, parameters: &'a [f32], layer: usize) -> Vec<&'a [f32]> {
        let layer = &self.layers[layer];
        parameters[layer.basis.clone()].chunks_exact(layer.mlp.len()).collect()
    }

    /// Writes the plain model that `vector` (m) projects to.
    fn project(&self, parameters: &[f32], vector: &[f32], model: &mut [f32]) {
        self.share(parameters, model);
        for (l, layer) in self.layers.iter().enumerate() {
            let alpha = self.coefficients(parameters, l, vector);
            kernel::mix(&parameters[layer.basis.clone()], &[&alpha], &mut [&mut model[layer.mlp.clone()]]);
        }
    }

    /// Writes what all experts share.
    fn share(&self, parameters: &[f32], model: &mut [f32]) {
        for (slot, range) in &self.shared {
            model[slot.range.clone()].copy_from_slice(&parameters[range.clone()]);
        }
    }
}

/// The parameters of the plain model that a mixture of a network's experts projects to: `alpha = M^T (sum_i p_i E_i)`.
/// `shares` (k) are usually 1 for one expert, or a domain's histogram over the clusters. \[SE\] for the mixture. With adapters it is
/// `W + scale * sum_i p_i B_i A_i`.
pub fn project(config: &Config, parameters: &[f32], shares: &[f64]) -> Result<Vec<f32>> {
    let experts = config.experts();
    if config.projection.is_none() && config.adapters.is_none() {
        return Err(Error::config("the checkpoint is a plain model, not a network of experts"));
    }
    if shares.len() != experts {
        let message = format!("{} shares are given for a network of {experts} experts", shares.len());
        return Err(Error::config(message).hint("a network has one expert for each cluster that it was trained on"));
    }
    if let Some(tensors) = lora::Tensors::of(config) {
        let mut model = vec![0.0; tensors.plain_len()];
        tensors.merge(parameters, shares, &mut model);
        return Ok(model);
    }
    let tensors = Tensors::of(config).ok_or_else(|| Error::internal("a network without tensors"))?;
    let mut vector = vec![0.0; tensors.projection.expert_size];
    for (i, share) in shares.iter().enumerate() {
        let expert = tensors.expert(parameters, i);
        vector.iter_mut().zip(expert).for_each(|(sum, e)| *sum += *share as f32 * e);
    }
    let mut model = vec![0.0; tensors.plain_len];
    tensors.project(parameters, &vector, &mut model);
    Ok(model)
}

/// Writes the plain model that `shares` (k) of the network in `checkpoint` project to, as a checkpoint in `folder`.
pub fn write(checkpoint: &Path, shares: &[f64], folder: &Path) -> Result<()> {
    let network = checkpoint::read_model(checkpoint)?;
    let parameters = project(&network.config, &network.parameters, shares).map_err(|e| e.file(checkpoint.display()))?;
    let model = Model { config: network.config.plain(), end_of_text: network.end_of_text, parameters };
    let state = serde_json::json!({ "projected_from": checkpoint, "shares": shares });
    checkpoint::save(folder, &model, &checkpoint::tokenizer(checkpoint), None, &state)
}

impl Projected {
    /// The network with the flat `parameters`, whose tensors lie as `tensors` says.
    pub(crate) fn new(config: &Config, tensors: Tensors, parameters: Vec<f32>, precision: Precision) -> Projected {
        let plain = vec![0.0; tensors.plain_len];
        Projected {
            native: Native::new(&config.plain(), precision),
            parameters,
            moments: Default::default(),
            model: plain.clone(),
            gradient: plain,
            expert: None,
            own: Vec::new(),
            spare: Vec::new(),
            mixed: None,
            tensors,
        }
    }

    /// Room for the MLPs of one expert, with anything in it.
    fn memory(&mut self) -> Vec<f32> {
        let numbers = self.tensors.layers.iter().map(|layer| layer.mlp.len()).sum();
        self.spare.pop().unwrap_or_else(|| vec![0.0; numbers])
    }

    /// Takes the MLPs' gradient of the expert at hand out of `gradient`.
    fn set_gradient_aside(&mut self) {
        let Some(expert) = self.expert.take() else { return };
        let index = self.own.iter().position(|own| own.expert == expert).unwrap_or_else(|| {
            let mut numbers = self.memory();
            numbers.fill(0.0);
            self.own.push(Own { expert, numbers, selected: true });
            self.own.len() - 1
        });
        let mut rest = self.own[index].numbers.as_mut_slice();
        for layer in &self.tensors.layers {
            let (sum, after) = rest.split_at_mut(layer.mlp.len());
            let gradient = &mut self.gradient[layer.mlp.clone()];
            sum.iter_mut().zip(gradient.iter()).for_each(|(sum, g)| *sum += g);
            gradient.fill(0.0);
            rest = after;
        }
    }

    /// The experts' gradients of one layer's MLP, and their coefficients.
    fn of_layer(&self, layer: usize) -> (Vec<&[f32]>, Vec<Vec<f32>>) {
        let len = self.tensors.layers[layer].mlp.len();
        let gradients = self.own.iter().map(|own| &own.numbers[layer * len..(layer + 1) * len]).collect();
        let alpha = |i: usize| self.tensors.coefficients(&self.parameters, layer, self.tensors.expert(&self.parameters, i));
        (gradients, self.own.iter().map(|own| alpha(own.expert)).collect())
    }
}

impl Network for Projected {
    /// Mixes the MLPs of the experts of a step together, which reads the basis once. [`Projected::select`] does without.
    fn prepare(&mut self, experts: &[usize]) {
        let first = self.own.len();
        for &expert in experts {
            if self.expert != Some(expert) && !self.own.iter().any(|own| own.expert == expert) {
                let numbers = self.memory();
                self.own.push(Own { expert, numbers, selected: false });
            }
        }
        for (l, layer) in self.tensors.layers.iter().enumerate() {
            let len = layer.mlp.len();
            let of =
                |own: &Own| self.tensors.coefficients(&self.parameters, l, self.tensors.expert(&self.parameters, own.expert));
            let alphas: Vec<Vec<f32>> = self.own[first..].iter().map(of).collect();
            let alphas: Vec<&[f32]> = alphas.iter().map(Vec::as_slice).collect();
            let mut mlps: Vec<&mut [f32]> =
                self.own[first..].iter_mut().map(|own| &mut own.numbers[l * len..(l + 1) * len]).collect();
            kernel::mix(&self.parameters[layer.basis.clone()], &alphas, &mut mlps);
        }
    }

    fn select(&mut self, i: usize) {
        assert!(i < self.tensors.projection.experts, "expert {i} is beyond the network's");
        if self.expert == Some(i) {
            return;
        }
        self.set_gradient_aside();
        self.expert = Some(i);
        match self.own.iter_mut().find(|own| own.expert == i && !own.selected) {
            Some(own) => {
                self.tensors.share(&self.parameters, &mut self.model);
                let mlps = own.numbers.chunks_exact(own.numbers.len() / self.tensors.layers.len());
                for (layer, mlp) in self.tensors.layers.iter().zip(mlps) {
                    self.model[layer.mlp.clone()].copy_from_slice(mlp);
                }
                own.numbers.fill(0.0);
                own.selected = true;
            }
            None => self.tensors.project(&self.parameters, self.tensors.expert(&self.parameters, i), &mut self.model),
        }
    }

    fn native(&mut self) -> (&mut Native, &[f32]) {
        assert!(self.expert.is_some(), "no expert is selected");
        (&mut self.native, &self.model)
    }

    fn accumulate(&mut self, batch: &Batch, scale: f32) -> &[f32] {
        assert!(self.expert.is_some(), "no expert is selected");
        self.native.losses_and_gradient(&self.model, batch, None, scale, &mut self.gradient)
    }

    /// The Euclidean norm of the gradient that was accumulated. Applies the chain rule to what mixes the experts.
    fn gradient_norm(&mut self) -> f64 {
        self.set_gradient_aside();
        self.own.retain(|own| own.selected);
        let Projection { expert_size, capacity, frozen, .. } = self.tensors.projection;
        let mut squares = adamw::norm(&self.gradient).powi(2);
        let mut mixed = MixedGradients { mixing: Vec::new(), experts: vec![0.0; self.tensors.experts.len()] };
        for (l, layer) in self.tensors.layers.iter().enumerate() {
            let (gradients, alphas) = self.of_layer(l);
            let rows: Vec<&[f32]> = alphas.iter().map(Vec::as_slice).collect();
            squares += kernel::squared_norm(&rows, &kernel::gram(&gradients));
            if frozen {
                continue;
            }
            let slopes = kernel::coefficient_gradients(&self.parameters[layer.basis.clone()], &gradients);
            let mixing = &self.parameters[layer.mixing.clone()];
            let mut mixing_gradient = vec![0.0; mixing.len()];
            for (i, slopes) in self.own.iter().map(|own| own.expert).zip(slopes.chunks_exact(capacity)) {
                let expert = self.tensors.expert(&self.parameters, i);
                let own = &mut mixed.experts[i * expert_size..(i + 1) * expert_size];
                let rows = mixing.chunks_exact(capacity).zip(mixing_gradient.chunks_exact_mut(capacity));
                for (((mixing, gradient), weight), own) in rows.zip(expert).zip(own) {
                    *own += mixing.iter().zip(slopes).map(|(m, s)| m * s).sum::<f32>();
                    gradient.iter_mut().zip(slopes).for_each(|(sum, s)| *sum += weight * s);
                }
            }
            mixed.mixing.push(mixing_gradient);
        }
        squares += mixed.mixing.iter().chain([&mixed.experts]).map(|g| adamw::norm(g).powi(2)).sum::<f64>();
        self.mixed = Some(mixed);
        squares.sqrt()
    }

    /// The flat gradient that was accumulated; forms that of the basis, which training never does.
    fn gradient(&mut self) -> Vec<f32> {
        self.gradient_norm();
        let mut flat = vec![0.0; self.parameters.len()];
        for (slot, range) in &self.tensors.shared {
            flat[range.clone()].copy_from_slice(&self.gradient[slot.range.clone()]);
        }
        for (l, layer) in self.tensors.layers.iter().enumerate() {
            let (gradients, alphas) = self.of_layer(l);
            for (r, basis) in flat[layer.basis.clone()].chunks_exact_mut(layer.mlp.len()).enumerate() {
                for (alpha, gradient) in alphas.iter().zip(&gradients) {
                    basis.iter_mut().zip(*gradient).for_each(|(sum, g)| *sum += alpha[r] * g);
                }
            }
        }
        if let Some(mixed) = self.mixed.as_ref().filter(|_| !self.tensors.projection.frozen) {
            for (layer, gradient) in self.tensors.layers.iter().zip(&mixed.mixing) {
                flat[layer.mixing.clone()].copy_from_slice(gradient);
            }
            flat[self.tensors.experts.clone()].copy_from_slice(&mixed.experts);
        }
        flat
    }

    fn step(&mut self, factors: Factors) {
        if self.mixed.is_none() {
            self.gradient_norm();
        }
        let [m, v] = &mut self.moments;
        m.resize(self.parameters.len(), 0.0);
        v.resize(self.parameters.len(), 0.0);
        // Coefficients of the step that is taken, before `E` and `M` move.
        let layers: Vec<_> = (0..self.tensors.layers.len()).map(|l| self.of_layer(l).1).collect();
        let mut layers = layers.iter().enumerate();
        let mut mixing = self.mixed.take().into_iter().flat_map(|mixed| {
            let MixedGradients { mixing, experts } = mixed;
            mixing.into_iter().chain([experts])
        });
        let [m, v] = &mut self.moments;
        for slot in &self.tensors.slots {
            let at = slot.range.clone();
            let factors = if slot.decays() { factors } else { Factors { decay: 0.0, ..factors } };
            let (parameters, m, v) = (&mut self.parameters[at.clone()], &mut m[at.clone()], &mut v[at.clone()]);
            if let Some((plain, _)) = self.tensors.shared.iter().find(|(_, range)| *range == at) {
                adamw::step(parameters, &mut self.gradient[plain.range.clone()], m, v, factors);
            } else if slot.is_basis() {
                let Some((l, alphas)) = layers.next() else { continue };
                let len = self.tensors.layers[l].mlp.len();
                let gradients: Vec<&[f32]> = self.own.iter().map(|own| &own.numbers[l * len..(l + 1) * len]).collect();
                let alphas: Vec<&[f32]> = alphas.iter().map(Vec::as_slice).collect();
                let rates = self.tensors.projection.rates(self.own.len());
                let of = |r: usize| Factors { learning_rate: rates[r] * factors.learning_rate, ..factors };
                kernel::step(parameters, m, v, &alphas, &gradients, of);
            } else if !self.tensors.projection.frozen
                && let Some(mut gradient) = mixing.next()
            {
                adamw::step(parameters, &mut gradient, m, v, factors);
            }
        }
        // The steps have left zeros in `gradient`, where the MLPs' were set aside before.
        self.spare.extend(self.own.drain(..).map(|own| own.numbers));
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
