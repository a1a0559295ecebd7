//! The files of shards by cluster: rows that are sorted by cluster become files of one cluster each.

use std::path::{Path, PathBuf};

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::BatchCoalescer;
use arrow::datatypes::{SchemaRef, UInt32Type};
use arrow::error::ArrowError;
use trommel_core::error::{Error, Result};
use trommel_core::progress::Progress;

use super::{Content, count, finish};
use crate::engine::ParquetSink;

/// Rows that a file grows by. It ends with the first of these slices that fills it, so files do not depend on where the engine
/// cuts its batches.
const SLICE: usize = 256;

/// The files, of which one is open at a time.
pub(super) struct ClusterFiles<'a> {
    pub(super) folder: &'a Path,
    /// The end of each file's name.
    pub(super) suffix: &'a str,
    pub(super) schema: SchemaRef,
    /// A file with so many tokens is full.
    pub(super) shard_tokens: u64,
    pub(super) progress: &'a dyn Progress,
    /// What is written, in the order of clusters.
    pub(super) made: Vec<(u32, PathBuf)>,
    pub(super) slices: Option<BatchCoalescer>,
    pub(super) open: Option<(ParquetSink, Content)>,
    pub(super) cluster: u32,
}

impl ClusterFiles<'_> {
    /// Appends rows, whose clusters never fall.
    pub(super) fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let clusters = batch.column_by_name("cluster_id").and_then(|c| c.as_primitive_opt::<UInt32Type>());
        let clusters = clusters.ok_or_else(|| Error::internal("a shard lacks its clusters"))?.values();
        let mut from = 0;
        for rows in clusters.chunk_by(|a, b| a == b) {
            if self.cluster != rows[0] {
                self.end_cluster()?;
                self.cluster = rows[0];
            }
            let slices = self.slices.get_or_insert_with(|| BatchCoalescer::new(batch.schema(), SLICE));
            slices.push_batch(batch.slice(from, rows.len())).map_err(not_joined)?;
            self.write_slices()?;
            from += rows.len();
        }
        Ok(())
    }

    /// Closes the last file, and returns all of them.
    pub(super) fn finish(mut self) -> Result<Vec<(u32, PathBuf)>> {
        self.end_cluster()?;
        Ok(self.made)
    }

    fn end_cluster(&mut self) -> Result<()> {
        self.slices.as_mut().map(BatchCoalescer::finish_buffered_batch).transpose().map_err(not_joined)?;
        self.write_slices()?;
        self.close()
    }

    fn write_slices(&mut self) -> Result<()> {
        while let Some(slice) = self.slices.as_mut().and_then(BatchCoalescer::next_completed_batch) {
            let (sink, content) = match &mut self.open {
                Some(open) => open,
                None => {
                    let number = self.made.iter().rev().take_while(|(cluster, _)| *cluster == self.cluster).count();
                    let name = format!("{:08}-{number:05}{}", self.cluster, self.suffix);
                    let sink = ParquetSink::create(&self.folder.join(name), &self.schema)?;
                    self.open.insert((sink, Content { rows: 0, tokens: 0, bytes: 0 }))
                }
            };
            let added = count(&slice)?;
            sink.write(&slice)?;
            content.rows += added.rows;
            content.tokens += added.tokens;
            content.bytes += added.bytes;
            self.progress.advance(added.tokens);
            if content.tokens >= self.shard_tokens {
                self.close()?;
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        if let Some((sink, content)) = self.open.take() {
            self.made.push((self.cluster, finish(sink, &content)?));
        }
        Ok(())
    }
}

fn not_joined(error: ArrowError) -> Error {
    Error::internal("rows of a shard cannot be joined").source(error)
}
