//! A table of token vectors; a text's vector is the mean of its tokens' vectors, at unit length.
//!
//! No token sees its neighbours, so one lookup per token and one addition per distinct token is all the work. Vectors come from
//! a sentence encoder (`crate::distill`) or a corpus (`crate::lsa`) and carry their frequency weight in their length.
//! `static_table.safetensors` holds
//!
//! | tensor    | type | shape                | row `i` belongs to the token with id `i` of `tokenizer.json` |
//! |-----------|------|----------------------|-----------------------------------------------|
//! | `vectors` | i8   | (tokens, dimensions) | the vector divided by its scale, rounded      |
//! | `scales`  | f32  | (tokens)             | 0 for the unknown token, which counts nowhere |
//!
//! and, where a token that occurs n times counts as `1 + ln n` rather than n, the metadata `counts: logarithmic`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ndarray::ArrayView2;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tokenizers::Tokenizer;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::storage::{write_bytes, write_new_folder};
use trommel_kernels::embedding;

use crate::model_folder::{ModelFolder, TOKENIZER, Tensors, parse_tokenizer};
use crate::text_tokens::{self, TextTokens};
use crate::{Embedder, assert_shape, normalize};

/// The file whose presence makes a folder a static table.
pub const STATIC_TABLE: &str = "static_table.safetensors";

/// The kind of embedder, in its key; raised when a text's vector changes in any bit.
const KIND: &str = "static-table-2";

/// Names of the two tensors.
const VECTORS: &str = "vectors";
const SCALES: &str = "scales";

/// The table that the binary carries; `data/models/README.md` says how it was made.
const EMBEDDED_TABLE: &[u8] = include_bytes!("../../../data/models/static/static_table.safetensors");
pub(crate) const EMBEDDED_TOKENIZER: &[u8] = include_bytes!("../../../data/models/static/tokenizer.json");

/// What a token that occurs n times in a text counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counts {
    /// n.
    Linear,
    /// `1 + ln n`.
    Logarithmic,
}

impl Counts {
    const NAME: &str = "counts";
    const LOGARITHMIC: &str = "logarithmic";

    fn metadata(self) -> Option<HashMap<String, String>> {
        (self == Counts::Logarithmic).then(|| HashMap::from([(Self::NAME.to_owned(), Self::LOGARITHMIC.to_owned())]))
    }

    fn read(table: &[u8]) -> Result<Self> {
        let damaged = |e| Error::data("the tensors are damaged or cut short").source(e);
        let (_, header) = SafeTensors::read_metadata(table).map_err(damaged)?;
        match header.metadata().as_ref().and_then(|metadata| metadata.get(Self::NAME)).map(String::as_str) {
            None => Ok(Counts::Linear),
            Some(Self::LOGARITHMIC) => Ok(Counts::Logarithmic),
            Some(other) => Err(Error::data(format!("the table counts tokens in a way that is not known: `{other}`"))),
        }
    }
}

/// A static table, loaded.
pub struct StaticTable {
    tokens: TextTokens,
    counts: Counts,
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
        let text_tokens = TextTokens::of(tokenizer);
        let (&[tokens, dimensions], ids) = (&shape[..], text_tokens.vocabulary()) else {
            return Err(Error::data(format!("the tensor `{VECTORS}` has the shape {shape:?}")).file(path.display()));
        };
        if tokens < ids || dimensions == 0 {
            let message = format!("the table has {tokens} rows of {dimensions}, the tokenizer has {ids} tokens");
            return Err(Error::data(message).file(path.display()).hint("take both files from the same model"));
        }
        let counts = Counts::read(table).map_err(|e| e.file(path.display()))?;
        let vectors = tensors.expect(VECTORS, Dtype::I8, &shape)?;
        Ok(StaticTable {
            tokens: text_tokens,
            counts,
            dimensions,
            vectors: vectors.data().iter().map(|byte| i8::from_le_bytes([*byte])).collect(),
            scales: tensors.floats(SCALES, &[tokens])?,
            key: folder.key(KIND),
        })
    }

    /// One text's vector. What `memory` holds changes the time and nothing else.
    fn embed_one(&self, text: &str, memory: &mut Memory, vector: &mut [f32]) -> Result<()> {
        let Memory { ids, rows, tokens, tally } = memory;
        ids.clear();
        self.tokens.encode(text, tokens, ids)?;
        tally.count(ids, self.counts, rows);
        rows.iter_mut().for_each(|(id, factor)| *factor *= self.scales[*id as usize]);
        vector.fill(0.0);
        embedding::add_scaled_rows(&self.vectors, rows, vector);
        // The mean and the sum have the same direction, so the division by the count is left out.
        normalize(vector);
        Ok(())
    }
}

/// What a thread keeps from text to text.
#[derive(Default)]
struct Memory {
    /// The tokens of the text at hand.
    ids: Vec<u32>,
    /// The rows of the table that its vector is the sum of, and their factors.
    rows: Vec<(u32, f32)>,
    tokens: text_tokens::Memory,
    tally: Tally,
}

/// `static_table.safetensors` for `vectors` `(tokens, dimensions)`.
pub(crate) fn table_bytes(vectors: ArrayView2<f64>, unknown: Option<usize>, counts: Counts) -> Result<Vec<u8>> {
    let mut quantized = Vec::with_capacity(vectors.len());
    let mut scales = Vec::with_capacity(vectors.nrows() * 4);
    for (token, vector) in vectors.rows().into_iter().enumerate() {
        let largest = vector.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
        let scale = if Some(token) == unknown { 0.0 } else { (largest / 127.0) as f32 };
        let inverse = if scale > 0.0 { 1.0 / f64::from(scale) } else { 0.0 };
        quantized.extend(vector.iter().map(|x| ((x * inverse).round() as i8).to_le_bytes()[0]));
        scales.extend(scale.to_le_bytes());
    }
    let failed = |e| Error::internal("cannot lay out the table").source(e);
    let tensors = [
        (VECTORS, TensorView::new(Dtype::I8, vectors.shape().to_vec(), &quantized).map_err(failed)?),
        (SCALES, TensorView::new(Dtype::F32, vec![vectors.nrows()], &scales).map_err(failed)?),
    ];
    safetensors::serialize(tensors, counts.metadata()).map_err(failed)
}

/// Writes the folder of a static table, where nothing may be yet.
pub(crate) fn write_table(folder: &Path, tokenizer: &[u8], table: &[u8]) -> Result<()> {
    write_new_folder(folder, |folder| {
        write_bytes(&folder.join(TOKENIZER), tokenizer)?;
        write_bytes(&folder.join(STATIC_TABLE), table)
    })
}

/// How often each token occurs in a text.
#[derive(Default)]
pub(crate) struct Tally {
    /// By token; zeros between texts.
    occurrences: Vec<u32>,
}

impl Tally {
    /// Replaces `counted` by the distinct `ids`, in the order in which they first occur, and what each counts.
    pub(crate) fn count(&mut self, ids: &[u32], counts: Counts, counted: &mut Vec<(u32, f32)>) {
        let tokens = ids.iter().max().map_or(0, |id| *id as usize + 1);
        if self.occurrences.len() < tokens {
            self.occurrences.resize(tokens, 0);
        }
        // Each is written, and written over if it was there before: whether it was cannot be foreseen.
        counted.resize(ids.len(), (0, 0.0));
        let mut distinct = 0;
        for id in ids {
            let occurrences = &mut self.occurrences[*id as usize];
            counted[distinct].0 = *id;
            distinct += usize::from(*occurrences == 0);
            *occurrences += 1;
        }
        counted.truncate(distinct);
        for (id, count) in counted {
            let occurrences = std::mem::take(&mut self.occurrences[*id as usize]) as f32;
            *count = match counts {
                Counts::Linear => occurrences,
                Counts::Logarithmic => 1.0 + occurrences.ln(),
            };
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_by_word_gives_the_same_bits() {
        let mut table = StaticTable::embedded().unwrap();
        assert!(table.tokens.words.is_some());
        let windows = include_str!("../tests/fixtures/windows.jsonl");
        let odd = "Caf\u{e9} cafe\u{301} \u{301}x \u{4e00}a\u{4e01}\u{a0}b\u{2003}c \u{3a3}\u{391}\u{3a3} don't [CLS] a\u{0}b \u{200b} \n\t ##ing";
        let texts: Vec<&str> = windows.lines().chain([odd]).collect();
        let embed = |table: &StaticTable| {
            let mut vectors = vec![0.0; texts.len() * table.dimensions];
            table.embed(&texts, &mut vectors).unwrap();
            vectors.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        };
        let by_word = embed(&table);
        table.tokens.words = None;
        assert!(by_word == embed(&table));
    }
}
