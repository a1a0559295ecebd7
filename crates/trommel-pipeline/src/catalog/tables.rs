//! The tables of a run directory, and queries of them. Queries read only: what a run has made is the run's.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::TableReference;
use datafusion::datasource::MemTable;
use datafusion::error::DataFusionError;
use datafusion::execution::context::SQLOptions;
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::{ParquetReadOptions, SessionConfig, SessionContext};
use datafusion::sql::parser::{DFParser, Statement};
use trommel_core::error::{Error, Result};
use trommel_core::schema::{CORPUS, assignments, rejects, windows};

use crate::catalog::{Catalog, read, shards};
use crate::documents::{Origin, documents_table};
use crate::engine::{footer, query_error};
use crate::resample::diagnostics_schema;
use crate::results;

/// The tables that wait for a stage, and that stage. The ones of DSIR are of runs with the method `dsir`.
const MADE_BY: [(&str, &str); 15] = [
    ("windows", "windows"),
    ("rejects", "windows"),
    ("embeddings", "embed"),
    ("clusters", "cluster"),
    ("assignments", "assign"),
    ("histograms", "histogram"),
    ("weights", "weigh"),
    ("dsir_ratios", "weigh"),
    ("draws", "resample"),
    ("diagnostics", "resample"),
    ("dsir_scores", "resample"),
    ("dsir_selection", "resample"),
    ("dsir_draws", "resample"),
    ("shards", "shard"),
    ("results", "eval"),
];

/// The tables of the source documents.
const DOCUMENTS: [&str; 2] = [CORPUS, "domains"];

/// Files that are parts of tables, and no tables of their own.
const PARTS: [&str; 4] = ["tree", "cluster_statistics", "weigh", "rates"];

/// The tables of a run directory.
pub struct Tables {
    session: SessionContext,
    run_dir: PathBuf,
    catalog: Catalog,
}

/// What a query found.
pub struct Answer {
    /// Its rows: at least one batch, so that there are columns.
    pub rows: Vec<RecordBatch>,
    /// What to know of the tables that it read: that they are empty or not whole, and why.
    pub notes: Vec<String>,
}

impl Tables {
    /// Opens them. A table whose stage has not run is empty or, where its columns depend on the run, absent.
    pub async fn open(run_dir: &Path) -> Result<Tables> {
        let session = SessionContext::new_with_config(SessionConfig::new().with_information_schema(true));
        let tables = Tables { session, run_dir: run_dir.to_owned(), catalog: read(run_dir)? };
        tables.register().await?;
        Ok(tables)
    }

    /// The run's name.
    pub fn name(&self) -> &str {
        &self.catalog.name
    }

    /// Whether there is a table of this name.
    pub fn has(&self, table: &str) -> bool {
        self.session.table_exist(table).unwrap_or(false)
    }

    /// The statements of a text.
    pub fn statements(sql: &str) -> Result<VecDeque<Statement>> {
        DFParser::parse_sql(sql).map_err(query_error)
    }

    /// The rows of a query, the last one of a text.
    pub async fn query(&self, sql: &str) -> Result<Answer> {
        let mut answer = Answer { rows: Vec::new(), notes: Vec::new() };
        for statement in Self::statements(sql)? {
            answer = self.run(statement).await?;
        }
        Ok(answer)
    }

    /// The rows of a statement. Fails if it would write, or if it needs a source file that is gone or has changed since the run.
    pub async fn run(&self, statement: Statement) -> Result<Answer> {
        let named = self.session.state().resolve_table_references(&statement).map_err(query_error)?;
        self.register_documents(&named)?;
        let mut notes = Vec::new();
        for (table, stage) in MADE_BY.into_iter().filter(|(table, stage)| is_named(&named, table) && !self.is_done(stage)) {
            if !self.has(table) {
                let method = if table.starts_with("dsir") { ", in a run with the method `dsir`" } else { "" };
                let error = Error::data(format!("the table `{table}` is not there: stage `{stage}` makes it{method}"));
                return Err(error.file(self.run_dir.display()).hint("run the pipeline up to that stage, then ask again"));
            }
            notes.push(match self.is_made(table) {
                true => format!("the table `{table}` is not whole: stage `{stage}` is not done with these settings"),
                false => format!("the table `{table}` is empty: stage `{stage}` has not run with these settings"),
            });
        }
        // Planned with a new state, as documents may have been registered.
        let plan = self.session.state().statement_to_plan(statement).await.map_err(|e| self.not_planned(&named, e))?;
        let reads_only = SQLOptions::new().with_allow_dml(false).with_allow_ddl(false).verify_plan(&plan);
        reads_only.map_err(|_| {
            Error::data("a query of a run reads only; it cannot write files or make tables")
                .hint("print the rows as `--format csv`, `json` or `parquet`, and redirect the output to a file")
        })?;
        let rows = self.collect(plan).await.map_err(|error| self.not_run(error))?;
        Ok(Answer { rows, notes })
    }

    async fn collect(&self, plan: LogicalPlan) -> Result<Vec<RecordBatch>, DataFusionError> {
        let frame = self.session.execute_logical_plan(plan).await?;
        let columns = Arc::new(frame.schema().as_arrow().clone());
        let mut rows = frame.collect().await?;
        if rows.is_empty() {
            rows.push(RecordBatch::new_empty(columns));
        }
        Ok(rows)
    }

    /// What to say of a query that cannot be planned.
    fn not_planned(&self, named: &[TableReference], error: DataFusionError) -> Error {
        let state = self.session.state();
        let is_unknown = |table: &&TableReference| {
            !self.session.table_exist((*table).clone()).unwrap_or(true) && !state.table_functions().contains_key(table.table())
        };
        let Some(unknown) = named.iter().find(is_unknown) else { return query_error(error) };
        let tables: Vec<&str> = MADE_BY.into_iter().map(|(table, _)| table).filter(|table| self.has(table)).collect();
        Error::data(format!("there is no table `{unknown}`")).hint(format!(
            "the tables are: {}, {}",
            DOCUMENTS.join(", "),
            tables.join(", ")
        ))
    }

    /// What to say of a query that failed while it ran. The engine names no file, so the first one that is missing or cut short
    /// is looked for.
    fn not_run(&self, error: DataFusionError) -> Error {
        self.broken_file().unwrap_or_else(|| query_error(error))
    }

    /// The first file of the tables that is missing or cut short, as an error.
    fn broken_file(&self) -> Option<Error> {
        self.catalog.tables.values().flatten().find_map(|file| footer(&self.run_dir.join(file), "").err())
    }

    fn is_done(&self, stage: &str) -> bool {
        self.catalog.done.contains(stage)
    }

    /// Whether the stage of a table has made some of it.
    fn is_made(&self, table: &str) -> bool {
        match table {
            "clusters" => self.catalog.tables.contains_key("tree"),
            "weights" => self.catalog.tables.contains_key("weigh"),
            "shards" => !self.catalog.shards.is_empty(),
            _ => self.catalog.tables.contains_key(table),
        }
    }

    async fn register(&self) -> Result<()> {
        for (table, files) in &self.catalog.tables {
            let paths: Vec<PathBuf> = files.iter().map(|file| self.run_dir.join(file)).collect();
            // The engine would leave out one that is missing.
            if let Some(missing) = paths.iter().find(|path| !path.exists()) {
                footer(missing, "")?;
            }
            let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
            let frame = self.session.read_parquet(paths, ParquetReadOptions::default()).await.map_err(|e| self.not_run(e))?;
            self.session.register_table(table.as_str(), frame.into_view()).map_err(query_error)?;
        }
        for (table, schema) in unmade_tables()? {
            if !self.catalog.tables.contains_key(table) {
                self.register_rows(table, RecordBatch::new_empty(schema))?;
            }
        }
        self.register_rows("shards", shards(&self.run_dir, &self.catalog)?)?;
        self.view("weights", include_str!("../sql/view_weights.sql")).await?;
        if self.is_made("clusters") {
            self.view("clusters", include_str!("../sql/view_clusters.sql")).await?;
        }
        PARTS.into_iter().try_for_each(|part| self.session.deregister_table(part).map(|_| ())).map_err(query_error)
    }

    async fn view(&self, table: &str, sql: &str) -> Result<()> {
        let frame = self.session.sql(sql).await.map_err(query_error)?;
        self.session.register_table(table, frame.into_view()).map_err(query_error)?;
        Ok(())
    }

    fn register_rows(&self, table: &str, batch: RecordBatch) -> Result<()> {
        let memory = MemTable::try_new(batch.schema(), vec![vec![batch]]).map_err(query_error)?;
        self.session.register_table(table, Arc::new(memory)).map_err(query_error)?;
        Ok(())
    }

    /// Registers `corpus` and `domains` where a query names them, or lists all tables. Not before: every source file is opened for
    /// them. The sources may be gone; all other tables stand without them.
    fn register_documents(&self, named: &[TableReference]) -> Result<()> {
        for table in DOCUMENTS {
            let is_named = is_named(named, table);
            let is_listed = named.iter().any(|t| t.schema() == Some("information_schema")) && !self.has(table);
            if !is_named && !is_listed {
                continue;
            }
            // Whoever asks for them may have changed them since the last query.
            self.session.deregister_table(table).map_err(query_error)?;
            let is_of = |origin: &&Origin| origin.domain.is_none() == (table == CORPUS);
            let origins: Vec<Origin> = self.catalog.documents.iter().filter(is_of).cloned().collect();
            match documents_table(&origins) {
                Ok(documents) => _ = self.session.register_table(table, Arc::new(documents)).map_err(query_error)?,
                Err(error) if is_named => return Err(error),
                Err(_) => {}
            }
        }
        Ok(())
    }
}

fn is_named(named: &[TableReference], table: &str) -> bool {
    named.iter().any(|t| t.table() == table && matches!(t.schema(), None | Some("public")))
}

/// The tables that are empty before their stage has run, with their columns.
fn unmade_tables() -> Result<[(&'static str, SchemaRef); 9]> {
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
    Ok([
        ("windows", windows()),
        ("assignments", assignments()),
        ("rejects", rejects()),
        ("cluster_statistics", Arc::new(statistics)),
        ("histograms", numbers(&["windows", "bytes", "share"])),
        ("weigh", numbers(&["p_domain", "p_corpus", "weight"])),
        ("rates", numbers(&["rate", "epochs", "expected_draws", "wanted_draws"])),
        ("diagnostics", diagnostics_schema()),
        ("results", results::batch(&[])?.schema()),
    ])
}
