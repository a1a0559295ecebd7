//! What a folder of training shards says of itself: `manifest.json`, written last, read by every trainer.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One Parquet file of training windows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Position in the global pseudo-random order, from 0.
    pub shard: u32,
    /// File name within the folder of the manifest.
    pub path: String,
    /// Windows.
    pub rows: u64,
    /// Tokens, without any separator between windows.
    pub tokens: u64,
    /// UTF-8 bytes of text.
    pub bytes: u64,
    /// XXH3-64 of the file.
    pub checksum: String,
    /// The cluster of all its windows, in a folder that was written by cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<u32>,
}

/// A folder of shards, in reading order, beside the `tokenizer.json` that made their tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The domain that the windows were drawn for, or `corpus` for an unweighted sample.
    pub domain: String,
    /// Token ids lie in `0..vocab`.
    pub vocab: u32,
    /// The id of the end-of-text token.
    pub end_of_text: u32,
    /// Sum of the shards' tokens.
    pub tokens: u64,
    /// The shards, in reading order.
    pub shards: Vec<Shard>,
}

impl Manifest {
    /// The file's name within its folder.
    pub const FILE: &'static str = "manifest.json";
    /// The tokenizer's name within the same folder.
    pub const TOKENIZER: &'static str = "tokenizer.json";

    /// Reads `folder/manifest.json`.
    pub fn read(folder: &Path) -> Result<Manifest> {
        let path = folder.join(Self::FILE);
        let text = std::fs::read(&path).map_err(|e| {
            Error::data("cannot read the manifest of the shards")
                .file(path.display())
                .source(e)
                .hint("name a folder that `trommel run` has written, such as `runs/NAME/shards/DOMAIN`")
        })?;
        serde_json::from_slice(&text).map_err(|e| Error::data("the manifest is damaged").file(path.display()).source(e))
    }
}
