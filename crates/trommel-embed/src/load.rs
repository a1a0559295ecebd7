//! From what a user writes under `embed.model` to the model.

use std::path::Path;

use trommel_core::error::{Error, Result};
use trommel_kernels::panels::Precision;

use crate::Embedder;
use crate::model_folder::MODEL_HINT;
use crate::sentence_encoder::SentenceEncoder;
use crate::static_table::{STATIC_TABLE, StaticTable};

/// The name of the static table that the binary carries.
pub const DEFAULT_MODEL: &str = "static";

/// The model that `model` names: [`DEFAULT_MODEL`], or a folder, whose content says which kind it is. `precision` is that of
/// a sentence encoder's matrix products; a static table has none.
pub fn load(model: &str, precision: Precision) -> Result<Box<dyn Embedder>> {
    if model == DEFAULT_MODEL {
        return Ok(Box::new(StaticTable::embedded()?));
    }
    let folder = Path::new(model);
    if !folder.is_dir() {
        let what = if folder.exists() { "is a file, not a folder" } else { "does not exist" };
        return Err(Error::config(format!("the embedding model `{model}` {what}")).hint(MODEL_HINT));
    }
    if folder.join(STATIC_TABLE).is_file() {
        return Ok(Box::new(StaticTable::read(folder)?));
    }
    Ok(Box::new(SentenceEncoder::read(folder, precision)?))
}
