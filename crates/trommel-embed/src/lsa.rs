//! From a corpus to a static table, by latent semantic analysis (Deerwester et al. 1990).
//!
//! 1. Each window becomes a vector over tokens: `(1 + ln count) * idf`, at unit length, where `idf` is
//!    `ln((1 + windows) / (1 + windows with the token)) + 1` [Manning, Raghavan and Schuetze 2008, section 6.4];
//! 2. the leading right singular vectors of (windows, tokens) span what windows differ in most;
//! 3. a token's vector is its coordinates along them times its `idf`, divided by the square root of the singular values, so
//!    that the few strongest directions do not decide every distance.
//!
//! Punctuation, digits and function words count here as far as they tell windows apart, which a table distilled from a sentence
//! encoder leaves out: so such a table sees a text's form beside its topic.
//!
//! Singular vectors come from randomized subspace iteration [Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4].

use std::path::Path;

use linfa_linalg::eigh::{EigSort, EighInto};
use ndarray::{Array1, Array2, ArrayViewMut1, Axis, s};
use rayon::prelude::*;
use trommel_core::error::{Error, Result};
use trommel_core::seed::Stream;

use crate::model_folder::parse_tokenizer;
use crate::static_table::{Counts, EMBEDDED_TOKENIZER, Tally, table_bytes, write_table};
use crate::text_tokens::{Memory, TextTokens};

/// Directions that are followed beside those that are kept, for the accuracy of these.
const OVERSAMPLING: usize = 16;
/// Passes over the windows that turn random directions into the leading ones.
const PASSES: usize = 3;
/// Directions with less than this part of the largest variance are rounding.
const NEGLIGIBLE: f64 = 1e-12;

/// What was learnt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fitted {
    /// Windows that it was learnt from.
    pub windows: usize,
    /// Tokens that occur in them; others have a vector of zero.
    pub tokens: usize,
    /// The length of a vector.
    pub dimensions: usize,
    /// The part of the windows' squared length that the dimensions carry, 0 to 1.
    pub explained: f64,
    /// Table and tokenizer together.
    pub bytes: u64,
}

/// Writes to `output`, where nothing may be yet, a folder that [`crate::load::load`] reads as a static table, learnt from `windows`,
/// of `dimensions` or as many as they fill: no more than windows, and than different tokens in them. It has the tokens of the table
/// that the binary carries.
/// Equal inputs on equal processors give equal bytes.
pub fn fit(windows: &[String], output: &Path, dimensions: usize, seed: u64) -> Result<Fitted> {
    let tokens = TextTokens::of(parse_tokenizer(EMBEDDED_TOKENIZER)?);
    let matrix = Matrix::count(windows, &tokens)?;
    let known = matrix.idf.iter().filter(|idf| **idf > 0.0).count();
    let dimensions = dimensions.min(known).min(windows.len());
    if dimensions == 0 {
        return Err(
            Error::data("there is no text to learn an embedding table from").hint("check the paths and the text column")
        );
    }
    let (directions, values) = matrix.singular_vectors(dimensions, seed)?;
    let mut vectors = directions; // (tokens, dimensions)
    for (mut coordinate, value) in vectors.columns_mut().into_iter().zip(&values) {
        coordinate /= value.max(f64::MIN_POSITIVE).sqrt();
    }
    for (mut vector, idf) in vectors.rows_mut().into_iter().zip(&matrix.idf) {
        vector *= *idf;
    }
    let table = table_bytes(vectors.view(), tokens.unknown(), Counts::Logarithmic)?;
    write_table(output, EMBEDDED_TOKENIZER, &table)?;
    Ok(Fitted {
        windows: windows.len(),
        tokens: known,
        dimensions,
        explained: values.iter().map(|value| value * value).sum::<f64>() / matrix.squared_length().max(f64::MIN_POSITIVE),
        bytes: (table.len() + EMBEDDED_TOKENIZER.len()) as u64,
    })
}

/// The weighted counts of tokens in windows, sparse: each list holds the other index and the weight.
struct Matrix {
    windows: Vec<Vec<(u32, f64)>>,
    tokens: Vec<Vec<(u32, f64)>>,
    /// By token; 0 for one that does not occur.
    idf: Vec<f64>,
}

impl Matrix {
    fn count(texts: &[String], tokens: &TextTokens) -> Result<Matrix> {
        let count = |(memory, tally): &mut (Memory, Tally), text: &String| {
            let (mut ids, mut counted) = (Vec::new(), Vec::new());
            tokens.encode(text, memory, &mut ids)?;
            tally.count(&ids, Counts::Logarithmic, &mut counted);
            counted.retain(|(id, _)| Some(*id as usize) != tokens.unknown());
            Ok(counted)
        };
        let counts: Vec<Vec<(u32, f32)>> = texts.par_iter().map_init(Default::default, count).collect::<Result<_>>()?;
        let mut containing = vec![0usize; tokens.vocabulary()];
        counts.iter().flatten().for_each(|(id, _)| containing[*id as usize] += 1);
        let inverse = |n: usize| ((1 + texts.len()) as f64 / (1 + n) as f64).ln() + 1.0;
        let idf: Vec<f64> = containing.iter().map(|n| if *n == 0 { 0.0 } else { inverse(*n) }).collect();
        let weighted = |counted: &Vec<(u32, f32)>| {
            let mut row: Vec<(u32, f64)> = counted.iter().map(|(id, n)| (*id, f64::from(*n) * idf[*id as usize])).collect();
            let length = row.iter().map(|(_, x)| x * x).sum::<f64>().sqrt();
            row.iter_mut().for_each(|(_, x)| *x /= length);
            row
        };
        let windows: Vec<Vec<(u32, f64)>> = counts.iter().map(weighted).collect();
        let mut columns = vec![Vec::new(); tokens.vocabulary()];
        for (window, row) in windows.iter().enumerate() {
            row.iter().for_each(|(id, x)| columns[*id as usize].push((window as u32, *x)));
        }
        Ok(Matrix { windows, tokens: columns, idf })
    }

    fn squared_length(&self) -> f64 {
        self.windows.iter().flatten().map(|(_, x)| x * x).sum()
    }

    /// The leading right singular vectors, (tokens, dimensions), and their singular values, falling.
    fn singular_vectors(&self, dimensions: usize, seed: u64) -> Result<(Array2<f64>, Vec<f64>)> {
        let width = (dimensions + OVERSAMPLING).min(self.windows.len()).min(self.tokens.len());
        let stream = Stream::new(seed, "lsa");
        let random = |(token, column): (usize, usize)| {
            let key = [(token as u64).to_le_bytes(), (column as u64).to_le_bytes()].concat();
            2.0 * stream.uniform(&key) - 1.0
        };
        let mut right = Array2::from_shape_fn((self.tokens.len(), width), random);
        let mut left = orthonormal(&product(&self.windows, &right))?;
        for _ in 1..PASSES {
            right = orthonormal(&product(&self.tokens, &left))?;
            left = orthonormal(&product(&self.windows, &right))?;
        }
        let within = product(&self.tokens, &left); // (tokens, width): the matrix, transposed, within the directions
        let (mut directions, variances) = rotated(&within)?;
        directions.slice_collapse(s![.., ..dimensions]);
        Ok((directions, variances.iter().take(dimensions).map(|x| x.max(0.0).sqrt()).collect()))
    }
}

/// The product of sparse `rows` and `dense` (columns, width): (rows, width).
fn product(rows: &[Vec<(u32, f64)>], dense: &Array2<f64>) -> Array2<f64> {
    let mut out = Array2::zeros((rows.len(), dense.ncols()));
    let sum = |(mut out, row): (ArrayViewMut1<'_, f64>, &Vec<(u32, f64)>)| {
        row.iter().for_each(|(column, x)| out.scaled_add(*x, &dense.row(*column as usize)));
    };
    out.axis_iter_mut(Axis(0)).into_par_iter().zip(rows).for_each(sum);
    out
}

/// An orthonormal basis of the columns of `x`; zeros where they depend on each other.
fn orthonormal(x: &Array2<f64>) -> Result<Array2<f64>> {
    Ok(rotated(x)?.0)
}

/// The left singular vectors of `x` (n, width), and its squared singular values, falling.
fn rotated(x: &Array2<f64>) -> Result<(Array2<f64>, Array1<f64>)> {
    let failed = |e| Error::internal("the eigendecomposition failed").source(e);
    let (squares, rotation) = x.t().dot(x).eigh_into().map_err(failed)?.sort_eig_desc();
    let largest = squares.first().copied().unwrap_or(0.0);
    let mut vectors = x.dot(&rotation);
    for (mut vector, square) in vectors.columns_mut().into_iter().zip(&squares) {
        vector *= if *square > NEGLIGIBLE * largest { 1.0 / square.sqrt() } else { 0.0 };
    }
    Ok((vectors, squares))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Embedder;
    use crate::static_table::{STATIC_TABLE, StaticTable};

    fn texts() -> Vec<String> {
        let kinds: [&dyn Fn(usize) -> String; 3] = [
            &|i| format!("the lord said unto the {i} kings of the land, and the people heard the word {}", i % 7),
            &|i| format!("fn gold_{i}(x: u32) -> u32 {{ x + {i}; }} // {}", i % 5),
            &|i| format!("the court held that section {i} of the act; the appeal (no. {}) is dismissed", i % 9),
        ];
        (0..90).map(|i| kinds[i % 3](i)).collect()
    }

    #[test]
    fn windows_of_one_kind_are_near_each_other() {
        let (folder, texts) = (tempfile::tempdir().unwrap(), texts());
        let output = folder.path().join("table");
        let fitted = fit(&texts, &output, 3, 17).unwrap();
        assert!(fitted.windows == 90 && fitted.explained > 0.3 && fitted.explained < 1.0, "{fitted:?}");
        let table = StaticTable::read(&output).unwrap();
        let mut vectors = vec![0.0; 90 * 3];
        table.embed(&texts.iter().map(String::as_str).collect::<Vec<_>>(), &mut vectors).unwrap();
        let cosine = |a: usize, b: usize| -> f32 { (0..3).map(|i| vectors[a * 3 + i] * vectors[b * 3 + i]).sum() };
        for (a, b) in (0..90).flat_map(|a| (0..90).map(move |b| (a, b))) {
            assert_eq!(cosine(a, b) > 0.5, a % 3 == b % 3, "{a} {b} {}", cosine(a, b));
        }
    }

    #[test]
    fn equal_texts_give_equal_bytes_and_little_text_fewer_dimensions() {
        let folder = tempfile::tempdir().unwrap();
        let output = |name: &str| folder.path().join(name);
        let bytes = ["a", "b"].map(|name| {
            fit(&texts(), &output(name), 3, 17).unwrap();
            std::fs::read(output(name).join(STATIC_TABLE)).unwrap()
        });
        assert!(bytes[0] == bytes[1]);
        assert!(fit(&texts(), &output("a"), 3, 17).unwrap_err().to_string().contains("is not overwritten"));
        assert_eq!(fit(&texts()[..5], &output("small"), 6, 17).unwrap().dimensions, 5);
        assert_eq!(StaticTable::read(&output("small")).unwrap().dimensions(), 5);
        for nothing in [vec![], vec![" ".to_owned()]] {
            assert!(fit(&nothing, &output("none"), 1, 17).unwrap_err().to_string().contains("no text"));
        }
    }

    // Reference, by hand: [[3, 0], [0, 2], [0, 0]] has the singular values 3 and 2 along the axes.
    #[test]
    fn singular_vectors_of_a_diagonal_matrix_are_the_axes() {
        let matrix = Matrix {
            windows: vec![vec![(0, 3.0)], vec![(1, 2.0)], vec![]],
            tokens: vec![vec![(0, 3.0)], vec![(1, 2.0)]],
            idf: vec![1.0; 2],
        };
        let (directions, values) = matrix.singular_vectors(2, 1).unwrap();
        for (i, expected) in [3.0, 2.0].into_iter().enumerate() {
            assert!((values[i] - expected).abs() < 1e-12 && (directions[[i, i]].abs() - 1.0).abs() < 1e-12);
        }
    }
}
