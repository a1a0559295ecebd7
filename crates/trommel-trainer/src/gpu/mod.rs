//! The model on a GPU: passes by hand over kernels of its own, in `f32` or with rows in `bf16`.
//!
//! Parameters, gradient and moments are one flat buffer each, as on the CPU, and stay on the device. A projected network mixes
//! the MLPs of a step's experts at once and applies the chain rule once, as `crate::projected` says; here the gradient of the
//! basis is formed, which costs memory and saves passes over it.

/// The operations on an NVIDIA GPU.
#[cfg(feature = "cuda")]
mod cuda;
/// What the passes are made of.
mod ops;
/// The passes of a plain model.
mod pass;
/// The operations in plain Rust.
mod twins;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use trommel_kernels::adamw::Factors;
use trommel_kernels::panels::Precision;

use self::ops::{Kernels, Spot, as_is, transposed};
use self::pass::{Gradients, Layer, LayerGradients, Mlp, Parts, Pass, Weights};
use crate::batch::Batch;
use crate::model::{Activation, Config, Projection};
use crate::parameters::{Layout, Slot, layer_sizes};
use crate::projected::{self, Tensors};

/// Numbers of a row whose sums fit into the shared memory of a block.
const WIDTH_MOST: usize = 12_000;
/// Rows of blocks that a kernel is called with.
const CAPACITY_MOST: usize = 65_535;

/// A plain model or a projected network on a device.
#[derive(Debug)]
pub struct Gpu {
    config: Config,
    layout: Layout,
    kernels: Box<dyn Kernels>,
    pass: Pass,
    rows: DType,
    parameters: Tensor,             // flat
    gradient: Option<Tensor>,       // flat, once there is one
    moments: Option<[Tensor; 2]>,   // flat, once there are any
    losses: Option<Tensor>,         // the sum of those accumulated
    casts: HashMap<usize, Tensor>,  // matrices of this step's parameters as rows, by their place
    groups: Vec<[Range<usize>; 6]>, // of each layer
    last_gain: Range<usize>,
    network: Option<Mixed>,
}

/// What makes the plain models of a network.
#[derive(Debug)]
struct Mixed {
    tensors: Tensors,           // where those of the network lie in the flat buffer
    mixed: Vec<usize>,          // the experts whose MLPs are at hand
    vectors: Option<Tensor>,    // (mixed, m), theirs
    alphas: Vec<Tensor>,        // layers times (mixed, h)
    mlps: Vec<Tensor>,          // layers times (mixed, numbers), as rows
    mlp_gradients: Vec<Tensor>, // layers times (mixed * numbers), once there are any
    selected: Option<usize>,    // of `mixed`
    added: BTreeSet<usize>,     // places in `mixed` that have a gradient
    chained: bool,              // whether the basis has its gradient of this step
    seen: BTreeSet<usize>,      // experts that the gradient comes from
}

impl Mixed {
    /// The network; `None` for a plain model.
    fn of(config: &Config) -> Option<Mixed> {
        Some(Mixed {
            tensors: Tensors::of(config)?,
            mixed: Vec::new(),
            vectors: None,
            alphas: Vec::new(),
            mlps: Vec::new(),
            mlp_gradients: Vec::new(),
            selected: None,
            added: BTreeSet::new(),
            chained: false,
            seen: BTreeSet::new(),
        })
    }

    /// Forgets the experts at hand.
    fn forget(&mut self) {
        (self.vectors, self.selected) = (None, None);
        self.mixed.clear();
        self.alphas.clear();
        self.mlps.clear();
    }
}

/// Where the groups of each layer lie in the flat buffer, in the order of [`layer_sizes`]; of a network's MLPs, where they lie in an
/// expert's.
fn groups(config: &Config, layout: &Layout) -> Result<Vec<[Range<usize>; 6]>> {
    let sizes = layer_sizes(config);
    let group = |layer: usize| {
        let at = |name: &str| {
            let name = format!("model.layers.{layer}.{name}.weight");
            let start = layout.slot(&name).map(|slot| slot.range.start);
            start.ok_or_else(|| candle_core::Error::msg(format!("the model has no tensor `{name}`")))
        };
        let up = match config.activation {
            _ if config.projection.is_some() => 0,
            Activation::SwiGlu => at("mlp.gate_proj")?,
            Activation::Gelu => at("mlp.up_proj")?,
        };
        let starts = [
            at("input_layernorm")?,
            at("self_attn.q_proj")?,
            at("self_attn.o_proj")?,
            at("post_attention_layernorm")?,
            up,
            up + sizes[4],
        ];
        Ok(std::array::from_fn(|i| starts[i]..starts[i] + sizes[i]))
    };
    (0..config.layers).map(group).collect()
}

/// A part of a flat buffer, in this shape.
fn view(buffer: &Tensor, range: &Range<usize>, shape: &[usize]) -> Result<Tensor> {
    buffer.narrow(0, range.start, range.len())?.reshape(shape)
}

fn spot(buffer: &Tensor, range: Range<usize>) -> Spot {
    Spot { buffer: buffer.clone(), start: range.start, len: range.len(), fresh: false }
}

impl Gpu {
    /// Whether a model of this shape runs here: one without adapters.
    pub fn runs(config: &Config) -> bool {
        config.adapters.is_none()
    }

    /// A model with the flat `parameters` on `device`, whose rows have `precision`. The CPU computes slowly, for tests.
    pub fn new(config: &Config, parameters: &[f32], device: &Device, precision: Precision) -> Result<Gpu> {
        if !Gpu::runs(config) {
            candle_core::bail!("adapters run on the tape");
        }
        let capacity = config.projection.map_or(0, |projection| projection.capacity);
        if config.width > WIDTH_MOST || capacity > CAPACITY_MOST {
            candle_core::bail!(
                "a GPU's kernels take rows of up to {WIDTH_MOST} numbers, and up to {CAPACITY_MOST} MLPs in a basis"
            );
        }
        let kernels: Box<dyn Kernels> = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Box::new(cuda::Cuda::new(device)?),
            _ => Box::new(twins::Twins),
        };
        let rows = match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        };
        let layout = Layout::new(config);
        let Some(last_gain) = layout.slot("model.norm.weight") else { candle_core::bail!("the model has no last norm") };
        Ok(Gpu {
            network: Mixed::of(config),
            groups: groups(config, &layout)?,
            last_gain: last_gain.range.clone(),
            pass: Pass::new(&config.plain(), rows, device)?,
            parameters: Tensor::from_slice(parameters, parameters.len(), device)?,
            config: config.clone(),
            kernels,
            layout,
            rows,
            gradient: None,
            moments: None,
            losses: None,
            casts: HashMap::new(),
        })
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.parameters.device()
    }

    /// Sequences of `time` tokens whose activations fit into a quarter of what the model leaves of the device's memory.
    pub fn micro_batch(&self, time: usize) -> usize {
        let c = &self.config;
        let (row, packed, square) = (self.rows.size_in_bytes(), c.activation.packed() * c.mlp, c.heads * time);
        // Two residual streams, and rows: two norms, queries, keys, values, what was attended, the MLP, the shares of attention.
        let kept = c.layers * (8 * c.width + row * (6 * c.width + packed + square));
        let passing = 16 * c.width + 2 * row * packed + (4 + row) * square;
        // Parameters, gradient, moments and casts; and what a step holds for each expert.
        let experts = if c.projection.is_some() { c.experts() * c.layers * c.mlp_weights() } else { 0 };
        let held = (16 + row) * self.layout.len() + (4 + row) * experts;
        (self.kernels.memory().saturating_sub(held) / 4 / ((kept + passing) * time)).max(1)
    }

    /// The flat parameters, on the host.
    pub fn parameters(&self) -> Result<Vec<f32>> {
        self.parameters.to_vec1()
    }

    /// The flat gradient, on the host.
    pub fn gradient(&mut self) -> Result<Vec<f32>> {
        self.complete_gradient()?;
        self.gradient.as_ref().map_or_else(|| Ok(vec![0.0; self.layout.len()]), Tensor::to_vec1)
    }

    /// Both flat moments, on the host.
    pub fn moments(&self) -> Result<[Vec<f32>; 2]> {
        let Some([m, v]) = &self.moments else { return Ok([(); 2].map(|()| vec![0.0; self.layout.len()])) };
        Ok([m.to_vec1()?, v.to_vec1()?])
    }

    /// Replaces both moments.
    pub fn set_moments(&mut self, [m, v]: [&[f32]; 2]) -> Result<()> {
        let tensor = |flat: &[f32]| Tensor::from_slice(flat, flat.len(), self.parameters.device());
        self.moments = Some([tensor(m)?, tensor(v)?]);
        Ok(())
    }

    /// Mixes the MLPs of the experts of a step, `W_i = sum_r alpha_(i,r) T_r`, in one pass over each basis. [PE 2.5]
    pub fn prepare_experts(&mut self, experts: &[usize]) -> Result<()> {
        self.apply_chain_rule()?;
        let Some(network) = &mut self.network else { return Ok(()) };
        let Projection { experts: most, expert_size, capacity, .. } = network.tensors.projection;
        if let Some(beyond) = experts.iter().find(|expert| **expert >= most) {
            candle_core::bail!("expert {beyond} is beyond the network's {most}");
        }
        network.forget();
        network.mixed = experts.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let vectors = view(&self.parameters, &network.tensors.experts, &[most, expert_size])?;
        let vectors = vectors.index_select(&rows_of(&network.mixed, self.parameters.device())?, 0)?;
        for projected::Layer { basis, mixing, .. } in &network.tensors.layers {
            let mixing = view(&self.parameters, mixing, &[expert_size, capacity])?;
            let basis = view(&self.parameters, basis, &[capacity, basis.len() / capacity])?;
            let alpha = self.kernels.multiply(as_is(&vectors), as_is(&mixing), DType::F32)?;
            network.mlps.push(self.kernels.mix(&alpha, &basis, self.rows)?);
            network.alphas.push(alpha);
        }
        network.vectors = Some(vectors);
        Ok(())
    }

    /// Makes the next batches run through expert `i`; of no meaning for a plain model.
    pub fn select_expert(&mut self, i: usize) -> Result<()> {
        if self.network.as_ref().is_some_and(|network| !network.mixed.contains(&i)) {
            self.prepare_experts(&[i])?;
        }
        if let Some(network) = &mut self.network {
            network.selected = network.mixed.iter().position(|expert| *expert == i);
        }
        Ok(())
    }

    /// The plain models of the experts at these places of `mixed`; of a plain model, the model.
    fn weights(&mut self, places: &[usize]) -> Result<Weights> {
        let config = &self.config;
        let (width, packed) = (config.width, config.activation.packed() * config.mlp);
        let flat = &self.parameters;
        let casts = &mut self.casts;
        let mut matrix = |range: &Range<usize>, shape: [usize; 2]| -> Result<Tensor> {
            if let Some(cast) = casts.get(&range.start) {
                return Ok(cast.clone());
            }
            let cast = view(flat, range, &shape)?.to_dtype(self.rows)?;
            casts.insert(range.start, cast.clone());
            Ok(cast)
        };
        let layer = |(l, [attention_gain, qkv, output, mlp_gain, up, down]): (usize, &[Range<usize>; 6])| {
            let (qkv, output) = (matrix(qkv, [3 * width, width])?, matrix(output, [width, width])?);
            let (up_shape, down_shape) = ([packed, width], [width, config.mlp]);
            let mlps = match &self.network {
                None => vec![Mlp { up: matrix(up, up_shape)?, down: matrix(down, down_shape)? }],
                Some(network) => {
                    let Some(mlps) = network.mlps.get(l) else { candle_core::bail!("no expert is prepared") };
                    let mlp = |place: &usize| {
                        let mlp = mlps.get(*place)?;
                        Ok(Mlp { up: view(&mlp, up, &up_shape)?, down: view(&mlp, down, &down_shape)? })
                    };
                    places.iter().map(mlp).collect::<Result<_>>()?
                }
            };
            Ok(Layer {
                attention_gain: view(flat, attention_gain, &[width])?,
                qkv,
                output,
                mlp_gain: view(flat, mlp_gain, &[width])?,
                mlps,
            })
        };
        let layers = self.groups.iter().enumerate().map(layer).collect::<Result<_>>()?;
        let table = 0..config.vocab * width;
        Ok(Weights {
            table: view(flat, &table, &[config.vocab, width])?,
            table_rows: matrix(&table, [config.vocab, width])?,
            last_gain: view(flat, &self.last_gain, &[width])?,
            layers,
        })
    }

    /// The buffers that the gradients of the experts at these places are added to, made anew if there are none.
    fn gradients(&mut self, places: &[usize]) -> Result<Gradients> {
        let zeros = |len: usize| Tensor::zeros(len, DType::F32, self.parameters.device());
        if self.gradient.is_none() {
            self.gradient = Some(zeros(self.layout.len())?);
        }
        let mut fresh = Vec::new();
        if let Some(network) = &mut self.network {
            if network.mlp_gradients.is_empty() {
                let room = |mlps: &Tensor| self.kernels.room(&[mlps.elem_count()], DType::F32);
                network.mlp_gradients = network.mlps.iter().map(room).collect::<Result<_>>()?;
            }
            fresh = places.iter().map(|place| network.added.insert(*place)).collect();
            network.seen.extend(places.iter().filter_map(|place| network.mixed.get(*place)));
        }
        let Some(flat) = &self.gradient else { candle_core::bail!("no gradient") };
        let layer = |(l, group): (usize, &[Range<usize>; 6])| {
            let [attention_gain, qkv, output, mlp_gain, up, down] = group.clone();
            let mlps = match &self.network {
                None => vec![[spot(flat, up), spot(flat, down)]],
                Some(network) => {
                    let mlps = &network.mlp_gradients[l];
                    let len = mlps.elem_count() / network.mixed.len();
                    let mlp = |(place, fresh): (&usize, &bool)| {
                        let part = |range: &Range<usize>| {
                            let first = place * len;
                            Spot { fresh: *fresh, ..spot(mlps, first + range.start..first + range.end) }
                        };
                        [part(&up), part(&down)]
                    };
                    places.iter().zip(&fresh).map(mlp).collect()
                }
            };
            let [attention_gain, qkv, output, mlp_gain] =
                [attention_gain, qkv, output, mlp_gain].map(|range| spot(flat, range));
            LayerGradients { attention_gain, qkv, output, mlp_gain, mlps }
        };
        Ok(Gradients {
            table: spot(flat, 0..self.config.vocab * self.config.width),
            layers: self.groups.iter().enumerate().map(layer).collect(),
            last_gain: spot(flat, self.last_gain.clone()),
        })
    }

    /// The negative log-likelihood of each target, (sequences * time); zero where there is none.
    pub fn losses(&mut self, batch: &Batch) -> Result<Tensor> {
        let weights = self.weights(&[self.selected()?])?;
        self.pass.losses(&*self.kernels, &weights, batch)
    }

    /// The logits after the last position of each sequence, (sequences, vocab).
    pub fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let weights = self.weights(&[self.selected()?])?;
        self.pass.logits(&*self.kernels, &weights, batch)?.flatten_all()?.to_vec1()
    }

    /// The place of the selected expert; of a plain model, 0.
    fn selected(&self) -> Result<usize> {
        let place = self.network.as_ref().map_or(Some(0), |network| network.selected);
        place.ok_or_else(|| candle_core::Error::msg("no expert is selected"))
    }

    /// The losses, and adds the gradient of `scale` times their sum.
    pub fn losses_and_gradient(&mut self, batch: &Batch, scale: f32) -> Result<Tensor> {
        let place = self.selected()?;
        self.losses_and_gradient_at(&[place], &Parts::whole(batch), scale)
    }

    /// Adds the gradient of `scale` times the sum of the losses, without waiting for it.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<()> {
        let place = self.selected()?;
        self.accumulate_parts(&[place], &Parts::whole(batch), scale)
    }

    fn losses_and_gradient_at(&mut self, places: &[usize], parts: &Parts<'_>, scale: f32) -> Result<Tensor> {
        let (weights, gradients) = (self.weights(places)?, self.gradients(places)?);
        self.pass.losses_and_gradient(&*self.kernels, &weights, &gradients, parts, scale)
    }

    /// Adds the gradient of `scale` times the sum of the losses of all batches, each of its expert, without waiting for it. Batches run
    /// through the model together, as many as fit.
    pub fn accumulate_all(&mut self, batches: &[(usize, Batch)], scale: f32) -> Result<()> {
        let experts: Vec<usize> = batches.iter().map(|(expert, _)| *expert).collect();
        if self.network.as_ref().is_some_and(|network| experts.iter().any(|expert| !network.mixed.contains(expert))) {
            self.prepare_experts(&experts)?;
        }
        let (mut together, mut places, mut sequences) = (Batch::new(1), Vec::new(), Vec::new());
        for (expert, batch) in batches {
            let mixed = self.network.as_ref().map_or(&[][..], |network| &network.mixed);
            let place = mixed.iter().position(|mixed| mixed == expert).unwrap_or(0);
            let most = self.micro_batch(batch.time);
            for part in batch.parts(most) {
                if together.time != part.time || together.sequences() + part.sequences() > most {
                    self.accumulate_parts(&places, &Parts { batch: &together, sequences }, scale)?;
                    (together, places, sequences) = (Batch::new(part.time), Vec::new(), Vec::new());
                }
                match sequences.last_mut().filter(|_| places.last() == Some(&place)) {
                    Some(last) => *last += part.sequences(),
                    None => {
                        places.push(place);
                        sequences.push(part.sequences());
                    }
                }
                together.append(part);
            }
        }
        self.accumulate_parts(&places, &Parts { batch: &together, sequences }, scale)?;
        match batches.last() {
            Some((expert, _)) => self.select_expert(*expert),
            None => Ok(()),
        }
    }

    fn accumulate_parts(&mut self, places: &[usize], parts: &Parts<'_>, scale: f32) -> Result<()> {
        if parts.sequences.is_empty() {
            return Ok(());
        }
        let sum = self.losses_and_gradient_at(places, parts, scale)?.sum_all()?;
        self.losses = Some(match self.losses.take() {
            Some(before) => (before + sum)?,
            None => sum,
        });
        Ok(())
    }

    /// The sum of the losses that were accumulated since it was last taken.
    pub fn take_losses(&mut self) -> Result<f64> {
        self.losses.take().map_or(Ok(0.0), |sum| sum.to_scalar::<f32>().map(f64::from))
    }

    /// Brings the gradients of the experts' MLPs to `T`, `M` and `E`; see `crate::projected`.
    fn apply_chain_rule(&mut self) -> Result<()> {
        let (Some(network), Some(gradient)) = (&mut self.network, &self.gradient) else { return Ok(()) };
        if network.added.is_empty() {
            return Ok(());
        }
        // An expert without batches has nothing to add.
        for place in (0..network.mixed.len()).filter(|place| !network.added.contains(place)) {
            for mlps in &network.mlp_gradients {
                let len = mlps.elem_count() / network.mixed.len();
                mlps.narrow(0, place * len, len)?.zero_set()?;
            }
        }
        network.added.clear();
        let Projection { experts, expert_size, capacity, frozen } = network.tensors.projection;
        let (k, device) = (&self.kernels, self.parameters.device());
        let Some(vectors) = &network.vectors else { candle_core::bail!("no expert is prepared") };
        let mut vectors_gradient = vectors.zeros_like()?;
        for (l, mlps) in std::mem::take(&mut network.mlp_gradients).into_iter().enumerate() {
            let projected::Layer { basis, mixing, .. } = &network.tensors.layers[l];
            let mlps = mlps.reshape((network.mixed.len(), basis.len() / capacity))?;
            let alpha = &network.alphas[l];
            k.add_product(transposed(alpha), as_is(&mlps), &Spot { fresh: !network.chained, ..spot(gradient, basis.clone()) })?;
            if !frozen {
                let basis = view(&self.parameters, basis, &[capacity, basis.len() / capacity])?;
                let slopes = k.multiply(as_is(&mlps), transposed(&basis), DType::F32)?; // (mixed, h)
                k.add_product(transposed(vectors), as_is(&slopes), &spot(gradient, mixing.clone()))?;
                let mixing = view(&self.parameters, mixing, &[expert_size, capacity])?;
                vectors_gradient = (vectors_gradient + k.multiply(as_is(&slopes), transposed(&mixing), DType::F32)?)?;
            }
        }
        network.chained = true;
        if !frozen {
            // Each row of the gradient goes to that of its expert.
            let rows = rows_of(&network.mixed, device)?;
            let all = Tensor::zeros((experts, expert_size), DType::F32, device)?.index_add(&rows, &vectors_gradient, 0)?;
            let place = &network.tensors.experts;
            let sum = (view(gradient, place, &[experts, expert_size])? + all)?;
            gradient.slice_set(&sum.flatten_all()?, 0, place.start)?;
        }
        Ok(())
    }

    /// Completes the gradient: of a network that saw no batch, that of the basis is zero.
    fn complete_gradient(&mut self) -> Result<()> {
        self.apply_chain_rule()?;
        let (Some(network), Some(gradient)) = (&mut self.network, &self.gradient) else { return Ok(()) };
        if !std::mem::replace(&mut network.chained, true) {
            let mut layers = network.tensors.layers.iter();
            layers.try_for_each(|projected::Layer { basis, .. }| gradient.narrow(0, basis.start, basis.len())?.zero_set())?;
        }
        Ok(())
    }

    /// The slots that training changes.
    fn moving(&self) -> impl Iterator<Item = &Slot> {
        self.layout.slots().iter().filter(|slot| !slot.is_frozen(&self.config))
    }

    /// The Euclidean norm of the gradient.
    pub fn gradient_norm(&mut self) -> Result<f64> {
        self.complete_gradient()?;
        let Some(gradient) = &self.gradient else { return Ok(0.0) };
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for slot in self.moving() {
            match ranges.last_mut().filter(|last| last.end == slot.range.start) {
                Some(last) => last.end = slot.range.end,
                None => ranges.push(slot.range.clone()),
            }
        }
        let parts: Vec<Spot> = ranges.into_iter().map(|range| spot(gradient, range)).collect();
        Ok(self.kernels.squares(&parts)?.sqrt())
    }

    /// One step of `AdamW`, as [`trommel_kernels::adamw::step`]; gains do not decay. Then forgets the gradient.
    pub fn step(&mut self, factors: Factors) -> Result<()> {
        self.complete_gradient()?;
        if self.moments.is_none() {
            self.moments = Some([self.parameters.zeros_like()?, self.parameters.zeros_like()?]);
        }
        let (Some([m, v]), Some(gradient)) = (&self.moments, &self.gradient) else { return Ok(()) };
        let seen = self.network.as_ref().map_or(0, |network| network.seen.len());
        for slot in self.moving() {
            let at = |buffer: &Tensor| spot(buffer, slot.range.clone());
            let rates = self.config.projection.filter(|_| slot.is_basis()).map(|projection| projection.rates(seen));
            let factors = if slot.decays() { factors } else { Factors { decay: 0.0, ..factors } };
            let moments = [&at(m), &at(v)];
            self.kernels.adamw(&at(&self.parameters), &at(gradient), moments, factors, rates.as_deref())?;
        }
        self.casts.clear();
        // The gradient of a basis is overwritten.
        for slot in self.layout.slots().iter().filter(|slot| !slot.is_basis()) {
            gradient.narrow(0, slot.range.start, slot.range.len())?.zero_set()?;
        }
        if let Some(network) = &mut self.network {
            network.chained = false;
            network.seen.clear();
            // The parameters that these were mixed from are gone.
            network.forget();
        }
        Ok(())
    }
}

/// Numbers of rows, as a tensor.
fn rows_of(rows: &[usize], device: &Device) -> Result<Tensor> {
    Tensor::from_iter(rows.iter().map(|row| *row as u32), device)
}
