//! A model that can be trained: the same few verbs on every device.

use candle_core::Device;
use trommel_core::error::{Error, Result};
use trommel_kernels::adamw::{self, Factors};
use trommel_kernels::cross_entropy;
use trommel_kernels::lines::Lines;
use trommel_kernels::panels::Precision;

use crate::batch::Batch;
use crate::gpu::Gpu;
use crate::lora::{self, Adapted};
use crate::model::Config;
use crate::native::Native;
use crate::parameters::Layout;
use crate::projected::{Projected, Tensors};
use crate::recipe::Recipe;
use crate::tape::Tape;

/// Activations that one micro-batch may hold on a CPU, in bytes.
const ACTIVATION_BYTES: usize = 512 << 20;

/// A model that another one learns from; see [`Engine::learn_from`].
#[derive(Debug, Clone)]
pub struct Teacher {
    /// Its shape: a plain model.
    pub config: Config,
    /// Its flat parameters.
    pub parameters: Vec<f32>,
    /// The share of the loss against its distributions (0 to 1).
    pub weight: f64,
    /// What logits are divided by before both models' distributions are compared (above 0).
    pub temperature: f64,
}

/// A model with its gradient and the moments of `AdamW`.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    layout: Layout,
    place: Place,
    losses: f64, // of the batches since they were last taken; a GPU has its own sum
}

#[derive(Debug)]
enum Place {
    Host(Box<Host>),
    Network(Box<dyn Network>),
    Gpu(Box<Gpu>),
    Tape(Box<Tape>),
}

/// Several models in one, on the CPU, whose batches run through the plain model of the expert that is selected.
pub(crate) trait Network: std::fmt::Debug {
    /// Announces the experts of a step.
    fn prepare(&mut self, _experts: &[usize]) {}

    /// Makes the next batches run through expert `i`.
    fn select(&mut self, i: usize);

    /// The pass over the plain model of the selected expert, and that model.
    fn native(&mut self) -> (&mut Native, &[f32]);

    /// Adds the gradient of `scale * sum of losses`, and returns the losses.
    fn accumulate(&mut self, batch: &Batch, scale: f32) -> &[f32];

    /// The Euclidean norm of the gradient that was accumulated.
    fn gradient_norm(&mut self) -> f64;

    /// The flat gradient that was accumulated.
    fn gradient(&mut self) -> Vec<f32>;

    /// One step of `AdamW`; then forgets the gradient.
    fn step(&mut self, factors: Factors);

    /// The flat parameters.
    fn parameters(&self) -> &[f32];

    /// Both moments of `AdamW`, as long as the parameters, or empty until they are needed.
    fn moments(&self) -> &[Vec<f32>; 2];

    /// Replaces both moments.
    fn set_moments(&mut self, moments: [Vec<f32>; 2]);
}

#[derive(Debug)]
struct Host {
    native: Native,
    teacher: Option<(Native, Teacher)>,
    parameters: Lines<f32>,
    // The following are as long as `parameters`, or empty until they are needed.
    gradient: Lines<f32>,
    first_moment: Vec<f32>,
    second_moment: Vec<f32>,
}

fn internal(error: candle_core::Error) -> Error {
    Error::internal("a tensor operation failed").source(error)
}

/// The model on the tape, learning from a teacher.
fn taught(config: &Config, gpu: &Gpu, teacher: &Teacher, precision: Precision) -> candle_core::Result<Tape> {
    let mut tape = Tape::new(config, &gpu.parameters()?, gpu.device(), precision)?;
    let [m, v] = gpu.moments()?;
    tape.set_moments([&m, &v])?;
    tape.learn_from(teacher, precision)?;
    Ok(tape)
}

impl Engine {
    /// A model of shape `config` with the flat `parameters`, on `device`. Its weights and sums are `f32`; `precision` is that
    /// of the products of weights and rows, and on a GPU of all rows that products read or write, those of attention too.
    pub fn new(config: &Config, parameters: Vec<f32>, device: &Device, precision: Precision) -> Result<Engine> {
        config.check()?;
        let layout = Layout::new(config);
        assert_eq!(parameters.len(), layout.len(), "parameters of another shape");
        let place = if !device.is_cpu() && Gpu::runs(config) {
            Place::Gpu(Box::new(Gpu::new(config, &parameters, device, precision).map_err(internal)?))
        } else if !device.is_cpu() {
            Place::Tape(Box::new(Tape::new(config, &parameters, device, precision).map_err(internal)?))
        } else if let Some(tensors) = Tensors::of(config) {
            Place::Network(Box::new(Projected::new(config, tensors, parameters, precision)))
        } else if let Some(tensors) = lora::Tensors::of(config) {
            Place::Network(Box::new(Adapted::new(config, tensors, parameters, precision)))
        } else {
            let (parameters, gradient) = (Lines::from(&*parameters), Lines::default());
            let native = Native::new(config, precision);
            let teacher = None;
            let (first_moment, second_moment) = (Vec::new(), Vec::new());
            let host = Host { native, teacher, parameters, gradient, first_moment, second_moment };
            Place::Host(Box::new(host))
        };
        Ok(Engine { config: config.clone(), layout, place, losses: 0.0 })
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tensors of the model.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Sequences of `time` tokens that are computed at once: as many as fit into 512 MB of activations on a CPU, which is a function
    /// of the model only, so that the order of sums is the same on every machine, and into a quarter of what the model leaves of a
    /// GPU's memory.
    pub fn micro_batch(&self, time: usize) -> usize {
        let config = &self.config;
        let packed = config.activation.packed() * config.mlp;
        let numbers = config.layers * (6 * config.width + packed) + 10 * config.width + 2 * packed;
        match &self.place {
            Place::Gpu(gpu) => gpu.micro_batch(time),
            _ => (ACTIVATION_BYTES / (numbers * time * size_of::<f32>())).max(1),
        }
    }

    /// Announces the experts that a step will select: a projected network mixes them together, which is cheaper.
    pub fn prepare_experts(&mut self, experts: &[usize]) -> Result<()> {
        match &mut self.place {
            Place::Network(network) => network.prepare(experts),
            Place::Gpu(gpu) => gpu.prepare_experts(experts).map_err(internal)?,
            Place::Host(_) | Place::Tape(_) => {}
        }
        Ok(())
    }

    /// Makes the model of expert `i` of a network, which the next batches run through. A plain model is its own
    /// only expert.
    pub fn select_expert(&mut self, i: usize) -> Result<()> {
        match &mut self.place {
            Place::Host(_) => {}
            Place::Network(network) => network.select(i),
            Place::Gpu(gpu) => gpu.select_expert(i).map_err(internal)?,
            Place::Tape(tape) => tape.select_expert(i),
        }
        Ok(())
    }

    /// Lets the gradient, and the losses that come with it, be those against the targets mixed with those against a teacher's
    /// next-word distributions; see [`trommel_kernels::cross_entropy::Teacher`]. [`Engine::losses`] stay those of the targets.
    pub fn learn_from(&mut self, teacher: Teacher, precision: Precision) -> Result<()> {
        teacher.config.check_plain()?;
        if teacher.config.vocab != self.config.vocab {
            let message = format!("the teacher has {} tokens, and the model {}", teacher.config.vocab, self.config.vocab);
            return Err(Error::config(message).hint("train both on shards of the same tokenizer"));
        }
        match &mut self.place {
            Place::Network(_) => return Err(Error::internal("a network of experts has no teacher")),
            Place::Host(host) => host.teacher = Some((Native::new(&teacher.config, precision), teacher)),
            Place::Tape(tape) => tape.learn_from(&teacher, precision).map_err(internal)?,
            Place::Gpu(_) if self.config.projection.is_some() => {
                return Err(Error::internal("a network of experts has no teacher"));
            }
            // The tape knows teachers.
            Place::Gpu(gpu) => {
                self.place = Place::Tape(Box::new(taught(&self.config, gpu, &teacher, precision).map_err(internal)?))
            }
        }
        Ok(())
    }

    /// The negative log-likelihood in nats of each target of `batch`, (sequences, time); zero where there is none.
    pub fn losses(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        match &mut self.place {
            Place::Network(network) => {
                let (native, model) = network.native();
                Ok(native.losses(model, batch).to_vec())
            }
            Place::Host(host) => Ok(host.native.losses(&host.parameters, batch).to_vec()),
            Place::Gpu(gpu) => gpu.losses(batch).and_then(|losses| losses.to_vec1()).map_err(internal),
            Place::Tape(tape) => tape.losses(batch).and_then(|losses| losses.to_vec1()).map_err(internal),
        }
    }

    /// The logits after the last position of each sequence, (sequences, vocab).
    pub fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        match &mut self.place {
            Place::Network(network) => {
                let (native, model) = network.native();
                Ok(native.logits(model, batch))
            }
            Place::Host(host) => Ok(host.native.logits(&host.parameters, batch)),
            Place::Gpu(gpu) => gpu.logits(batch).map_err(internal),
            Place::Tape(tape) => tape.logits(batch).map_err(internal),
        }
    }

    /// Adds the gradient of `scale * sum of losses` over a micro-batch. A GPU may still be at work on it afterwards.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<()> {
        let sum = |losses: &[f32]| losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
        self.losses += match &mut self.place {
            Place::Network(network) => sum(network.accumulate(batch, scale)),
            Place::Host(host) => {
                host.gradient.resize(host.parameters.len(), 0.0);
                let teacher = host.teacher.as_mut().map(|(native, teacher)| cross_entropy::Teacher {
                    hidden: native.hidden(&teacher.parameters, batch),
                    embedding: &teacher.parameters[..teacher.config.vocab * teacher.config.width],
                    width: teacher.config.width,
                    weight: teacher.weight as f32,
                    temperature: teacher.temperature as f32,
                });
                sum(host.native.losses_and_gradient(&host.parameters, batch, teacher, scale, &mut host.gradient))
            }
            Place::Gpu(gpu) => gpu.accumulate(batch, scale).map(|()| 0.0).map_err(internal)?,
            Place::Tape(tape) => {
                let losses = tape.losses_and_gradient(batch, scale).and_then(|losses| losses.to_vec1()).map_err(internal)?;
                sum(&losses)
            }
        };
        Ok(())
    }

    /// Adds the gradient of `scale * sum of losses` over the batches of a step, each of its expert, in micro-batches.
    pub fn accumulate_all(&mut self, batches: &[(usize, Batch)], scale: f32) -> Result<()> {
        if let Place::Gpu(gpu) = &mut self.place {
            return gpu.accumulate_all(batches, scale).map_err(internal);
        }
        self.prepare_experts(&batches.iter().map(|(expert, _)| *expert).collect::<Vec<_>>())?;
        for (expert, batch) in batches {
            self.select_expert(*expert)?;
            batch.parts(self.micro_batch(batch.time)).try_for_each(|part| self.accumulate(&part, scale))?;
        }
        Ok(())
    }

    /// The sum of the losses of all batches that were accumulated since it was last taken.
    pub fn take_losses(&mut self) -> Result<f64> {
        match &mut self.place {
            Place::Gpu(gpu) => gpu.take_losses().map_err(internal),
            _ => Ok(std::mem::take(&mut self.losses)),
        }
    }

    /// The Euclidean norm of the gradient that was accumulated.
    pub fn gradient_norm(&mut self) -> Result<f64> {
        match &mut self.place {
            Place::Network(network) => Ok(network.gradient_norm()),
            Place::Host(host) => Ok(adamw::norm(&host.gradient)),
            Place::Gpu(gpu) => gpu.gradient_norm().map_err(internal),
            Place::Tape(tape) => tape.gradient_norm().map_err(internal),
        }
    }

    /// The flat gradient that was accumulated.
    pub fn gradient(&mut self) -> Result<Vec<f32>> {
        match &mut self.place {
            Place::Network(network) => Ok(network.gradient()),
            Place::Host(host) => Ok(host.gradient.to_vec()),
            Place::Gpu(gpu) => gpu.gradient().map_err(internal),
            Place::Tape(tape) => tape.gradient().map_err(internal),
        }
    }

    /// Step `step`, from 0, of `AdamW` at `rate`, with a gradient of norm `norm` cut to the recipe's; then forgets the
    /// gradient. Gains do not decay.
    pub fn step(&mut self, recipe: &Recipe, step: u64, rate: f64, norm: f64) -> Result<()> {
        let power = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let factors = Factors {
            learning_rate: rate as f32,
            decay: recipe.decay as f32,
            beta1: recipe.beta1 as f32,
            beta2: recipe.beta2 as f32,
            epsilon: recipe.epsilon as f32,
            correction1: (1.0 - recipe.beta1.powi(power)) as f32,
            correction2: (1.0 - recipe.beta2.powi(power)) as f32,
            gradient_scale: if norm > recipe.clip { (recipe.clip / norm) as f32 } else { 1.0 },
        };
        match &mut self.place {
            Place::Network(network) => network.step(factors),
            Place::Host(host) => {
                let len = host.parameters.len();
                host.first_moment.resize(len, 0.0);
                host.second_moment.resize(len, 0.0);
                let slots = self.layout.slots();
                // One visit to the pool's threads, not one for each tensor.
                rayon::scope(|_| {
                    slots.iter().for_each(|slot| {
                        let at = slot.range.clone();
                        let decay = if slot.decays() { factors.decay } else { 0.0 };
                        let (m, v) = (&mut host.first_moment[at.clone()], &mut host.second_moment[at.clone()]);
                        let (parameters, gradient) = (&mut host.parameters[at.clone()], &mut host.gradient[at]);
                        adamw::step(parameters, gradient, m, v, Factors { decay, ..factors });
                    })
                });
            }
            Place::Gpu(gpu) => gpu.step(factors).map_err(internal)?,
            Place::Tape(tape) => {
                tape.step(factors).map_err(internal)?;
                tape.clear_gradient();
            }
        }
        Ok(())
    }

    /// The flat parameters.
    pub fn parameters(&self) -> Result<Vec<f32>> {
        match &self.place {
            Place::Network(network) => Ok(network.parameters().to_vec()),
            Place::Host(host) => Ok(host.parameters.to_vec()),
            Place::Gpu(gpu) => gpu.parameters().map_err(internal),
            Place::Tape(tape) => tape.parameters().map_err(internal),
        }
    }

    /// The flat moments of `AdamW`, zeros before the first step.
    pub fn moments(&self) -> Result<[Vec<f32>; 2]> {
        let whole = |moment: &Vec<f32>| {
            let mut moment = moment.clone();
            moment.resize(self.layout.len(), 0.0);
            moment
        };
        match &self.place {
            Place::Network(network) => Ok(network.moments().each_ref().map(whole)),
            Place::Host(host) => Ok([&host.first_moment, &host.second_moment].map(whole)),
            Place::Gpu(gpu) => gpu.moments().map_err(internal),
            Place::Tape(tape) => tape.moments().map_err(internal),
        }
    }

    /// Replaces the moments of `AdamW`.
    pub fn set_moments(&mut self, [m, v]: [Vec<f32>; 2]) -> Result<()> {
        assert!(m.len() == self.layout.len() && v.len() == self.layout.len(), "moments of another shape");
        match &mut self.place {
            Place::Network(network) => {
                network.set_moments([m, v]);
                Ok(())
            }
            Place::Host(host) => {
                (host.first_moment, host.second_moment) = (m, v);
                Ok(())
            }
            Place::Gpu(gpu) => gpu.set_moments([&m, &v]).map_err(internal),
            Place::Tape(tape) => tape.set_moments([&m, &v]).map_err(internal),
        }
    }
}
