//! Runs the comparisons of `tests/peers` one after the other and collects their records.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use crate::{call, root};

/// The scripts in `tests/peers`, by name.
pub(crate) const ROWS: [&str; 12] = [
    "sentence_encoder_bf16",
    "sentence_encoder_f32",
    "static_embedder",
    "nearest_centroid",
    "kmeans_fit",
    "shards_dsir",
    "shards_handwritten",
    "weights_duckdb",
    "training_f32",
    "training_bf16",
    "training_memory",
    "projected_step",
];

/// Builds our side and runs all rows, or `only` one, on the text of `corpus` where a row takes text. A row that fails does not
/// keep the others from running, and `json` holds the records of the rows that have ended, whatever happens after them.
pub(crate) fn run(only: Option<&str>, corpus: Option<&Path>, json: Option<&Path>) -> anyhow::Result<()> {
    let root = root();
    // The workspace, so that crates have the features that the tests have built them with.
    call(Command::new("cargo").args(["build", "--release", "--workspace", "--bins", "--examples"]).current_dir(&root))?;
    let records = root.join(".cache/peers-records");
    fs::create_dir_all(&records)?;
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    for row in ROWS.into_iter().filter(|row| only.is_none_or(|only| only == *row)) {
        let record = records.join(format!("{row}.json"));
        let mut script = Command::new("python3");
        script.arg(root.join(format!("tests/peers/{row}.py"))).arg("--json").arg(&record);
        script.args(corpus.iter().flat_map(|corpus| [Path::new("--corpus"), corpus]));
        match call(&mut script) {
            Ok(()) => found.push(fs::read_to_string(&record).with_context(|| record.display().to_string())?.trim().to_owned()),
            Err(error) => failed.push(format!("{row}: {error:#}")),
        }
        if let Some(json) = json {
            fs::write(json, format!("[{}]\n", found.join(",\n"))).with_context(|| json.display().to_string())?;
        }
    }
    if !failed.is_empty() {
        bail!("{} of the rows failed:\n{}", failed.len(), failed.join("\n"));
    }
    Ok(())
}
