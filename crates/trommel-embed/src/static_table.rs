//! A table of token vectors; a text's vector is the mean of its tokens' vectors, at unit length.
//!
//! No token sees its neighbours, so one lookup and one addition per token is all the work. Vectors come from a sentence
//! encoder (`crate::distill`) and carry their frequency weight in their length. `static_table.safetensors` holds
//!
//! | tensor    | type | shape                | row `i` belongs to the token with id `i` of `tokenizer.json` |
//! |-----------|------|----------------------|-----------------------------------------------|
//! | `vectors` | i8   | (tokens, dimensions) | the vector divided by its scale, rounded      |
//! | `scales`  | f32  | (tokens)             | 0 for the unknown token, which counts nowhere |

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::tensor::Dtype;
use tokenizers::Tokenizer;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_kernels::embedding;

use crate::model_folder::{ModelFolder, TOKENIZER, Tensors, parse_tokenizer};
use crate::wordpiece::{WordPiece, is_separable};
use crate::{Embedder, assert_shape, normalize};

/// The file whose presence makes a folder a static table.
pub const STATIC_TABLE: &str = "static_table.safetensors";

/// Names of the two tensors.
pub(crate) const VECTORS: &str = "vectors";
pub(crate) const SCALES: &str = "scales";

/// The table that the binary carries; `data/models/README.md` says how it was made.
const EMBEDDED_TABLE: &[u8] = include_bytes!("../../../data/models/static/static_table.safetensors");
const EMBEDDED_TOKENIZER: &[u8] = include_bytes!("../../../data/models/static/tokenizer.json");

/// A static table, loaded.
pub struct StaticTable {
    tokenizer: Tokenizer,
    separable: bool,
    words: Option<WordPiece>,
    dimensions: usize,
    /// `(tokens, dimensions)`.
    vectors: Vec<i8>,
    /// `(tokens)`.
    scales: Vec<f32>,
    key: Key,
}

impl StaticTable {
    /// The table that the binary carries.
    pub fn embedded() -> Result<Self> {
        let mut folder = ModelFolder::new(Path::new("the embedded model `static`"));
        folder.remember(STATIC_TABLE, EMBEDDED_TABLE);
        folder.remember(TOKENIZER, EMBEDDED_TOKENIZER);
        Self::new(&folder, EMBEDDED_TABLE, parse_tokenizer(EMBEDDED_TOKENIZER)?)
    }

    /// A folder that [`crate::distill::distill`] has written.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut folder = ModelFolder::new(folder);
        let table = folder.read(STATIC_TABLE)?;
        let tokenizer = folder.read_tokenizer()?;
        Self::new(&folder, &table, tokenizer)
    }

    fn new(folder: &ModelFolder, table: &[u8], tokenizer: Tokenizer) -> Result<Self> {
        let path: PathBuf = folder.file(STATIC_TABLE);
        let tensors = Tensors::parse(path.clone(), table)?;
        let shape = tensors.view(VECTORS)?.shape().to_vec();
        let (&[tokens, dimensions], ids) = (&shape[..], largest_id(&tokenizer) + 1) else {
            return Err(Error::data(format!("the tensor `{VECTORS}` has the shape {shape:?}")).file(path.display()));
        };
        if tokens < ids || dimensions == 0 {
            let message = format!("the table has {tokens} rows of {dimensions}, the tokenizer has {ids} tokens");
            return Err(Error::data(message).file(path.display()).hint("take both files from the same model"));
        }
        let vectors = tensors.expect(VECTORS, Dtype::I8, &shape)?;
        Ok(StaticTable {
            separable: is_separable(&tokenizer),
            words: WordPiece::of(&tokenizer),
            tokenizer,
            dimensions,
            vectors: vectors.data().iter().map(|byte| i8::from_le_bytes([*byte])).collect(),
            scales: tensors.floats(SCALES, &[tokens])?,
            key: folder.key("static-table"),
        })
    }

    /// One text's vector. What `memory` holds changes the time and nothing else.
    fn embed_one(&self, text: &str, memory: &mut Memory, vector: &mut [f32]) -> Result<()> {
        let Memory { ids, known } = memory;
        ids.clear();
        if self.separable {
            for word in text.split(SEPARATORS).filter(|word| !word.is_empty()) {
                if !self.words.as_ref().is_some_and(|words| words.encode(word.as_bytes(), ids)) {
                    self.add_word(word, known, ids)?;
                }
            }
        } else {
            ids.extend(self.tokens(text)?);
        }
        vector.fill(0.0);
        embedding::add_scaled_rows(&self.vectors, &self.scales, ids, vector);
        // The mean and the sum have the same direction, so the division by the count is left out.
        normalize(vector);
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

/// What a thread keeps from text to text.
#[derive(Default)]
struct Memory {
    /// The tokens of the text at hand.
    ids: Vec<u32>,
    known: KnownWords,
}

/// The tokens of words that the tokenizer was asked for before.
type KnownWords = HashMap<String, Vec<u32>>;

/// Words that are remembered until all are forgotten, some 10 MB.
const KNOWN_WORDS_MAX: usize = 1 << 16;
/// Longer words are not likely to come again.
const KNOWN_WORD_BYTES_MAX: usize = 32;
/// What separates words; other white space is left to the tokenizer.
const SEPARATORS: [char; 4] = [' ', '\n', '\t', '\r'];

impl Embedder for StaticTable {
    fn dimensions(&self) -> usize {
        self.dimensions
    }

    fn key(&self) -> Key {
        self.key
    }

    fn embed(&self, texts: &[&str], vectors: &mut [f32]) -> Result<()> {
        assert_shape(texts, self.dimensions, vectors);
        let rows = vectors.par_chunks_exact_mut(self.dimensions);
        let work = texts.par_iter().zip(rows);
        work.try_for_each_init(Memory::default, |memory, (text, vector)| self.embed_one(text, memory, vector))
    }
}

fn largest_id(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_by_word_gives_the_same_bits() {
        let mut table = StaticTable::embedded().unwrap();
        assert!(table.separable);
        let windows = include_str!("../tests/fixtures/windows.jsonl");
        let odd = "Caf\u{e9} cafe\u{301} \u{301}x \u{4e00}a\u{4e01}\u{a0}b\u{2003}c \u{3a3}\u{391}\u{3a3} don't [CLS] a\u{0}b \u{200b} \n\t ##ing";
        let texts: Vec<&str> = windows.lines().chain([odd]).collect();
        let embed = |table: &StaticTable| {
            let mut vectors = vec![0.0; texts.len() * table.dimensions];
            table.embed(&texts, &mut vectors).unwrap();
            vectors.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        };
        let by_word = embed(&table);
        table.separable = false;
        assert!(by_word == embed(&table));
    }
}
