//! How well a model predicts held-out documents.
//!
//! Every token of each document is scored once, given what precedes it in the document, from the start token on; what a
//! row holds, and what becomes of documents longer than the context, is in `documents::scoring_rows`.

use std::path::Path;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::progress::{Interrupt, Progress, Silent};
use trommel_core::tokenizer;
use trommel_kernels::panels::Precision;

use crate::batch::Batch;
use crate::checkpoint;
use crate::documents::{check_tokens, scoring_rows, tokenize};
use crate::engine::Engine;

/// Positions that are scored at once.
const POSITIONS: usize = 4096;

/// The quality of a model on a set of documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// `e` to the mean negative log-likelihood per token.
    pub perplexity: f64,
    /// Standard error of the perplexity over documents; zero for a single document.
    pub stderr: f64,
    /// Mean negative log-likelihood per token, in nats.
    pub nll_per_token: f64,
    /// Negative log-likelihood in bits per UTF-8 byte of text, which does not depend on the tokenizer.
    pub bits_per_byte: f64,
    /// Tokens that were scored.
    pub tokens: u64,
    /// UTF-8 bytes of the documents.
    pub bytes: u64,
    /// Documents with at least one token.
    pub documents: u64,
}

/// The score of one document.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    /// Sum of the negative log-likelihoods of its tokens, in nats.
    pub nll: f64,
    /// Its tokens.
    pub tokens: u64,
}

/// Evaluates the model in `checkpoint` on `documents`, with sequences of `context` tokens.
pub fn evaluate(
    checkpoint: &Path,
    documents: &[String],
    context: usize,
    device: &Device,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<Evaluation> {
    let Opened { mut engine, tokens, end_of_text } = open(checkpoint, documents, context, device)?;
    engine.config().check_plain().map_err(|e| e.file(checkpoint.display()))?;
    progress.begin("evaluate", Some(tokens.iter().map(|tokens| tokens.len() as u64).sum()), "tokens");
    let scores = scores(&mut engine, &tokens, end_of_text, context, progress, interrupt)?;
    progress.end();
    summarize(&scores, documents.iter().map(|document| document.len() as u64).sum()).map_err(|e| e.file(checkpoint.display()))
}

/// The mean loss on `documents`, in nats per token, of each expert of the projected network in `checkpoint`.
pub fn expert_losses(
    checkpoint: &Path,
    documents: &[String],
    context: usize,
    device: &Device,
    interrupt: &Interrupt,
) -> Result<Vec<f64>> {
    let Opened { mut engine, tokens, end_of_text } = open(checkpoint, documents, context, device)?;
    let experts = engine.config().experts();
    let loss = |expert: usize| {
        engine.select_expert(expert)?;
        scores(&mut engine, &tokens, end_of_text, context, &Silent, interrupt).map(|scores| mean_nll(&scores))
    };
    (0..experts).map(loss).collect()
}

/// A model, and documents as its tokens.
struct Opened {
    engine: Engine,
    tokens: Vec<Vec<u32>>,
    end_of_text: u32,
}

fn open(checkpoint: &Path, documents: &[String], context: usize, device: &Device) -> Result<Opened> {
    let model = checkpoint::read_model(checkpoint)?;
    let tokens = tokenize(&tokenizer::read(&checkpoint::tokenizer(checkpoint))?, documents)?;
    if context == 0 || context > model.config.context {
        let message = format!("a context of {context} tokens is outside the model's 1 to {}", model.config.context);
        return Err(Error::config(message).file(checkpoint.display()));
    }
    check_tokens(tokens.iter().flatten(), model.config.vocab).map_err(|e| e.file(checkpoint.display()))?;
    let engine = Engine::new(&model.config, model.parameters, device, Precision::F32)?;
    Ok(Opened { engine, tokens, end_of_text: model.end_of_text })
}

/// The score of each document, given as tokens.
pub fn scores(
    engine: &mut Engine,
    documents: &[Vec<u32>],
    end_of_text: u32,
    context: usize,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<Vec<Score>> {
    let (rows, owners) = scoring_rows(documents, end_of_text, context);
    let mut scores = vec![Score::default(); documents.len()];
    let step = (POSITIONS / context).max(1) * context;
    for from in (0..rows.tokens.len()).step_by(step) {
        interrupt.check()?;
        let at = from..rows.tokens.len().min(from + step);
        let batch = Batch {
            time: context,
            tokens: rows.tokens[at.clone()].to_vec(),
            targets: rows.targets[at.clone()].to_vec(),
            starts: rows.starts[at.clone()].to_vec(),
        };
        for (loss, owner) in engine.losses(&batch)?.iter().zip(&owners[at]) {
            if let Some(document) = owner {
                scores[*document].nll += f64::from(*loss);
                scores[*document].tokens += 1;
            }
        }
        progress.advance(batch.targets_len() as u64);
    }
    Ok(scores)
}

/// The mean negative log-likelihood per token over all documents, in nats.
pub fn mean_nll(scores: &[Score]) -> f64 {
    scores.iter().map(|score| score.nll).sum::<f64>() / scores.iter().map(|score| score.tokens).sum::<u64>() as f64
}

/// Puts scores together; `bytes` is the length of all documents.
///
/// The mean per token is a ratio of sums over documents, `R = sum L_i / sum n_i`, with loss `L_i` and length `n_i`. By the
/// delta method its variance is about `D / (D - 1) * sum (L_i - R n_i)^2 / (sum n_i)^2` for `D` documents, and the standard
/// error of `e^R` is `e^R` times the root of that. [Cochran, Sampling Techniques, 6.4]
fn summarize(scores: &[Score], bytes: u64) -> Result<Evaluation> {
    let tokens: u64 = scores.iter().map(|score| score.tokens).sum();
    let documents = scores.iter().filter(|score| score.tokens > 0).count();
    if tokens == 0 {
        return Err(Error::data("there are no documents to evaluate on").hint("check the domain's `test` files"));
    }
    let mean = mean_nll(scores);
    if !mean.is_finite() {
        let error = Error::data(format!("the model's loss is {mean}: its weights give no probabilities"));
        return Err(error.hint("take an earlier checkpoint"));
    }
    let squares: f64 = scores.iter().map(|score| (score.nll - mean * score.tokens as f64).powi(2)).sum();
    let spread = if documents > 1 { documents as f64 / (documents - 1) as f64 * squares } else { 0.0 };
    Ok(Evaluation {
        perplexity: mean.exp(),
        stderr: mean.exp() * spread.sqrt() / tokens as f64,
        nll_per_token: mean,
        bits_per_byte: mean * tokens as f64 / std::f64::consts::LN_2 / bytes as f64,
        tokens,
        bytes,
        documents: documents as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;
    use crate::parameters::Layout;

    /// One forward pass per document prefix, and the last position's logits.
    fn naive(engine: &mut Engine, document: &[u32], end_of_text: u32, context: usize) -> f64 {
        let mut nll = 0.0;
        for (i, token) in document.iter().enumerate() {
            let first = i / context * context;
            let mut tokens = vec![if first == 0 { end_of_text } else { document[first - 1] }];
            tokens.extend_from_slice(&document[first..i]);
            let batch = Batch { time: tokens.len(), targets: tokens.clone(), starts: vec![0; tokens.len()], tokens };
            let logits = engine.logits(&batch).unwrap();
            let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            nll += sum.ln() - f64::from(logits[*token as usize]);
        }
        nll
    }

    #[test]
    fn packed_scores_equal_one_document_at_a_time() {
        let config = preset("slm-1m", 40).unwrap();
        let parameters = Layout::new(&config).initial(5).iter().map(|p| p * 2.0).collect();
        let mut engine = Engine::new(&config, parameters, &Device::Cpu, Precision::F32).unwrap();
        let documents: Vec<Vec<u32>> = [3, 1, 19, 0, 8].map(|n| (0..n).map(|i| (i * i + n) % 39 + 1).collect()).to_vec();
        let scores = scores(&mut engine, &documents, 0, 8, &Silent, &Interrupt::default()).unwrap();
        for (score, document) in scores.iter().zip(&documents) {
            let expected = naive(&mut engine, document, 0, 8);
            assert!((score.nll - expected).abs() < 1e-4 * (1.0 + expected), "{} for {expected}", score.nll);
            assert_eq!(score.tokens, document.len() as u64);
        }
    }

    #[test]
    fn the_summary_can_be_checked_by_hand() {
        let scores = [Score { nll: 2.0, tokens: 2 }, Score { nll: 6.0, tokens: 2 }, Score::default()];
        let evaluation = summarize(&scores, 16).unwrap();
        assert_eq!((evaluation.nll_per_token, evaluation.documents, evaluation.tokens), (2.0, 2, 4));
        // Residuals are -2 and 2: variance 2/1 * 8 / 16 = 1.
        assert!((evaluation.stderr / evaluation.perplexity - 1.0).abs() < 1e-12);
        assert!((evaluation.bits_per_byte - 0.5 / std::f64::consts::LN_2).abs() < 1e-12);
        assert!(summarize(&[Score::default()], 0).is_err());
    }
}
