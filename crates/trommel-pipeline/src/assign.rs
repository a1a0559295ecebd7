//! Stage `assign`: the nearest cluster of every window, the step that must scale; one output per input file.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, StructArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Fields};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use trommel_core::error::Result;
use trommel_core::schema::{assignments, embedding_type};

use crate::cluster::tree::Tree;
use crate::embed::append_numbers;
use crate::engine::Engine;
use crate::outputs::Unit;

/// Assigns the windows of one unit.
pub fn run(engine: &Engine, unit: &Unit, tree: &Arc<Tree>) -> Result<()> {
    let session = engine.session([nearest_cluster_function(tree)]);
    engine.register(&session, "embeddings", &[&unit.embeddings])?;
    let frame = engine.query(&session, include_str!("sql/assign.sql"))?;
    let written = engine.write(frame, &assignments(), &unit.assignments)?;
    engine.progress.advance(written.rows);
    Ok(())
}

/// SQL `nearest_cluster(embedding)`: (cluster_id, distance).
pub fn nearest_cluster_function(tree: &Arc<Tree>) -> ScalarUDF {
    let tree = Arc::clone(tree);
    let fields =
        Fields::from(vec![Field::new("cluster_id", DataType::UInt32, false), Field::new("distance", DataType::Float32, false)]);
    let argument = embedding_type(tree.dimensions());
    let returns = DataType::Struct(fields.clone());
    let compute = move |arguments: &[ColumnarValue]| {
        let columns = ColumnarValue::values_to_arrays(arguments)?;
        let mut vectors = Vec::new();
        append_numbers(&columns[0], &mut vectors).map_err(|e| DataFusionError::External(Box::new(e)))?;
        let found = tree.assign(&vectors);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from_iter_values(found.iter().map(|a| a.cluster_id))),
            Arc::new(Float32Array::from_iter_values(found.iter().map(|a| a.distance))),
        ];
        Ok(ColumnarValue::Array(Arc::new(StructArray::try_new(fields.clone(), columns, None)?)))
    };
    create_udf("nearest_cluster", vec![argument], returns, Volatility::Immutable, Arc::new(compute))
}
