//! The tokens of a text, word by word where the tokenizer allows it.

use std::collections::HashMap;

use tokenizers::Tokenizer;
use trommel_core::error::{Error, Result};

use crate::sentence_encoder::unknown_token;
use crate::wordpiece::{WordPiece, is_separable};

/// The tokens of words that the tokenizer was asked for before.
pub(crate) type KnownWords = HashMap<String, Vec<u32>>;

/// Words that are remembered until all are forgotten, some 10 MB.
const KNOWN_WORDS_MAX: usize = 1 << 16;
/// Longer words are not likely to come again.
const KNOWN_WORD_BYTES_MAX: usize = 32;
/// What separates words; other white space is left to the tokenizer.
const SEPARATORS: [char; 4] = [' ', '\n', '\t', '\r'];

/// A tokenizer that gives ids and nothing else.
pub(crate) struct TextTokens {
    tokenizer: Tokenizer,
    pub(crate) separable: bool,
    words: Option<WordPiece>,
}

impl TextTokens {
    pub(crate) fn of(tokenizer: Tokenizer) -> Self {
        TextTokens { separable: is_separable(&tokenizer), words: WordPiece::of(&tokenizer), tokenizer }
    }

    /// One more than the largest id.
    pub(crate) fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// The token of unknown words.
    pub(crate) fn unknown(&self) -> Option<usize> {
        unknown_token(&self.tokenizer).map(|id| id as usize)
    }

    /// Appends the tokens of `text` to `ids`. What `known` holds changes the time and nothing else.
    pub(crate) fn encode(&self, text: &str, known: &mut KnownWords, ids: &mut Vec<u32>) -> Result<()> {
        if !self.separable {
            ids.extend(self.tokens(text)?);
            return Ok(());
        }
        for word in text.split(SEPARATORS).filter(|word| !word.is_empty()) {
            if !self.words.as_ref().is_some_and(|words| words.encode(word.as_bytes(), ids)) {
                self.add_word(word, known, ids)?;
            }
        }
        Ok(())
    }

    /// Appends the tokens of a word that [`WordPiece`] does not take.
    fn add_word(&self, word: &str, known: &mut KnownWords, ids: &mut Vec<u32>) -> Result<()> {
        if let Some(found) = known.get(word) {
            ids.extend(found);
            return Ok(());
        }
        let found = self.tokens(word)?;
        ids.extend(&found);
        if known.len() == KNOWN_WORDS_MAX {
            known.clear();
        }
        if word.len() <= KNOWN_WORD_BYTES_MAX {
            known.insert(word.to_string(), found);
        }
        Ok(())
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| Error::data("cannot tokenize a text").source(e))?;
        Ok(encoding.get_ids().to_vec())
    }
}
