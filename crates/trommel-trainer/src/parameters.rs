//! The parameters of a model: one flat buffer, and the table that says where each matrix lies in it.
//!
//! Matrices that are multiplied with the same rows lie side by side (query, key, value; gate, up), so each group is one
//! product. Names and shapes are those of `transformers`.
//!
//! ```text
//!   embedding | norm  query key value  output  norm  gate up  down | ... one group per layer ... | norm
//! ```
//!
//! A projected network has, in place of the MLP of a layer, its basis and its mixing matrix, and the experts' vectors at
//! the end; the other tensors are those of the plain model.
//!
//! ```text
//!   embedding | norm  query key value  output  norm  basis mixing | ... | norm | experts
//! ```
//!
//! A model with low-rank adapters has them after its own tensors.

use std::ops::Range;

use rand::RngCore;
use trommel_core::seed::{Stream, unit};

use crate::model::{Activation, Adapters, Config, Projection};

/// One named tensor within the flat buffer.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The tensor's name in `transformers`.
    pub name: String,
    /// Its shape, (out, in) for a matrix.
    pub shape: Vec<usize>,
    /// Where its numbers lie.
    pub range: Range<usize>,
    start: Start,
}

/// How a tensor begins.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Start {
    /// At one: a gain.
    One,
    /// From a normal distribution of this standard deviation.
    Normal(f64),
    /// At zero: the `B` of an adapter, so that training starts at the model itself.
    Zero,
    /// As a part of the start of a projected network; see [`Layout::initial`].
    Projection,
}

impl Slot {
    /// Whether weight decay applies: to matrices of weights; not to gains, nor to what mixes the experts.
    pub fn decays(&self) -> bool {
        match self.start {
            Start::One => false,
            Start::Normal(_) | Start::Zero => true,
            Start::Projection => self.name.ends_with(BASIS),
        }
    }

    /// Whether training leaves it as it began.
    pub(crate) fn is_frozen(&self, config: &Config) -> bool {
        let mixes = config.projection.is_some_and(|p| p.frozen) && self.start == Start::Projection && !self.is_basis();
        mixes || (config.adapters.as_ref().is_some_and(|a| a.frozen) && !self.name.contains(".lora_"))
    }

    /// Whether this is the basis of a layer, whose gradient is never formed.
    pub(crate) fn is_basis(&self) -> bool {
        self.start == Start::Projection && self.name.ends_with(BASIS)
    }
}

/// Tensors of a projected network: a layer's `T` (h, numbers of an MLP) and `M` (m, h), and the experts' `E` (k, m).
const BASIS: &str = "mlp.basis";
const MIXING: &str = "mlp.mixing";
const EXPERTS: &str = "model.experts";

/// Every tensor of a model, in the order of the flat buffer.
#[derive(Debug, Clone)]
pub struct Layout {
    config: Config,
    slots: Vec<Slot>,
}

impl Layout {
    /// The tensors of a model of this shape.
    ///
    /// Matrices start at `N(0, 1 / (4 width))`, whose deviation is 0.018 at the width 768 and so close to GPT-2's 0.02, and
    /// scales to narrow models; the matrices that write to the residual stream start smaller by `sqrt(2 layers)`, so that
    /// its variance does not grow with depth. [Radford et al. 2019, 2.3] The embedding starts at `N(0, 0.02^2)`: being the
    /// output layer too, a larger one would begin by predicting that each token repeats.
    pub fn new(config: &Config) -> Self {
        let plain = Self::plain(config);
        if let Some(adapters) = &config.adapters {
            return plain.adapted(config, adapters);
        }
        let Some(Projection { experts, expert_size, capacity, .. }) = config.projection else { return plain };
        let mut slots: Vec<Slot> = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, start: Start| {
            let from = slots.last().map_or(0, |slot| slot.range.end);
            slots.push(Slot { name, range: from..from + shape.iter().product::<usize>(), shape, start });
        };
        for slot in plain.slots {
            match slot.name.split_once(".mlp.") {
                None => add(slot.name, slot.shape, slot.start),
                // The last matrix of a layer's MLP stands for all of them.
                Some((layer, "down_proj.weight")) => {
                    add(format!("{layer}.{BASIS}"), vec![capacity, config.mlp_weights()], Start::Projection);
                    add(format!("{layer}.{MIXING}"), vec![expert_size, capacity], Start::Projection);
                }
                Some(_) => {}
            }
        }
        add(EXPERTS.to_owned(), vec![experts, expert_size], Start::Projection);
        Layout { config: config.clone(), slots }
    }

    /// The tensors of a plain model, and after them those of its adapters: `A` from a normal distribution of the deviation
    /// `1 / sqrt(in)`, `B` at zero.
    fn adapted(self, config: &Config, adapters: &Adapters) -> Self {
        let mut slots = self.slots.clone();
        let mut end = self.len();
        for slot in &self.slots {
            let Some(name) = slot.name.strip_suffix(".weight") else { continue };
            if !name.rsplit('.').next().is_some_and(|last| adapters.targets.iter().any(|target| target == last)) {
                continue;
            }
            let (outputs, inputs) = (slot.shape[0], slot.shape[1]);
            let parts = [
                ("lora_A", [adapters.experts, adapters.rank, inputs], Start::Normal(1.0 / (inputs as f64).sqrt())),
                ("lora_B", [adapters.experts, outputs, adapters.rank], Start::Zero),
            ];
            for (part, shape, start) in parts {
                let range = end..end + shape.iter().product::<usize>();
                end = range.end;
                slots.push(Slot { name: format!("{name}.{part}.weight"), shape: shape.to_vec(), range, start });
            }
        }
        Layout { config: config.clone(), slots }
    }

    fn plain(config: &Config) -> Self {
        let (width, mlp) = (config.width, config.mlp);
        let deviation = 0.5 / (width as f64).sqrt();
        let residual = deviation / (2.0 * config.layers as f64).sqrt();
        let mut slots = Vec::new();
        let mut end = 0;
        let mut add = |name: String, shape: &[usize], deviation: Option<f64>| {
            let from = end;
            end += shape.iter().product::<usize>();
            let start = deviation.map_or(Start::One, Start::Normal);
            slots.push(Slot { name, shape: shape.to_vec(), range: from..end, start });
        };
        add("model.embed_tokens.weight".into(), &[config.vocab, width], Some(0.02));
        for layer in 0..config.layers {
            let mut add =
                |name: &str, shape: &[usize], deviation| add(format!("model.layers.{layer}.{name}.weight"), shape, deviation);
            add("input_layernorm", &[width], None);
            for name in ["q_proj", "k_proj", "v_proj"] {
                add(&format!("self_attn.{name}"), &[width, width], Some(deviation));
            }
            add("self_attn.o_proj", &[width, width], Some(residual));
            add("post_attention_layernorm", &[width], None);
            if config.activation == Activation::SwiGlu {
                add("mlp.gate_proj", &[mlp, width], Some(deviation));
            }
            add("mlp.up_proj", &[mlp, width], Some(deviation));
            add("mlp.down_proj", &[width, mlp], Some(residual));
        }
        add("model.norm.weight".into(), &[width], None);
        Layout { config: config.plain(), slots }
    }

    /// The tensors, in the order of the buffer.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Numbers in the buffer.
    pub fn len(&self) -> usize {
        self.slots.last().map_or(0, |slot| slot.range.end)
    }

    /// Whether there is no tensor, which no model has.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The slot of this name.
    pub fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.name == name)
    }

    /// Parameters at the start. Each tensor is drawn from a stream of its own name, so its numbers depend on nothing else.
    ///
    /// A projected network starts with every expert equal to the plain model of the same seed: the first MLP of the basis
    /// is the plain one with coefficient 1, and the others are zero. Each expert has one of the others of its own if there
    /// are enough (`alpha_i = [1, delta_i]`), else a mixture of them of length 1, so that experts can drift apart. The hard
    /// mixture (`h = k`, frozen) has `alpha_i = delta_i`, and the plain MLP everywhere. The paper leaves the start open.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let config = &self.config;
        let Some(projection) = config.projection else { return self.initial_plain(seed) };
        let (plain, mut parameters) = (Self::plain(config), vec![0.0; self.len()]);
        let start = plain.initial_plain(seed);
        let mixing = mixing_at_start(projection, seed);
        let mut layers = 0..config.layers;
        for slot in &self.slots {
            let target = &mut parameters[slot.range.clone()];
            if let Some(same) = plain.slot(&slot.name) {
                target.copy_from_slice(&start[same.range.clone()]);
            } else if slot.is_basis() {
                let mlp = layers.next().map_or(0..0, |layer| mlp_range(config, layer));
                let copies = if projection.frozen { projection.capacity } else { 1 };
                target.chunks_exact_mut(mlp.len()).take(copies).for_each(|t| t.copy_from_slice(&start[mlp.clone()]));
            } else if slot.name == EXPERTS {
                (0..projection.experts).for_each(|i| target[i * projection.expert_size + i % projection.expert_size] = 1.0);
            } else {
                target.copy_from_slice(&mixing);
            }
        }
        parameters
    }

    fn initial_plain(&self, seed: u64) -> Vec<f32> {
        let mut parameters = vec![1.0; self.len()];
        for slot in &self.slots {
            let deviation = match slot.start {
                Start::Normal(deviation) => deviation,
                Start::Zero => 0.0,
                _ => continue,
            };
            let mut generator = Stream::new(seed, &format!("init:{}", slot.name)).generator();
            for pair in parameters[slot.range.clone()].chunks_mut(2) {
                // Box and Muller: two uniform numbers make two normal ones. The first lies in (0, 1].
                let radius = deviation * (-2.0 * (1.0 - unit(generator.next_u64())).ln()).sqrt();
                let angle = std::f64::consts::TAU * unit(generator.next_u64());
                for (number, value) in pair.iter_mut().zip([angle.cos(), angle.sin()]) {
                    *number = (radius * value) as f32;
                }
            }
        }
        parameters
    }
}

/// `M` of every layer at the start, (m, h); see [`Layout::initial`].
fn mixing_at_start(projection: Projection, seed: u64) -> Vec<f32> {
    let Projection { expert_size, capacity, frozen, .. } = projection;
    let mut mixing = vec![0.0; expert_size * capacity];
    let mut generator = Stream::new(seed, "init:mixing").generator();
    for (q, row) in mixing.chunks_exact_mut(capacity).enumerate() {
        if frozen {
            row[q % capacity] = 1.0;
            continue;
        }
        let (shared, own) = row.split_at_mut(1);
        shared[0] = 1.0;
        if own.len() >= expert_size {
            own[q] = 1.0;
        } else {
            own.iter_mut().for_each(|x| *x = (2.0 * unit(generator.next_u64()) - 1.0) as f32);
            let length = own.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
            own.iter_mut().for_each(|x| *x /= length);
        }
    }
    mixing
}

/// Where the MLP of layer `layer` lies in the buffer of the plain model: gate, up and down without a gap.
pub(crate) fn mlp_range(config: &Config, layer: usize) -> Range<usize> {
    let [.., up, down] = layer_ranges(config, layer);
    up.start..down.end
}

/// The groups of one layer, as sizes in the order of the buffer: norm, query-key-value, output, norm, up (with gate), down.
pub fn layer_sizes(config: &Config) -> [usize; 6] {
    let (width, mlp) = (config.width, config.mlp);
    [width, 3 * width * width, width * width, width, config.activation.packed() * mlp * width, width * mlp]
}

/// Where the groups of layer `layer` lie; see [`layer_sizes`].
pub fn layer_ranges(config: &Config, layer: usize) -> [Range<usize>; 6] {
    let sizes = layer_sizes(config);
    let mut end = config.vocab * config.width + layer * sizes.iter().sum::<usize>();
    sizes.map(|size| {
        end += size;
        end - size..end
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    #[test]
    fn the_table_covers_the_buffer_and_agrees_with_the_ranges() {
        for name in ["slm-1m", "slm-126m"] {
            let config = preset(name, 300).unwrap();
            let layout = Layout::new(&config);
            assert_eq!(layout.len(), config.parameters());
            assert!(layout.slots().windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
            let find = |name: &str| layout.slots().iter().find(|slot| slot.name == name).unwrap().range.clone();
            let [norm, qkv, output, _, up, down] = layer_ranges(&config, 2);
            assert_eq!(norm, find("model.layers.2.input_layernorm.weight"));
            assert_eq!(qkv.start, find("model.layers.2.self_attn.q_proj.weight").start);
            assert_eq!(output, find("model.layers.2.self_attn.o_proj.weight"));
            assert_eq!(up.end, find("model.layers.2.mlp.up_proj.weight").end);
            assert_eq!(down, find("model.layers.2.mlp.down_proj.weight"));
        }
    }

    #[test]
    fn the_start_has_the_stated_spread_and_depends_on_the_seed_only() {
        let config = preset("slm-1m", 1000).unwrap();
        let layout = Layout::new(&config);
        let parameters = layout.initial(7);
        assert_eq!(parameters, layout.initial(7));
        assert_ne!(parameters, layout.initial(8));
        let embedding = &parameters[layout.slots()[0].range.clone()];
        let mean_square = embedding.iter().map(|x| f64::from(x * x)).sum::<f64>() / embedding.len() as f64;
        // The relative standard error of the variance of 128,000 normal numbers is 0.4%; the bound is five of them.
        assert!((mean_square / 0.02f64.powi(2) - 1.0).abs() < 0.02, "{mean_square}");
    }
}
