//! The encoder's forward pass: BERT (Devlin et al. 2019) as `transformers.BertModel` computes it, for inference.
//!
//! One text runs at a time, on the calling thread: nothing is padded, no attention mask is needed, and the rows of a text,
//! `(time, hidden)`, stay in the cache of one core. The products are those of the trainer.

use trommel_core::error::Result;
use trommel_kernels::attention::{self, Shape};
use trommel_kernels::encoder::{LayerNorm, add_bias, add_bias_and_gelu};
use trommel_kernels::matmul::{Matrix, MatrixMut, Target};
use trommel_kernels::panels::{Panels, Precision};
use trommel_kernels::rows::Rows;

use crate::encoder_config::BertConfig;
use crate::model_folder::Tensors;

/// The weights of a BERT encoder.
pub(crate) struct Bert {
    hidden: usize,
    heads: usize,
    precision: Precision,
    /// `(vocabulary, hidden)`.
    words: Vec<f32>,
    /// `(positions, hidden)`, with the embedding of token type 0 added: we never encode pairs of texts.
    positions: Vec<f32>,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    /// Query, key and value side by side: `(hidden, 3 * hidden)`.
    projections: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

/// `x weight + bias`, where `weight` is `(in, out)`, transposed from PyTorch's `(out, in)`.
struct Linear {
    weight: Panels,
    bias: Vec<f32>,
}

/// Memory of one thread's passes through one model.
pub(crate) struct Scratch {
    states: Vec<f32>,    // (time, hidden)
    projected: Vec<f32>, // (time, 3 * hidden)
    qkv: Rows,           // (time, 3 * hidden), as products read them
    attended: Vec<f32>,  // (time, hidden)
    wide: Vec<f32>,      // (time, intermediate)
    attention: attention::Scratch,
}

impl Bert {
    /// The weights from `model.safetensors`, whose tensors may all be prefixed with `bert.`.
    pub(crate) fn from_tensors(tensors: &Tensors, config: &BertConfig, precision: Precision) -> Result<Self> {
        let words = "embeddings.word_embeddings.weight";
        let prefix = if tensors.has(&format!("bert.{words}")) { "bert." } else { "" };
        let read = Reader { tensors, config, prefix, precision };
        let hidden = config.hidden_size;
        let types = read.floats("embeddings.token_type_embeddings.weight", &[config.type_vocab_size, hidden])?;
        let mut positions = read.floats("embeddings.position_embeddings.weight", &[config.max_position_embeddings, hidden])?;
        for row in positions.chunks_exact_mut(hidden) {
            row.iter_mut().zip(&types).for_each(|(position, kind)| *position += kind);
        }
        Ok(Bert {
            hidden,
            heads: config.num_attention_heads,
            precision,
            words: read.floats(words, &[config.vocab_size, hidden])?,
            positions,
            norm: read.norm("embeddings.LayerNorm")?,
            layers: (0..config.num_hidden_layers).map(|layer| read.layer(layer)).collect::<Result<_>>()?,
        })
    }

    /// Memory for passes of one thread.
    pub(crate) fn scratch(&self) -> Scratch {
        Scratch {
            states: Vec::new(),
            projected: Vec::new(),
            qkv: Rows::new(self.precision),
            attended: Vec::new(),
            wide: Vec::new(),
            attention: attention::Scratch::default(),
        }
    }

    /// The last layer's states of one text: `ids` (time) gives `(time, hidden)`, in `scratch`.
    pub(crate) fn states<'a>(&self, ids: &[u32], scratch: &'a mut Scratch) -> &'a [f32] {
        let (time, hidden) = (ids.len(), self.hidden);
        let Scratch { states, projected, qkv, attended, wide, attention } = scratch;
        let shape = Shape { time, heads: self.heads, head: hidden / self.heads };
        states.clear();
        for (at, id) in ids.iter().enumerate() {
            let word = &self.words[*id as usize * hidden..][..hidden];
            let position = &self.positions[at * hidden..][..hidden];
            states.extend(word.iter().zip(position).map(|(word, position)| word + position));
        }
        self.norm.apply(states);
        attended.resize(time * hidden, 0.0);
        for layer in &self.layers {
            layer.projections.apply(states, projected);
            add_bias(projected, &layer.projections.bias);
            qkv.pack(Matrix::new(projected, time, 3 * hidden));
            attention::forward_unmasked(shape, qkv, attended, attention);
            layer.attention_output.add_to(states, attended);
            layer.attention_norm.apply(states);

            layer.up.apply(states, wide);
            add_bias_and_gelu(wide, &layer.up.bias);
            layer.down.add_to(states, wide);
            layer.norm.apply(states);
        }
        states
    }
}

impl Linear {
    /// `out = x weight`; the bias is left to the caller.
    fn apply(&self, x: &[f32], out: &mut Vec<f32>) {
        let (inputs, outputs) = (self.weight.rows(), self.bias.len());
        let rows = x.len() / inputs;
        out.resize(rows * outputs, 0.0);
        self.weight.multiply(MatrixMut::new(out, rows, outputs), Target::Overwrite, Matrix::new(x, rows, inputs));
    }

    /// `out += x weight + bias`.
    fn add_to(&self, out: &mut [f32], x: &[f32]) {
        let (inputs, outputs) = (self.weight.rows(), self.bias.len());
        let rows = x.len() / inputs;
        add_bias(out, &self.bias);
        self.weight.multiply(MatrixMut::new(out, rows, outputs), Target::Add, Matrix::new(x, rows, inputs));
    }
}

/// Weights by their name in the file.
struct Reader<'a> {
    tensors: &'a Tensors<'a>,
    config: &'a BertConfig,
    prefix: &'static str,
    precision: Precision,
}

impl Reader<'_> {
    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.tensors.floats(&format!("{}{name}", self.prefix), shape)
    }

    fn layer(&self, layer: usize) -> Result<Layer> {
        let (hidden, intermediate) = (self.config.hidden_size, self.config.intermediate_size);
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let projections = ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}")));
        Ok(Layer {
            projections: self.linear(&projections, hidden, hidden)?,
            attention_output: self.linear(&[name("attention.output.dense")], hidden, hidden)?,
            attention_norm: self.norm(&name("attention.output.LayerNorm"))?,
            up: self.linear(&[name("intermediate.dense")], hidden, intermediate)?,
            down: self.linear(&[name("output.dense")], intermediate, hidden)?,
            norm: self.norm(&name("output.LayerNorm"))?,
        })
    }

    /// Linear layers of the same input, side by side as one: `names` each hold `(outputs, inputs)`.
    fn linear(&self, names: &[String], inputs: usize, outputs: usize) -> Result<Linear> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            weight.extend(self.floats(&format!("{name}.weight"), &[outputs, inputs])?);
            bias.extend(self.floats(&format!("{name}.bias"), &[outputs])?);
        }
        let outputs = bias.len();
        let mut panels = Panels::new(self.precision);
        panels.pack(Matrix::new(&weight, outputs, inputs).transposed());
        Ok(Linear { weight: panels, bias })
    }

    fn norm(&self, name: &str) -> Result<LayerNorm> {
        let read = |part: &str| self.floats(&format!("{name}.{part}"), &[self.config.hidden_size]);
        Ok(LayerNorm { weight: read("weight")?, bias: read("bias")?, epsilon: self.config.layer_norm_eps as f32 })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    // candle's composed operations are the reference.
    #[test]
    fn layer_norm_follows_candle() {
        let values: Vec<f32> = (0..60).map(|i| ((i * 37) % 60) as f32 * 0.3 - 9.0).collect();
        let tensor = |values: &[f32], rows: usize| Tensor::from_slice(values, (rows, 20), &Device::Cpu).unwrap();
        let (weight, bias) = (tensor(&values[..20], 1).squeeze(0).unwrap(), tensor(&values[20..40], 1).squeeze(0).unwrap());
        let expected = candle_nn::ops::layer_norm_slow(&tensor(&values, 3), &weight, &bias, 1e-12).unwrap();
        let mut ours = values.clone();
        LayerNorm { weight: values[..20].to_vec(), bias: values[20..40].to_vec(), epsilon: 1e-12 }.apply(&mut ours);
        for (a, b) in ours.iter().zip(expected.flatten_all().unwrap().to_vec1::<f32>().unwrap()) {
            assert!((a - b).abs() < 2e-5, "{a} {b}");
        }
    }
}
