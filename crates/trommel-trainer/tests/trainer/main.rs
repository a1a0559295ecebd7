//! The trainer as its callers see it.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

/// Small folders of shards, tokenizers and plans.
mod fixtures;
/// Gradients of the whole model against the tape and finite differences, and what the mask hides.
mod gradients;
/// The passes of a GPU.
mod gpu;
/// Low-rank adapters.
mod lora;
/// Projected networks, and training on clusters.
mod projected;
/// Runs that are cut short, repeated, damaged.
mod runs;
/// Fine-tuning, evaluation and generation on a model of a toy language.
mod specialise;
