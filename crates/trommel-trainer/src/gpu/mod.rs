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

use self::ops::{Kernels, Spot, plain, turned};
use self::pass::{Gradients, Layer, LayerGradients, Mlp, Parts, Pass, Weights};
use crate::batch::Batch;
use crate::model::{Config, Projection};
use crate::parameters::{Layout, Slot, layer_sizes};

/// A plain model or a projected network on a device.
#[derive(Debug)]
pub struct Gpu {
    config: Config,
    layout: Layout,
    kernels: Box<dyn Kernels>,
    pass: Pass,
    rows: DType,
    parameters: Tensor,            // flat
    gradient: Option<Tensor>,      // flat, once there is one
    moments: Option<[Tensor; 2]>,  // flat, once there are any
    losses: Option<Tensor>,        // the sum of those accumulated
    casts: HashMap<usize, Tensor>, // matrices of this step's parameters as rows, by their place
    network: Option<Network>,
}

/// What makes the plain models of a network.
#[derive(Debug)]
struct Network {
    projection: Projection,
    experts: Range<usize>,                     // (k, m) in the flat buffer
    layers: Vec<(Range<usize>, Range<usize>)>, // basis (h, numbers) and mixing matrix (m, h)
    mixed: Vec<usize>,                         // the experts whose MLPs are at hand
    alphas: Vec<Tensor>,                       // layers times (mixed, h)
    mlps: Vec<Tensor>,                         // layers times (mixed, numbers), as rows
    mlp_gradients: Vec<Tensor>,                // layers times (mixed * numbers), once there are any
    selected: usize,                           // of `mixed`
    added: BTreeSet<usize>,                    // places in `mixed` that have a gradient
    chained: bool,                             // whether the basis has its gradient of this step
    seen: BTreeSet<usize>,                     // experts that the gradient comes from
}

impl Network {
    /// The network of a layout; `None` for a plain model.
    fn of(config: &Config, layout: &Layout) -> Option<Network> {
        let projection = config.projection?;
        let plain = Layout::new(&config.plain());
        // In the order of the buffer: a basis, then its mixing matrix, for each layer; the experts come last.
        let own: Vec<&Slot> = layout.slots().iter().filter(|slot| plain.slot(&slot.name).is_none()).collect();
        let (experts, layers) = own.split_last()?;
        Some(Network {
            projection,
            experts: experts.range.clone(),
            layers: layers.chunks_exact(2).map(|pair| (pair[0].range.clone(), pair[1].range.clone())).collect(),
            mixed: Vec::new(),
            alphas: Vec::new(),
            mlps: Vec::new(),
            mlp_gradients: Vec::new(),
            selected: 0,
            added: BTreeSet::new(),
            chained: false,
            seen: BTreeSet::new(),
        })
    }
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
        Ok(Gpu {
            network: Network::of(config, &layout),
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

    /// Sequences of `time` tokens whose activations fit into a quarter of the device's memory.
    pub fn micro_batch(&self, time: usize) -> usize {
        let c = &self.config;
        let (row, packed, square) = (self.rows.size_in_bytes(), c.activation.packed() * c.mlp, c.heads * time);
        // Two residual streams, and rows: two norms, queries, keys, values, what was attended, the MLP, the shares of attention.
        let kept = c.layers * (8 * c.width + row * (6 * c.width + packed + square));
        let passing = 16 * c.width + 2 * row * packed + (4 + row) * square;
        (self.kernels.memory() / 4 / ((kept + passing) * time)).max(1)
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
        let Projection { experts: most, expert_size, capacity, .. } = network.projection;
        network.mixed = experts.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        if let Some(beyond) = network.mixed.iter().find(|expert| **expert >= most) {
            candle_core::bail!("expert {beyond} is beyond the network's {most}");
        }
        let vectors = view(&self.parameters, &network.experts, &[most, expert_size])?;
        let vectors = vectors.index_select(&rows_of(&network.mixed, self.parameters.device())?, 0)?; // (mixed, m)
        (network.alphas, network.mlps) = (Vec::new(), Vec::new());
        for (basis, mixing) in &network.layers {
            let mixing = view(&self.parameters, mixing, &[expert_size, capacity])?;
            let basis = view(&self.parameters, basis, &[capacity, basis.len() / capacity])?;
            let alpha = self.kernels.multiply(plain(&vectors), plain(&mixing), DType::F32)?;
            network.mlps.push(self.kernels.mix(&alpha, &basis, self.rows)?);
            network.alphas.push(alpha);
        }
        network.selected = 0;
        Ok(())
    }

    /// Makes the next batches run through expert `i`; of no meaning for a plain model.
    pub fn select_expert(&mut self, i: usize) -> Result<()> {
        let Some(network) = &mut self.network else { return Ok(()) };
        match network.mixed.iter().position(|expert| *expert == i) {
            Some(place) => network.selected = place,
            None => self.prepare_experts(&[i])?,
        }
        Ok(())
    }

    /// Where the groups of one layer lie in the flat buffer, in the order of [`layer_sizes`]; a network's MLPs lie elsewhere, and have
    /// places from 0 on.
    fn groups(&self) -> Vec<[Range<usize>; 6]> {
        let config = &self.config;
        let mut end = config.vocab * config.width;
        let group = |layer: usize| {
            let sizes = layer_sizes(config);
            let mut next = |i: usize| {
                end += sizes[i];
                end - sizes[i]..end
            };
            let shared = [next(0), next(1), next(2), next(3)];
            let (up, down) = match &self.network {
                None => (next(4), next(5)),
                Some(network) => {
                    end = network.layers[layer].1.end;
                    (0..sizes[4], sizes[4]..sizes[4] + sizes[5])
                }
            };
            let [attention_gain, qkv, output, mlp_gain] = shared;
            [attention_gain, qkv, output, mlp_gain, up, down]
        };
        (0..config.layers).map(group).collect()
    }

    /// The plain models of the experts at these places of `mixed`; of a plain model, the model.
    fn weights(&mut self, places: &[usize]) -> Result<Weights> {
        let groups = self.groups();
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
        let mut layer = |(l, [attention_gain, qkv, output, mlp_gain, up, down]): (usize, [Range<usize>; 6])| {
            let (qkv, output) = (matrix(&qkv, [3 * width, width])?, matrix(&output, [width, width])?);
            let (up_shape, down_shape) = ([packed, width], [width, config.mlp]);
            let mlps = match &self.network {
                None => vec![Mlp { up: matrix(&up, up_shape)?, down: matrix(&down, down_shape)? }],
                Some(network) => {
                    let Some(mlps) = network.mlps.get(l) else { candle_core::bail!("no expert is selected") };
                    let mlp = |place: &usize| {
                        let mlp = mlps.get(*place)?;
                        Ok(Mlp { up: view(&mlp, &up, &up_shape)?, down: view(&mlp, &down, &down_shape)? })
                    };
                    places.iter().map(mlp).collect::<Result<_>>()?
                }
            };
            Ok(Layer {
                attention_gain: view(flat, &attention_gain, &[width])?,
                qkv,
                output,
                mlp_gain: view(flat, &mlp_gain, &[width])?,
                mlps,
            })
        };
        let layers = groups.into_iter().enumerate().map(&mut layer).collect::<Result<_>>()?;
        let table = 0..config.vocab * width;
        Ok(Weights {
            table: view(flat, &table, &[config.vocab, width])?,
            table_rows: matrix(&table, [config.vocab, width])?,
            last_gain: view(flat, &self.last_gain(), &[width])?,
            layers,
        })
    }

    /// Where the gain of the last norm lies: before the experts of a network, at the end of a plain model.
    fn last_gain(&self) -> Range<usize> {
        let end = self.network.as_ref().map_or(self.layout.len(), |network| network.experts.start);
        end - self.config.width..end
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
                network.added.clear();
            }
            fresh = places.iter().map(|place| network.added.insert(*place)).collect();
            network.seen.extend(places.iter().filter_map(|place| network.mixed.get(*place)));
        }
        let Some(flat) = &self.gradient else { candle_core::bail!("no gradient") };
        let layer = |(l, group): (usize, [Range<usize>; 6])| {
            let [attention_gain, qkv, output, mlp_gain, up, down] = group;
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
            layers: self.groups().into_iter().enumerate().map(layer).collect(),
            last_gain: spot(flat, self.last_gain()),
        })
    }

    /// The negative log-likelihood of each target, (sequences * time); zero where there is none.
    pub fn losses(&mut self, batch: &Batch) -> Result<Tensor> {
        let weights = self.weights(&[self.selected()])?;
        self.pass.losses(&*self.kernels, &weights, batch)
    }

    /// The logits after the last position of each sequence, (sequences, vocab).
    pub fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let weights = self.weights(&[self.selected()])?;
        self.pass.logits(&*self.kernels, &weights, batch)?.flatten_all()?.to_vec1()
    }

    /// The place of the selected expert.
    fn selected(&self) -> usize {
        self.network.as_ref().map_or(0, |network| network.selected)
    }

    /// The losses, and adds the gradient of `scale` times their sum.
    pub fn losses_and_gradient(&mut self, batch: &Batch, scale: f32) -> Result<Tensor> {
        let place = self.selected();
        self.losses_and_gradient_at(&[place], &Parts { batch, sequences: &[batch.sequences()] }, scale)
    }

    /// Adds the gradient of `scale` times the sum of the losses, without waiting for it.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<()> {
        let place = self.selected();
        self.accumulate_parts(&[place], &Parts { batch, sequences: &[batch.sequences()] }, scale)
    }

    fn losses_and_gradient_at(&mut self, places: &[usize], parts: &Parts<'_>, scale: f32) -> Result<Tensor> {
        let (weights, gradients) = (self.weights(places)?, self.gradients(places)?);
        self.pass.losses_and_gradient(&*self.kernels, &weights, &gradients, parts, scale)
    }

    /// Adds the gradient of `scale` times the sum of the losses of all batches, each of its expert, without waiting for it. Batches run
    /// through the model together, as many as fit.
    pub fn accumulate_all(&mut self, batches: &[(usize, Batch)], scale: f32) -> Result<()> {
        let Some(time) = batches.first().map(|(_, batch)| batch.time) else { return Ok(()) };
        let experts: Vec<usize> = batches.iter().map(|(expert, _)| *expert).collect();
        if self.network.as_ref().is_some_and(|network| experts.iter().any(|expert| !network.mixed.contains(expert))) {
            self.prepare_experts(&experts)?;
        }
        let most = self.micro_batch(time);
        let (mut together, mut places, mut sequences) = (Batch::new(time), Vec::new(), Vec::new());
        for (expert, batch) in batches {
            let mixed = self.network.as_ref().map_or(&[][..], |network| &network.mixed);
            let place = mixed.iter().position(|mixed| mixed == expert).unwrap_or(0);
            for part in batch.parts(most) {
                if together.sequences() + part.sequences() > most {
                    self.accumulate_parts(&places, &Parts { batch: &together, sequences: &sequences }, scale)?;
                    (together, places, sequences) = (Batch::new(time), Vec::new(), Vec::new());
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
        self.accumulate_parts(&places, &Parts { batch: &together, sequences: &sequences }, scale)
    }

    fn accumulate_parts(&mut self, places: &[usize], parts: &Parts<'_>, scale: f32) -> Result<()> {
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
        let Projection { experts, expert_size, capacity, frozen } = network.projection;
        let (k, device) = (&self.kernels, self.parameters.device());
        let rows = rows_of(&network.mixed, device)?;
        let vectors = view(&self.parameters, &network.experts, &[experts, expert_size])?.index_select(&rows, 0)?;
        let mut vectors_gradient = vectors.zeros_like()?;
        for (l, mlps) in std::mem::take(&mut network.mlp_gradients).into_iter().enumerate() {
            let (basis, mixing) = &network.layers[l];
            let mlps = mlps.reshape((network.mixed.len(), basis.len() / capacity))?;
            let alpha = &network.alphas[l];
            k.add_product(turned(alpha), plain(&mlps), &Spot { fresh: !network.chained, ..spot(gradient, basis.clone()) })?;
            if !frozen {
                let basis = view(&self.parameters, basis, &[capacity, basis.len() / capacity])?;
                let slopes = k.multiply(plain(&mlps), turned(&basis), DType::F32)?; // (mixed, h)
                k.add_product(turned(&vectors), plain(&slopes), &spot(gradient, mixing.clone()))?;
                let mixing = view(&self.parameters, mixing, &[expert_size, capacity])?;
                vectors_gradient = (vectors_gradient + k.multiply(plain(&slopes), turned(&mixing), DType::F32)?)?;
            }
        }
        network.chained = true;
        if !frozen {
            // Each row of the gradient goes to that of its expert.
            let all = Tensor::zeros((experts, expert_size), DType::F32, device)?.index_add(&rows, &vectors_gradient, 0)?;
            let sum = (view(gradient, &network.experts, &[experts, expert_size])? + all)?;
            gradient.slice_set(&sum.flatten_all()?, 0, network.experts.start)?;
        }
        Ok(())
    }

    /// Completes the gradient: of a network that saw no batch, that of the basis is zero.
    fn complete_gradient(&mut self) -> Result<()> {
        self.apply_chain_rule()?;
        let (Some(network), Some(gradient)) = (&mut self.network, &self.gradient) else { return Ok(()) };
        if !std::mem::replace(&mut network.chained, true) {
            network.layers.iter().try_for_each(|(basis, _)| gradient.narrow(0, basis.start, basis.len())?.zero_set())?;
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
        let Some(network) = &mut self.network else { return gradient.zero_set() };
        // The gradient of a basis is overwritten.
        for slot in self.layout.slots().iter().filter(|slot| !slot.is_basis()) {
            gradient.narrow(0, slot.range.start, slot.range.len())?.zero_set()?;
        }
        network.chained = false;
        network.seen.clear();
        // The parameters that these were mixed from are gone.
        network.mixed.clear();
        network.mlps.clear();
        Ok(())
    }
}

/// Numbers of rows, as a tensor.
fn rows_of(rows: &[usize], device: &Device) -> Result<Tensor> {
    Tensor::from_iter(rows.iter().map(|row| *row as u32), device)
}
