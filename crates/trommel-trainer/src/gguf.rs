//! A model as one GGUF file, the format of llama.cpp, which calls this architecture `llama`.
//!
//! The weights stay `f32`; `llama-quantize` makes smaller files of this one. The output layer is the embedding, so it is left
//! out. llama.cpp turns neighbouring numbers of a head, `transformers` (and we) a number of the first half and one of the
//! second, so that the rows of queries and keys are put into another order:
//!
//! ```text
//!   a head of six, here     a0 a1 a2 b0 b1 b2      (a_i, b_i) is turned by the i-th angle
//!   in the file             a0 b0 a1 b1 a2 b2
//! ```

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use trommel_core::error::{Error, Result};
use trommel_core::storage::write_error;

use crate::checkpoint::Model;
use crate::gguf_tokenizer;
use crate::model::{Activation, Config};
use crate::parameters::{Layout, Slot};

/// `general.file_type` of a file whose tensors are all `f32`.
const ALL_F32: u32 = 0;

/// A [`Error::config`] unless llama.cpp has an architecture for a model of this shape.
pub(crate) fn check(config: &Config) -> Result<()> {
    if config.activation != Activation::SwiGlu {
        let error = Error::config("llama.cpp has no architecture with this model's MLP, two matrices and `GELU`");
        return Err(error.hint("use `--format hf`; the presets other than `slm-126m` have `SwiGLU` and can be exported"));
    }
    Ok(())
}

/// Writes a model that passes [`check`] to `file`; `path` is its name in messages. `tokenizer` is the model's `tokenizer.json`.
pub(crate) fn write(model: &Model, tokenizer: &Path, path: &Path, file: &mut File) -> Result<()> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut metadata = shape(&model.config, name);
    metadata.extend(gguf_tokenizer::metadata(tokenizer, &model.config, model.end_of_text)?);
    let tensors = tensors(model).map_err(|e| Error::internal("a tensor cannot be converted").source(e))?;
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut buffered = BufWriter::new(file);
    gguf_file::write(&mut buffered, &metadata, &tensors).map_err(|e| write_failed(path, e))?;
    buffered.flush().map_err(|e| write_error(path, e))
}

fn write_failed(path: &Path, error: candle_core::Error) -> Error {
    match error {
        candle_core::Error::Io(error) => write_error(path, error),
        other => Error::internal("a GGUF file cannot be written").file(path.display()).source(other),
    }
}

fn shape(config: &Config, name: String) -> Vec<(&'static str, Value)> {
    let count = |number: usize| Value::U32(number as u32);
    vec![
        ("general.architecture", Value::String("llama".to_owned())),
        ("general.type", Value::String("model".to_owned())),
        ("general.name", Value::String(name)),
        ("general.file_type", Value::U32(ALL_F32)),
        ("llama.vocab_size", count(config.vocab)),
        ("llama.context_length", count(config.context)),
        ("llama.embedding_length", count(config.width)),
        ("llama.block_count", count(config.layers)),
        ("llama.feed_forward_length", count(config.mlp)),
        ("llama.attention.head_count", count(config.heads)),
        ("llama.attention.head_count_kv", count(config.heads)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps as f32)),
        ("llama.rope.dimension_count", count(config.head())),
        ("llama.rope.freq_base", Value::F32(config.rope_theta as f32)),
    ]
}

fn tensors(model: &Model) -> candle_core::Result<Vec<(String, QTensor)>> {
    let layout = Layout::new(&model.config);
    let tensor = |slot: &Slot| {
        let numbers = &model.parameters[slot.range.clone()];
        let tensor = match slot.name.contains(".q_proj.") || slot.name.contains(".k_proj.") {
            true => Tensor::new(interleaved(&model.config, numbers), &Device::Cpu)?,
            false => Tensor::new(numbers, &Device::Cpu)?,
        };
        Ok((name(&slot.name), QTensor::quantize(&tensor.reshape(slot.shape.as_slice())?, GgmlDType::F32)?))
    };
    layout.slots().iter().map(tensor).collect()
}

/// The name in llama.cpp of a tensor that `transformers` calls `name`.
fn name(name: &str) -> String {
    let parts = [
        ("model.layers.", "blk."),
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("input_layernorm.", "attn_norm."),
        ("self_attn.q_proj.", "attn_q."),
        ("self_attn.k_proj.", "attn_k."),
        ("self_attn.v_proj.", "attn_v."),
        ("self_attn.o_proj.", "attn_output."),
        ("post_attention_layernorm.", "ffn_norm."),
        ("mlp.gate_proj.", "ffn_gate."),
        ("mlp.up_proj.", "ffn_up."),
        ("mlp.down_proj.", "ffn_down."),
    ];
    parts.iter().fold(name.to_owned(), |name, (theirs, ours)| name.replace(theirs, ours))
}

/// The rows of a query or key matrix, (heads * head, width), in llama.cpp's order: within a head, row `2 i + h` is row
/// `h * head / 2 + i`, for the halves `h` = 0, 1.
fn interleaved(config: &Config, rows: &[f32]) -> Vec<f32> {
    let (width, half) = (config.width, config.head() / 2);
    let row = |head: usize, h: usize, i: usize| &rows[((2 * head + h) * half + i) * width..][..width];
    let order = (0..config.heads).flat_map(|head| (0..half).flat_map(move |i| [0, 1].map(|h| (head, h, i))));
    order.flat_map(|(head, h, i)| row(head, h, i)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    #[test]
    fn rows_of_a_head_are_interleaved() {
        let config = Config { width: 12, heads: 2, ..preset("slm-1m", 10).unwrap() };
        let rows: Vec<f32> = (0..12).flat_map(|row| [row as f32; 12]).collect();
        let first: Vec<f32> = interleaved(&config, &rows).chunks(12).map(|row| row[0]).collect();
        assert_eq!(first, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 9.0, 7.0, 10.0, 8.0, 11.0]);
    }

    #[test]
    fn every_tensor_has_a_name_of_its_own() {
        let config = Config { layers: 2, ..preset("slm-1m", 10).unwrap() };
        let mut names: Vec<String> = Layout::new(&config).slots().iter().map(|slot| name(&slot.name)).collect();
        assert_eq!(names[..3], ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight"]);
        assert!(names.iter().all(|name| !name.contains("proj") && !name.contains("model")), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 2 * 9 + 2);
    }
}
