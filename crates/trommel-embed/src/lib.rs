//! Text to vectors: the static table, the sentence encoder, and how a table comes from an encoder or from a corpus.
//!
//! Both kinds stand behind `Embedder`. The static table is a lookup and a mean, fast enough for a trillion tokens; the
//! sentence encoder reads whole sentences, is some hundred times slower, and is where the table's vectors come from.

use trommel_core::error::Result;
use trommel_core::key::Key;

/// The encoder's forward pass.
mod bert;
/// From a sentence encoder to a static table.
pub mod distill;
/// What a sentence-transformers folder says about its model, checked against what we can run.
mod encoder_config;
/// The folder or name of a model, as a user writes it, to the model.
pub mod load;
/// From a corpus to a static table.
pub mod lsa;
/// The files of a model folder, each error naming the file.
mod model_folder;
/// Principal component analysis.
mod principal;
/// A BERT-family sentence-transformers model.
pub mod sentence_encoder;
/// A table of token vectors; a text is the mean of its tokens.
pub mod static_table;
/// The ids of a text's tokens.
mod text_tokens;
/// Tokens of plain words.
mod wordpiece;

/// Turns texts into vectors of unit length whose nearness follows meaning.
pub trait Embedder: Send + Sync {
    /// The length of a vector.
    fn dimensions(&self) -> usize;

    /// The content key of the model: equal keys give equal vectors.
    fn key(&self) -> Key;

    /// Writes one vector per text into `vectors`, shaped `(texts, dimensions)`, each of L2 norm 1 (all zero for a text
    /// without a known token). A text's vector does not depend on the other texts in the call.
    fn embed(&self, texts: &[&str], vectors: &mut [f32]) -> Result<()>;
}

/// Scales `vector` to L2 norm 1; a zero vector stays zero.
pub(crate) fn normalize(vector: &mut [f32]) {
    let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if norm > 0.0 {
        let scale = (1.0 / norm) as f32;
        vector.iter_mut().for_each(|x| *x *= scale);
    }
}

/// A caller's buffer of another shape than `(texts, dimensions)` is a bug of the caller.
pub(crate) fn assert_shape(texts: &[&str], dimensions: usize, vectors: &[f32]) {
    assert_eq!(vectors.len(), texts.len() * dimensions, "`vectors` must be shaped (texts, dimensions)");
}
