//! The embedded DataFusion, and what every stage does with it: a query in, a Parquet file out.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::{DataType, SchemaRef};
use datafusion::datasource::MemTable;
use datafusion::error::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::logical_expr::ScalarUDF;
use datafusion::prelude::{DataFrame, ParquetReadOptions, SessionConfig, SessionContext};
use futures::StreamExt;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use tokio::runtime::Runtime;
use trommel_core::error::{Error, Result};
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::storage::{AtomicFile, create_folder, write_error};

/// Memory for sorting and joining before DataFusion spills to disk, for each thread of a session. Sessions share none of it, so
/// that whether a query succeeds does not depend on what runs beside it: with as many sessions as threads, 128 MB for each thread in all.
const QUERY_MEMORY: usize = 128 << 20;
/// Bytes of text that a batch of a text session aims at: a merge of sorted runs holds two batches of each.
const BATCH_BYTES: u32 = 4 << 20;
/// Rows that a batch never exceeds.
const BATCH_ROWS: u32 = 8192;
/// Uncompressed bytes of a row group: what a writer holds in memory, and the unit that a reader can skip.
const ROW_GROUP_BYTES: usize = 8 << 20;
/// Numbers of vectors that are encoded at once. The encoder makes some 50 bytes of each, which are to stay in the cache.
const ENCODED_NUMBERS: usize = 1 << 15;

/// Where and how the stages run.
pub struct Engine {
    runtime: Runtime,
    environment: RuntimeEnv,
    threads: usize,
    /// Where progress goes.
    pub progress: Arc<dyn Progress>,
    /// The request to stop.
    pub interrupt: Interrupt,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Rows of the file.
    pub rows: u64,
    /// Bytes on disk.
    pub bytes: u64,
}

impl Engine {
    /// An engine with `threads` workers (at least 1) that spills into `spill`.
    pub fn new(threads: usize, spill: PathBuf, progress: Arc<dyn Progress>, interrupt: Interrupt) -> Result<Engine> {
        let threads = threads.max(1);
        create_folder(&spill)?;
        let environment = RuntimeEnvBuilder::new()
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(DiskManagerMode::Directories(vec![spill])))
            .build()
            .map_err(not_started)?;
        Ok(Engine { runtime: runtime(threads)?, environment, threads, progress, interrupt })
    }

    /// A session that knows `functions`, where rows keep the order of their files.
    pub fn session(&self, functions: impl IntoIterator<Item = ScalarUDF>) -> SessionContext {
        self.session_of(1, BATCH_ROWS, functions)
    }

    /// A [`Engine::session`] for windows with their text, of up to `window_bytes` bytes each.
    pub fn text_session(&self, window_bytes: u32, functions: impl IntoIterator<Item = ScalarUDF>) -> SessionContext {
        self.session_of(1, (BATCH_BYTES / window_bytes.max(1)).clamp(1, BATCH_ROWS), functions)
    }

    /// A session for queries over whole tables, which all cores share.
    pub fn parallel_session(&self, functions: impl IntoIterator<Item = ScalarUDF>) -> SessionContext {
        self.session_of(self.threads, BATCH_ROWS, functions)
    }

    fn session_of(&self, partitions: usize, batch_rows: u32, functions: impl IntoIterator<Item = ScalarUDF>) -> SessionContext {
        let config = SessionConfig::new()
            .with_target_partitions(partitions)
            .with_batch_size(batch_rows as usize)
            .with_information_schema(true)
            .with_parquet_pruning(true)
            .set_bool("datafusion.execution.parquet.pushdown_filters", false);
        let memory_pool = Arc::new(FairSpillPool::new(QUERY_MEMORY * partitions));
        let environment = RuntimeEnv { memory_pool, ..self.environment.clone() };
        let session = SessionContext::new_with_config_rt(config, Arc::new(environment));
        functions.into_iter().for_each(|f| session.register_udf(f));
        session
    }

    /// Waits for something asynchronous.
    pub fn wait<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Registers Parquet files as one table.
    pub fn register(&self, session: &SessionContext, table: &str, files: &[&Path]) -> Result<()> {
        let paths: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
        let register = async {
            let frame = session.read_parquet(paths, ParquetReadOptions::default()).await?;
            session.register_table(table, frame.into_view())
        };
        self.wait(register).map_err(query_error)?;
        Ok(())
    }

    /// Plans a query.
    pub fn query(&self, session: &SessionContext, sql: &str) -> Result<DataFrame> {
        self.wait(session.sql(sql)).map_err(query_error)
    }

    /// Runs a query and returns its batches, for results that are small.
    pub fn collect(&self, session: &SessionContext, sql: &str) -> Result<Vec<RecordBatch>> {
        let frame = self.query(session, sql)?;
        self.wait(frame.collect()).map_err(query_error)
    }

    /// Starts a query and returns its rows as they come.
    pub fn stream(&self, frame: DataFrame) -> Result<impl Iterator<Item = Result<RecordBatch>> + '_> {
        let mut stream: SendableRecordBatchStream = self.wait(frame.execute_stream()).map_err(query_error)?;
        Ok(std::iter::from_fn(move || {
            if let Err(interrupted) = self.interrupt.check() {
                return Some(Err(interrupted));
            }
            self.wait(stream.next()).map(|batch| batch.map_err(query_error))
        }))
    }

    /// Runs a query into a Parquet file with columns of exactly `schema`.
    pub fn write(&self, frame: DataFrame, schema: &SchemaRef, path: &Path) -> Result<Written> {
        write_parquet(path, schema, self.stream(frame)?)
    }

    /// Runs `work` for every item, up to one at a time per thread; stops at the first error.
    pub fn for_each<T: Sync>(&self, items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.threads.min(items.len()))
                .map(|_| {
                    scope.spawn(|| {
                        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                            let result = self.interrupt.check().and_then(|()| work(item));
                            if result.is_err() {
                                next.store(items.len(), Ordering::Relaxed);
                                return result;
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            let mut outcome = Ok(());
            for worker in workers {
                let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                outcome = outcome.and(result);
            }
            outcome
        })
    }
}

/// What queries run on, with `threads` workers (at least 1).
///
/// Files are read on threads of their own, each of which keeps memory for a while; without a limit, a table of many files begins
/// with as many. None of them waits for another.
pub fn runtime(threads: usize) -> Result<Runtime> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(threads).max_blocking_threads(2 * threads).enable_all().build().map_err(not_started)
}

fn not_started(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::system("cannot start the query engine").source(error)
}

/// Registers batches that are in memory as a table, which has the columns of `empty` if there are none.
pub fn register_batches(session: &SessionContext, table: &str, batches: Vec<RecordBatch>, empty: &SchemaRef) -> Result<()> {
    let schema = batches.first().map_or_else(|| Arc::clone(empty), RecordBatch::schema);
    let memory = MemTable::try_new(schema, vec![batches]).map_err(query_error)?;
    session.register_table(table, Arc::new(memory)).map_err(query_error)?;
    Ok(())
}

/// Writes batches to a Parquet file that is whole or absent. Columns are matched by name and cast to `schema`.
pub fn write_parquet(path: &Path, schema: &SchemaRef, batches: impl Iterator<Item = Result<RecordBatch>>) -> Result<Written> {
    let mut sink = ParquetSink::create(path, schema)?;
    for batch in batches {
        sink.write(&batch?)?;
    }
    sink.finish()
}

/// The columns of vectors: their names, those of their items, and the numbers of a vector.
fn vectors(schema: &SchemaRef) -> impl Iterator<Item = (&str, &str, usize)> {
    schema.fields().iter().filter_map(|field| match field.data_type() {
        DataType::FixedSizeList(item, len) => Some((field.name().as_str(), item.name().as_str(), (*len).max(1) as usize)),
        _ => None,
    })
}

/// A Parquet file that appears under its name when it is finished.
pub struct ParquetSink {
    path: PathBuf,
    schema: SchemaRef,
    writer: ArrowWriter<BufWriter<File>>,
    file: AtomicFile,
    rows: u64,
    /// Rows that are encoded at once.
    rows_at_once: usize,
}

impl ParquetSink {
    /// Opens the sink; nothing is visible under `path` before [`ParquetSink::finish`].
    pub fn create(path: &Path, schema: &SchemaRef) -> Result<ParquetSink> {
        let file = AtomicFile::create(path)?;
        let mut properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_bytes(Some(ROW_GROUP_BYTES));
        // Numbers of vectors hardly repeat, and nobody looks for one.
        for path in vectors(schema).map(|(field, item, _)| ColumnPath::from(vec![field.into(), "list".into(), item.into()])) {
            properties = properties
                .set_column_dictionary_enabled(path.clone(), false)
                .set_column_compression(path.clone(), Compression::UNCOMPRESSED)
                .set_column_statistics_enabled(path, EnabledStatistics::None);
        }
        let writer = ArrowWriter::try_new(BufWriter::new(file.handle()?), Arc::clone(schema), Some(properties.build()));
        let writer = writer.map_err(|e| parquet_error(path, e))?;
        let longest = vectors(schema).map(|(.., len)| len).max();
        let rows_at_once = longest.map_or(usize::MAX, |len| (ENCODED_NUMBERS / len).max(1));
        Ok(ParquetSink { path: path.to_owned(), schema: Arc::clone(schema), writer, file, rows: 0, rows_at_once })
    }

    /// Appends the batch's columns of the same names, cast to the sink's types.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let column = |field: &arrow::datatypes::FieldRef| {
            let column = batch.column_by_name(field.name());
            let column = column.ok_or_else(|| Error::internal(format!("the column `{}` was not computed", field.name())))?;
            cast(column, field.data_type()).map_err(|e| Error::internal("a column has a wrong type").source(e))
        };
        let columns = self.schema.fields().iter().map(column).collect::<Result<Vec<_>>>()?;
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns);
        let batch =
            batch.map_err(|e| Error::internal("a row breaks the schema of its table").file(self.path.display()).source(e))?;
        for first in (0..batch.num_rows()).step_by(self.rows_at_once) {
            let part = batch.slice(first, self.rows_at_once.min(batch.num_rows() - first));
            self.writer.write(&part).map_err(|e| parquet_error(&self.path, e))?;
        }
        self.rows += batch.num_rows() as u64;
        Ok(())
    }

    /// The name that the file will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stores a text under a name in the file's footer.
    pub fn note(&mut self, key: &str, value: &str) {
        self.writer.append_key_value_metadata(KeyValue::new(key.to_owned(), value.to_owned()));
    }

    /// Closes the file and gives it its name.
    pub fn finish(self) -> Result<Written> {
        let path = self.path;
        let buffer = self.writer.into_inner().map_err(|e| parquet_error(&path, e))?;
        buffer.into_inner().map_err(|e| write_error(&path, e.into_error()))?;
        self.file.commit()?;
        Ok(Written { rows: self.rows, bytes: crate::source::size(&path) })
    }
}

/// The number of rows of one of our own Parquet files, and a text from its footer.
pub fn footer(path: &Path, key: &str) -> Result<(u64, Option<String>)> {
    let reader = File::open(path).map_err(|e| own_file_error(path, e))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(reader).map_err(|e| own_file_error(path, e))?;
    let metadata = reader.metadata().file_metadata();
    let note = metadata.key_value_metadata().and_then(|m| m.iter().find(|k| k.key == key)).and_then(|k| k.value.clone());
    Ok((metadata.num_rows() as u64, note))
}

/// The rows and bytes of files that are there.
pub fn written<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Written> {
    let mut sum = Written::default();
    for path in paths {
        sum.rows += footer(path, "")?.0;
        sum.bytes += crate::source::size(path);
    }
    Ok(sum)
}

fn own_file_error(path: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    let hint = "remove this file and run the pipeline again: it will be made anew";
    Error::data("a file of the run is missing or damaged").file(path.display()).source(error).hint(hint)
}

/// A failed write of Parquet, where a full disk arrives wrapped.
fn parquet_error(path: &Path, error: parquet::errors::ParquetError) -> Error {
    match error {
        parquet::errors::ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(io) => write_error(path, *io),
            Err(other) => Error::internal("cannot encode a table").file(path.display()).source(other),
        },
        other => Error::internal("cannot encode a table").file(path.display()).source(other),
    }
}

/// A failed query: our own error if one of our functions raised it, else the engine's.
pub fn query_error(error: DataFusionError) -> Error {
    match error {
        DataFusionError::External(source) => match source.downcast::<Error>() {
            Ok(own) => *own,
            Err(other) => Error::data("a query failed").source(other),
        },
        DataFusionError::Context(_, inner) | DataFusionError::Diagnostic(_, inner) => query_error(*inner),
        DataFusionError::SQL(e, _) => Error::data("a query failed").source(*e),
        DataFusionError::ArrowError(e, _) => Error::data("a query failed").source(*e),
        DataFusionError::Shared(shared) => Error::data(format!("a query failed: {shared}")),
        DataFusionError::ResourcesExhausted(what) => {
            let error = Error::system(format!(
                "a query needs more than the {} MB that each of its threads may hold",
                QUERY_MEMORY >> 20
            ));
            error.source(what).hint("cut the largest files of the corpus into several")
        }
        DataFusionError::IoError(e) => {
            Error::system("a query could not read or write a file").source(e).hint("check the disk, then run again")
        }
        DataFusionError::SchemaError(e, _) => Error::data("a query failed").source(*e),
        other => Error::data(format!("a query failed: {}", other.message())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, FixedSizeListArray, Float16Array, UInt32Array};
    use arrow::datatypes::{Field, Schema};
    use half::f16;
    use trommel_core::schema::embedding_type;

    use super::*;

    #[test]
    fn vectors_come_back_and_have_neither_statistics_nor_a_dictionary() {
        let (rows, len) = (300, 256);
        let fields = vec![Field::new("row", DataType::UInt32, false), Field::new("embedding", embedding_type(len), false)];
        let schema: SchemaRef = Arc::new(Schema::new(fields));
        let numbers = Float16Array::from_iter_values((0..rows * len).map(|i| f16::from_f32((i % 2039) as f32)));
        let DataType::FixedSizeList(item, _) = embedding_type(len) else { unreachable!("embeddings are lists") };
        let vectors = FixedSizeListArray::new(item, len as i32, Arc::new(numbers), None);
        let columns: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from_iter_values(0..rows as u32)), Arc::new(vectors)];
        let batch = RecordBatch::try_new(Arc::clone(&schema), columns).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vectors.parquet");
        assert_eq!(write_parquet(&path, &schema, std::iter::once(Ok(batch.clone()))).unwrap().rows, rows as u64);
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(&path).unwrap()).unwrap();
        let [row, vector] = reader.metadata().row_group(0).columns() else { panic!("two columns") };
        assert!(row.statistics().is_some() && row.dictionary_page_offset().is_some());
        assert!(vector.statistics().is_none() && vector.dictionary_page_offset().is_none());
        let read: Vec<RecordBatch> = reader.with_batch_size(rows).build().unwrap().map(Result::unwrap).collect();
        assert_eq!(read, [batch]);
    }
}
