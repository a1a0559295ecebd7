//! The files of a model folder, each error naming the file.
//!
//! Models are read whole into memory: the content key needs every byte anyway, and the largest supported files have some
//! hundred megabytes.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tokenizers::Tokenizer;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;

/// What a user can do about a folder that is no model.
pub(crate) const MODEL_HINT: &str = "name `static`, `learnt`, a folder that `trommel fit-embedder` or `trommel \
     distill-embedder` has written, or a sentence-transformers folder with `config.json`, `model.safetensors`, \
     `tokenizer.json`, `modules.json` and `1_Pooling/config.json`";

/// A model folder that is being read; remembers what was read for the model's key.
pub(crate) struct ModelFolder {
    path: PathBuf,
    /// Name and content key of each file read, in reading order.
    files: Vec<(String, Key)>,
}

impl ModelFolder {
    /// Names the folder; reads nothing yet.
    pub(crate) fn new(path: &Path) -> Self {
        ModelFolder { path: path.to_path_buf(), files: Vec::new() }
    }

    /// The path of a file within the folder.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The content of a file that the model cannot do without.
    pub(crate) fn read(&mut self, name: &str) -> Result<Vec<u8>> {
        let path = self.file(name);
        let bytes = fs::read(&path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::config("the model folder lacks this file").file(path.display()).hint(MODEL_HINT),
            _ => Error::system("cannot read the file").file(path.display()).source(e),
        })?;
        self.remember(name, &bytes);
        Ok(bytes)
    }

    /// Adds a file's content to the model's key.
    pub(crate) fn remember(&mut self, name: &str, bytes: &[u8]) {
        self.files.push((name.to_string(), Key::of_bytes(bytes)));
    }

    /// A JSON file, parsed.
    pub(crate) fn read_json<T: serde::de::DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let bytes = self.read(name)?;
        serde_json::from_slice(&bytes).map_err(|e| {
            let (line, column) = (e.line() as u64, e.column() as u64);
            Error::data("the file is not what it should be").file(self.file(name).display()).at(line, column).source(e)
        })
    }

    /// `tokenizer.json`, without the padding that its file may ask for: texts of a call must not see each other.
    pub(crate) fn read_tokenizer(&mut self) -> Result<Tokenizer> {
        let bytes = self.read(TOKENIZER)?;
        parse_tokenizer(&bytes).map_err(|e| e.file(self.file(TOKENIZER).display()))
    }

    /// The key of all files read so far; `kind` keeps two readers of the same files apart.
    pub(crate) fn key(&self, kind: &str) -> Key {
        let mut parts = vec![kind.as_bytes().to_vec()];
        for (name, key) in &self.files {
            parts.push(name.as_bytes().to_vec());
            parts.push(key.0.to_le_bytes().to_vec());
        }
        Key::of(parts)
    }
}

/// The tokenizer's file name, in both kinds of model.
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// A tokenizer without padding and truncation.
pub(crate) fn parse_tokenizer(bytes: &[u8]) -> Result<Tokenizer> {
    let damaged = |e: tokenizers::Error| Error::data("the tokenizer is damaged").source(e);
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(damaged)?;
    tokenizer.with_padding(None).with_truncation(None).map_err(damaged)?;
    Ok(tokenizer)
}

/// The tensors of a safetensors file, each error naming file and tensor.
pub(crate) struct Tensors<'a> {
    path: PathBuf,
    tensors: SafeTensors<'a>,
}

impl<'a> Tensors<'a> {
    /// Reads the header. `path` is for errors only.
    pub(crate) fn parse(path: PathBuf, bytes: &'a [u8]) -> Result<Self> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| {
            Error::data("the tensors are damaged or cut short")
                .file(path.display())
                .source(e)
                .hint("copy or download the file again")
        })?;
        Ok(Tensors { path, tensors })
    }

    /// Whether there is a tensor of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }

    /// A tensor of whatever shape.
    pub(crate) fn view(&self, name: &str) -> Result<TensorView<'a>> {
        let missing = |_| Error::data(format!("the tensor `{name}` is missing")).file(self.path.display());
        self.tensors.tensor(name).map_err(missing)
    }

    /// A tensor of the given type and shape.
    pub(crate) fn expect(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<TensorView<'a>> {
        let view = self.view(name)?;
        if view.shape() == shape && view.dtype() == dtype {
            return Ok(view);
        }
        let found = format!("{:?} {:?}", view.dtype(), view.shape());
        Err(Error::data(format!("the tensor `{name}` is {found}, expected {dtype:?} {shape:?}")).file(self.path.display()))
    }

    /// A tensor as f32, whatever floating type it has in the file.
    pub(crate) fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let found = self.view(name)?.dtype();
        let floating = matches!(found, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let view = self.expect(name, if floating { found } else { Dtype::F32 }, shape)?;
        let data = view.data();
        let two = |c: &[u8]| [c[0], c[1]];
        let values: Vec<f32> = match found {
            Dtype::F16 => data.chunks_exact(2).map(|c| half::f16::from_le_bytes(two(c)).to_f32()).collect(),
            Dtype::BF16 => data.chunks_exact(2).map(|c| half::bf16::from_le_bytes(two(c)).to_f32()).collect(),
            _ => data.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
        };
        if values.iter().all(|x| x.is_finite()) {
            return Ok(values);
        }
        Err(Error::data(format!("the tensor `{name}` has values that are not finite")).file(self.path.display()))
    }
}
