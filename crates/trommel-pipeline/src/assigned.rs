//! The windows of one file with their text and their cluster: two files of one order, read side by side.
//!
//! A join of the two would hold one of them in memory, and a file may have millions of windows.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::{DataFusionError, Result as QueryResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use datafusion::prelude::SessionContext;
use futures::{StreamExt, TryStreamExt};
use trommel_core::error::{Error, Result};

use crate::embed::register_texts;
use crate::engine::{Engine, query_error};
use crate::outputs::Unit;

/// Registers a unit's windows as the table `assigned(row, window, document, cluster_id, text)`, in the order of the file.
pub fn register_assigned(engine: &Engine, session: &SessionContext, unit: &Unit, window_bytes: u32) -> Result<()> {
    register_texts(engine, session, unit, window_bytes)?;
    engine.register(session, "assignments", &[&unit.assignments])?;
    // Plans, not queries: a query holds the session that is to hold this table.
    let plan = |sql| engine.wait(engine.query(session, sql)?.create_physical_plan()).map_err(query_error);
    let texts = plan("SELECT row, window, text FROM texts")?;
    let clusters = plan("SELECT row, window, document, cluster_id FROM assignments")?;
    let assigned = Assigned { file: unit.file.path.display().to_string(), schema: schema(), texts, clusters };
    let table = StreamingTable::try_new(schema(), vec![Arc::new(assigned)]).map_err(query_error)?;
    session.register_table("assigned", Arc::new(table)).map_err(query_error)?;
    Ok(())
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("row", DataType::Int64, false),
        Field::new("window", DataType::UInt32, false),
        Field::new("document", DataType::Utf8View, false),
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("text", DataType::Utf8View, false),
    ]))
}

/// Columns `row` and `window`, by which both sides agree on what they read.
const KEY: usize = 2;

/// The columns of `clusters`, then those of `texts` after the key.
#[derive(Debug)]
struct Assigned {
    file: String,
    schema: SchemaRef,
    texts: Arc<dyn ExecutionPlan>,
    clusters: Arc<dyn ExecutionPlan>,
}

impl Assigned {
    fn read(&self, context: &Arc<TaskContext>) -> QueryResult<SideBySide> {
        let side = |plan: &Arc<dyn ExecutionPlan>| -> QueryResult<Side> {
            let stream = execute_stream(Arc::clone(plan), Arc::clone(context))?;
            Ok(Side { rest: RecordBatch::new_empty(stream.schema()), stream })
        };
        let (texts, clusters) = (side(&self.texts)?, side(&self.clusters)?);
        Ok(SideBySide { file: self.file.clone(), schema: Arc::clone(&self.schema), texts, clusters })
    }
}

impl PartitionStream for Assigned {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let both = futures::stream::once(std::future::ready(self.read(&context)));
        let batches = both.map_ok(|both| futures::stream::try_unfold(both, SideBySide::next)).try_flatten();
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), batches))
    }
}

/// One side as it is read.
struct Side {
    stream: SendableRecordBatchStream,
    /// Rows that wait for the other side.
    rest: RecordBatch,
}

impl Side {
    /// How many rows wait: none at the end only.
    async fn waiting(&mut self) -> QueryResult<usize> {
        while self.rest.num_rows() == 0 {
            let Some(next) = self.stream.next().await.transpose()? else { break };
            self.rest = next;
        }
        Ok(self.rest.num_rows())
    }

    fn take(&mut self, rows: usize) -> RecordBatch {
        let taken = self.rest.slice(0, rows);
        self.rest = self.rest.slice(rows, self.rest.num_rows() - rows);
        taken
    }
}

/// Both sides; their batches end at different rows, and what goes on is as long as the shorter one.
struct SideBySide {
    file: String,
    schema: SchemaRef,
    texts: Side,
    clusters: Side,
}

impl SideBySide {
    async fn next(mut self) -> QueryResult<Option<(RecordBatch, SideBySide)>> {
        let waiting = [self.texts.waiting().await?, self.clusters.waiting().await?];
        let rows = match waiting {
            [0, 0] => return Ok(None),
            [0, _] | [_, 0] => return Err(self.changed()),
            [texts, clusters] => texts.min(clusters),
        };
        let (texts, clusters) = (self.texts.take(rows), self.clusters.take(rows));
        if clusters.columns()[..KEY] != texts.columns()[..KEY] {
            return Err(self.changed());
        }
        let columns = [clusters.columns(), &texts.columns()[KEY..]].concat();
        let columns = columns.iter().zip(self.schema.fields()).map(|(column, field)| cast(column, field.data_type()));
        let both = RecordBatch::try_new(Arc::clone(&self.schema), columns.collect::<Result<_, _>>()?)?;
        Ok(Some((both, self)))
    }

    fn changed(&self) -> DataFusionError {
        let error = Error::data("the file no longer has the windows that its clusters were found for").file(&self.file);
        DataFusionError::External(Box::new(error.hint("it was changed during the run: run the same command again")))
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, AsArray, Int64Array, StringViewArray, UInt32Array};
    use arrow::datatypes::UInt32Type;

    use super::*;
    use crate::engine::register_batches;

    /// Windows `rows`, in batches of `batch` rows, with a text or with document and cluster.
    fn batches(rows: std::ops::Range<u32>, batch: usize, with_text: bool) -> Vec<RecordBatch> {
        let rows: Vec<u32> = rows.collect();
        let names = |part: &[u32]| {
            Arc::new(StringViewArray::from_iter_values(part.iter().map(|i| format!("window number {i}")))) as ArrayRef
        };
        let numbers = |part: &[u32]| Arc::new(UInt32Array::from(part.to_vec())) as ArrayRef;
        let one = |part: &[u32]| {
            let row = Arc::new(Int64Array::from_iter_values(part.iter().map(|&i| i64::from(i)))) as ArrayRef;
            let key = [("row", row), ("window", numbers(part))];
            let rest = if with_text {
                vec![("text", names(part))]
            } else {
                vec![("document", names(part)), ("cluster_id", numbers(part))]
            };
            RecordBatch::try_from_iter(key.into_iter().chain(rest)).unwrap()
        };
        rows.chunks(batch).map(one).collect()
    }

    async fn read(texts: Vec<RecordBatch>, clusters: Vec<RecordBatch>) -> QueryResult<Vec<(u32, String)>> {
        let session = SessionContext::new_with_config(datafusion::prelude::SessionConfig::new().with_target_partitions(1));
        for (table, batches) in [("texts", texts), ("clusters", clusters)] {
            let empty = batches[0].schema();
            register_batches(&session, table, batches, &empty).unwrap();
        }
        let texts = session.table("texts").await?.create_physical_plan().await?;
        let clusters = session.table("clusters").await?.create_physical_plan().await?;
        let assigned = Assigned { file: "part.parquet".into(), schema: schema(), texts, clusters };
        let read: Vec<RecordBatch> = assigned.execute(session.task_ctx()).try_collect().await?;
        // Each batch refers to what it was read from, and to nothing that came before.
        assert!(read.iter().all(|batch| batch.column(2).as_string_view().data_buffers().len() <= 1));
        let rows = |batch: &RecordBatch| {
            let (clusters, texts) =
                (batch.column(3).as_primitive::<UInt32Type>().clone(), batch.column(4).as_string_view().clone());
            (0..batch.num_rows()).map(move |i| (clusters.value(i), texts.value(i).to_owned())).collect::<Vec<_>>()
        };
        Ok(read.iter().flat_map(rows).collect())
    }

    #[tokio::test]
    async fn every_text_meets_its_cluster_wherever_batches_end() {
        let wanted: Vec<_> = (0..23).map(|i| (i, format!("window number {i}"))).collect();
        for (texts, clusters) in [(1, 23), (23, 1), (5, 7), (7, 5), (4, 4)] {
            assert_eq!(read(batches(0..23, texts, true), batches(0..23, clusters, false)).await.unwrap(), wanted);
        }
    }

    #[tokio::test]
    async fn a_file_that_has_changed_is_refused() {
        for (texts, clusters) in [(0..9, 0..8), (0..8, 0..9), (1..9, 0..8)] {
            let error = read(batches(texts, 3, true), batches(clusters, 4, false)).await.unwrap_err();
            assert!(query_error(error).to_string().contains("no longer has the windows"));
        }
    }
}
