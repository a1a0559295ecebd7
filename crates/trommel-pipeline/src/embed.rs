//! Stages `windows` and `embed`: one pass over each input file cuts its documents and turns the windows into vectors.
//!
//! Both tables come from one reading of the text. The corpus also leaves a sample of its windows with their text, which
//! the tokenizer is trained on and clusters are described by.

use std::collections::BinaryHeap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use arrow::array::{
    ArrayRef, AsArray, FixedSizeListArray, Float16Array, Int64Array, RecordBatch, StringArray, StringViewArray, UInt32Array,
    UInt64Array,
};
use arrow::datatypes::{DataType, Field, Float16Type, Schema, SchemaRef, UInt32Type, UInt64Type};
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::DataFusionError;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::prelude::SessionContext;
use half::f16;
use half::slice::HalfFloatSliceExt;
use trommel_core::error::{Error, Result};
use trommel_core::progress::{Progress, Silent};
use trommel_core::schema::{embedding_type, embeddings, rejects, windows};
use trommel_core::seed::Stream;
use trommel_embed::Embedder;

use crate::engine::{Engine, ParquetSink, footer, query_error, write_parquet};
use crate::outputs::Unit;
use crate::source::{Reject, SourceFile};
use crate::window::{content_key_function, windows_function};

/// Windows with text that a corpus file contributes to the sample at most: 32 MB at the default window length.
const SAMPLE_WINDOWS: usize = 8192;
/// Bytes of text in the sample at most, but for its last window.
const SAMPLE_BYTES: usize = 32 << 20;

/// What the pass needs besides the units.
pub struct Pass<'a> {
    /// The engine.
    pub engine: &'a Engine,
    /// The model, or none to cut windows only.
    pub embedder: Option<&'a Arc<dyn Embedder>>,
    /// Longest window in bytes.
    pub window_bytes: u32,
    /// The seed of the run.
    pub seed: u64,
}

impl Pass<'_> {
    /// Writes what is missing of a unit's windows, embeddings and sample.
    pub fn run(&self, unit: &Unit) -> Result<()> {
        let mut functions = vec![windows_function(self.window_bytes), content_key_function(), priority_function(self.seed)];
        functions.extend(self.embedder.map(embed_function));
        let session = self.engine.text_session(self.window_bytes, functions);
        let rejected = register_source(&session, unit, Arc::clone(&self.engine.progress))?;
        let sql = if self.embedder.is_some() { include_str!("sql/embed.sql") } else { include_str!("sql/windows.sql") };
        let frame = self.engine.query(&session, sql)?;

        let mut window_sink = (!unit.windows.exists()).then(|| ParquetSink::create(&unit.windows, &windows())).transpose()?;
        let mut embedding_sink = match self.embedder {
            Some(embedder) => Some(ParquetSink::create(&unit.embeddings, &embeddings(embedder.dimensions()))?),
            None => None,
        };
        let mut sample = match (self.embedder, &unit.sample) {
            (Some(embedder), Some(_)) => Some((Sample::default(), embedder.dimensions())),
            _ => None,
        };
        let mut documents = 0;
        for batch in self.engine.stream(frame)? {
            let batch = batch?;
            let numbers = batch.column_by_name("window").and_then(|c| c.as_primitive_opt::<UInt32Type>());
            documents += numbers.map_or(0, |n| n.values().iter().filter(|&&window| window == 0).count());
            for sink in [&mut window_sink, &mut embedding_sink].into_iter().flatten() {
                sink.write(&batch)?;
            }
            if let Some((sample, _)) = &mut sample {
                sample.add(&batch)?;
            }
        }
        if let Some(mut sink) = window_sink {
            let rejected = std::mem::take(&mut *rejected.lock().map_err(|_| Error::internal("a reader panicked"))?);
            sink.note(REJECTED, &rejected.len().to_string());
            sink.note(DOCUMENTS, &documents.to_string());
            write_rejects(unit, rejected)?;
            sink.finish()?;
        }
        if let (Some((sample, dimensions)), Some(path)) = (sample, &unit.sample) {
            sample.write(path, dimensions)?;
        }
        embedding_sink.map(ParquetSink::finish).transpose()?;
        Ok(())
    }
}

const REJECTED: &str = "trommel.rejected";
const DOCUMENTS: &str = "trommel.documents";

/// What a unit whose windows are written holds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Usable documents.
    pub documents: u64,
    /// Their windows.
    pub windows: u64,
    /// Rows that cannot be used.
    pub rejected: u64,
}

/// The counts of a unit whose windows are written.
pub fn counts(unit: &Unit) -> Result<Counts> {
    let note = |key: &str| Ok(footer(&unit.windows, key)?.1.and_then(|v| v.parse().ok()).unwrap_or(0));
    Ok(Counts { documents: note(DOCUMENTS)?, windows: footer(&unit.windows, "")?.0, rejected: note(REJECTED)? })
}

fn write_rejects(unit: &Unit, mut rejected: Vec<Reject>) -> Result<()> {
    rejected.sort_by_key(|r| r.row);
    let file = unit.file.path.display().to_string();
    let batch = RecordBatch::try_new(
        rejects(),
        vec![
            Arc::new(StringArray::from_iter_values(rejected.iter().map(|_| &file))),
            Arc::new(Int64Array::from_iter_values(rejected.iter().map(|r| r.row))),
            Arc::new(StringArray::from_iter_values(rejected.iter().map(|_| "windows"))),
            Arc::new(StringArray::from_iter_values(rejected.iter().map(|r| &r.reason))),
        ],
    );
    let batch = batch.map_err(|e| Error::internal("rejects do not form a table").source(e))?;
    write_parquet(&unit.rejects, &rejects(), std::iter::once(Ok(batch))).map(|_| ())
}

/// Registers a unit's documents as the table `source`; the list fills with rejected rows as the table is read.
pub fn register_source(session: &SessionContext, unit: &Unit, progress: Arc<dyn Progress>) -> Result<Arc<Mutex<Vec<Reject>>>> {
    let rejected = Arc::new(Mutex::new(Vec::new()));
    let documents = Documents {
        file: unit.file.clone(),
        source: unit.source.clone(),
        schema: documents_schema(),
        rejected: Arc::clone(&rejected),
        progress,
    };
    let table = StreamingTable::try_new(documents_schema(), vec![Arc::new(documents)]).map_err(query_error)?;
    session.register_table("source", Arc::new(table)).map_err(query_error)?;
    Ok(rejected)
}

/// Registers a unit's windows, with their text, as the table `texts`.
pub fn register_texts(engine: &Engine, session: &SessionContext, unit: &Unit, window_bytes: u32) -> Result<()> {
    session.register_udf(windows_function(window_bytes));
    session.register_udf(content_key_function());
    register_source(session, unit, Arc::new(Silent))?;
    let texts = engine.query(session, include_str!("sql/windows.sql"))?;
    session.register_table("texts", texts.into_view()).map_err(query_error)?;
    Ok(())
}

/// The documents of one file, as DataFusion reads them.
struct Documents {
    file: SourceFile,
    source: String,
    schema: SchemaRef,
    rejected: Arc<Mutex<Vec<Reject>>>,
    progress: Arc<dyn Progress>,
}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Documents({})", self.file.path.display())
    }
}

fn documents_schema() -> SchemaRef {
    let constants = ["file", "source"].map(|name| Field::new(name, DataType::Utf8View, false));
    let own = crate::source::schema();
    Arc::new(Schema::new(own.fields().iter().map(|f| f.as_ref().clone()).chain(constants).collect::<Vec<_>>()))
}

impl PartitionStream for Documents {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let external = |e: Error| DataFusionError::External(Box::new(e));
        let (schema, rejected, progress) = (Arc::clone(&self.schema), Arc::clone(&self.rejected), Arc::clone(&self.progress));
        let (file, source) = (self.file.path.display().to_string(), self.source.clone());
        let batches: Box<dyn Iterator<Item = _> + Send> = match self.file.read() {
            Err(error) => Box::new(std::iter::once(Err(external(error)))),
            Ok(rows) => Box::new(rows.map(move |rows| {
                let rows = rows.map_err(external)?;
                if !rows.rejects.is_empty() {
                    rejected.lock().map_err(|_| external(Error::internal("a reader panicked")))?.extend(rows.rejects);
                }
                progress.advance(rows.consumed);
                let constant = |value: &str| {
                    Arc::new(StringViewArray::from_iter_values(std::iter::repeat_n(value, rows.batch.num_rows()))) as ArrayRef
                };
                let columns = [rows.batch.columns(), &[constant(&file), constant(&source)]].concat();
                Ok(RecordBatch::try_new(Arc::clone(&schema), columns)?)
            })),
        };
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), futures::stream::iter(batches)))
    }
}

/// SQL `embed(text)`: the text's vector.
fn embed_function(embedder: &Arc<dyn Embedder>) -> ScalarUDF {
    let embedder = Arc::clone(embedder);
    let dimensions = embedder.dimensions();
    let compute = move |arguments: &[ColumnarValue]| {
        let texts = ColumnarValue::values_to_arrays(arguments)?;
        let texts: Vec<&str> = texts[0].as_string_view().iter().map(Option::unwrap_or_default).collect();
        let mut vectors = vec![0.0; texts.len() * dimensions];
        embedder.embed(&texts, &mut vectors).map_err(|e| DataFusionError::External(Box::new(e)))?;
        let mut halves = vec![f16::ZERO; vectors.len()];
        halves.convert_from_f32_slice(&vectors);
        let values = Arc::new(Float16Array::from(halves));
        let item = Arc::new(Field::new("item", DataType::Float16, false));
        Ok(ColumnarValue::Array(Arc::new(FixedSizeListArray::try_new(item, dimensions as i32, values, None)?)))
    };
    create_udf("embed", vec![DataType::Utf8View], embedding_type(dimensions), Volatility::Immutable, Arc::new(compute))
}

/// Appends the numbers of a column of embeddings, `(rows, dimensions)`.
pub fn append_numbers(column: &ArrayRef, numbers: &mut Vec<f32>) -> Result<()> {
    let values = column.as_fixed_size_list_opt().and_then(|l| l.values().as_primitive_opt::<Float16Type>());
    let values = values.ok_or_else(|| Error::internal("embeddings have an unexpected type"))?;
    let before = numbers.len();
    numbers.resize(before + values.len(), 0.0);
    values.values().convert_to_f32_slice(&mut numbers[before..]);
    match numbers[before..].iter().all(|x| x.is_finite()) {
        true => Ok(()),
        false => Err(Error::internal("the embedding model gave a number that is not finite")),
    }
}

/// The key of a window in hashes: its document's key, then its number.
pub fn window_key(document: &str, window: u32) -> Vec<u8> {
    [document.as_bytes(), &window.to_le_bytes()].concat()
}

/// SQL `priority(document, window)`: a window's priority in every sample of the corpus; low ones are taken first.
pub fn priority_function(seed: u64) -> ScalarUDF {
    let stream = Stream::new(seed, "sample");
    let compute = move |arguments: &[ColumnarValue]| {
        let columns = ColumnarValue::values_to_arrays(arguments)?;
        let (documents, windows) = (columns[0].as_string_view(), columns[1].as_primitive::<UInt32Type>());
        let keys = documents.iter().zip(windows.values()).map(|(d, &w)| window_key(d.unwrap_or_default(), w));
        let priorities = keys.map(|key| stream.bits(&key));
        Ok(ColumnarValue::Array(Arc::new(UInt64Array::from_iter_values(priorities))))
    };
    create_udf(
        "priority",
        vec![DataType::Utf8View, DataType::UInt32],
        DataType::UInt64,
        Volatility::Immutable,
        Arc::new(compute),
    )
}

/// The windows of lowest priority among those seen, with their text and vector.
#[derive(Default)]
struct Sample {
    heap: BinaryHeap<Sampled>,
    bytes: usize,
}

/// Ordered by priority, then by everything that could still tell two windows apart.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Sampled {
    priority: u64,
    document: String,
    window: u32,
    text: String,
    embedding: Vec<u16>,
}

impl Sample {
    /// Whether the sample is complete without its window of highest priority.
    fn is_over(&self) -> bool {
        let last = self.heap.peek().map_or(0, |s| s.text.len());
        self.heap.len() > SAMPLE_WINDOWS || self.bytes - last >= SAMPLE_BYTES
    }

    /// Takes what belongs to the sample of the columns `priority`, `document`, `window`, `text` and `embedding`.
    fn add(&mut self, batch: &RecordBatch) -> Result<()> {
        let column =
            |name: &str| batch.column_by_name(name).ok_or_else(|| Error::internal(format!("the column `{name}` is missing")));
        let as_text = |name: &str| {
            arrow::compute::cast(column(name)?, &DataType::Utf8View).map_err(|e| Error::internal("no text").source(e))
        };
        let (documents, texts): (ArrayRef, ArrayRef) = (as_text("document")?, as_text("text")?);
        let (documents, texts) = (documents.as_string_view(), texts.as_string_view());
        let priorities = column("priority")?.as_primitive::<UInt64Type>();
        let windows = column("window")?.as_primitive::<UInt32Type>();
        let vectors = column("embedding")?.as_fixed_size_list();
        for row in 0..batch.num_rows() {
            let priority = priorities.value(row);
            let full = self.heap.len() >= SAMPLE_WINDOWS || self.bytes >= SAMPLE_BYTES;
            if full && self.heap.peek().is_some_and(|last| last.priority < priority) {
                continue;
            }
            let vector = vectors.value(row);
            let embedding = vector.as_primitive::<Float16Type>().values().iter().map(|x| x.to_bits()).collect();
            let (document, text) = (documents.value(row).to_owned(), texts.value(row).to_owned());
            self.bytes += text.len();
            self.heap.push(Sampled { priority, document, window: windows.value(row), text, embedding });
            while self.is_over() {
                self.bytes -= self.heap.pop().map_or(0, |s| s.text.len());
            }
        }
        Ok(())
    }

    fn write(self, path: &Path, dimensions: usize) -> Result<()> {
        let rows = self.heap.into_sorted_vec();
        let schema = sample_schema(dimensions);
        let vectors =
            Float16Array::from_iter_values(rows.iter().flat_map(|r| r.embedding.iter().map(|&bits| f16::from_bits(bits))));
        let item = Arc::new(Field::new("item", DataType::Float16, false));
        let vectors = FixedSizeListArray::try_new(item, dimensions as i32, Arc::new(vectors), None);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.priority))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.document))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.window))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.text))),
            Arc::new(vectors.map_err(|e| Error::internal("vectors have a wrong shape").source(e))?),
        ];
        let batch = RecordBatch::try_new(Arc::clone(&schema), columns).map_err(|e| Error::internal("no table").source(e))?;
        write_parquet(path, &schema, std::iter::once(Ok(batch))).map(|_| ())
    }
}

fn sample_schema(dimensions: usize) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("priority", DataType::UInt64, false),
        Field::new("document", DataType::Utf8, false),
        Field::new("window", DataType::UInt32, false),
        Field::new("text", DataType::Utf8, false),
        Field::new("embedding", embedding_type(dimensions), false),
    ]))
}

/// One window of the merged sample.
#[derive(Debug, Clone)]
pub struct SampledWindow {
    /// Its text.
    pub text: String,
    /// Its vector.
    pub embedding: Vec<f32>,
}

/// The windows of lowest priority in the whole corpus, in order of priority: the same however the corpus is split.
pub fn read_sample(engine: &Engine, outputs: &crate::outputs::Outputs) -> Result<Vec<SampledWindow>> {
    let files: Vec<&Path> = outputs.corpus().filter_map(|u| u.sample.as_deref()).collect();
    let session = engine.text_session((SAMPLE_BYTES / SAMPLE_WINDOWS) as u32, []);
    engine.register(&session, "samples", &files)?;
    let mut sample = Sample::default();
    for batch in engine.stream(engine.query(&session, "SELECT * FROM samples")?)? {
        sample.add(&batch?)?;
    }
    let window = |sampled: Sampled| {
        let embedding = sampled.embedding.into_iter().map(|bits| f16::from_bits(bits).to_f32()).collect();
        SampledWindow { text: sampled.text, embedding }
    };
    Ok(sample.heap.into_sorted_vec().into_iter().map(window).collect())
}
