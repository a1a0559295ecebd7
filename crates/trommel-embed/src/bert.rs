//! The encoder's forward pass: BERT (Devlin et al. 2019) as `transformers.BertModel` computes it, for inference.
//!
//! Shapes: `n` texts of `time` tokens each give `(n * time, hidden)` activations. All texts of a call have the same length, so
//! that nothing is padded and no attention mask is needed. candle multiplies the matrices; `crate::fused` does the rest.

use candle_core::{Device, Tensor};
use trommel_core::error::{Error, Result};

use crate::encoder_config::BertConfig;
use crate::fused::{Add, AddBias, BiasGelu, LayerNorm, ScaledSoftmax};
use crate::model_folder::Tensors;

/// The weights of a BERT encoder.
pub(crate) struct Bert {
    hidden: usize,
    heads: usize,
    /// `(vocabulary, hidden)`.
    words: Vec<f32>,
    /// `(positions, hidden)`, with the embedding of token type 0 added: we never encode pairs of texts.
    positions: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
}

struct Layer {
    /// Query, key and value side by side: `(hidden, 3 * hidden)`.
    projections: Linear,
    attention_output: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    norm: Norm,
}

/// `weight` is stored as `(in, out)`, transposed from PyTorch's `(out, in)`: the product then reads it in order.
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl Bert {
    /// The weights from `model.safetensors`, whose tensors may all be prefixed with `bert.`.
    pub(crate) fn from_tensors(tensors: &Tensors, config: &BertConfig) -> Result<Self> {
        let words = "embeddings.word_embeddings.weight";
        let prefix = if tensors.has(&format!("bert.{words}")) { "bert." } else { "" };
        let read = Reader { tensors, config, prefix };
        let hidden = config.hidden_size;
        let types = read.floats("embeddings.token_type_embeddings.weight", &[config.type_vocab_size, hidden])?;
        let mut positions = read.floats("embeddings.position_embeddings.weight", &[config.max_position_embeddings, hidden])?;
        for row in positions.chunks_exact_mut(hidden) {
            row.iter_mut().zip(&types).for_each(|(position, kind)| *position += kind);
        }
        Ok(Bert {
            hidden,
            heads: config.num_attention_heads,
            words: read.floats(words, &[config.vocab_size, hidden])?,
            positions,
            norm: read.norm("embeddings.LayerNorm")?,
            layers: (0..config.num_hidden_layers).map(|layer| read.layer(layer)).collect::<Result<_>>()?,
        })
    }

    /// The last layer's states: `ids` `(n, time)` gives `(n, time, hidden)`.
    pub(crate) fn states(&self, ids: &[u32], time: usize) -> Result<Vec<f32>> {
        let failed = |e| Error::internal("the sentence encoder failed").source(e);
        self.forward(ids, time).and_then(|states| states.flatten_all()?.to_vec1()).map_err(failed)
    }

    fn forward(&self, ids: &[u32], time: usize) -> candle_core::Result<Tensor> {
        let mut embedded = Vec::with_capacity(ids.len() * self.hidden);
        for (at, id) in ids.iter().enumerate() {
            let word = &self.words[*id as usize * self.hidden..][..self.hidden];
            let position = &self.positions[at % time * self.hidden..][..self.hidden];
            embedded.extend(word.iter().zip(position).map(|(word, position)| word + position));
        }
        let mut states = Tensor::from_vec(embedded, (ids.len(), self.hidden), &Device::Cpu)?; // (n * time, hidden)
        self.norm.apply(&states)?;
        for layer in &self.layers {
            let attended = layer.attend(&states, time, self.heads)?;
            let attended = layer.attention_output.apply(&attended)?;
            attended.inplace_op2(&states, &Add)?;
            layer.attention_norm.apply(&attended)?;
            let wide = attended.matmul(&layer.up.weight)?; // (n * time, intermediate)
            wide.inplace_op2(&layer.up.bias, &BiasGelu)?;
            states = layer.down.apply(&wide)?; // (n * time, hidden)
            states.inplace_op2(&attended, &Add)?;
            layer.norm.apply(&states)?;
        }
        Ok(states)
    }
}

impl Layer {
    /// Multi-head self-attention before its output projection: `(n * time, hidden)` to the same shape.
    fn attend(&self, states: &Tensor, time: usize, heads: usize) -> candle_core::Result<Tensor> {
        let (rows, hidden) = states.dims2()?;
        let (texts, width) = (rows / time, hidden / heads);
        let projected = self.projections.apply(states)?.reshape((texts, time, 3, heads, width))?;
        // (3, texts, heads, time, width), then one of the three as (texts * heads, time, width)
        let projected = projected.permute((2, 0, 3, 1, 4))?.contiguous()?.reshape((3, texts * heads, time, width))?;
        let (query, key, value) = (projected.get(0)?, projected.get(1)?, projected.get(2)?);
        let scores = query.matmul(&key.t()?)?; // (texts * heads, time, time)
        scores.inplace_op1(&ScaledSoftmax { scale: 1.0 / (width as f32).sqrt() })?;
        let mixed = scores.matmul(&value)?.reshape((texts, heads, time, width))?;
        mixed.transpose(1, 2)?.contiguous()?.reshape((rows, hidden))
    }
}

impl Linear {
    fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        y.inplace_op2(&self.bias, &AddBias)?;
        Ok(y)
    }
}

impl Norm {
    fn apply(&self, x: &Tensor) -> candle_core::Result<()> {
        x.inplace_op3(&self.weight, &self.bias, &LayerNorm { epsilon: self.epsilon })
    }
}

/// Weights by their name in the file.
struct Reader<'a> {
    tensors: &'a Tensors<'a>,
    config: &'a BertConfig,
    prefix: &'static str,
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
        let failed = |e: candle_core::Error| Error::internal("cannot arrange the weights").source(e);
        let outputs = bias.len();
        let weight = Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu).map_err(failed)?;
        let weight = weight.t().and_then(|w| w.contiguous()).map_err(failed)?;
        Ok(Linear { weight, bias: Tensor::from_vec(bias, outputs, &Device::Cpu).map_err(failed)? })
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        let read = |part: &str| {
            let values = self.floats(&format!("{name}.{part}"), &[self.config.hidden_size])?;
            let length = values.len();
            let failed = |e| Error::internal("cannot arrange the weights").source(e);
            Tensor::from_vec(values, length, &Device::Cpu).map_err(failed)
        };
        Ok(Norm { weight: read("weight")?, bias: read("bias")?, epsilon: self.config.layer_norm_eps })
    }
}
