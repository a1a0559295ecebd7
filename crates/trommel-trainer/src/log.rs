//! `log.jsonl`: one line per training step.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::storage::{write_bytes, write_error};

/// One training step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Steps done, from 1.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean negative log-likelihood of the step's tokens, in nats, before the step.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Euclidean norm of the gradient before it was cut.
    pub gradient_norm: f64,
    /// Tokens per second of this step.
    pub tokens_per_second: f64,
    /// Held-out loss after the step, in nats per token, where it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
}

/// The open log of a run.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens `folder/log.jsonl`. Lines of steps beyond `step`, which a killed run left after its last checkpoint, and a
    /// torn last line are removed first.
    pub fn open(folder: &Path, step: u64) -> Result<Log> {
        let path = folder.join("log.jsonl");
        let old = fs::read_to_string(&path).unwrap_or_default();
        let parsed = |line: &&str| serde_json::from_str::<Entry>(line).is_ok_and(|entry| entry.step <= step);
        let kept: String = old.lines().take_while(parsed).map(|line| format!("{line}\n")).collect();
        write_bytes(&path, kept.as_bytes())?;
        let file = File::options().append(true).open(&path).map_err(|e| write_error(&path, e))?;
        Ok(Log { path, file })
    }

    /// Appends a line.
    pub fn write(&mut self, entry: &Entry) -> Result<()> {
        let line = serde_json::to_string(entry).map_err(|e| Error::internal("a log line cannot be written").source(e))?;
        writeln!(self.file, "{line}").map_err(|e| write_error(&self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_checkpoint_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let entry = |step| Entry {
            step,
            tokens: step * 10,
            loss: 1.0,
            learning_rate: 0.1,
            gradient_norm: 1.0,
            tokens_per_second: 5.0,
            validation_loss: None,
        };
        let mut log = Log::open(folder.path(), 0).unwrap();
        (1..=5).for_each(|step| log.write(&entry(step)).unwrap());
        let mut log = Log::open(folder.path(), 3).unwrap();
        log.write(&entry(4)).unwrap();
        let text = fs::read_to_string(folder.path().join("log.jsonl")).unwrap();
        let steps: Vec<u64> = text.lines().map(|line| serde_json::from_str::<Entry>(line).unwrap().step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }
}
