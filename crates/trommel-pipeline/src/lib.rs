//! The columnar pipeline: corpus and domains in, resampled shards out.
//!
//! Modules stand in the order in which data meets them. A stage is a query in `sql/` over the tables before it, with a
//! few functions of our own; its output is Parquet, under a name that says what made it.

/// Windows find their cluster.
pub mod assign;
/// Every table of a run directory, for SQL.
pub mod catalog;
/// Vectors become clusters.
pub mod cluster;
/// The tables `corpus` and `domains`.
pub mod documents;
/// Windows become vectors.
pub mod embed;
/// The embedded DataFusion: a query in, a Parquet file out.
pub mod engine;
/// Clusters are counted, for the corpus and for each domain.
pub mod histogram;
/// The name of every output, computed before anything runs.
pub mod outputs;
/// Windows are drawn.
pub mod resample;
/// The whole run.
pub mod run;
/// Draws become training shards.
pub mod shard;
/// Documents from Parquet and JSON lines.
pub mod source;
/// The tokenizer of the shards.
pub mod tokenizer;
/// Counts become importance weights.
pub mod weigh;
/// Documents are cut into windows.
pub mod window;
