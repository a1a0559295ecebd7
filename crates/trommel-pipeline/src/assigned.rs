//! The windows of one file with their text and their cluster: two files of one order, read side by side.
//!
//! A join would hold one of the two in memory, and a file may have millions of windows.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::{DataFusionError, Result as QueryResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::prelude::{DataFrame, SessionContext};
use futures::{StreamExt, TryStreamExt};
use trommel_core::error::{Error, Result};

use crate::embed::register_texts;
use crate::engine::{Engine, query_error};
use crate::outputs::Unit;

/// Registers a unit's windows as the table `assigned(row, window, document, cluster_id, text)`, in the order of the file.
pub fn register_assigned(engine: &Engine, session: &SessionContext, unit: &Unit, window_bytes: u32) -> Result<()> {
    register_texts(engine, session, unit, window_bytes)?;
    engine.register(session, "assignments", &[&unit.assignments])?;
    let texts = engine.query(session, "SELECT row, window, text FROM texts")?;
    let clusters = engine.query(session, "SELECT row, window, document, cluster_id FROM assignments")?;
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
    texts: DataFrame,
    clusters: DataFrame,
}

impl PartitionStream for Assigned {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let (texts, clusters) = (self.texts.clone(), self.clusters.clone());
        let (file, schema) = (self.file.clone(), Arc::clone(&self.schema));
        let start = async move {
            let (texts, clusters) = (texts.execute_stream().await?, clusters.execute_stream().await?);
            let ahead = RecordBatch::new_empty(clusters.schema());
            Ok::<_, DataFusionError>(futures::stream::try_unfold(
                SideBySide { file, schema, texts, clusters, ahead },
                SideBySide::next,
            ))
        };
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), futures::stream::once(start).try_flatten()))
    }
}

/// Both sides as they are read; their batches end at different rows.
struct SideBySide {
    file: String,
    schema: SchemaRef,
    texts: SendableRecordBatchStream,
    clusters: SendableRecordBatchStream,
    /// Rows of `clusters` whose text is still to come.
    ahead: RecordBatch,
}

impl SideBySide {
    async fn next(mut self) -> QueryResult<Option<(RecordBatch, SideBySide)>> {
        let Some(texts) = self.texts.next().await.transpose()? else {
            self.read_clusters(1).await?;
            return if self.ahead.num_rows() == 0 { Ok(None) } else { Err(self.changed()) };
        };
        let rows = texts.num_rows();
        self.read_clusters(rows).await?;
        if self.ahead.num_rows() < rows || self.ahead.slice(0, rows).columns()[..KEY] != texts.columns()[..KEY] {
            return Err(self.changed());
        }
        let columns = [self.ahead.slice(0, rows).columns(), &texts.columns()[KEY..]].concat();
        let columns = columns.iter().zip(self.schema.fields()).map(|(column, field)| cast(column, field.data_type()));
        let both = RecordBatch::try_new(Arc::clone(&self.schema), columns.collect::<Result<_, _>>()?)?;
        self.ahead = self.ahead.slice(rows, self.ahead.num_rows() - rows);
        Ok(Some((both, self)))
    }

    /// Reads until `rows` rows are ahead, or all that there are.
    async fn read_clusters(&mut self, rows: usize) -> QueryResult<()> {
        while self.ahead.num_rows() < rows {
            let Some(next) = self.clusters.next().await.transpose()? else { break };
            self.ahead = concat_batches(&next.schema(), [&self.ahead, &next])?;
        }
        Ok(())
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
        let names = |part: &[u32]| Arc::new(StringViewArray::from_iter_values(part.iter().map(u32::to_string))) as ArrayRef;
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
        let (texts, clusters) = (session.table("texts").await?, session.table("clusters").await?);
        let assigned = Assigned { file: "part.parquet".into(), schema: schema(), texts, clusters };
        let read: Vec<RecordBatch> = assigned.execute(session.task_ctx()).try_collect().await?;
        let rows = |batch: &RecordBatch| {
            let (clusters, texts) =
                (batch.column(3).as_primitive::<UInt32Type>().clone(), batch.column(4).as_string_view().clone());
            (0..batch.num_rows()).map(move |i| (clusters.value(i), texts.value(i).to_owned())).collect::<Vec<_>>()
        };
        Ok(read.iter().flat_map(rows).collect())
    }

    #[tokio::test]
    async fn every_text_meets_its_cluster_wherever_batches_end() {
        let wanted: Vec<_> = (0..23).map(|i| (i, i.to_string())).collect();
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
