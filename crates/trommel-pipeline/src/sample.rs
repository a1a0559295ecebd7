//! Windows of a corpus for what is learnt from text alone.

use std::collections::BinaryHeap;

use arrow::array::AsArray;
use trommel_core::error::{Error, Result};
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::seed::Stream;
use trommel_spec::plan::Source;

use crate::source::SourceFile;
use crate::window::cut;

/// Windows of a corpus.
#[derive(Debug)]
pub struct WindowSample {
    /// Their texts, in pseudo-random order.
    pub texts: Vec<String>,
    /// Windows of the corpus.
    pub windows: u64,
    /// Rows of the corpus that could not be used.
    pub rejected: u64,
}

/// The `count` windows of `source` whose hashes are lowest: the same however the corpus is split. Windows have up to
/// `window_bytes` bytes; all documents are read, and `count` windows are held.
pub fn sample(
    source: &Source,
    window_bytes: u32,
    count: usize,
    seed: u64,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<WindowSample> {
    let priority = Stream::new(seed, "window sample");
    let mut lowest: BinaryHeap<(u64, String)> = BinaryHeap::new();
    let (mut windows, mut rejected) = (0, 0);
    progress.begin("sample", None, "bytes");
    for path in &source.files {
        let file = SourceFile { path: path.clone(), text: source.text.clone(), id: None };
        for rows in file.read()? {
            interrupt.check()?;
            let rows = rows?;
            for reject in rows.rejects {
                progress.line(&format!("{}: row {} is left out: {}", path.display(), reject.row, reject.reason));
                rejected += 1;
            }
            let texts = rows.batch.column_by_name("text").ok_or_else(|| Error::internal("the column `text` is missing"))?;
            for text in texts.as_string_view().iter().flatten() {
                for window in cut(text, window_bytes as usize).map(|range| &text[range]) {
                    windows += 1;
                    let priority = priority.bits(window.as_bytes());
                    if lowest.len() == count && lowest.peek().is_some_and(|(highest, _)| *highest <= priority) {
                        continue;
                    }
                    lowest.push((priority, window.to_owned()));
                    if lowest.len() > count {
                        lowest.pop();
                    }
                }
            }
            progress.advance(rows.consumed);
        }
    }
    progress.end();
    Ok(WindowSample { texts: lowest.into_sorted_vec().into_iter().map(|(_, text)| text).collect(), windows, rejected })
}
