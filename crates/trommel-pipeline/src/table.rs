//! A static embedding table that is learnt from the corpus itself: a sample of its windows, and latent semantic analysis of it.

use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use arrow::array::AsArray;
use rayon::prelude::*;
use trommel_core::error::{Error, Result};
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::seed::Stream;
use trommel_embed::lsa::{self, Fitted};
use trommel_spec::plan::Source;

use crate::source::{Reject, SourceFile};
use crate::window::cut;

/// The length of a vector, unless something else is asked for.
pub const DIMENSIONS: u32 = 240;
/// Windows that a table is learnt from at most: some hundred times as many as it has dimensions.
const WINDOWS: usize = 1 << 14;

/// From what to learn a table.
#[derive(Debug, Clone, Copy)]
pub struct Learning<'a> {
    /// The corpus.
    pub source: &'a Source,
    /// Longest window in bytes.
    pub window_bytes: u32,
    /// The length of a vector, at most.
    pub dimensions: u32,
    /// What the sample is chosen by, and the search for directions started from.
    pub seed: u64,
}

/// What was learnt, and from what.
#[derive(Debug)]
pub struct Learnt {
    /// The table.
    pub fitted: Fitted,
    /// Windows of the corpus, of which those of lowest hash were the sample.
    pub windows: u64,
    /// Rows of the corpus that could not be used.
    pub rejects: Vec<(PathBuf, Reject)>,
}

impl Learnt {
    /// In words, what the table was learnt from, and what it is.
    pub fn describe(&self) -> String {
        let Fitted { windows, tokens, dimensions, explained, bytes } = self.fitted;
        let (all, left_out, explained) = (self.windows, self.rejects.len(), explained * 100.0);
        let size = bytesize::ByteSize(bytes).display().si();
        format!(
            "{windows} of {all} windows ({left_out} rows were left out): {tokens} tokens x {dimensions} dimensions, \
             {explained:.1}% of the windows' squared length, {size}"
        )
    }
}

impl Learning<'_> {
    /// Writes the folder `out`, where nothing may be yet and which [`trommel_embed::load::load`] reads. Reads all documents; a table
    /// is the same however they are split into files. `progress` advances by the bytes read.
    pub fn run(&self, out: &Path, progress: &dyn Progress, interrupt: &Interrupt) -> Result<Learnt> {
        let sample = Sample::new();
        self.source.files.par_iter().try_for_each(|path| self.read(path, &sample, progress, interrupt))?;
        let Found { lowest, rejects } = sample.found.into_inner().map_err(|_| Error::internal("a reader panicked"))?;
        let texts: Vec<String> = lowest.into_sorted_vec().into_iter().map(|(_, text)| text).collect();
        let fitted = lsa::fit(&texts, out, self.dimensions as usize, self.seed)?;
        Ok(Learnt { fitted, windows: sample.windows.into_inner(), rejects })
    }

    fn read(&self, path: &Path, sample: &Sample, progress: &dyn Progress, interrupt: &Interrupt) -> Result<()> {
        let priority = Stream::new(self.seed, "window sample");
        let file = SourceFile { path: path.to_owned(), text: self.source.text.clone(), id: None };
        for rows in file.read()? {
            interrupt.check()?;
            let rows = rows?;
            if !rows.rejects.is_empty() {
                sample.found()?.rejects.extend(rows.rejects.into_iter().map(|reject| (path.to_owned(), reject)));
            }
            let texts = rows.batch.column_by_name("text").ok_or_else(|| Error::internal("the column `text` is missing"))?;
            for text in texts.as_string_view().iter().flatten() {
                for window in cut(text, self.window_bytes as usize).map(|range| &text[range]) {
                    sample.windows.fetch_add(1, Ordering::Relaxed);
                    sample.offer(priority.bits(window.as_bytes()), window)?;
                }
            }
            progress.advance(rows.consumed);
        }
        Ok(())
    }
}

/// What all readers have found together, so that memory does not grow with them.
struct Sample {
    found: Mutex<Found>,
    /// The highest priority that can still enter; falls, so that readers seldom meet at the lock.
    highest: AtomicU64,
    windows: AtomicU64,
}

#[derive(Default)]
struct Found {
    /// The windows of lowest priority, at most [`WINDOWS`].
    lowest: BinaryHeap<(u64, String)>,
    rejects: Vec<(PathBuf, Reject)>,
}

impl Sample {
    fn new() -> Sample {
        Sample { found: Mutex::default(), highest: AtomicU64::new(u64::MAX), windows: AtomicU64::new(0) }
    }

    fn found(&self) -> Result<MutexGuard<'_, Found>> {
        self.found.lock().map_err(|_| Error::internal("a reader panicked"))
    }

    fn offer(&self, priority: u64, window: &str) -> Result<()> {
        if priority > self.highest.load(Ordering::Relaxed) {
            return Ok(());
        }
        let lowest = &mut self.found()?.lowest;
        lowest.push((priority, window.to_owned()));
        if lowest.len() > WINDOWS {
            lowest.pop();
            self.highest.store(lowest.peek().map_or(u64::MAX, |(highest, _)| *highest), Ordering::Relaxed);
        }
        Ok(())
    }
}
