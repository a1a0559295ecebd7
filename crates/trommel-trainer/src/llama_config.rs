//! `config.json` of a model, in the words of `transformers`.
//!
//! Written so that it opens there without custom code; read so that nothing is computed otherwise than its author meant.
//! What a Llama model may have and ours has not (grouped heads, biases, an output layer of its own, scaled rotations) is
//! refused by the field's name. Where such a field is absent or `null`, it has the value that `LlamaConfig` documents; a field
//! that no computation of ours depends on is ignored.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use trommel_core::error::{Error, Result};

use crate::model::{Activation, Adapters, Config, Projection};

/// The file's name in a model's folder.
pub(crate) const FILE: &str = "config.json";

/// The remedy for a file that describes no model.
const OTHER_FILE: &str = "compare the file with the one that the model was published with, or copy the model again";

/// Architecture and type of a projected network, which `transformers` must not take for the small models that it projects to.
const PROJECTED: &str = "trommel-projected";

/// Architecture, type and activation, as `transformers` calls them, of each of our activations.
fn architecture(activation: Activation) -> [&'static str; 3] {
    match activation {
        Activation::SwiGlu => ["LlamaForCausalLM", "llama", "silu"],
        Activation::Gelu => ["ArceeForCausalLM", "arcee", "gelu_pytorch_tanh"],
    }
}

#[derive(Debug, Serialize)]
struct Written {
    architectures: [&'static str; 1],
    model_type: &'static str,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
    hidden_act: &'static str,
    max_position_embeddings: usize,
    /// For `transformers` 4, vLLM and others.
    rope_theta: f64,
    /// For `transformers` 5.
    rope_parameters: Rotation,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    bos_token_id: u32,
    eos_token_id: u32,
    /// For `transformers` 4, which knows no `dtype`.
    torch_dtype: &'static str,
    dtype: &'static str,
    /// Of a projected network.
    #[serde(skip_serializing_if = "Option::is_none")]
    projection: Option<Projection>,
    /// Of a model with low-rank adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapters: Option<Adapters>,
}

#[derive(Debug, Serialize)]
struct Rotation {
    rope_type: &'static str,
    rope_theta: f64,
}

/// The file's content for a model of this shape, whose documents begin and end with the token `end_of_text`.
pub(crate) fn write(config: &Config, end_of_text: u32) -> Result<Vec<u8>> {
    let [architecture, model_type, hidden_act] = architecture(config.activation);
    let [architecture, model_type] = if config.check_plain().is_err() { [PROJECTED; 2] } else { [architecture, model_type] };
    let written = Written {
        architectures: [architecture],
        model_type,
        vocab_size: config.vocab,
        hidden_size: config.width,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        num_key_value_heads: config.heads,
        head_dim: config.head(),
        intermediate_size: config.mlp,
        hidden_act,
        max_position_embeddings: config.context,
        rope_theta: config.rope_theta,
        rope_parameters: Rotation { rope_type: "default", rope_theta: config.rope_theta },
        rms_norm_eps: config.norm_eps,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        bos_token_id: end_of_text,
        eos_token_id: end_of_text,
        torch_dtype: "float32",
        dtype: "float32",
        projection: config.projection,
        adapters: config.adapters.clone(),
    };
    serde_json::to_vec_pretty(&written).map_err(|e| Error::internal("a configuration cannot be written as JSON").source(e))
}

/// The shape of the model in `folder`, and the token that ends its documents.
pub(crate) fn read(folder: &Path) -> Result<(Config, u32)> {
    let fields = Fields::open(folder.join(FILE))?;
    let activation = activation(&fields)?;
    let (width, heads): (usize, usize) = (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
    let norm_eps: f64 = fields.required("rms_norm_eps")?;
    if !(0.0..1.0).contains(&norm_eps) {
        return Err(fields.refusal("rms_norm_eps", norm_eps, "a number from 0 to below 1"));
    }
    let config = Config {
        vocab: fields.required("vocab_size")?,
        width,
        layers: fields.required("num_hidden_layers")?,
        heads,
        mlp: fields.required("intermediate_size")?,
        activation,
        context: fields.required("max_position_embeddings")?,
        rope_theta: rope_theta(&fields)?,
        norm_eps,
        projection: fields.get("projection")?,
        adapters: fields.get("adapters")?,
    };
    let unfit = |e| Error::data("the sizes do not fit together").source(e).file(fields.path.display()).hint(OTHER_FILE);
    config.check().map_err(unfit)?;
    fields.only("num_key_value_heads", heads, heads)?;
    fields.only("head_dim", width / heads, width / heads)?;
    fields.only("attention_bias", false, false)?;
    fields.only("mlp_bias", false, false)?;
    fields.only("partial_rotary_factor", 1.0, 1.0)?;
    fields.only("quantization_config", Value::Null, Value::Null)?;
    // `transformers` gives a Llama model whose file does not say otherwise an output layer of its own.
    fields.only("tie_word_embeddings", false, true)?;
    let end_of_text = end_of_text(&fields)?;
    if end_of_text as usize >= config.vocab {
        return Err(fields.refusal("eos_token_id", end_of_text, &format!("0 to {}", config.vocab - 1)));
    }
    Ok((config, end_of_text))
}

fn activation(fields: &Fields) -> Result<Activation> {
    let found: (String, String) = (fields.required("model_type")?, fields.required("hidden_act")?);
    let known = [Activation::SwiGlu, Activation::Gelu];
    if found.0 == PROJECTED
        && let Some(activation) = known.into_iter().find(|activation| architecture(*activation)[2] == found.1)
    {
        return Ok(activation);
    }
    let fits = |activation: &Activation| architecture(*activation)[1..] == [found.0.as_str(), found.1.as_str()];
    let Some(activation) = known.into_iter().find(fits) else {
        let message = format!("`model_type` `{}` with `hidden_act` `{}` is not supported", found.0, found.1);
        let hint = "supported are `llama` with `silu` and `arcee` with `gelu_pytorch_tanh`";
        return Err(Error::data(message).file(fields.path.display()).hint(hint));
    };
    let expected = vec![architecture(activation)[0].to_owned()];
    let found = fields.or("architectures", expected.clone())?;
    if found != expected {
        return Err(fields.refusal("architectures", found.join(", "), &format!("`{}`", expected[0])));
    }
    Ok(activation)
}

/// The base of the rotary angles. `transformers` 5 writes it into `rope_parameters`, 4 beside a `rope_scaling` that is `null`
/// unless the angles are scaled; files meant for both have both.
fn rope_theta(fields: &Fields) -> Result<f64> {
    let mut theta: Option<f64> = fields.get("rope_theta")?;
    for outer in ["rope_parameters", "rope_scaling"] {
        let Some(inner) = fields.get::<Map<String, Value>>(outer)? else { continue };
        let inner = Fields { path: fields.path.clone(), parent: format!("{outer}."), fields: inner };
        for kind in ["rope_type", "type"] {
            inner.only(kind, "default".to_owned(), "default".to_owned())?;
        }
        inner.only("partial_rotary_factor", 1.0, 1.0)?;
        let Some(found) = inner.get("rope_theta")? else { continue };
        let expected = *theta.get_or_insert(found);
        if expected != found {
            return Err(inner.refusal("rope_theta", found, &format!("{expected}, as elsewhere in this file")));
        }
    }
    let theta = theta.unwrap_or(10_000.0);
    if theta.is_finite() && theta > 0.0 { Ok(theta) } else { Err(fields.refusal("rope_theta", theta, "a number above 0")) }
}

/// One token, or the first of a list: models that were tuned to chat list the end of a turn after the end of a text. It begins
/// documents too, whatever `bos_token_id` says, because the trainer has one token for both.
fn end_of_text(fields: &Fields) -> Result<u32> {
    match fields.get::<Value>("eos_token_id")? {
        Some(Value::Array(_)) => {
            let first = fields.required::<Vec<u32>>("eos_token_id")?.first().copied();
            first.ok_or_else(|| fields.refusal("eos_token_id", "[]", "a token or a list of them"))
        }
        _ => fields.required("eos_token_id"),
    }
}

/// The fields of the file, or of an object in it.
struct Fields {
    path: PathBuf,
    /// What precedes a field's name in messages.
    parent: String,
    fields: Map<String, Value>,
}

impl Fields {
    fn open(path: PathBuf) -> Result<Fields> {
        let bytes = fs::read(&path).map_err(|e| {
            let hint = "name the folder `checkpoint` in the output of a training run, or a folder that `transformers` saved";
            Error::data("this is no checkpoint").file(path.display()).source(e).hint(hint)
        })?;
        let fields = serde_json::from_slice(&bytes).map_err(|e| {
            let hint = "restore the file from a copy, or copy or download the model again";
            let error = Error::data("the configuration is damaged").file(path.display());
            error.at(e.line() as u64, e.column() as u64).source(e).hint(hint)
        })?;
        Ok(Fields { path, parent: String::new(), fields })
    }

    /// A field that may be absent or `null`.
    fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(value) = self.fields.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
        serde_json::from_value(value.clone()).map(Some).map_err(|e| {
            let message = format!("`{}{name}` is `{value}`, which is not what belongs there", self.parent);
            Error::data(message).file(self.path.display()).source(e).hint(OTHER_FILE)
        })
    }

    fn or<T: DeserializeOwned>(&self, name: &str, default: T) -> Result<T> {
        Ok(self.get(name)?.unwrap_or(default))
    }

    fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let missing = || Error::data(format!("`{}{name}` is missing", self.parent)).file(self.path.display()).hint(OTHER_FILE);
        self.get(name)?.ok_or_else(missing)
    }

    /// Refuses any value but `supported`; an absent field stands for `default`.
    fn only<T: DeserializeOwned + PartialEq + Serialize>(&self, name: &str, default: T, supported: T) -> Result<()> {
        let found = self.or(name, default)?;
        if found == supported { Ok(()) } else { Err(self.refusal(name, json(&found), &json(&supported))) }
    }

    fn refusal(&self, name: &str, found: impl Display, supported: &str) -> Error {
        let message = format!("`{}{name}` is {found}, supported is {supported}", self.parent);
        let hint = "trommel's decoder has as many key as query heads, no biases, plain rotations, and one matrix that is both \
                    embedding and output layer; choose a model of this kind";
        Error::data(message).file(self.path.display()).hint(hint)
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::preset;

    fn folder_with(config: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), config.to_string()).unwrap();
        folder
    }

    fn written() -> Value {
        serde_json::from_slice(&write(&preset("slm-1m", 50).unwrap(), 3).unwrap()).unwrap()
    }

    /// Reads the written file with some fields replaced.
    fn read_with(replaced: &[(&str, Value)]) -> Result<(Config, u32)> {
        let mut config = written();
        replaced.iter().for_each(|(name, value)| config[*name] = value.clone());
        read(folder_with(&config).path())
    }

    #[test]
    fn what_transformers_writes_is_read() {
        let ours = preset("slm-1m", 50).unwrap();
        assert_eq!(read_with(&[]).unwrap(), (ours.clone(), 3));
        let version_4 = [("rope_parameters", Value::Null), ("rope_scaling", Value::Null), ("head_dim", Value::Null)];
        assert_eq!(read_with(&version_4).unwrap(), (ours.clone(), 3));
        let version_5 = [("rope_theta", Value::Null), ("rope_parameters", json!({"rope_type": "default", "rope_theta": 5e5}))];
        assert_eq!(read_with(&version_5).unwrap().0, Config { rope_theta: 5e5, ..ours });
        assert_eq!(read_with(&[("eos_token_id", json!([7, 8]))]).unwrap().1, 7);
    }

    #[test]
    fn what_would_be_computed_otherwise_is_refused_by_name() {
        let cases = [
            ("num_key_value_heads", json!(2), "`num_key_value_heads` is 2, supported is 4"),
            ("head_dim", json!(64), "`head_dim` is 64, supported is 32"),
            ("attention_bias", json!(true), "`attention_bias` is true, supported is false"),
            ("mlp_bias", json!(true), "`mlp_bias` is true"),
            ("tie_word_embeddings", Value::Null, "`tie_word_embeddings` is false, supported is true"),
            ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "`rope_scaling.type` is \"linear\""),
            ("rope_parameters", json!({"rope_type": "llama3"}), "`rope_parameters.rope_type` is \"llama3\""),
            ("rope_parameters", json!({"rope_theta": 1.0}), "`rope_parameters.rope_theta` is 1, supported is 10000"),
            ("rope_theta", json!(-1.0), "`rope_parameters.rope_theta` is 10000, supported is -1"),
            ("partial_rotary_factor", json!(0.5), "`partial_rotary_factor` is 0.5"),
            ("quantization_config", json!({"bits": 4}), "`quantization_config` is {\"bits\":4}"),
            ("model_type", json!("qwen3"), "`model_type` `qwen3` with `hidden_act` `silu`"),
            ("architectures", json!(["LlamaForSequenceClassification"]), "supported is `LlamaForCausalLM`"),
            ("vocab_size", Value::Null, "`vocab_size` is missing"),
            ("vocab_size", json!("many"), "`vocab_size` is `\"many\"`"),
            ("max_position_embeddings", json!(1u64 << 40), "the sizes do not fit together"),
            ("rms_norm_eps", json!(-1.0), "`rms_norm_eps` is -1, supported is a number from 0 to below 1"),
            ("num_hidden_layers", json!(0), "the sizes do not fit together"),
            ("hidden_size", json!(u64::MAX / 4), "the sizes do not fit together"),
            ("eos_token_id", json!(50), "`eos_token_id` is 50, supported is 0 to 49"),
            ("eos_token_id", json!([]), "`eos_token_id` is []"),
            ("eos_token_id", Value::Null, "`eos_token_id` is missing"),
        ];
        for (name, value, said) in cases {
            let error = read_with(&[(name, value)]).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
            assert!(error.place().file.as_ref().unwrap().ends_with(FILE) && error.exit_code() == 1, "{error}");
            assert!(error.remedy().is_some(), "{error}");
        }
        let folder = folder_with(&json!([]));
        assert!(read(folder.path()).unwrap_err().to_string().contains("the configuration is damaged"));
    }
}
