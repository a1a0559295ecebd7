//! `trommel sql`: one query, or a prompt.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use anyhow::bail;
use datafusion::arrow::array::RecordBatch;
use datafusion::arrow::csv::WriterBuilder;
use datafusion::arrow::datatypes::FieldRef;
use datafusion::arrow::json::ArrayWriter;
use datafusion::arrow::util::pretty::pretty_format_batches;
use datafusion::parquet::arrow::ArrowWriter;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use trommel_core::error::Error;
use trommel_pipeline::{catalog, engine};
use trommel_spec::plan;

use crate::args::{Format, SqlArguments};
use crate::pipeline::Mistakes;

/// The tables of a run directory, and what their queries run on.
pub(crate) struct Tables {
    runtime: Runtime,
    tables: catalog::Tables,
}

impl Tables {
    /// Opens them.
    pub(crate) fn open(run_dir: &Path) -> anyhow::Result<Tables> {
        let runtime = engine::runtime(rayon::current_num_threads())?;
        let tables = runtime.block_on(catalog::Tables::open(run_dir))?;
        Ok(Tables { runtime, tables })
    }

    /// The run's name.
    pub(crate) fn name(&self) -> &str {
        self.tables.name()
    }

    /// Whether there is a table of this name.
    pub(crate) fn has(&self, table: &str) -> bool {
        self.tables.has(table)
    }

    /// The rows of a query, for results that are small.
    pub(crate) fn rows<T: DeserializeOwned>(&self, sql: &str) -> anyhow::Result<Vec<T>> {
        let rows = json(&self.runtime.block_on(self.tables.query(sql))?.rows)?;
        Ok(serde_json::from_slice(&rows).map_err(|e| Error::internal("a table has other columns").source(e))?)
    }

    /// Prints the rows of each query of a text, and what to know of them.
    fn answer(&self, sql: &str, format: Format) -> anyhow::Result<()> {
        for statement in catalog::Tables::statements(sql)? {
            let answer = self.runtime.block_on(self.tables.run(statement))?;
            answer.notes.iter().for_each(|note| eprintln!("note: {note}"));
            print(&answer.rows, format)?;
        }
        Ok(())
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
    let run_dir = match arguments.run.is_file() {
        true => plan::run_dir(&arguments.run).map_err(Mistakes)?,
        false => arguments.run.clone(),
    };
    let tables = Tables::open(&run_dir)?;
    match &arguments.query {
        Some(sql) => tables.answer(sql, arguments.format),
        None => prompt(arguments.format, &tables),
    }
}

fn print(rows: &[RecordBatch], format: Format) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match format {
        Format::Table => writeln!(out, "{}", pretty_format_batches(rows)?)?,
        Format::Csv => {
            let is_nested = |field: &&FieldRef| field.data_type().is_nested();
            if let Some(field) = rows.iter().flat_map(|batch| batch.schema_ref().fields()).find(is_nested) {
                bail!("CSV holds plain columns only, and `{}` is none: select a list or a struct part by part", field.name());
            }
            let mut writer = WriterBuilder::new().build(Vec::new());
            rows.iter().try_for_each(|batch| writer.write(batch))?;
            out.write_all(&writer.into_inner())?;
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
    // Whoever wrote the queries beforehand wants no answers after one that failed.
    let is_piped = !io::stdin().is_terminal();
    if !is_piped {
        eprintln!("End a query with `;`. `SHOW TABLES;` lists the tables; Ctrl-D leaves.");
    }
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
            Err(ReadlineError::Eof) if is_piped => return tables.answer(&text, format),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        if text.trim().is_empty() {
            text.clear();
        } else if text.trim().ends_with(';') {
            editor.add_history_entry(text.trim())?;
            match tables.answer(&text, format) {
                Err(error) if !is_piped => eprintln!("error: {error:#}"),
                result => result?,
            }
            text.clear();
        }
    }
}
