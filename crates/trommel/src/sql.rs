//! `trommel sql`: one query, or a prompt.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use datafusion::arrow::array::RecordBatch;
use datafusion::arrow::csv::WriterBuilder;
use datafusion::arrow::json::ArrayWriter;
use datafusion::arrow::util::pretty::pretty_format_batches;
use datafusion::parquet::arrow::ArrowWriter;
use datafusion::prelude::{SessionConfig, SessionContext};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use trommel_core::error::Error;
use trommel_pipeline::{catalog, engine};

use crate::args::{Format, SqlArguments};

/// The tables of a run directory.
pub(crate) struct Tables {
    runtime: Runtime,
    session: SessionContext,
    run_dir: PathBuf,
}

impl Tables {
    /// Opens them.
    pub(crate) fn open(run_dir: &Path) -> anyhow::Result<Tables> {
        let runtime = engine::runtime(rayon::current_num_threads())?;
        let session = SessionContext::new_with_config(SessionConfig::new().with_information_schema(true));
        runtime.block_on(catalog::register(&session, run_dir))?;
        Ok(Tables { runtime, session, run_dir: run_dir.to_path_buf() })
    }

    /// Whether there is a table of this name.
    pub(crate) fn has(&self, table: &str) -> bool {
        self.session.table_exist(table).unwrap_or(false)
    }

    fn query(&self, sql: &str) -> anyhow::Result<Vec<RecordBatch>> {
        let rows = self.runtime.block_on(async {
            let frame = self.session.sql(sql).await?;
            let columns = Arc::new(frame.schema().as_arrow().clone());
            let mut rows = frame.collect().await?;
            if rows.is_empty() {
                rows.push(RecordBatch::new_empty(columns));
            }
            Ok(rows)
        });
        Ok(rows.map_err(|error| catalog::query_error(&self.run_dir, error))?)
    }

    /// The rows of a query, for results that are small.
    pub(crate) fn rows<T: DeserializeOwned>(&self, sql: &str) -> anyhow::Result<Vec<T>> {
        let rows = json(&self.query(sql)?)?;
        Ok(serde_json::from_slice(&rows).map_err(|e| Error::internal("a table has other columns").source(e))?)
    }
}

/// Rows as a list of JSON objects.
fn json(rows: &[RecordBatch]) -> anyhow::Result<Vec<u8>> {
    let mut writer = ArrayWriter::new(Vec::new());
    writer.write_batches(&rows.iter().collect::<Vec<_>>())?;
    writer.finish()?;
    Ok(writer.into_inner())
}

/// Runs the command.
pub(crate) fn run(arguments: &SqlArguments) -> anyhow::Result<()> {
    let run_dir: PathBuf =
        if arguments.run.is_file() { crate::pipeline::load(&arguments.run, &[], None)?.run_dir } else { arguments.run.clone() };
    let tables = Tables::open(&run_dir)?;
    match &arguments.query {
        Some(sql) => print(&tables.query(sql)?, arguments.format),
        None => prompt(arguments.format, &tables),
    }
}

fn print(rows: &[RecordBatch], format: Format) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match format {
        Format::Table => writeln!(out, "{}", pretty_format_batches(rows)?)?,
        Format::Csv => {
            let mut writer = WriterBuilder::new().build(&mut out);
            rows.iter()
                .try_for_each(|batch| writer.write(batch))
                .context("CSV holds plain columns only: select a list or a struct part by part")?;
        }
        Format::Json => {
            out.write_all(&json(rows)?)?;
            writeln!(out)?;
        }
        Format::Parquet => {
            let Some(first) = rows.first() else { bail!("the query has no columns to write") };
            let mut writer = ArrowWriter::try_new(Vec::new(), first.schema(), None)?;
            rows.iter().try_for_each(|batch| writer.write(batch))?;
            out.write_all(&writer.into_inner()?)?;
        }
    }
    Ok(())
}

fn prompt(format: Format, tables: &Tables) -> anyhow::Result<()> {
    eprintln!("End a query with `;`. `SHOW TABLES;` lists the tables; Ctrl-D leaves.");
    let mut editor = DefaultEditor::new()?;
    let mut text = String::new();
    loop {
        match editor.readline(if text.is_empty() { "trommel> " } else { "      -> " }) {
            Ok(line) => {
                text.push_str(&line);
                text.push('\n');
            }
            Err(ReadlineError::Interrupted) => {
                text.clear();
                continue;
            }
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        if text.trim().is_empty() {
            text.clear();
        } else if let Some(sql) = text.trim().strip_suffix(';') {
            editor.add_history_entry(text.trim())?;
            if let Err(error) = tables.query(sql).and_then(|rows| print(&rows, format)) {
                eprintln!("error: {error:#}");
            }
            text.clear();
        }
    }
}
