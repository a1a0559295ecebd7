//! The spec of a training file: one pretraining on a folder of shards.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::count::Count;
use crate::pipeline::{Precision, Schedule};

/// One pretraining.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Name of the training; its checkpoint is `runs/<name>/` unless `out` says otherwise.
    #[schemars(regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub name: String,
    /// Seed of initialisation. Default 0.
    #[serde(default)]
    pub seed: u64,
    /// A folder with `manifest.json`, such as `runs/NAME/shards/DOMAIN`.
    pub shards: PathBuf,
    /// A preset: `slm-400k`, `slm-600k`, `slm-1m`, `slm-3m`, `slm-5m`, `slm-9m`, `slm-30m` or `slm-126m`.
    pub model: String,
    /// Tokens that a prediction can look back on, and the length of a training sequence (8 to 65,536). Default 1024.
    #[serde(default = "context")]
    #[schemars(range(min = 8, max = 65_536))]
    pub context: u32,
    /// Tokens of pretraining.
    pub tokens: Count,
    /// How the learning rate moves. Default `cosine`.
    #[serde(default)]
    pub schedule: Schedule,
    /// Numbers that are multiplied; weights and sums are `f32` always. Default `bf16`.
    #[serde(default)]
    pub precision: Precision,
    /// Folder of the checkpoint. Default `runs/<name>`.
    pub out: Option<PathBuf>,
}

fn context() -> u32 {
    1024
}
