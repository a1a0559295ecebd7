//! What a long job tells the person who waits for it, and how that person stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Where a job reports to: progress bars on a terminal, plain lines in a log, nothing in tests.
pub trait Progress: Send + Sync {
    /// A step of work begins. `total` is in `unit` (such as `bytes`, `tokens`, `steps`); `None` if it is not known.
    fn begin(&self, name: &str, total: Option<u64>, unit: &str);
    /// `n` more units of the current step are done.
    fn advance(&self, n: u64);
    /// A short text beside the bar, such as the current loss.
    fn note(&self, text: &str);
    /// The current step is done.
    fn end(&self);
    /// One line that stays, such as a warning or a figure.
    fn line(&self, text: &str);
}

/// A [`Progress`] that says nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: Option<u64>, _: &str) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn end(&self) {}
    fn line(&self, _: &str) {}
}

/// The request to stop, set by Ctrl-C and asked for between batches.
#[derive(Debug, Default, Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Asks every job that holds a clone to stop at its next safe point.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// An [`Error::interrupted`] once a stop was asked for.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(Error::interrupted()) } else { Ok(()) }
    }
}
