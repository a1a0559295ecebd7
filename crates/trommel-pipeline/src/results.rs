//! The table `results`: what the compared models reached, and what they cost. The trainer's figures, kept beside our tables.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, UInt64Array};
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_spec::plan::Plan;

use crate::catalog;
use crate::engine::write_parquet;
use crate::outputs::Outputs;

/// One row of the comparison. A contract.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The domain.
    pub domain: String,
    /// What the model is pretrained on.
    pub method: String,
    /// What tells models of one method apart, such as `level-2 mixture`; left out if there is one only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
    /// The seed of its training.
    pub seed: u64,
    /// `pretrained` or `finetuned`.
    pub stage: String,
    /// On the domain's held-out documents.
    pub perplexity: f64,
    /// Standard error of the perplexity over documents.
    pub stderr: f64,
    /// The same loss per byte of text.
    pub bits_per_byte: f64,
    /// Tokens that it was trained on, with the part that all domains share; so are the next two.
    pub train_tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// Floating-point operations of training.
    pub flops: f64,
    /// The part of the cost that all domains share, and is paid once. [PE eq. 1]
    pub generic: Cost,
}

/// What a model took to train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Tokens that it was trained on.
    pub tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// Floating-point operations of training.
    pub flops: f64,
}

impl std::ops::Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        let (tokens, seconds) = (self.tokens + other.tokens, self.seconds + other.seconds);
        Cost { tokens, seconds, flops: self.flops + other.flops }
    }
}

/// Keeps the outcomes of a run, and lists them in its catalog.
pub fn write(plan: &Plan, outputs: &Outputs, outcomes: &[Outcome]) -> Result<()> {
    let batch = batch(outcomes)?;
    write_parquet(&outputs.results, &batch.schema(), std::iter::once(Ok(batch)))?;
    catalog::write(plan, outputs)
}

/// The rows of the table.
pub(crate) fn batch(outcomes: &[Outcome]) -> Result<RecordBatch> {
    let text = |get: fn(&Outcome) -> &str| -> ArrayRef { Arc::new(StringArray::from_iter_values(outcomes.iter().map(get))) };
    // Signed, as all numbers that people calculate with; a seed is none.
    let count = |get: fn(&Outcome) -> u64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(outcomes.iter().map(|o| get(o) as i64)))
    };
    let number = |get: fn(&Outcome) -> f64| -> ArrayRef { Arc::new(Float64Array::from_iter_values(outcomes.iter().map(get))) };
    let columns = [
        ("domain", text(|o| &o.domain)),
        ("method", text(|o| &o.method)),
        ("variant", text(|o| &o.variant)),
        ("seed", Arc::new(UInt64Array::from_iter_values(outcomes.iter().map(|o| o.seed)))),
        ("stage", text(|o| &o.stage)),
        ("perplexity", number(|o| o.perplexity)),
        ("stderr", number(|o| o.stderr)),
        ("bits_per_byte", number(|o| o.bits_per_byte)),
        ("train_tokens", count(|o| o.train_tokens)),
        ("seconds", number(|o| o.seconds)),
        ("flops", number(|o| o.flops)),
        ("generic_tokens", count(|o| o.generic.tokens)),
        ("generic_seconds", number(|o| o.generic.seconds)),
        ("generic_flops", number(|o| o.generic.flops)),
    ];
    RecordBatch::try_from_iter(columns).map_err(|e| Error::internal("no table of results").source(e))
}
