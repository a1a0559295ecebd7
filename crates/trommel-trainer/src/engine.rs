//! A model that can be trained: the same few verbs on every device.

use candle_core::Device;
use trommel_core::error::{Error, Result};
use trommel_kernels::adamw::{self, Factors};
use trommel_kernels::cross_entropy;
use trommel_kernels::panels::Precision;

use crate::batch::Batch;
use crate::lora::{self, Adapted};
use crate::model::Config;
use crate::native::Native;
use crate::parameters::Layout;
use crate::projected::{Projected, Tensors};
use crate::recipe::Recipe;
use crate::tape::Tape;

/// Activations that one micro-batch may hold, in bytes.
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
}

#[derive(Debug)]
enum Place {
    Host(Box<Host>),
    Network(Box<dyn Network>),
    Device(Box<Tape>),
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
    parameters: Vec<f32>,
    // The following are as long as `parameters`, or empty until they are needed.
    gradient: Vec<f32>,
    first_moment: Vec<f32>,
    second_moment: Vec<f32>,
}

fn internal(error: candle_core::Error) -> Error {
    Error::internal("a tensor operation failed").source(error)
}

impl Engine {
    /// A model of shape `config` with the flat `parameters`, on `device`. Its weights and sums are `f32`; `precision` is that
    /// of the products of weights and rows; other devices than the CPU round the results of products too.
    pub fn new(config: &Config, parameters: Vec<f32>, device: &Device, precision: Precision) -> Result<Engine> {
        config.check()?;
        let layout = Layout::new(config);
        assert_eq!(parameters.len(), layout.len(), "parameters of another shape");
        let place = if !device.is_cpu() {
            Place::Device(Box::new(Tape::new(config, &parameters, device, precision).map_err(internal)?))
        } else if let Some(tensors) = Tensors::of(config) {
            Place::Network(Box::new(Projected::new(config, tensors, parameters, precision)))
        } else if let Some(tensors) = lora::Tensors::of(config) {
            Place::Network(Box::new(Adapted::new(config, tensors, parameters, precision)))
        } else {
            let empty = Vec::new;
            let native = Native::new(config, precision);
            let teacher = None;
            let host = Host { native, teacher, parameters, gradient: empty(), first_moment: empty(), second_moment: empty() };
            Place::Host(Box::new(host))
        };
        Ok(Engine { config: config.clone(), layout, place })
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tensors of the model.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Sequences of `time` tokens that are computed at once: as many as fit into 512 MB of activations. A function of the
    /// model only, so that the order of sums is the same on every machine.
    pub fn micro_batch(&self, time: usize) -> usize {
        let config = &self.config;
        let packed = config.activation.packed() * config.mlp;
        let numbers = config.layers * (6 * config.width + packed) + 10 * config.width + 2 * packed;
        (ACTIVATION_BYTES / (numbers * time * size_of::<f32>())).max(1)
    }

    /// Announces the experts that a step will select: a projected network mixes them together, which is cheaper.
    pub fn prepare_experts(&mut self, experts: &[usize]) {
        if let Place::Network(network) = &mut self.place {
            network.prepare(experts);
        }
    }

    /// Makes the model of expert `i` of a network, which the next batches run through. A plain model is its own
    /// only expert.
    pub fn select_expert(&mut self, i: usize) {
        match &mut self.place {
            Place::Host(_) => {}
            Place::Network(network) => network.select(i),
            Place::Device(tape) => tape.select_expert(i),
        }
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
            Place::Device(tape) => tape.learn_from(&teacher, precision).map_err(internal)?,
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
            Place::Device(tape) => tape.losses(batch).and_then(|losses| losses.to_vec1()).map_err(internal),
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
            Place::Device(tape) => tape.logits(batch).map_err(internal),
        }
    }

    /// Adds the gradient of `scale * sum of losses` over a micro-batch, and returns the sum of its losses.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<f64> {
        match &mut self.place {
            Place::Network(network) => Ok(network.accumulate(batch, scale).iter().map(|loss| f64::from(*loss)).sum()),
            Place::Host(host) => {
                host.gradient.resize(host.parameters.len(), 0.0);
                let teacher = host.teacher.as_mut().map(|(native, teacher)| cross_entropy::Teacher {
                    hidden: native.hidden(&teacher.parameters, batch),
                    embedding: &teacher.parameters[..teacher.config.vocab * teacher.config.width],
                    width: teacher.config.width,
                    weight: teacher.weight as f32,
                    temperature: teacher.temperature as f32,
                });
                let losses = host.native.losses_and_gradient(&host.parameters, batch, teacher, scale, &mut host.gradient);
                Ok(losses.iter().map(|loss| f64::from(*loss)).sum())
            }
            Place::Device(tape) => {
                let losses = tape.losses_and_gradient(batch, scale).map_err(internal)?;
                losses.sum_all().and_then(|sum| sum.to_scalar::<f32>()).map(f64::from).map_err(internal)
            }
        }
    }

    /// The Euclidean norm of the gradient that was accumulated.
    pub fn gradient_norm(&mut self) -> Result<f64> {
        match &mut self.place {
            Place::Network(network) => Ok(network.gradient_norm()),
            Place::Host(host) => Ok(adamw::norm(&host.gradient)),
            Place::Device(tape) => tape.gradient_norm().map_err(internal),
        }
    }

    /// The flat gradient that was accumulated.
    pub fn gradient(&mut self) -> Result<Vec<f32>> {
        match &mut self.place {
            Place::Network(network) => Ok(network.gradient()),
            Place::Host(host) => Ok(host.gradient.clone()),
            Place::Device(tape) => tape.gradient().map_err(internal),
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
            Place::Device(tape) => {
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
            Place::Host(host) => Ok(host.parameters.clone()),
            Place::Device(tape) => tape.parameters().map_err(internal),
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
            Place::Device(tape) => tape.moments().map_err(internal),
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
            Place::Device(tape) => tape.set_moments([&m, &v]).map_err(internal),
        }
    }
}
