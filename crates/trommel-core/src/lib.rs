//! Shared words of trommel: what every crate must name in the same way, and no stage logic.

/// One error type, whose kind says whose fault it was.
pub mod error;
/// Content keys and checksums: the same input has the same name everywhere.
pub mod key;
/// Random numbers as a function of (seed, stream name, key), never of order.
pub mod seed;
/// The Arrow schemas of every table that a user can query.
pub mod schema;
/// What a folder of training shards says of itself.
pub mod manifest;
/// How a `tokenizer.json` makes tokens of a text.
pub mod tokenizer;
/// Files that are whole or absent.
pub mod storage;
/// What a long job tells the person who waits for it, and how that person stops it.
pub mod progress;
