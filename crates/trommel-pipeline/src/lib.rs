//! The columnar pipeline: corpus and domains in, resampled shards out.
//!
//! Modules stand in the order in which data meets them. A stage is a query in `sql/` over the tables before it, with a
//! few functions of our own; its output is Parquet, under a name that says what made it.

/// The embedded DataFusion: a query in, a Parquet file out.
pub mod engine;
/// The name of every output, computed before anything runs.
pub mod outputs;
/// Documents from Parquet and JSON lines.
pub mod source;
/// Documents are cut into windows.
pub mod window;
/// An embedding table that is learnt from the corpus.
pub mod table;
/// Windows become vectors.
pub mod embed;
/// Vectors become clusters.
pub mod cluster;
/// Windows find their cluster.
pub mod assign;
/// Windows with their cluster and their text.
pub mod assigned;
/// Clusters are counted, for the corpus and for each domain.
pub mod histogram;
/// Counts become importance weights.
pub mod weigh;
/// The tokenizer of the shards.
pub mod tokenizer;
/// Windows are drawn.
pub mod resample;
/// Windows are selected by another method, for comparison.
pub mod dsir;
/// Draws become training shards.
pub mod shard;
/// The tables `corpus` and `domains`.
pub mod documents;
/// What the models that were trained on the shards reached.
pub mod results;
/// Every table of a run directory, for SQL.
pub mod catalog;
/// In which proportions a training draws clusters.
pub mod proportions;
/// The whole run.
pub mod run;
