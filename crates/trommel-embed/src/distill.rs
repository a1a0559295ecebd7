//! From a sentence encoder to a static table, without any training text.
//!
//! The recipe is Model2Vec's (Tulkens and van Dongen 2024, <https://github.com/MinishLab/model2vec>):
//!
//! 1. each token of the vocabulary goes through the encoder by itself, as `[CLS] token [SEP]`;
//! 2. principal component analysis turns the vectors so that the first coordinates carry the most, and keeps those;
//! 3. each vector is multiplied by a weight that falls with the token's frequency, so that the mean over a text
//!    follows its content words. The vocabulary of a BERT model is sorted by frequency, which gives the rank.
//!
//! We deviate in five points; `data/models/README.md` has the measurements. (a) Of the three states in step 1 we take the
//! token's own, not the mean. (b) The coordinates of step 2 are divided by the square root of their standard deviation, so
//! that the few strongest directions do not decide every distance. (c) The block of single characters at the head of
//! the vocabulary is not taken for its most frequent words. (d) Vectors are stored as 8-bit integers with one scale per
//! token. (e) Tokens that no text can contain, such as `[unused1]` and `[CLS]`, are left out of table and tokenizer.

use std::path::Path;

use ndarray::Array2;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use trommel_core::error::{Error, Result};
use trommel_core::progress::Progress;
use trommel_core::storage::refuse_existing;
use trommel_kernels::panels::Precision;

use crate::Embedder;
use crate::model_folder::TOKENIZER;
use crate::principal::Principal;
use crate::sentence_encoder::{SentenceEncoder, unknown_token};
use crate::static_table::{Counts, table_bytes, write_table};

/// The dimensions of the table that the binary carries.
pub const DEFAULT_DIMENSIONS: usize = 240;

/// Tokens that go through the encoder together.
const BATCH: usize = 64;

/// The `a` of smooth inverse frequency: a token of this probability has weight 1/2.
const SIF: f64 = 1e-4;

/// A coordinate of standard deviation `s` is divided by `s` to this power: 0 leaves it, 1 makes all alike.
const FLATTENING: f64 = 0.5;

/// What a distillation gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Distilled {
    /// Rows of the table.
    pub tokens: usize,
    /// The length of a vector.
    pub dimensions: usize,
    /// The part of the token vectors' variance that the dimensions carry, 0 to 1.
    pub explained_variance: f64,
    /// Table and tokenizer together.
    pub bytes: u64,
}

/// Writes to `output`, where nothing may be yet, a folder that [`crate::load::load`] reads as a static table, made from the sentence
/// encoder in `encoder`. Equal inputs give equal bytes.
pub fn distill(encoder: &Path, output: &Path, dimensions: usize, progress: &dyn Progress) -> Result<Distilled> {
    refuse_existing(output)?;
    let model = SentenceEncoder::read(encoder, Precision::F32)?;
    if !(1..=model.dimensions()).contains(&dimensions) {
        let message = format!("`dimensions` is {dimensions}, possible is 1 to {}, the encoder's own", model.dimensions());
        return Err(Error::config(message));
    }
    let vocabulary = Vocabulary::of(&model).map_err(|e| e.file(encoder.join(TOKENIZER).display()))?;
    let states = token_states(&model, &vocabulary, progress)?; // (tokens, hidden)
    let principal = Principal::fit(states.view(), dimensions)?;
    let mut vectors = principal.project(states.view()); // (tokens, dimensions)
    for (mut coordinate, deviation) in vectors.columns_mut().into_iter().zip(&principal.deviations) {
        // Without any deviation the coordinate is zero.
        coordinate /= deviation.max(f64::MIN_POSITIVE).powf(FLATTENING);
    }
    for (mut vector, weight) in vectors.rows_mut().into_iter().zip(vocabulary.weights()) {
        vector *= weight;
    }
    let table = table_bytes(vectors.view(), vocabulary.unknown, Counts::Linear)?;
    let tokenizer = vocabulary.tokenizer.to_string().into_bytes();
    write_table(output, &tokenizer, &table)?;
    Ok(Distilled {
        tokens: vocabulary.ids.len(),
        dimensions,
        explained_variance: principal.explained,
        bytes: (table.len() + tokenizer.len()) as u64,
    })
}

/// The tokens that the table keeps, by rank, which is their id in the new tokenizer.
struct Vocabulary {
    /// The encoder's id of each.
    ids: Vec<u32>,
    /// Which of them stands for unknown words.
    unknown: Option<usize>,
    /// Where the block of single characters ends and the words begin, sorted by frequency.
    first_word: usize,
    /// `tokenizer.json` with the new ids.
    tokenizer: Value,
}

impl Vocabulary {
    fn of(model: &SentenceEncoder) -> Result<Self> {
        let tokenizer = model.tokenizer();
        let damaged = |e| Error::data("the tokenizer cannot be written").source(e);
        let text = tokenizer.to_string(false).map_err(damaged)?;
        let mut json: Value = serde_json::from_str(&text).map_err(|e| Error::internal("the tokenizer is no JSON").source(e))?;
        if json["model"]["type"] != "WordPiece" {
            let message = format!("the tokenizer's model is {}, supported is \"WordPiece\"", json["model"]["type"]);
            return Err(Error::config(message));
        }
        let unknown = unknown_token(tokenizer);
        let special = tokenizer.get_added_tokens_decoder();
        let mut tokens: Vec<(u32, String)> = tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.retain(|(id, token)| Some(*id) == unknown || !(special.contains_key(id) || token.starts_with("[unused")));
        tokens.sort();
        let is_word = |(_, token): &(u32, String)| token.chars().count() > 1 && !token.starts_with(['[', '#']);
        let vocabulary: Map<String, Value> =
            tokens.iter().enumerate().map(|(rank, (_, token))| (token.clone(), json!(rank))).collect();
        json["model"]["vocab"] = Value::Object(vocabulary);
        json["added_tokens"] = json!([]);
        json["post_processor"] = Value::Null;
        json["truncation"] = Value::Null;
        json["padding"] = Value::Null;
        Ok(Vocabulary {
            unknown: tokens.iter().position(|(id, _)| Some(*id) == unknown),
            first_word: tokens.iter().position(is_word).unwrap_or(0),
            ids: tokens.into_iter().map(|(id, _)| id).collect(),
            tokenizer: json,
        })
    }

    /// The weight of each token: smooth inverse frequency, `a / (a + p)` [Arora et al. 2017, section 3], where Zipf's law
    /// gives the probability `p` from the rank, `p = 1 / (rank + 1) / sum over all tokens` [Model2Vec]. Ours counts ranks
    /// from the first word; whatever stands before it has the first word's weight.
    fn weights(&self) -> impl Iterator<Item = f64> {
        let tokens = self.ids.len();
        let harmonic: f64 = (2..tokens + 2).map(|n| 1.0 / n as f64).sum();
        (0..tokens).map(move |token| {
            let rank = (token + 1).saturating_sub(self.first_word).max(1);
            let probability = 1.0 / ((rank + 1) as f64 * harmonic);
            SIF / (SIF + probability)
        })
    }
}

/// The encoder's state of each token, between `[CLS]` and `[SEP]`: `(tokens, hidden)`.
fn token_states(model: &SentenceEncoder, vocabulary: &Vocabulary, progress: &dyn Progress) -> Result<Array2<f64>> {
    let frame = model.tokenizer().encode_fast("", true).map_err(|e| Error::data("cannot tokenize a text").source(e))?;
    let &[start, end] = frame.get_ids() else {
        return Err(Error::config("the tokenizer does not frame a text as `[CLS] text [SEP]`"));
    };
    progress.begin("distil", Some(vocabulary.ids.len() as u64), "tokens");
    let hidden = model.dimensions();
    let batches: Vec<Vec<f32>> = vocabulary
        .ids
        .par_chunks(BATCH)
        .map_init(
            || model.scratch(),
            |scratch, ids| {
                let state = |id: &u32| model.states(&[start, *id, end], scratch)[hidden..2 * hidden].to_vec();
                let states = ids.iter().flat_map(state).collect();
                progress.advance(ids.len() as u64);
                states
            },
        )
        .collect();
    progress.end();
    let states: Vec<f64> = batches.iter().flatten().map(|x| f64::from(*x)).collect();
    Array2::from_shape_vec((vocabulary.ids.len(), hidden), states)
        .map_err(|e| Error::internal("token vectors are missing").source(e))
}
