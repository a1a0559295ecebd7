//! A model on disk, and the state of an unfinished training run.
//!
//! ```text
//!   checkpoint/
//!     model.safetensors   the weights, under the names of `transformers`
//!     config.json         the shape, as `transformers` writes it
//!     tokenizer.json      what made the tokens
//!     state.json          step, place in the data, fingerprint, and the checksum of every other file
//!     first_moment.safetensors, second_moment.safetensors   of AdamW; unfinished runs only
//!     best.safetensors    the best weights so far; unfinished fine-tuning only
//! ```
//!
//! A folder is written beside its place and renamed when it is whole; the one before is kept until then. Training draws no
//! random numbers in sequence (weights and orders come from hashes of the seed), so no generator's state is needed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::checksum;
use trommel_core::manifest::Manifest;
use trommel_core::storage::{create_folder, write_bytes, write_error};

use crate::model::{Activation, Config, Projection};
use crate::parameters::Layout;

/// The checkpoint's folder within a training run's output folder.
pub const FOLDER: &str = "checkpoint";

/// The type of a projected network in `config.json`.
const PROJECTED: &str = "trommel-projected";

const MODEL: &str = "model.safetensors";
const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MOMENTS: [&str; 2] = ["first_moment.safetensors", "second_moment.safetensors"];
const BEST: &str = "best.safetensors";

/// A trained model, as a checkpoint holds it.
#[derive(Debug, Clone)]
pub struct Model {
    /// Its shape.
    pub config: Config,
    /// The id of the token that begins and ends a document.
    pub end_of_text: u32,
    /// The flat parameters; see [`Layout`].
    pub parameters: Vec<f32>,
}

/// What an unfinished run needs beside its model.
#[derive(Debug, Clone)]
pub struct Unfinished {
    /// Both flat moments of `AdamW`.
    pub moments: [Vec<f32>; 2],
    /// The flat parameters of the best evaluation so far, if there was one.
    pub best: Option<Vec<f32>>,
}

#[derive(Serialize, Deserialize)]
struct StateFile<S> {
    checksums: BTreeMap<String, String>,
    state: S,
}

/// Writes a checkpoint in place of the one in `folder`. `tokenizer` is the file to copy.
pub fn save<S: Serialize>(
    folder: &Path,
    model: &Model,
    tokenizer: &Path,
    unfinished: Option<&Unfinished>,
    state: &S,
) -> Result<()> {
    let new = sibling(folder, "unfinished");
    remove(&new)?;
    create_folder(&new)?;
    let layout = Layout::new(&model.config);
    let mut files = vec![
        (MODEL, tensors(&layout, &model.parameters)?),
        (CONFIG, json(&Published::new(&model.config, model.end_of_text))?),
        (Manifest::TOKENIZER, fs::read(tokenizer).map_err(|e| unreadable(tokenizer, e))?),
    ];
    if let Some(unfinished) = unfinished {
        for (name, moment) in MOMENTS.iter().zip(&unfinished.moments) {
            files.push((name, tensors(&layout, moment)?));
        }
        if let Some(best) = &unfinished.best {
            files.push((BEST, tensors(&layout, best)?));
        }
    }
    let mut checksums = BTreeMap::new();
    for (name, bytes) in files {
        write_bytes(&new.join(name), &bytes)?;
        checksums.insert(name.to_owned(), checksum(&bytes));
    }
    write_bytes(&new.join(STATE), &json(&StateFile { checksums, state })?)?;

    let previous = sibling(folder, "previous");
    let failed = |e| write_error(folder, e);
    if folder.exists() {
        remove(&previous)?;
        fs::rename(folder, &previous).map_err(failed)?;
    }
    fs::rename(&new, folder).map_err(failed)?;
    let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
    remove(&previous)
}

/// The state in `folder`, or `None` if there is no checkpoint.
pub fn read_state<S: DeserializeOwned>(folder: &Path) -> Result<Option<S>> {
    // A crash between the two renames of `save` leaves the checkpoint under its old name.
    let previous = sibling(folder, "previous");
    if !folder.exists() && previous.exists() {
        fs::rename(&previous, folder).map_err(|e| write_error(folder, e))?;
    }
    if !folder.exists() {
        return Ok(None);
    }
    let path = folder.join(STATE);
    let bytes = fs::read(&path).map_err(|e| damaged(&path).source(e))?;
    let file: StateFile<S> = serde_json::from_slice(&bytes).map_err(|e| damaged(&path).source(e))?;
    for (name, expected) in &file.checksums {
        let path = folder.join(name);
        let bytes = fs::read(&path).map_err(|e| damaged(&path).source(e))?;
        if checksum(&bytes) != *expected {
            return Err(damaged(&path));
        }
    }
    Ok(Some(file.state))
}

/// Reads the model in `folder`: a checkpoint, or an export of the same shape.
pub fn read_model(folder: &Path) -> Result<Model> {
    let path = folder.join(CONFIG);
    let bytes = fs::read(&path).map_err(|e| {
        let hint = "name the folder `checkpoint` in the output of a training run";
        Error::data("this is no checkpoint").file(path.display()).source(e).hint(hint)
    })?;
    let published: Published = serde_json::from_slice(&bytes).map_err(|e| damaged(&path).source(e))?;
    let config = published.config().map_err(|e| e.file(path.display()))?;
    let parameters = read_tensors(&folder.join(MODEL), &Layout::new(&config))?;
    Ok(Model { config, end_of_text: published.eos_token_id, parameters })
}

/// Reads what the unfinished run in `folder` needs beside its model.
pub fn read_unfinished(folder: &Path, config: &Config) -> Result<Unfinished> {
    let layout = Layout::new(config);
    let read = |name| read_tensors(&folder.join(name), &layout);
    let best = if folder.join(BEST).exists() { Some(read(BEST)?) } else { None };
    Ok(Unfinished { moments: [read(MOMENTS[0])?, read(MOMENTS[1])?], best })
}

/// The tokenizer of a checkpoint.
pub fn tokenizer(folder: &Path) -> PathBuf {
    folder.join(Manifest::TOKENIZER)
}

fn tensors(layout: &Layout, flat: &[f32]) -> Result<Vec<u8>> {
    let bytes: Vec<u8> = flat.iter().flat_map(|number| number.to_le_bytes()).collect();
    let mut views = Vec::new();
    for slot in layout.slots() {
        let data = &bytes[slot.range.start * 4..slot.range.end * 4];
        let view = TensorView::new(Dtype::F32, slot.shape.clone(), data)
            .map_err(|e| Error::internal("a tensor has a wrong size").source(e))?;
        views.push((slot.name.as_str(), view));
    }
    // `transformers` refuses files that do not say which framework's layout they have.
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| Error::internal("the weights cannot be written").source(e))
}

fn read_tensors(path: &Path, layout: &Layout) -> Result<Vec<f32>> {
    let bytes = fs::read(path).map_err(|e| damaged(path).source(e))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(path).source(e))?;
    let mut flat = vec![0.0; layout.len()];
    for slot in layout.slots() {
        let tensor = tensors.tensor(&slot.name).map_err(|e| damaged(path).source(e))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != slot.shape {
            let (name, shape, expected) = (&slot.name, tensor.shape(), &slot.shape);
            let message = format!("tensor `{name}` is {:?} {shape:?}, not F32 {expected:?}", tensor.dtype());
            return Err(Error::data(message).file(path.display()).hint("`config.json` and the weights do not belong together"));
        }
        for (number, bytes) in flat[slot.range.clone()].iter_mut().zip(tensor.data().as_chunks().0) {
            *number = f32::from_le_bytes(*bytes);
        }
    }
    Ok(flat)
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|e| Error::internal("a value cannot be written as JSON").source(e))
}

fn sibling(folder: &Path, suffix: &str) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{suffix}"));
    folder.with_file_name(name)
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() { fs::remove_dir_all(folder).map_err(|e| write_error(folder, e)) } else { Ok(()) }
}

/// The error of a folder whose checkpoint belongs to another plan or other data.
pub fn of_another_plan(folder: &Path) -> Error {
    Error::config("the checkpoint belongs to another plan or other data")
        .file(folder.display())
        .hint("remove the folder to train anew, or name another output folder")
}

fn damaged(path: &Path) -> Error {
    let hint = "restore the checkpoint's folder from a copy, or remove it to train again from the start";
    Error::data("the checkpoint is damaged").file(path.display()).hint(hint)
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    Error::data("the file cannot be read").file(path.display()).source(error)
}

/// `config.json`, in the words of `transformers`.
#[derive(Debug, Serialize, Deserialize)]
struct Published {
    architectures: Vec<String>,
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
    hidden_act: String,
    max_position_embeddings: usize,
    rope_theta: f64,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    bos_token_id: u32,
    eos_token_id: u32,
    torch_dtype: String,
    /// Of a projected network, which only trommel opens; `trommel project` makes a plain model of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    projection: Option<Projection>,
}

impl Published {
    fn new(config: &Config, end_of_text: u32) -> Self {
        let (architecture, model_type, activation) = match config.activation {
            Activation::SwiGlu => ("LlamaForCausalLM", "llama", "silu"),
            Activation::Gelu => ("ArceeForCausalLM", "arcee", "gelu_pytorch_tanh"),
        };
        // `transformers` must not take a network for the small models that it projects to.
        let (architecture, model_type) = if config.projection.is_some() { (PROJECTED, PROJECTED) } else { (architecture, model_type) };
        Published {
            architectures: vec![architecture.to_owned()],
            model_type: model_type.to_owned(),
            vocab_size: config.vocab,
            hidden_size: config.width,
            num_hidden_layers: config.layers,
            num_attention_heads: config.heads,
            num_key_value_heads: config.heads,
            head_dim: config.head(),
            intermediate_size: config.mlp,
            hidden_act: activation.to_owned(),
            max_position_embeddings: config.context,
            rope_theta: config.rope_theta,
            rms_norm_eps: config.norm_eps,
            tie_word_embeddings: true,
            attention_bias: false,
            mlp_bias: false,
            bos_token_id: end_of_text,
            eos_token_id: end_of_text,
            torch_dtype: "float32".to_owned(),
            projection: config.projection,
        }
    }

    fn config(&self) -> Result<Config> {
        let activation = match (self.model_type.as_str(), self.hidden_act.as_str()) {
            ("llama" | PROJECTED, "silu") => Activation::SwiGlu,
            ("arcee" | PROJECTED, "gelu_pytorch_tanh") => Activation::Gelu,
            (model, activation) => {
                let message = format!("a model of type `{model}` with activation `{activation}` is not supported");
                return Err(Error::data(message)
                    .hint("models that trommel trains are `llama` with `silu` or `arcee` with `gelu_pytorch_tanh`"));
            }
        };
        let plain = self.tie_word_embeddings && self.num_key_value_heads == self.num_attention_heads;
        if !plain || self.attention_bias || self.mlp_bias {
            return Err(Error::data("models with a separate output layer, grouped heads or biases are not supported"));
        }
        let config = Config {
            vocab: self.vocab_size,
            width: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            mlp: self.intermediate_size,
            activation,
            context: self.max_position_embeddings,
            rope_theta: self.rope_theta,
            norm_eps: self.rms_norm_eps,
            projection: self.projection,
        };
        config.check().map_err(|e| Error::data("the sizes do not fit together").source(e))?;
        Ok(config)
    }
}

/// Numbers of a state as text: JSON's own numbers may lose their last bit when `serde_json` reads them.
pub mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes the shortest text that stands for this number only.
    pub fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&number.to_string())
    }

    /// Reads it back to the same bits.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    fn written(folder: &Path, activation: Activation) -> Model {
        let config = Config { activation, ..preset("slm-1m", 50).unwrap() };
        let model = Model { parameters: Layout::new(&config).initial(1), config, end_of_text: 3 };
        let tokenizer = folder.join("source.json");
        fs::write(&tokenizer, "{}").unwrap();
        let moments = [model.parameters.clone(), vec![0.5; model.parameters.len()]];
        save(&folder.join("c"), &model, &tokenizer, Some(&Unfinished { moments, best: None }), &7u32).unwrap();
        model
    }

    #[test]
    fn what_is_written_is_read() {
        for activation in [Activation::SwiGlu, Activation::Gelu] {
            let folder = tempfile::tempdir().unwrap();
            let model = written(folder.path(), activation);
            let at = folder.path().join("c");
            let read = read_model(&at).unwrap();
            assert_eq!((&read.config, read.end_of_text), (&model.config, 3));
            assert_eq!(read.parameters, model.parameters);
            assert_eq!(read_state::<u32>(&at).unwrap(), Some(7));
            assert_eq!(read_unfinished(&at, &model.config).unwrap().moments[1][9], 0.5);
            assert_eq!(read_state::<u32>(&folder.path().join("none")).unwrap(), None);
        }
    }

    #[test]
    fn a_crash_between_the_renames_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), Activation::Gelu);
        fs::rename(folder.path().join("c"), folder.path().join("c.previous")).unwrap();
        assert_eq!(read_state::<u32>(&folder.path().join("c")).unwrap(), Some(7));
    }

    #[test]
    fn damage_names_the_file_and_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), Activation::SwiGlu);
        let at = folder.path().join("c");
        let model = fs::read(at.join(MODEL)).unwrap();
        fs::write(at.join(MODEL), &model[..model.len() - 100]).unwrap();
        for error in [read_state::<u32>(&at).unwrap_err(), read_model(&at).unwrap_err()] {
            assert!(error.place().file.as_ref().unwrap().ends_with(MODEL) && error.remedy().is_some(), "{error}");
        }
        let mut flipped = model;
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(at.join(MODEL), flipped).unwrap();
        assert!(read_state::<u32>(&at).is_err());
        fs::write(at.join(STATE), "{").unwrap();
        assert!(read_state::<u32>(&at).unwrap_err().place().file.as_ref().unwrap().ends_with(STATE));
        assert!(read_model(folder.path()).unwrap_err().message().contains("no checkpoint"));
    }
}
