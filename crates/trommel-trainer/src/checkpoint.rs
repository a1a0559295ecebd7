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

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use trommel_core::error::{Error, Result};
use trommel_core::key::{checksum, checksum_file};
use trommel_core::manifest::Manifest;
use trommel_core::storage::{create_folder, write_bytes, write_error};

use crate::model::Config;
use crate::parameters::Layout;
use crate::{llama_config, weights};

/// The checkpoint's folder within a training run's output folder.
pub const FOLDER: &str = "checkpoint";

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
    let write = || {
        create_folder(&new)?;
        let layout = Layout::new(&model.config);
        let mut files = published(model, tokenizer)?;
        if let Some(unfinished) = unfinished {
            for (name, moment) in MOMENTS.iter().zip(&unfinished.moments) {
                files.push((name, weights::write(&layout, moment)?));
            }
            if let Some(best) = &unfinished.best {
                files.push((BEST, weights::write(&layout, best)?));
            }
        }
        let mut checksums = BTreeMap::new();
        for (name, bytes) in files {
            write_bytes(&new.join(name), &bytes)?;
            checksums.insert(name.to_owned(), checksum(&bytes));
        }
        write_bytes(&new.join(STATE), &json(&StateFile { checksums, state })?)
    };
    // What is left of it on a full disk is in the way of whatever needs the space next.
    write().inspect_err(|_| drop(remove(&new)))?;

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

/// The files of a model that `transformers` reads, and their content. `tokenizer` is the file to copy.
pub(crate) fn published(model: &Model, tokenizer: &Path) -> Result<Vec<(&'static str, Vec<u8>)>> {
    Ok(vec![
        (weights::FILE, weights::write(&Layout::new(&model.config), &model.parameters)?),
        (llama_config::FILE, llama_config::write(&model.config, model.end_of_text)?),
        (Manifest::TOKENIZER, fs::read(tokenizer).map_err(|e| unreadable(tokenizer, e))?),
    ])
}

/// The state in `folder` as it stands, or `None` if there is no checkpoint: for a look at what another process may be training.
/// Unlike [`read_state`], it neither checks the other files nor puts anything in order.
pub fn peek<S: DeserializeOwned>(folder: &Path) -> Result<Option<S>> {
    let path = folder.join(STATE);
    match fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map(|file: StateFile<S>| Some(file.state)).map_err(|e| damaged(&path).source(e))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(damaged(&path).source(e)),
    }
}

/// The state in `folder`, or `None` if there is no checkpoint.
pub fn read_state<S: DeserializeOwned>(folder: &Path) -> Result<Option<S>> {
    // A crash of `save` between its two renames leaves the checkpoint under its old name, and one after them both.
    let previous = sibling(folder, "previous");
    match (folder.exists(), previous.exists()) {
        (false, true) => fs::rename(&previous, folder).map_err(|e| write_error(folder, e))?,
        (true, true) => remove(&previous)?,
        _ => {}
    }
    if !folder.exists() {
        return Ok(None);
    }
    let state = verify(folder)?;
    serde_json::from_value(state).map(Some).map_err(|e| of_another_plan(folder).source(e))
}

/// Checks that the files of a checkpoint are as they were written; returns its state.
fn verify(folder: &Path) -> Result<Value> {
    let path = folder.join(STATE);
    let bytes = fs::read(&path).map_err(|e| damaged(&path).source(e))?;
    let file: StateFile<Value> = serde_json::from_slice(&bytes).map_err(|e| damaged(&path).source(e))?;
    for (name, expected) in &file.checksums {
        let path = folder.join(name);
        if checksum_file(&path).map_err(|e| damaged(&path).source(e))? != *expected {
            return Err(damaged(&path));
        }
    }
    Ok(file.state)
}

/// Reads the model in `folder`: a checkpoint, whose files are as they were written, an export, or what `transformers` saved of a
/// Llama model that fits.
pub fn read_model(folder: &Path) -> Result<Model> {
    if folder.join(STATE).exists() {
        verify(folder)?;
    }
    let (config, end_of_text) = llama_config::read(folder)?;
    let parameters = weights::read_folder(folder, &config)?;
    Ok(Model { config, end_of_text, parameters })
}

/// Reads what the unfinished run in `folder` needs beside its model.
pub fn read_unfinished(folder: &Path, config: &Config) -> Result<Unfinished> {
    let read = |name| weights::read(&folder.join(name), config);
    let best = if folder.join(BEST).exists() { Some(read(BEST)?) } else { None };
    Ok(Unfinished { moments: [read(MOMENTS[0])?, read(MOMENTS[1])?], best })
}

/// The tokenizer of a checkpoint.
pub fn tokenizer(folder: &Path) -> PathBuf {
    folder.join(Manifest::TOKENIZER)
}

pub(crate) fn json(value: &impl Serialize) -> Result<Vec<u8>> {
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
        .hint("name another output folder; or remove this one, if its model is not needed, to train anew")
}

fn damaged(path: &Path) -> Error {
    let hint = "restore the checkpoint's folder from a copy, or remove it to train again from the start";
    Error::data("the checkpoint is damaged").file(path.display()).hint(hint)
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    Error::data("the file cannot be read").file(path.display()).source(error)
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
    use crate::model::{Activation, preset};

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
    fn what_a_crash_after_the_renames_left_does_not_come_back() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), Activation::Gelu);
        let previous = folder.path().join("c.previous");
        fs::create_dir(&previous).unwrap();
        assert_eq!(read_state::<u32>(&folder.path().join("c")).unwrap(), Some(7));
        assert!(!previous.exists());
    }

    #[test]
    fn what_cannot_be_written_leaves_the_checkpoint_as_it_was_and_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let model = written(folder.path(), Activation::Gelu);
        let tokenizer = folder.path().join("source.json");
        fs::remove_file(&tokenizer).unwrap();
        assert!(save(&folder.path().join("c"), &model, &tokenizer, None, &8u32).is_err());
        assert_eq!(read_state::<u32>(&folder.path().join("c")).unwrap(), Some(7));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_state_of_another_kind_of_training_is_no_damage() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), Activation::Gelu);
        let error = read_state::<String>(&folder.path().join("c")).unwrap_err();
        assert!(error.message().contains("another plan"), "{error}");
    }

    #[test]
    fn damage_names_the_file_and_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), Activation::SwiGlu);
        let at = folder.path().join("c");
        let model = fs::read(at.join(weights::FILE)).unwrap();
        fs::write(at.join(weights::FILE), &model[..model.len() - 100]).unwrap();
        for error in [read_state::<u32>(&at).unwrap_err(), read_model(&at).unwrap_err()] {
            assert!(error.place().file.as_ref().unwrap().ends_with(weights::FILE) && error.remedy().is_some(), "{error}");
        }
        let mut flipped = model;
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(at.join(weights::FILE), flipped).unwrap();
        assert!(read_state::<u32>(&at).is_err() && read_model(&at).is_err());
        fs::write(at.join(STATE), "{").unwrap();
        assert!(read_state::<u32>(&at).unwrap_err().place().file.as_ref().unwrap().ends_with(STATE));
        assert!(read_model(folder.path()).unwrap_err().message().contains("no checkpoint"));
    }
}
