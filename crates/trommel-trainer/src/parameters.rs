//! The parameters of a model: one flat buffer, and the table that says where each matrix lies in it.
//!
//! Matrices that are multiplied with the same rows lie side by side (query, key, value; gate, up), so each group is one
//! product. Names and shapes are those of `transformers`.
//!
//! ```text
//!   embedding | norm  query key value  output  norm  gate up  down | ... one group per layer ... | norm
//! ```

use std::ops::Range;

use rand::RngCore;
use trommel_core::seed::{Stream, unit};

use crate::model::{Activation, Config};

/// One named tensor within the flat buffer.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The tensor's name in `transformers`.
    pub name: String,
    /// Its shape, (out, in) for a matrix.
    pub shape: Vec<usize>,
    /// Where its numbers lie.
    pub range: Range<usize>,
    /// Standard deviation at the start; `None` for a gain, which starts at one.
    deviation: Option<f64>,
}

impl Slot {
    /// Whether weight decay applies: to matrices, not to gains.
    pub fn decays(&self) -> bool {
        self.deviation.is_some()
    }
}

/// Every tensor of a model, in the order of the flat buffer.
#[derive(Debug, Clone)]
pub struct Layout {
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
        let (width, mlp) = (config.width, config.mlp);
        let deviation = 0.5 / (width as f64).sqrt();
        let residual = deviation / (2.0 * config.layers as f64).sqrt();
        let mut slots = Vec::new();
        let mut end = 0;
        let mut add = |name: String, shape: &[usize], deviation: Option<f64>| {
            let start = end;
            end += shape.iter().product::<usize>();
            slots.push(Slot { name, shape: shape.to_vec(), range: start..end, deviation });
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
        Layout { slots }
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

    /// Parameters at the start. Each tensor is drawn from a stream of its own name, so its numbers depend on nothing else.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut parameters = vec![1.0; self.len()];
        for slot in &self.slots {
            let Some(deviation) = slot.deviation else { continue };
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
