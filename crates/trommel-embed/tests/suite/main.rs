//! The embedders seen from outside.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

/// What `Embedder` promises, for both kinds of model.
mod contract;
/// From the tiny BERT to a static table.
mod distill;
/// Texts and folders that nobody should pass, but somebody will.
mod hostile;
/// all-MiniLM-L6-v2 against sentence-transformers' own output.
mod real_model;
/// A generated BERT of a few kilobytes in a sentence-transformers folder.
mod tiny_bert;
