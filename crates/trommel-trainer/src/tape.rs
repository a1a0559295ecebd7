//! The model on candle's tape: what adapters and teachers run on a GPU, and the oracle of `crate::native` and `crate::gpu` in the tests.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Result, Tensor, Var};
use trommel_kernels::adamw::Factors;
use trommel_kernels::cross_entropy::IGNORED;
use trommel_kernels::panels::Precision;
use trommel_kernels::rotary::Table;

use crate::batch::Batch;
use crate::composed::{activate, attention, cross_entropy, linear, losses, mask, rms_norm, rotate};
use crate::engine::Teacher;
use crate::model::{Activation, Config};
use crate::parameters::{Layout, Slot};

/// A model whose parameters, gradients and moments live on a device.
#[derive(Debug)]
pub struct Tape {
    config: Config,
    layout: Layout,
    device: Device,
    precision: Precision,
    cosines: Tensor, // (context, head / 2)
    sines: Tensor,   // (context, head / 2)
    parameters: Vec<Var>,
    gradients: Vec<Option<Tensor>>,
    moments: Vec<(Tensor, Tensor)>,
    /// The expert whose model batches run through; of no meaning for a plain model.
    expert: usize,
    /// The experts that the gradient comes from.
    seen: BTreeSet<usize>,
    teacher: Option<Box<TapeTeacher>>,
}

/// A model that is learnt from; see [`crate::engine::Engine::learn_from`].
#[derive(Debug)]
struct TapeTeacher {
    tape: Tape,
    weight: f64,
    temperature: f64,
}

/// Tensors that belong to one layer: norm, query, key, value, output, norm, (gate), up, down.
struct Names {
    first: usize,
    gate: bool,
}

impl Names {
    fn mlp(&self, which: usize) -> usize {
        self.first + 6 + which
    }

    fn down(&self) -> usize {
        self.mlp(1 + usize::from(self.gate))
    }
}

impl Tape {
    /// A model with the flat `parameters` on `device`, whose weights and rows are multiplied in `precision`.
    pub fn new(config: &Config, parameters: &[f32], device: &Device, precision: Precision) -> Result<Self> {
        let layout = Layout::new(config);
        let table = Table::new(config.context, config.head(), config.rope_theta);
        let shape = (config.context, config.head() / 2);
        let var = |slot: &crate::parameters::Slot| {
            Var::from_tensor(&Tensor::from_slice(&parameters[slot.range.clone()], slot.shape.as_slice(), device)?)
        };
        let parameters = layout.slots().iter().map(var).collect::<Result<Vec<Var>>>()?;
        Ok(Tape {
            cosines: Tensor::from_slice(table.cosines(), shape, device)?,
            sines: Tensor::from_slice(table.sines(), shape, device)?,
            gradients: vec![None; parameters.len()],
            moments: Vec::new(),
            expert: 0,
            seen: BTreeSet::new(),
            teacher: None,
            config: config.clone(),
            device: device.clone(),
            precision,
            layout,
            parameters,
        })
    }

    /// The flat parameters, on the host.
    pub fn parameters(&self) -> Result<Vec<f32>> {
        flatten(self.parameters.iter().map(|var| Some(var.as_tensor())), &self.layout)
    }

    /// The flat gradient, on the host.
    pub fn gradient(&self) -> Result<Vec<f32>> {
        flatten(self.gradients.iter().map(Option::as_ref), &self.layout)
    }

    /// Both flat moments, on the host.
    pub fn moments(&self) -> Result<[Vec<f32>; 2]> {
        let at = |i: usize| self.moments.get(i);
        let slots = 0..self.parameters.len();
        Ok([
            flatten(slots.clone().map(|i| at(i).map(|m| &m.0)), &self.layout)?,
            flatten(slots.map(|i| at(i).map(|m| &m.1)), &self.layout)?,
        ])
    }

    /// Replaces both moments.
    pub fn set_moments(&mut self, [m, v]: [&[f32]; 2]) -> Result<()> {
        let tensor = |flat: &[f32], slot: &crate::parameters::Slot| {
            Tensor::from_slice(&flat[slot.range.clone()], slot.shape.as_slice(), &self.device)
        };
        self.moments =
            self.layout.slots().iter().map(|slot| Ok((tensor(m, slot)?, tensor(v, slot)?))).collect::<Result<Vec<_>>>()?;
        Ok(())
    }

    /// Makes the next batches run through expert `i` of a projected network.
    pub fn select_expert(&mut self, i: usize) {
        self.expert = i;
    }

    /// Learns from another model, too.
    pub fn learn_from(&mut self, teacher: &Teacher, precision: Precision) -> Result<()> {
        let tape = Tape::new(&teacher.config, &teacher.parameters, &self.device, precision)?;
        self.teacher = Some(Box::new(TapeTeacher { tape, weight: teacher.weight, temperature: teacher.temperature }));
        Ok(())
    }

    /// The weights of the plain model, in the order of its layout. Those of a projected network's expert are mixed on the
    /// tape, anew for each batch: `W = sum_r alpha_r T_r`, `alpha = M^T E_i`. [PE 2.5]
    fn weights(&self) -> Result<Vec<Tensor>> {
        let plain = Layout::new(&self.config.plain());
        let mut weights = Vec::with_capacity(plain.slots().len());
        let mut mixed: Option<(usize, Tensor)> = None; // where the layer's MLP begins in the plain buffer, and its numbers
        for slot in plain.slots() {
            let find = |name: &str| self.layout.slots().iter().position(|own| own.name == name);
            if let Some(i) = find(&slot.name) {
                weights.push(self.adapted(self.parameters[i].as_tensor(), &slot.name)?);
                mixed = None;
                continue;
            }
            let (first, mlp) = match mixed.take() {
                Some(mixed) => mixed,
                None => {
                    let layer = slot.name.split_once(".mlp.").map_or("", |(layer, _)| layer);
                    let tensor = |name: &str| find(name).map(|i| self.parameters[i].as_tensor());
                    let own = (
                        tensor(&format!("{layer}.mlp.basis")),
                        tensor(&format!("{layer}.mlp.mixing")),
                        tensor("model.experts"),
                    );
                    let (Some(basis), Some(mixing), Some(experts)) = own else {
                        candle_core::bail!("the network has no tensor `{}`", slot.name)
                    };
                    let alpha = experts.narrow(0, self.expert, 1)?.matmul(mixing)?; // (1, h)
                    (slot.range.start, alpha.matmul(basis)?.flatten_all()?)
                }
            };
            let part = mlp.narrow(0, slot.range.start - first, slot.range.len())?;
            weights.push(part.reshape(slot.shape.as_slice())?);
            mixed = Some((first, mlp));
        }
        Ok(weights)
    }

    /// `matrix`, and `scale * B A` of the selected expert if it has an adapter.
    fn adapted(&self, matrix: &Tensor, name: &str) -> Result<Tensor> {
        let part = |part: &str| -> Result<Option<Tensor>> {
            let name = name.replace(".weight", &format!(".{part}.weight"));
            let found = self.layout.slots().iter().position(|slot| slot.name == name);
            found.map(|i| self.parameters[i].as_tensor().get(self.expert)).transpose()
        };
        let Some(adapters) = &self.config.adapters else { return Ok(matrix.clone()) };
        let (Some(a), Some(b)) = (part("lora_A")?, part("lora_B")?) else { return Ok(matrix.clone()) };
        matrix + (b.matmul(&a)? * f64::from(adapters.scale()))?
    }

    /// The negative log-likelihood of each target, (sequences * time); zero where there is none.
    pub fn losses(&self, batch: &Batch) -> Result<Tensor> {
        self.losses_of(&self.all_logits(batch)?, batch)
    }

    fn losses_of(&self, logits: &Tensor, batch: &Batch) -> Result<Tensor> {
        let targets: Vec<u32> = batch.targets.iter().map(|t| if *t == IGNORED { 0 } else { *t }).collect();
        losses(logits, &Tensor::from_vec(targets, batch.targets.len(), &self.device)?, &self.counted(batch)?)
    }

    /// One for each target, (sequences * time), and zero where there is none.
    fn counted(&self, batch: &Batch) -> Result<Tensor> {
        let counted: Vec<f32> = batch.targets.iter().map(|t| if *t == IGNORED { 0.0 } else { 1.0 }).collect();
        Tensor::from_vec(counted, batch.targets.len(), &self.device)
    }

    /// The logits of every position, (sequences * time, vocab).
    fn all_logits(&self, batch: &Batch) -> Result<Tensor> {
        linear(&self.hidden(batch)?, self.parameters[0].as_tensor(), Precision::F32)
    }

    /// The losses that are learnt from: [`Tape::losses`], mixed with those against the teacher if there is one.
    fn learnt_losses(&self, batch: &Batch) -> Result<Tensor> {
        let logits = self.all_logits(batch)?;
        let losses = self.losses_of(&logits, batch)?;
        let Some(teacher) = &self.teacher else { return Ok(losses) };
        let taught = teacher.tape.all_logits(batch)?.detach();
        let against = cross_entropy(&(taught / teacher.temperature)?, &(logits / teacher.temperature)?)?;
        let against = (against.mul(&self.counted(batch)?)? * (teacher.weight * teacher.temperature.powi(2)))?;
        (losses * (1.0 - teacher.weight))? + against
    }

    /// The logits after the last position of each sequence, (sequences, vocab).
    pub fn logits(&self, batch: &Batch) -> Result<Vec<f32>> {
        let hidden = self.hidden(batch)?.reshape((batch.sequences(), batch.time, self.config.width))?;
        let last = hidden.narrow(1, batch.time - 1, 1)?.squeeze(1)?.contiguous()?;
        linear(&last, self.parameters[0].as_tensor(), Precision::F32)?.flatten_all()?.to_vec1()
    }

    /// The losses that are learnt from, and adds the gradient of `scale` times their sum.
    pub fn losses_and_gradient(&mut self, batch: &Batch, scale: f32) -> Result<Tensor> {
        let losses = self.learnt_losses(batch)?;
        self.seen.insert(self.expert);
        let gradients = (losses.sum_all()? * f64::from(scale))?.backward()?;
        for ((sum, var), slot) in self.gradients.iter_mut().zip(&self.parameters).zip(self.layout.slots()) {
            if slot.is_frozen(&self.config) {
                continue;
            }
            let Some(gradient) = gradients.get(var.as_tensor()) else { continue };
            *sum = Some(match sum.take() {
                Some(sum) => sum.add(gradient)?,
                None => gradient.clone(),
            });
        }
        Ok(losses.detach())
    }

    /// The Euclidean norm of the gradient.
    pub fn gradient_norm(&self) -> Result<f64> {
        let squares = self.gradients.iter().flatten().map(|gradient| gradient.sqr()?.sum_all());
        let squares = Tensor::stack(&squares.collect::<Result<Vec<_>>>()?, 0)?;
        Ok(squares.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?.sqrt())
    }

    /// Forgets the gradient.
    pub fn clear_gradient(&mut self) {
        self.gradients.fill(None);
        self.seen.clear();
    }

    /// One step of `AdamW`, as [`trommel_kernels::adamw::step`]; gains do not decay.
    pub fn step(&mut self, factors: Factors) -> Result<()> {
        if self.moments.is_empty() {
            let zeros = |var: &Var| Ok((var.zeros_like()?, var.zeros_like()?));
            self.moments = self.parameters.iter().map(zeros).collect::<Result<Vec<_>>>()?;
        }
        let f = factors;
        let wide = f64::from;
        // What the learning rate of each MLP of a basis (h, numbers) is multiplied by.
        let rates = |slot: &Slot| {
            let projection = self.config.projection.filter(|_| slot.is_basis())?;
            let mut shape = vec![1; slot.shape.len()];
            shape[0] = slot.shape[0];
            Some(Tensor::from_vec(projection.rates(self.seen.len()), shape, &self.device))
        };
        let slots = self.layout.slots().iter().zip(&self.parameters).zip(&self.gradients);
        for (((slot, parameter), gradient), (m, v)) in slots.zip(&mut self.moments) {
            let Some(gradient) = gradient else { continue };
            let g = (gradient * wide(f.gradient_scale))?;
            *m = ((&*m * wide(f.beta1))? + (&g * (1.0 - wide(f.beta1)))?)?;
            *v = ((&*v * wide(f.beta2))? + (g.sqr()? * (1.0 - wide(f.beta2)))?)?;
            let root = ((&*v / wide(f.correction2))?.sqrt()? + wide(f.epsilon))?;
            let mut change = ((&*m / wide(f.correction1))? / root)?;
            if slot.decays() {
                change = (change + (parameter.as_tensor() * wide(f.decay))?)?;
            }
            if let Some(rates) = rates(slot) {
                change = change.broadcast_mul(&rates?)?;
            }
            parameter.set(&(parameter.as_tensor() - (change * wide(f.learning_rate))?)?)?;
        }
        Ok(())
    }

    /// The normalised rows after the last layer, (sequences * time, width).
    fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let config = &self.config;
        let (sequences, time, width) = (batch.sequences(), batch.time, config.width);
        let weights = self.weights()?;
        let weight = |i: usize| &weights[i];
        let linear = |x: &Tensor, weight: &Tensor| linear(x, weight, self.precision);
        let tokens = Tensor::from_slice(&batch.tokens, sequences * time, &self.device)?;
        let mask = mask(&Tensor::from_slice(&batch.starts, (sequences, time), &self.device)?)?;
        let (cosines, sines) = (self.cosines.narrow(0, 0, time)?, self.sines.narrow(0, 0, time)?);
        let heads = |x: Tensor| x.reshape((sequences, time, config.heads, config.head()))?.transpose(1, 2);

        let gate = config.activation == Activation::SwiGlu;
        let mut x = weight(0).index_select(&tokens, 0)?; // (sequences * time, width)
        for layer in 0..config.layers {
            let names = Names { first: 1 + layer * (8 + usize::from(gate)), gate };
            let first = names.first;
            let normed = rms_norm(&x, weight(first), config.norm_eps)?;
            let turned = |i: usize| rotate(&heads(linear(&normed, weight(i))?)?, &cosines, &sines);
            let (q, k, v) = (turned(first + 1)?, turned(first + 2)?, heads(linear(&normed, weight(first + 3))?)?);
            let attended = attention(&q, &k, &v, &mask, self.precision)?.transpose(1, 2)?.reshape((sequences * time, width))?;
            x = (x + linear(&attended, weight(first + 4))?)?;

            let normed = rms_norm(&x, weight(first + 5), config.norm_eps)?;
            let mut packed = linear(&normed, weight(names.mlp(0)))?;
            if gate {
                packed = Tensor::cat(&[packed, linear(&normed, weight(names.mlp(1)))?], 1)?;
            }
            x = (x + linear(&activate(&packed, config.activation)?, weight(names.down()))?)?;
        }
        rms_norm(&x, weight(weights.len() - 1), config.norm_eps)
    }
}

/// Tensors in the order of the layout as one flat vector on the host; zeros where there is none.
fn flatten<'a>(tensors: impl Iterator<Item = Option<&'a Tensor>>, layout: &Layout) -> Result<Vec<f32>> {
    let mut flat = vec![0.0; layout.len()];
    for (tensor, slot) in tensors.zip(layout.slots()) {
        if let Some(tensor) = tensor {
            flat[slot.range.clone()].copy_from_slice(&tensor.flatten_all()?.to_vec1::<f32>()?);
        }
    }
    Ok(flat)
}
