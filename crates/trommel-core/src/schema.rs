//! The Arrow schemas of the tables that a user can query. A contract.
//!
//! One function per table, in the order of the data. Column names are what users type in SQL.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

fn field(name: &str, data_type: DataType) -> Field {
    Field::new(name, data_type, false)
}

fn schema(fields: Vec<Field>) -> SchemaRef {
    Arc::new(Schema::new(fields))
}

/// The name under which the corpus stands beside the domains in `source` and `domain` columns.
pub const CORPUS: &str = "corpus";

/// The columns that say which window a row is and where its text lies; shared by `windows`, `embeddings` and
/// `assignments`. `byte_start` and `byte_len` are UTF-8 bytes within the document's text. Numbers that people calculate with
/// are signed, because SQL engines turn sums of mixed signs into decimals.
fn window_fields() -> Vec<Field> {
    vec![
        field("document", DataType::Utf8),
        field("window", DataType::UInt32),
        field("file", DataType::Utf8),
        field("row", DataType::Int64),
        field("byte_start", DataType::Int64),
        field("byte_len", DataType::Int32),
    ]
}

/// `windows`: where each window lies.
pub fn windows() -> SchemaRef {
    schema([window_fields(), vec![field("source", DataType::Utf8)]].concat())
}

/// The type of an embedding: `dimensions` half-precision numbers of unit L2 norm.
pub fn embedding_type(dimensions: usize) -> DataType {
    DataType::FixedSizeList(Arc::new(field("item", DataType::Float16)), dimensions as i32)
}

/// `embeddings`: the vector of each window.
pub fn embeddings(dimensions: usize) -> SchemaRef {
    let vector = field("embedding", embedding_type(dimensions));
    schema([window_fields(), vec![field("source", DataType::Utf8), vector]].concat())
}

/// `assignments`: the cluster of each window. `distance` is the Euclidean distance to the centroid.
pub fn assignments() -> SchemaRef {
    let tail =
        vec![field("cluster_id", DataType::UInt32), field("distance", DataType::Float32), field("source", DataType::Utf8)];
    schema([window_fields(), tail].concat())
}

/// `rejects`: a row that could not be used, and why. `row` is the line minus one in a JSONL file.
pub fn rejects() -> SchemaRef {
    schema(vec![
        field("file", DataType::Utf8),
        field("row", DataType::Int64),
        field("stage", DataType::Utf8),
        field("reason", DataType::Utf8),
    ])
}
