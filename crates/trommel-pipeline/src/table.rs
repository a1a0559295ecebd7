//! A static embedding table that is learnt from the corpus itself: a sample of its windows, and latent semantic analysis of it.

use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};

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
    /// Writes the folder `out`, which [`trommel_embed::load::load`] reads. Reads all documents; a table is the same however they
    /// are split into files. `progress` advances by the bytes read.
    pub fn run(&self, out: &Path, progress: &dyn Progress, interrupt: &Interrupt) -> Result<Learnt> {
        let files = self.source.files.par_iter().map(|path| self.sample(path, progress, interrupt));
        let sample = files.try_reduce(Sample::default, |a, b| Ok(a.join(b)))?;
        let texts: Vec<String> = sample.lowest.into_sorted_vec().into_iter().map(|(_, text)| text).collect();
        let fitted = lsa::fit(&texts, out, self.dimensions as usize, self.seed)?;
        Ok(Learnt { fitted, windows: sample.windows, rejects: sample.rejects })
    }

    fn sample(&self, path: &Path, progress: &dyn Progress, interrupt: &Interrupt) -> Result<Sample> {
        let priority = Stream::new(self.seed, "window sample");
        let file = SourceFile { path: path.to_owned(), text: self.source.text.clone(), id: None };
        let mut sample = Sample::default();
        for rows in file.read()? {
            interrupt.check()?;
            let rows = rows?;
            sample.rejects.extend(rows.rejects.into_iter().map(|reject| (path.to_owned(), reject)));
            let texts = rows.batch.column_by_name("text").ok_or_else(|| Error::internal("the column `text` is missing"))?;
            for text in texts.as_string_view().iter().flatten() {
                for window in cut(text, self.window_bytes as usize).map(|range| &text[range]) {
                    sample.windows += 1;
                    let priority = priority.bits(window.as_bytes());
                    if sample.lowest.len() < WINDOWS || sample.lowest.peek().is_some_and(|(highest, _)| priority < *highest) {
                        sample.add(priority, window.to_owned());
                    }
                }
            }
            progress.advance(rows.consumed);
        }
        Ok(sample)
    }
}

/// The windows of lowest priority among those seen, at most [`WINDOWS`].
#[derive(Default)]
struct Sample {
    lowest: BinaryHeap<(u64, String)>,
    windows: u64,
    rejects: Vec<(PathBuf, Reject)>,
}

impl Sample {
    fn add(&mut self, priority: u64, window: String) {
        self.lowest.push((priority, window));
        if self.lowest.len() > WINDOWS {
            self.lowest.pop();
        }
    }

    fn join(mut self, other: Sample) -> Sample {
        other.lowest.into_iter().for_each(|(priority, window)| self.add(priority, window));
        self.windows += other.windows;
        self.rejects.extend(other.rejects);
        self
    }
}
