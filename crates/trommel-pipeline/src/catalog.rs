//! Every table of a run directory, for SQL.
//!
//! `catalog.json` lists the files behind each table as of the last run, so that queries need neither the pipeline file
//! nor the models. It is a record for readers: which work is done is decided by the files themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{AsArray, Int64Array, RecordBatch, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::manifest::Manifest;
use trommel_core::schema::CORPUS;
use trommel_core::storage::write_bytes;
use trommel_spec::plan::{Plan, Source};

use crate::documents::{Origin, OriginFile};
use crate::engine::Engine;
use crate::outputs::Outputs;
use crate::run::{Stage, is_done};
use crate::shard::finished;

/// The tables, and queries of them.
mod tables;

pub use tables::Tables;

const FILE: &str = "catalog.json";

/// The files of a run directory by table. Paths of outputs are relative to the directory, so that it can be moved.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Catalog {
    /// The run's.
    #[serde(default)]
    name: String,
    /// The stages that are done with its settings.
    #[serde(default)]
    done: BTreeSet<String>,
    tables: BTreeMap<String, Vec<PathBuf>>,
    documents: Vec<Origin>,
    shards: Vec<PathBuf>,
}

/// Writes the catalog of what is there.
pub fn write(plan: &Plan, outputs: &Outputs) -> Result<()> {
    let mut catalog = Catalog { name: plan.spec.name.clone(), ..Catalog::default() };
    let done = Stage::ALL.into_iter().filter(|stage| is_done(outputs, *stage)).map(Stage::name);
    catalog.done = done.chain(outputs.results.exists().then_some("eval")).map(str::to_owned).collect();
    let relative = |path: &Path| path.strip_prefix(&plan.run_dir).unwrap_or(path).to_owned();
    let mut add = |table: &str, path: &Path| {
        if path.exists() {
            catalog.tables.entry(table.to_owned()).or_default().push(relative(path));
        }
    };
    for unit in &outputs.units {
        add("windows", &unit.windows);
        add("embeddings", &unit.embeddings);
        add("assignments", &unit.assignments);
        add("rejects", &unit.rejects);
        if let Some(draws) = &unit.draws {
            add("draws", draws);
        }
    }
    add("tree", &outputs.clusters);
    add("cluster_statistics", &outputs.cluster_statistics);
    outputs.histogram_files().iter().for_each(|histograms| add("histograms", histograms));
    add("weigh", &outputs.weights);
    add("rates", &outputs.rates);
    add("diagnostics", &outputs.diagnostics);
    add("results", &outputs.results);
    if let Some(dsir) = &outputs.dsir {
        for unit in &dsir.units {
            unit.scores.iter().for_each(|scores| add("dsir_scores", scores));
            unit.unit.draws.iter().for_each(|draws| add("dsir_draws", draws));
        }
        add("dsir_ratios", &dsir.ratios);
        add("dsir_selection", &dsir.selection);
    }
    for set in outputs.shard_sets() {
        // A folder may still hold the shards of another plan.
        let folders = set.shards.iter().filter(|(_, folder)| finished(set, folder).is_some());
        catalog.shards.extend(folders.map(|(_, folder)| relative(folder)));
    }
    let file = |path: &PathBuf| OriginFile {
        name: path.display().to_string(),
        path: std::path::absolute(path).unwrap_or_else(|_| path.clone()),
        fingerprint: outputs.sources.get(path).map(Key::to_string).unwrap_or_default(),
    };
    let mut origin = |source: &Source, split: Option<&str>| {
        catalog.documents.push(Origin {
            domain: (source.name != CORPUS).then(|| source.name.clone()),
            split: split.map(str::to_owned),
            files: source.files.iter().map(file).collect(),
        });
    };
    origin(&plan.corpus, None);
    for domain in &plan.domains {
        origin(&domain.train, Some("train"));
        domain.test.iter().for_each(|test| origin(test, Some("test")));
    }
    let text = serde_json::to_vec_pretty(&catalog).map_err(|e| Error::internal("no catalog").source(e))?;
    write_bytes(&plan.run_dir.join(FILE), &text)
}

fn read(run_dir: &Path) -> Result<Catalog> {
    let path = run_dir.join(FILE);
    let text = std::fs::read(&path).map_err(|e| {
        let error = Error::config("not a run directory").file(run_dir.display()).source(e);
        error.hint("name a directory that `trommel run` has made, such as `runs/NAME`")
    })?;
    serde_json::from_slice(&text).map_err(|e| {
        let error = Error::data("the catalog is damaged, or of another version of trommel").file(path.display()).source(e);
        error.hint("run the pipeline again: it writes the catalog anew")
    })
}

/// The table `shards`, from the manifests.
fn shards(run_dir: &Path, catalog: &Catalog) -> Result<RecordBatch> {
    let mut rows = Vec::new();
    for folder in &catalog.shards {
        let folder = run_dir.join(folder);
        // A folder without a manifest is not finished.
        if folder.join(Manifest::FILE).exists() {
            let manifest = Manifest::read(&folder)?;
            rows.extend(
                manifest.shards.into_iter().map(|s| (manifest.domain.clone(), folder.join(&s.path).display().to_string(), s)),
            );
        }
    }
    let count = |name: &str| Field::new(name, DataType::Int64, false);
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    let shard = Field::new("shard", DataType::UInt32, false);
    let schema = Schema::new(vec![
        text("domain"),
        shard,
        text("path"),
        count("rows"),
        count("tokens"),
        count("bytes"),
        text("checksum"),
    ]);
    let batch = RecordBatch::try_new(
        Arc::new(schema),
        vec![
            Arc::new(StringArray::from_iter_values(rows.iter().map(|(domain, _, _)| domain))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|(_, _, s)| s.shard))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, path, _)| path))),
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|(_, _, s)| s.rows as i64))),
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|(_, _, s)| s.tokens as i64))),
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|(_, _, s)| s.bytes as i64))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, _, s)| &s.checksum))),
        ],
    );
    batch.map_err(|e| Error::internal("no table of shards").source(e))
}

/// The place and reason of the first rejected row among some reject files.
pub fn first_reject(engine: &Engine, files: &[&Path]) -> Result<String> {
    let session = engine.session([]);
    engine.register(&session, "rejects", files)?;
    let sql = r#"SELECT file, "row", reason FROM rejects ORDER BY file, "row" LIMIT 1"#;
    let batches = engine.collect(&session, sql)?;
    let batch = batches.iter().find(|b| b.num_rows() > 0);
    let batch = batch.ok_or_else(|| Error::internal("rejected rows are counted but not listed"))?;
    let text = |i: usize| batch.column(i).as_string_view().value(0).to_owned();
    Ok(format!("row {} of `{}`: {}", batch.column(1).as_primitive::<Int64Type>().value(0), text(0), text(2)))
}
