//! The tokens of a text, word by word where the tokenizer allows it.

use std::collections::HashMap;

use tokenizers::{PostProcessorWrapper, Tokenizer};
use trommel_core::error::{Error, Result};

use crate::sentence_encoder::unknown_token;
use crate::wordpiece::{WordPiece, Words};

/// What a thread keeps from text to text; it changes the time and nothing else.
#[derive(Default)]
pub(crate) struct Memory {
    /// The tokens of words that the tokenizer was asked for before.
    known: HashMap<String, Vec<u32>>,
    /// The words of a text.
    words: Words,
}

/// Words that are remembered until all are forgotten, some 10 MB.
const KNOWN_WORDS_MAX: usize = 1 << 16;
/// Longer words are not likely to come again.
const KNOWN_WORD_BYTES_MAX: usize = 32;

/// A tokenizer that gives ids and nothing else.
pub(crate) struct TextTokens {
    tokenizer: Tokenizer,
    /// Without it, the tokenizer is given whole texts.
    pub(crate) words: Option<WordPiece>,
}

impl TextTokens {
    pub(crate) fn of(mut tokenizer: Tokenizer) -> Self {
        // It adds what frames a text, or repeats it.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        TextTokens { words: WordPiece::of(&tokenizer), tokenizer }
    }

    /// One more than the largest id.
    pub(crate) fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// The token of unknown words.
    pub(crate) fn unknown(&self) -> Option<usize> {
        unknown_token(&self.tokenizer).map(|id| id as usize)
    }

    /// Appends the tokens of `text` to `ids`.
    pub(crate) fn encode(&self, text: &str, memory: &mut Memory, ids: &mut Vec<u32>) -> Result<()> {
        let Some(words) = &self.words else {
            ids.extend(self.tokens(text)?);
            return Ok(());
        };
        let Memory { known, words: of_text } = memory;
        words.encode(&self.tokenizer, text, of_text, ids, |word, ids| self.add_word(word, known, ids))
    }

    /// Appends the tokens of a word that [`WordPiece`] does not take.
    fn add_word(&self, word: &str, known: &mut HashMap<String, Vec<u32>>, ids: &mut Vec<u32>) -> Result<()> {
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
