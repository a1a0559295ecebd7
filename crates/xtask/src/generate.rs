//! Files that are made from the code; a test fails when they are stale.

use std::fs;

use trommel_spec::pipeline::Pipeline;
use trommel_spec::training::Training;
use trommel_spec::validate::schema;

use crate::root;

/// Writes the JSON Schemas.
pub(crate) fn run() -> anyhow::Result<()> {
    let folder = root().join("pipelines/schema");
    fs::create_dir_all(&folder)?;
    for (name, schema) in [("pipeline", schema::<Pipeline>()), ("training", schema::<Training>())] {
        fs::write(folder.join(format!("{name}.json")), serde_json::to_string_pretty(&schema)? + "\n")?;
    }
    Ok(())
}
