//! The tables `corpus` and `domains`: source documents with the user's own columns, and where they come from.

use std::fs::File;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, new_null_array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::json::ReaderBuilder;
use arrow::json::reader::infer_json_schema_from_iterator;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::DataFusionError;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};

use crate::engine::query_error;
use crate::outputs::fingerprint;
use crate::source::{is_parquet, open_lines, open_parquet};

/// Lines that a batch of JSON holds, and lines that its columns are guessed from.
const LINES: usize = 1000;

/// The files of one set of documents.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Origin {
    /// The domain, or none for the corpus.
    pub domain: Option<String>,
    /// `train` or `test`, or none for the corpus.
    pub split: Option<String>,
    /// The files.
    pub files: Vec<OriginFile>,
}

/// A file of documents, as a run read it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OriginFile {
    /// As the pipeline file names it.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// What tells whether it has changed since.
    pub fingerprint: String,
}

impl OriginFile {
    /// Refuses a file that is gone, or is not the one that the run read: its rows would meet windows of other text.
    fn check(&self) -> Result<()> {
        let (_, found) = fingerprint(&self.path)?;
        if found.to_string() == self.fingerprint {
            return Ok(());
        }
        let error = Error::data("the file has changed since the run read it").file(self.path.display());
        Err(error.hint("run the pipeline again: it makes what depends on this file anew"))
    }
}

/// A table over the documents of `origins`, a partition per file. Columns are those of the files, by name, then `file`,
/// `row` and, for domains, `domain` and `split`; a column of the user's with such a name gets a `_` behind it. Fails if a
/// file is not there, or is another one now.
pub fn documents_table(origins: &[Origin]) -> Result<StreamingTable> {
    let own: Vec<(&str, DataType)> = match origins.iter().any(|o| o.domain.is_some()) {
        true => vec![("file", DataType::Utf8), ("row", DataType::Int64), ("domain", DataType::Utf8), ("split", DataType::Utf8)],
        false => vec![("file", DataType::Utf8), ("row", DataType::Int64)],
    };
    let mut fields: Vec<Field> = Vec::new();
    for file in origins.iter().flat_map(|o| &o.files) {
        file.check()?;
        for field in columns(&file.path).map_err(|e| e.file(file.path.display()))?.fields() {
            let name = visible_name(field.name(), &own);
            match fields.iter_mut().find(|f| *f.name() == name) {
                Some(known) => *known = Field::new(name, common_type(known.data_type(), field.data_type()), true),
                None => fields.push(Field::new(name, field.data_type().clone(), true)),
            }
        }
    }
    fields.extend(own.iter().map(|(name, data_type)| Field::new(*name, data_type.clone(), false)));
    let schema = Arc::new(Schema::new(fields));
    let partition = |origin: &Origin, file: &OriginFile| -> Arc<dyn PartitionStream> {
        let (domain, split) = (origin.domain.clone(), origin.split.clone());
        Arc::new(DocumentFile { domain, split, file: file.clone(), schema: Arc::clone(&schema) })
    };
    let partitions = origins.iter().flat_map(|o| o.files.iter().map(|file| partition(o, file))).collect();
    StreamingTable::try_new(Arc::clone(&schema), partitions).map_err(query_error)
}

/// What a column is whose type is not the same in all files: a number if it is one everywhere, else a text.
fn common_type(a: &DataType, b: &DataType) -> DataType {
    match a == b {
        true => a.clone(),
        false if a.is_numeric() && b.is_numeric() => DataType::Float64,
        false => DataType::Utf8,
    }
}

fn visible_name(name: &str, own: &[(&str, DataType)]) -> String {
    if own.iter().any(|(n, _)| *n == name) { format!("{name}_") } else { name.to_owned() }
}

fn columns(path: &Path) -> Result<Schema> {
    let unreadable = |e: ArrowError| Error::data("cannot read the columns").source(e);
    if is_parquet(path) {
        let file = File::open(path).map_err(|e| Error::data("cannot open the file").source(e))?;
        let (fields, _) = open_parquet(file).map_err(|e| unreadable(e.into()))?;
        return Ok(Schema::new(fields));
    }
    let lines = open_lines(path)?.0.split(b'\n').map_while(std::io::Result::ok).take(LINES);
    let values = lines
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(&line).ok())
        .filter(serde_json::Value::is_object)
        .map(Ok);
    infer_json_schema_from_iterator(values).map_err(unreadable)
}

#[derive(Debug, Clone)]
struct DocumentFile {
    domain: Option<String>,
    split: Option<String>,
    file: OriginFile,
    schema: SchemaRef,
}

type Batches = Box<dyn Iterator<Item = Result<(RecordBatch, Vec<i64>), DataFusionError>> + Send>;

impl DocumentFile {
    /// The file's own columns, and the row of each of them.
    fn batches(&self) -> Result<Batches, DataFusionError> {
        if is_parquet(&self.file.path) {
            // A text whose encoding is broken is null here, and its row is in the table `rejects`.
            let reader = open_parquet(File::open(&self.file.path)?)?.1.with_batch_size(LINES).build()?;
            let mut next = 0;
            return Ok(Box::new(reader.map(move |batch| {
                let batch = batch?;
                let first = next;
                next += batch.num_rows() as i64;
                Ok((batch, (first..next).collect()))
            })));
        }
        let external = |e: Error| DataFusionError::External(Box::new(e));
        let schema = Arc::new(columns(&self.file.path).map_err(external)?);
        let mut lines = open_lines(&self.file.path).map_err(external)?.0.split(b'\n').enumerate();
        Ok(Box::new(std::iter::from_fn(move || {
            let (mut text, mut rows) = (Vec::new(), Vec::new());
            for (row, line) in lines.by_ref() {
                match line {
                    Err(e) => return Some(Err(e.into())),
                    // What is no JSON object is in the table `rejects`.
                    Ok(line) if serde_json::from_slice::<serde_json::Map<_, _>>(&line).is_ok() => {
                        text.extend(line);
                        text.push(b'\n');
                        rows.push(row as i64);
                    }
                    Ok(_) => {}
                }
                if rows.len() == LINES {
                    break;
                }
            }
            (!rows.is_empty()).then(|| Ok((decode(&schema, &text, rows.len())?, rows)))
        })))
    }

    fn complete(&self, batch: &RecordBatch, rows: Vec<i64>) -> Result<RecordBatch, DataFusionError> {
        let count = batch.num_rows();
        let constant = |value: &str| Arc::new(StringArray::from_iter_values(std::iter::repeat_n(value, count))) as ArrayRef;
        let column = |field: &arrow::datatypes::FieldRef| -> Result<ArrayRef, ArrowError> {
            Ok(match field.name().as_str() {
                "file" => constant(&self.file.name),
                "row" => Arc::new(Int64Array::from(rows.clone())),
                "domain" if !field.is_nullable() => constant(self.domain.as_deref().unwrap_or_default()),
                "split" if !field.is_nullable() => constant(self.split.as_deref().unwrap_or_default()),
                name => match batch.column_by_name(name).or_else(|| batch.column_by_name(name.trim_end_matches('_'))) {
                    Some(column) => cast(column, field.data_type()).map_err(|e| {
                        let what = format!("the column `{name}` of `{}` is no {}: {e}", self.file.name, field.data_type());
                        ArrowError::CastError(what)
                    })?,
                    None => new_null_array(field.data_type(), count),
                },
            })
        };
        let columns = self.schema.fields().iter().map(column).collect::<Result<Vec<_>, _>>()?;
        Ok(RecordBatch::try_new(Arc::clone(&self.schema), columns)?)
    }
}

fn decode(schema: &SchemaRef, text: &[u8], rows: usize) -> Result<RecordBatch, ArrowError> {
    let mut decoder =
        ReaderBuilder::new(Arc::clone(schema)).with_batch_size(rows).with_coerce_primitive(true).build_decoder()?;
    decoder.decode(text)?;
    Ok(decoder.flush()?.unwrap_or_else(|| RecordBatch::new_empty(Arc::clone(schema))))
}

impl PartitionStream for DocumentFile {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let this = self.clone();
        let batches: Box<dyn Iterator<Item = _> + Send> = match self.batches() {
            Err(error) => Box::new(std::iter::once(Err(error))),
            Ok(batches) => Box::new(batches.map(move |found| found.and_then(|(batch, rows)| this.complete(&batch, rows)))),
        };
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), futures::stream::iter(batches)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use datafusion::prelude::SessionContext;

    #[tokio::test]
    async fn user_columns_keep_their_names_and_bad_lines_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "{\"text\":\"one\",\"row\":\"r1\"}\nnot json\n{\"text\":\"two\",\"stars\":5}\n").unwrap();
        let other = folder.path().join("b.jsonl");
        std::fs::write(&other, "{\"text\":\"three\",\"row\":[1],\"stars\":\"few\"}\n").unwrap();
        let file = |path: PathBuf| {
            let fingerprint = fingerprint(&path).unwrap().1.to_string();
            OriginFile { name: path.file_name().unwrap().to_string_lossy().into_owned(), path, fingerprint }
        };
        let origin = Origin { domain: None, split: None, files: vec![file(path), file(other)] };
        let session = SessionContext::new();
        session.register_table("corpus", Arc::new(documents_table(&[origin]).unwrap())).unwrap();
        let frame = session.sql("SELECT text, row_, stars, \"row\" FROM corpus ORDER BY file, \"row\"").await.unwrap();
        let shown = arrow::util::pretty::pretty_format_batches(&frame.collect().await.unwrap()).unwrap().to_string();
        let cells: Vec<Vec<&str>> = shown
            .lines()
            .filter(|l| l.starts_with('|'))
            .map(|l| l.split('|').map(str::trim).filter(|c| !c.is_empty()).collect())
            .collect();
        // A column that is of two types is text.
        let expected = [
            vec!["text", "row_", "stars", "row"],
            vec!["one", "r1", "0"],
            vec!["two", "5", "2"],
            vec!["three", "[1]", "few", "0"],
        ];
        assert_eq!(cells, expected);
    }
}
