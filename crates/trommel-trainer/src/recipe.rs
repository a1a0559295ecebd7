//! How a model is trained: optimizer, schedule and batch, as named functions of model size and token budget.
//!
//! A pipeline file names a model and a budget; everything else follows from them here, is printed at the start and kept
//! in the checkpoint.

use serde::{Deserialize, Serialize};
use trommel_kernels::panels::Precision;

use crate::model::Config;

/// The course of the learning rate after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine down to a tenth of the peak.
    Cosine,
    /// The peak, then a straight line down to zero over the last fifth of the steps. [Hu et al., arXiv 2404.06395]
    Wsd,
}

/// The share of the peak that [`Schedule::Cosine`] ends at.
const COSINE_END: f64 = 0.1;
/// The share of the steps over which [`Schedule::Wsd`] decays.
const WSD_DECAY: f64 = 0.2;

/// The settings of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Tokens per step, rounded up to whole sequences.
    pub batch_tokens: usize,
    /// The peak of the learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises in a straight line to its peak.
    pub warmup_steps: u64,
    /// Its course afterwards.
    pub schedule: Schedule,
    /// The gradient's norm is cut to this. The paper clips at 5.0, at a learning rate of 1e-4. [PE 3]
    pub clip: f64,
    /// Weight decay of matrices; gains have none.
    pub decay: f64,
    /// Decay of `AdamW`'s first moment.
    pub beta1: f64,
    /// Decay of `AdamW`'s second moment.
    pub beta2: f64,
    /// Added to the root of `AdamW`'s second moment.
    pub epsilon: f64,
    /// Of the products of weights and rows; weights, moments and sums are `f32`. On a GPU, of all rows that products read or write.
    pub precision: Precision,
}

/// The peak learning rate of a model: `0.014 / sqrt(width)`, which is 1.2e-3 at the width 128 and 5e-4 at 768, where GPT-3
/// used 6e-4. In a sweep of `slm-1m` over 600,000 bytes of text, 0.8e-3, 1.6e-3 and 3.2e-3 gave held-out losses of 2.16,
/// 2.15 and 2.39 nats per byte.
pub fn learning_rate(model: &Config) -> f64 {
    0.014 / (model.width as f64).sqrt()
}

/// Tokens per step: the power of two nearest to `sqrt(tokens) / 4`, between 512 and 524,288. So 1.5M tokens are trained on
/// in 2,930 steps and 1B tokens in 122,000. With `slm-1m` and 800,000 tokens, steps of 2,048, 1,024 and 512 tokens ended at
/// losses of 5.05, 4.91 and 4.37 nats per token.
pub fn batch_tokens(tokens: u64) -> usize {
    let power = (0.25 * (tokens as f64).sqrt()).log2().round();
    1 << (power as u32).clamp(9, 19)
}

/// Steps of warm-up: a twentieth of all, at most 1,000, which is the paper's number. [PE 3]
pub fn warmup_steps(steps: u64) -> u64 {
    (steps / 20).clamp(1, 1_000)
}

impl Recipe {
    /// The recipe to train `model` from scratch on `tokens` tokens.
    pub fn pretraining(model: &Config, tokens: u64) -> Recipe {
        let batch_tokens = batch_tokens(tokens);
        Recipe {
            batch_tokens,
            learning_rate: learning_rate(model),
            warmup_steps: warmup_steps(tokens.div_ceil(batch_tokens as u64)),
            schedule: Schedule::Cosine,
            clip: 1.0,
            decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            precision: Precision::Bf16,
        }
    }

    /// The recipe to fine-tune a pretrained `model` on up to `tokens` tokens: that of pretraining, at `multiplier` times its rate.
    /// The paper takes a third [PE 3]. With `slm-1m`, after 1.5M generic tokens, a third, the whole and twice the rate ended 1M
    /// tokens of a domain at 4.15, 3.93 and 3.87 nats per token; with `slm-600k`, after 4M, a third ended lower than the whole on two of three
    /// domains and level on the third.
    pub fn finetuning(model: &Config, tokens: u64, multiplier: f64) -> Recipe {
        let recipe = Self::pretraining(model, tokens);
        Recipe { learning_rate: multiplier * recipe.learning_rate, ..recipe }
    }

    /// Sequences per step.
    pub fn sequences(&self, context: usize) -> usize {
        self.batch_tokens.div_ceil(context)
    }

    /// Steps that a budget of `tokens` tokens takes; the last one goes past it, if need be.
    pub fn steps(&self, tokens: u64, context: usize) -> u64 {
        tokens.div_ceil((self.sequences(context) * context) as u64)
    }

    /// The step at which [`Schedule::Wsd`] begins to decay, of `steps`: where a trunk ends.
    pub fn decay_begins(steps: u64) -> u64 {
        steps - (WSD_DECAY * steps as f64) as u64
    }

    /// The learning rate of step `step`, from 0, of `steps`.
    pub fn rate(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let after = (step - self.warmup_steps) as f64 / (steps.saturating_sub(self.warmup_steps).max(1)) as f64;
        self.learning_rate
            * match self.schedule {
                Schedule::Cosine => {
                    COSINE_END + (1.0 - COSINE_END) * 0.5 * (1.0 + (std::f64::consts::PI * after.min(1.0)).cos())
                }
                Schedule::Wsd => {
                    let left = (steps.saturating_sub(step)) as f64 / (WSD_DECAY * steps as f64).max(1.0);
                    left.min(1.0)
                }
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    #[test]
    fn the_rate_rises_and_falls_as_stated() {
        let recipe = Recipe::pretraining(&preset("slm-3m", 4096).unwrap(), 1_500_000);
        assert_eq!((recipe.batch_tokens, recipe.warmup_steps), (512, 146));
        let steps = recipe.steps(1_500_000, 256);
        assert_eq!(steps, 2930);
        assert!((recipe.rate(145, steps) - recipe.learning_rate).abs() < 1e-12);
        assert!(recipe.rate(0, steps) > 0.0 && recipe.rate(0, steps) < recipe.rate(1, steps));
        assert!((recipe.rate(steps, steps) / recipe.learning_rate - 0.1).abs() < 1e-9);

        let wsd = Recipe { schedule: Schedule::Wsd, ..recipe };
        assert_eq!(wsd.rate(500, 1000), wsd.learning_rate);
        assert!((wsd.rate(900, 1000) / wsd.learning_rate - 0.5).abs() < 1e-9);
    }

    #[test]
    fn batches_grow_with_the_root_of_the_budget() {
        assert_eq!([100_000, 1_500_000, 10_000_000, 1_000_000_000].map(batch_tokens), [512, 512, 1024, 8192]);
    }
}
