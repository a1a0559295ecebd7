//! Every table of a run directory, for SQL.
//!
//! `catalog.json` lists the files behind each table as of the last run, so that queries need neither the pipeline file
//! nor the models. It is a record for readers: which work is done is decided by the files themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{AsArray, Int64Array, RecordBatch, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use datafusion::datasource::MemTable;
use datafusion::error::DataFusionError;
use datafusion::prelude::{ParquetReadOptions, SessionContext};
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::manifest::Manifest;
use trommel_core::schema::{CORPUS, assignments, rejects, windows};
use trommel_core::storage::write_bytes;
use trommel_spec::plan::Plan;

use crate::documents::{Origin, documents_table};
use crate::engine::{self, Engine, footer};
use crate::outputs::Outputs;
use crate::resample::diagnostics_schema;
use crate::results;

const FILE: &str = "catalog.json";

/// The files of a run directory by table. Paths of outputs are relative to the directory, so that it can be moved.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Catalog {
    /// The run's.
    #[serde(default)]
    name: String,
    tables: BTreeMap<String, Vec<PathBuf>>,
    documents: Vec<Origin>,
    shards: Vec<PathBuf>,
}

/// Writes the catalog of what is there.
pub fn write(plan: &Plan, outputs: &Outputs) -> Result<()> {
    let mut catalog = Catalog { name: plan.spec.name.clone(), ..Catalog::default() };
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
    let shards = outputs.shards.iter().chain(outputs.dsir.iter().flat_map(|dsir| &dsir.outputs.shards));
    catalog.shards = shards.map(|(_, folder)| relative(folder)).filter(|f| plan.run_dir.join(f).exists()).collect();
    let named = |path: &PathBuf| (path.display().to_string(), std::path::absolute(path).unwrap_or_else(|_| path.clone()));
    let mut origin = |source: &trommel_spec::plan::Source, split: Option<&str>| {
        catalog.documents.push(Origin {
            domain: (source.name != CORPUS).then(|| source.name.clone()),
            split: split.map(str::to_owned),
            files: source.files.iter().map(named).collect(),
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
    serde_json::from_slice(&text).map_err(|e| Error::data("the catalog is damaged").file(path.display()).source(e))
}

/// The name of the run in a directory.
pub fn name(run_dir: &Path) -> Result<String> {
    Ok(read(run_dir)?.name)
}

/// What to say of a query of these tables that failed. The engine names no file, so the first one that is missing or cut short
/// is looked for, unless the query itself is wrong.
pub fn query_error(run_dir: &Path, error: DataFusionError) -> Error {
    use DataFusionError::{Plan, SQL, SchemaError};
    let is_wrong = matches!(error.find_root(), Plan(_) | SQL(..) | SchemaError(..));
    let catalog = if is_wrong { None } else { read(run_dir).ok() };
    catalog.and_then(|catalog| broken_file(run_dir, &catalog)).unwrap_or_else(|| engine::query_error(error))
}

/// The first file of the tables that is missing or cut short, as an error.
fn broken_file(run_dir: &Path, catalog: &Catalog) -> Option<Error> {
    catalog.tables.values().flatten().find_map(|file| footer(&run_dir.join(file), "").err())
}

/// Registers every table of a run directory. A table whose stage has not run is empty or, where its columns depend on
/// the run, absent.
pub async fn register(session: &SessionContext, run_dir: &Path) -> Result<()> {
    let catalog = read(run_dir)?;
    let at = |path: &Path| run_dir.join(path);
    for (table, files) in &catalog.tables {
        // The engine would leave out one that is missing.
        if let Some(missing) = files.iter().map(|f| at(f)).find(|path| !path.exists()) {
            footer(&missing, "")?;
        }
        let paths: Vec<String> = files.iter().map(|f| at(f).display().to_string()).collect();
        let frame = session.read_parquet(paths, ParquetReadOptions::default()).await;
        let frame = frame.map_err(|error| broken_file(run_dir, &catalog).unwrap_or_else(|| engine::query_error(error)))?;
        session.register_table(table.as_str(), frame.into_view()).map_err(engine::query_error)?;
    }
    let number = |name: &str| Field::new(name, DataType::Float64, true);
    let cluster = || vec![Field::new("domain", DataType::Utf8, false), Field::new("cluster_id", DataType::UInt32, false)];
    let numbers = |names: &[&str]| Arc::new(Schema::new([cluster(), names.iter().map(|n| number(n)).collect()].concat()));
    let statistics = Schema::new(vec![
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("windows", DataType::Int64, true),
        Field::new("bytes", DataType::Int64, true),
        number("mean_distance"),
        Field::new("top_terms", DataType::new_list(DataType::Utf8, true), true),
    ]);
    let defaults: [(&str, SchemaRef); 9] = [
        ("windows", windows()),
        ("assignments", assignments()),
        ("rejects", rejects()),
        ("cluster_statistics", Arc::new(statistics)),
        ("histograms", numbers(&["windows", "bytes", "share"])),
        ("weigh", numbers(&["p_domain", "p_corpus", "weight"])),
        ("rates", numbers(&["rate", "epochs", "expected_draws", "wanted_draws"])),
        ("diagnostics", diagnostics_schema()),
        ("results", results::batch(&[])?.schema()),
    ];
    for (table, schema) in defaults {
        if !catalog.tables.contains_key(table) {
            register_rows(session, table, RecordBatch::new_empty(schema))?;
        }
    }
    register_rows(session, "shards", shards(run_dir, &catalog)?)?;
    let (corpus, domains): (Vec<Origin>, Vec<Origin>) = catalog.documents.into_iter().partition(|o| o.domain.is_none());
    for (table, origins) in [(CORPUS, corpus), ("domains", domains)] {
        // The sources may be gone; all other tables stand without them.
        if origins.iter().flat_map(|o| &o.files).all(|(_, path)| path.is_file()) {
            session.register_table(table, Arc::new(documents_table(&origins)?)).map_err(engine::query_error)?;
        }
    }
    view(session, "weights", include_str!("sql/view_weights.sql")).await?;
    if catalog.tables.contains_key("tree") {
        view(session, "clusters", include_str!("sql/view_clusters.sql")).await?;
    }
    Ok(())
}

async fn view(session: &SessionContext, table: &str, sql: &str) -> Result<()> {
    let frame = session.sql(sql).await.map_err(engine::query_error)?;
    session.register_table(table, frame.into_view()).map_err(engine::query_error)?;
    Ok(())
}

fn register_rows(session: &SessionContext, table: &str, batch: RecordBatch) -> Result<()> {
    let memory = MemTable::try_new(batch.schema(), vec![vec![batch]]).map_err(engine::query_error)?;
    session.register_table(table, Arc::new(memory)).map_err(engine::query_error)?;
    Ok(())
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
