//! Text from a model, one token at a time.

use std::path::Path;

use candle_core::Device;
use trommel_core::error::{Error, Result};
use trommel_core::progress::Interrupt;
use trommel_core::seed::Stream;
use trommel_core::tokenizer;
use trommel_kernels::panels::Precision;

use crate::batch::Batch;
use crate::checkpoint;
use crate::documents::check_tokens;
use crate::engine::Engine;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Tokens to add at most; a document may end before.
    pub max_tokens: usize,
    /// Logits are divided by this: 0 takes the likeliest token, 1 follows the model.
    pub temperature: f64,
    /// Only this many of the likeliest tokens are considered; `None` considers all.
    pub top_k: Option<usize>,
    /// Seed of the choices.
    pub seed: u64,
}

/// Continues `prompt` with the model in `checkpoint`, and returns what was added.
///
/// Each token takes one pass over the last `context` tokens, which is quick enough for models of this size.
pub fn generate(
    checkpoint: &Path,
    prompt: &str,
    sampling: &Sampling,
    device: &Device,
    interrupt: &Interrupt,
) -> Result<String> {
    let model = checkpoint::read_model(checkpoint)?;
    model.config.check_plain().map_err(|e| e.file(checkpoint.display()))?;
    let tokenizer = tokenizer::read(&checkpoint::tokenizer(checkpoint))?;
    let failed = |e| Error::data("the text cannot be tokenized").source(e);
    let mut tokens = vec![model.end_of_text];
    tokens.extend_from_slice(tokenizer.encode_fast(prompt, false).map_err(failed)?.get_ids());
    check_tokens(tokens.iter(), model.config.vocab).map_err(|e| e.file(checkpoint.display()))?;
    let prompt_len = tokens.len();
    let context = model.config.context;
    let mut engine = Engine::new(&model.config, model.parameters, device, Precision::F32)?;
    let choices = Stream::new(sampling.seed, "generate");
    while tokens.len() - prompt_len < sampling.max_tokens {
        interrupt.check()?;
        let seen = tokens[tokens.len().saturating_sub(context)..].to_vec();
        let batch = Batch { time: seen.len(), starts: vec![0; seen.len()], targets: seen.clone(), tokens: seen };
        let logits = engine.logits(&batch)?;
        if logits.iter().any(|logit| !logit.is_finite()) {
            let error = Error::data("the model's weights give no probabilities").file(checkpoint.display());
            return Err(error.hint("take an earlier checkpoint"));
        }
        let token = choose(&logits, sampling, choices.uniform(&tokens.len().to_le_bytes()));
        if token == model.end_of_text {
            break;
        }
        tokens.push(token);
    }
    tokenizer.decode(&tokens[prompt_len..], true).map_err(failed)
}

/// The token at the share `uniform`, in `[0, 1)`, of the distribution that `sampling` makes of the logits.
fn choose(logits: &[f32], sampling: &Sampling, uniform: f64) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let considered = if sampling.temperature > 0.0 { sampling.top_k.unwrap_or(logits.len()).clamp(1, logits.len()) } else { 1 };
    order.truncate(considered);
    let largest = f64::from(logits[order[0] as usize]);
    let odds =
        |token: &u32| ((f64::from(logits[*token as usize]) - largest) / sampling.temperature.max(f64::MIN_POSITIVE)).exp();
    let mut left = uniform * order.iter().map(odds).sum::<f64>();
    for token in &order {
        left -= odds(token);
        if left < 0.0 {
            return *token;
        }
    }
    order[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_follow_the_distribution() {
        let sampling = Sampling { max_tokens: 1, temperature: 1.0, top_k: Some(2), seed: 0 };
        let logits = [0.0, 3f32.ln(), -1.0, f32::NEG_INFINITY];
        assert_eq!([0.0, 0.74, 0.76, 0.999].map(|u| choose(&logits, &sampling, u)), [1, 1, 0, 0]);
        let greedy = Sampling { temperature: 0.0, ..sampling.clone() };
        assert_eq!([0.0, 0.999].map(|u| choose(&logits, &greedy, u)), [1, 1]);
        let all = Sampling { top_k: None, ..sampling };
        assert_eq!(choose(&logits, &all, 0.999), 2);
    }
}
