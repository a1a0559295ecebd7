//! Scores in whole numbers of 8 or 16 bits, of which an instruction multiplies twice as many as of the floats of its level, or more.
//!
//! A vector is a scale times whole numbers. An instruction multiplies 32 bits of a row, a step, by as many of each centroid in a
//! register, and adds the products of a step. The one of 8 bits multiplies signed by unsigned numbers: centroids are unsigned
//! there, with 128 added, and what that adds to a product is taken from the sum beforehand.
//!
//! ```text
//!   x = s q (about), c = t p (about)      x.c = s t (sum of q p)  =  s t (sum of q (p + 128)  -  128 sum of q)
//!
//!   panel: 64 or 16 centroids      b0  ..  bn      all steps of a panel before the next panel:
//!   6 rows  q[r][step]         acc[r][0 .. n]      scores are made, and compared, where the sums are
//! ```

use crate::isa::Isa;
use crate::lines::Lines;
use crate::vectorize::{LANES, fold, vectorized};

use super::{Candidate, Found, Size, squared_norm};

/// Calls the variant of `$score_rows` for as many rows as a tile has.
#[cfg(target_arch = "x86_64")]
macro_rules! for_rows {
    ($score_rows:ident($tile:ident, $found:ident)) => {
        match $tile.count {
            1 => $score_rows::<1>($tile, $found),
            2 => $score_rows::<2>($tile, $found),
            3 => $score_rows::<3>($tile, $found),
            4 => $score_rows::<4>($tile, $found),
            5 => $score_rows::<5>($tile, $found),
            _ => $score_rows::<{ super::TILE_ROWS }>($tile, $found),
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;

/// Rows of a tile: 24 registers of sums in AVX-512, 12 in AVX2.
const TILE_ROWS: usize = 6;

/// The whole numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Format {
    /// From -127 to 127, for `Isa::Avx512Vnni` and above.
    #[default]
    Int8,
    /// For `Isa::Avx2` and above; so large that sums of their products fit in 32 bits.
    Int16,
}

impl Format {
    /// Whether the processor multiplies them, and vectors of so many dimensions are not too long for them.
    pub(super) fn fits(self, dimensions: usize) -> bool {
        match self {
            // Of that many products, none is larger than 127 * 255. Their bytes' sum is one of whole numbers in f32 then.
            Format::Int8 => Isa::current() >= Isa::Avx512Vnni && dimensions <= i32::MAX as usize / (127 * 255),
            Format::Int16 => Isa::current() >= Isa::Avx2 && self.largest(dimensions) >= 127.0,
        }
    }

    /// The largest of them.
    fn largest(self, dimensions: usize) -> f32 {
        match self {
            Format::Int8 => 127.0,
            Format::Int16 => (i32::MAX as usize / dimensions).isqrt().min(i16::MAX as usize) as f32,
        }
    }

    /// Numbers of a step.
    fn step(self) -> usize {
        match self {
            Format::Int8 => 4,
            Format::Int16 => 2,
        }
    }

    /// Centroids of a panel.
    fn panel(self) -> usize {
        match self {
            Format::Int8 => 64,
            Format::Int16 => 16,
        }
    }

    /// A step of a centroid.
    fn of_centroid(self, step: i32) -> i32 {
        match self {
            // The sign's bit of each byte: 128 are added.
            Format::Int8 => step ^ i32::from_ne_bytes([0x80; 4]),
            Format::Int16 => step,
        }
    }
}

/// Centroids in whole numbers.
#[derive(Debug)]
pub(super) struct Panels {
    format: Format,
    /// (panels, steps, centroids of a panel); what is beyond the last centroid or dimension has any value.
    numbers: Lines<i32>,
    /// The scale of each centroid, filled up to whole panels.
    scales: Vec<f32>,
    steps: usize,
}

/// Rows in whole numbers.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// (rows, steps), with zeros beyond the last dimension.
    numbers: Vec<i32>,
    /// Of each row, the scale and what is taken from its sums beforehand.
    scales: Vec<f32>,
    offsets: Vec<i32>,
    steps: usize,
}

impl Panels {
    /// `points` is `(centroids, dimensions)`; returns the size of each as well. Fails if the format does not fit.
    pub(super) fn new(format: Format, points: &[f32], dimensions: usize) -> (Panels, Vec<Size>) {
        assert!(format.fits(dimensions), "no products of {format:?}");
        let mut rows = Rows::default();
        let sizes = rows.pack(format, points, dimensions);
        let (steps, columns) = (rows.steps, format.panel());
        let panels = sizes.len().div_ceil(columns);
        let mut numbers = Lines::default();
        numbers.resize(panels * steps * columns, 0);
        for (panel, rows) in numbers.chunks_exact_mut(steps * columns).zip(rows.numbers.chunks(columns * steps)) {
            for (column, row) in rows.chunks_exact(steps).enumerate() {
                for (panel, step) in panel.chunks_exact_mut(columns).zip(row) {
                    panel[column] = format.of_centroid(*step);
                }
            }
        }
        let mut scales = rows.scales;
        scales.resize(panels * columns, 0.0);
        (Panels { format, numbers, scales, steps }, sizes)
    }

    /// Rows that can be compared with these centroids replace the content of `rows`; returns their sizes.
    pub(super) fn pack(&self, rows: &mut Rows, vectors: &[f32], dimensions: usize) -> Vec<Size> {
        rows.pack(self.format, vectors, dimensions)
    }

    /// Offers to `found` the scores `norm - 2 x.c` of `rows` and the centroids from `first` on, where a panel begins, as many as
    /// there are norms.
    pub(super) fn score(&self, rows: &Rows, first: usize, norms: &[f32], found: &mut Found<'_>) {
        let (format, columns) = (self.format, self.format.panel());
        assert!(rows.steps == self.steps && first.is_multiple_of(columns));
        assert!(found.candidates.len() == rows.scales.len() && found.limits.len() == rows.scales.len());
        let panel_steps = self.steps * columns;
        let panels = self.numbers[first / columns * panel_steps..].chunks_exact(panel_steps);
        let scales = self.scales[first..].chunks_exact(columns);
        let mut filled = Vec::with_capacity(columns);
        for (panel, ((numbers, scales), norms)) in panels.zip(scales).zip(norms.chunks(columns)).enumerate() {
            filled.clear();
            filled.extend_from_slice(norms);
            filled.resize(columns, f32::INFINITY);
            let first = (first + panel * columns) as u32;
            for row in (0..rows.scales.len()).step_by(TILE_ROWS) {
                let count = TILE_ROWS.min(rows.scales.len() - row);
                Tile { numbers, scales, norms: &filled, columns: norms.len(), rows, row, count, first }.score(format, found);
            }
        }
    }
}

impl Rows {
    /// Replaces the content by `vectors`, which is `(rows, dimensions)` and finite; returns their sizes.
    fn pack(&mut self, format: Format, vectors: &[f32], dimensions: usize) -> Vec<Size> {
        self.steps = dimensions.div_ceil(format.step());
        self.numbers.clear();
        self.numbers.resize(vectors.len() / dimensions * self.steps, 0);
        self.scales.clear();
        self.offsets.clear();
        let rows = vectors.chunks_exact(dimensions).zip(self.numbers.chunks_exact_mut(self.steps));
        rows.map(|(vector, numbers)| {
            let scale = largest_of(vector) / format.largest(dimensions);
            // Of a scale that is hardly more than zero, the inverse would be infinite: all of the vector is residual.
            let inverse = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
            let (offset, squared_residual) = match format {
                Format::Int8 => {
                    let (sum, squared_residual) = round_to_i8(vector, scale, inverse, bytemuck::cast_slice_mut(numbers));
                    (128 * sum as i32, squared_residual)
                }
                Format::Int16 => (0, round_to_i16(vector, scale, inverse, bytemuck::cast_slice_mut(numbers)).1),
            };
            self.scales.push(scale);
            self.offsets.push(offset);
            Size::new(dimensions, squared_norm(vector), squared_residual)
        })
        .collect()
    }
}

vectorized! {
    fn largest_of(vector: &[f32]) -> f32 {
        let larger = |a: f32, x: &f32| if x.abs() > a { x.abs() } else { a };
        let lanes = vector.chunks_exact(LANES);
        let rest = lanes.remainder().iter().fold(0.0, larger);
        let mut largest = [rest; LANES];
        for vector in lanes {
            for (largest, x) in largest.iter_mut().zip(vector) {
                *largest = larger(*largest, x);
            }
        }
        largest.into_iter().fold(0.0, f32::max)
    }
}

vectorized! {
    fn round_to_i8(vector: &[f32], scale: f32, inverse: f32, numbers: &mut [i8]) -> (f32, f32) {
        round(vector, scale, inverse, numbers, |bits| bits as i8)
    }
}

vectorized! {
    fn round_to_i16(vector: &[f32], scale: f32, inverse: f32, numbers: &mut [i16]) -> (f32, f32) {
        round(vector, scale, inverse, numbers, |bits| bits as i16)
    }
}

/// Divides by the scale and rounds to the nearest whole number, ties to even; returns the sum of these, and the squared length of
/// what rounding took from the vector.
#[inline(always)]
fn round<T>(vector: &[f32], scale: f32, inverse: f32, numbers: &mut [T], low: impl Fn(u32) -> T) -> (f32, f32) {
    // The spacing of f32 is 1 here, and the low bits are those of the whole number.
    const WHOLE: f32 = 1.5 * (1 << 23) as f32;
    let (mut sums, mut squares) = ([0f32; LANES], [0f32; LANES]);
    let mut round = |lane: usize, x: f32, number: &mut T| {
        let whole = x * inverse + WHOLE;
        *number = low(whole.to_bits());
        let q = whole - WHOLE;
        let residual = x - scale * q;
        sums[lane] += q;
        squares[lane] += residual * residual;
    };
    let mut lanes = numbers[..vector.len()].chunks_exact_mut(LANES);
    let vectors = vector.chunks_exact(LANES);
    let rest = vectors.remainder();
    for (numbers, vector) in (&mut lanes).zip(vectors) {
        for lane in 0..LANES {
            round(lane, vector[lane], &mut numbers[lane]);
        }
    }
    for (lane, (number, x)) in lanes.into_remainder().iter_mut().zip(rest).enumerate() {
        round(lane, *x, number);
    }
    (fold(sums), fold(squares))
}

/// A few rows by one panel.
struct Tile<'a> {
    numbers: &'a [i32],
    scales: &'a [f32],
    norms: &'a [f32],
    /// Centroids of the panel.
    columns: usize,
    rows: &'a Rows,
    row: usize,
    /// Rows of the tile, at most `TILE_ROWS`.
    count: usize,
    /// The first centroid of the panel.
    first: u32,
}

impl Tile<'_> {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "calls a variant whose instructions are there")]
    fn score(&self, format: Format, found: &mut Found<'_>) {
        // SAFETY: `Panels::new` looked for these instructions.
        unsafe {
            match format {
                Format::Int8 => avx512vnni::score(self, found),
                Format::Int16 => avx2::score(self, found),
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn score(&self, _: Format, _: &mut Found<'_>) {
        unreachable!("panels are made only where the processor has the instructions");
    }

    /// Takes the centroids of `mask` as candidates of a row.
    #[inline(always)]
    fn take(&self, row: usize, mut mask: u64, scores: &[f32], found: &mut Found<'_>) {
        // A limit can be infinite, as norms beyond the last centroid are.
        mask &= u64::MAX >> (u64::BITS as usize - self.columns);
        let candidates = &mut found.candidates[row];
        while mask != 0 {
            let column = mask.trailing_zeros();
            candidates.push(Candidate { index: self.first + column, score: scores[column as usize] });
            mask &= mask - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::numbers;

    #[test]
    fn whole_numbers_and_their_residual_make_the_vector() {
        let mut vectors = numbers(5 * 37, 3);
        vectors[37..74].fill(0.0);
        vectors[74..111].iter_mut().for_each(|x| *x *= 1e-40);
        vectors[111..148].iter_mut().for_each(|x| *x *= 1e15);
        for (format, steps) in [(Format::Int8, 10), (Format::Int16, 19)] {
            let (largest, mut rows) = (format.largest(37), Rows::default());
            let sizes = rows.pack(format, &vectors, 37);
            assert_eq!((rows.steps, rows.numbers.len(), sizes.len()), (steps, 5 * steps, 5));
            for (i, (vector, numbers)) in vectors.chunks(37).zip(rows.numbers.chunks(steps)).enumerate() {
                let numbers: Vec<i32> = match format {
                    Format::Int8 => bytemuck::cast_slice::<_, i8>(numbers).iter().map(|q| i32::from(*q)).collect(),
                    Format::Int16 => bytemuck::cast_slice::<_, i16>(numbers).iter().map(|q| i32::from(*q)).collect(),
                };
                let rounded: Vec<f64> = numbers.iter().map(|q| f64::from(rows.scales[i]) * f64::from(*q)).collect();
                let residual: f64 = vector.iter().zip(&rounded).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum::<f64>().sqrt();
                let norm = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                // Squares of what is hardly more than zero vanish, and are taken for more.
                let (more, unsure) = (f64::from(sizes[i].residual) - residual, 1e-5 * residual + 1e-7 * norm);
                assert!(more >= -unsure && more <= unsure + 1e-18, "{format:?} {i}");
                assert!(residual <= 1.3 / f64::from(largest) * norm + 1e-22, "{format:?} {i}");
                assert!(numbers[37..].iter().all(|q| *q == 0) && numbers.iter().all(|q| q.abs() as f32 <= largest));
                let offset = if format == Format::Int8 { 128 * numbers.iter().sum::<i32>() } else { 0 };
                assert_eq!(rows.offsets[i], offset);
                assert_eq!(numbers.iter().any(|q| q.abs() as f32 == largest), norm > 1e-30, "{format:?} {i}");
            }
        }
    }

    #[test]
    fn sums_of_the_largest_numbers_fit() {
        for dimensions in [1, 2, 3, 384, 1 << 14, 133_000] {
            let largest = Format::Int16.largest(dimensions) as i64;
            assert!((127..=32767).contains(&largest) && largest * largest * dimensions as i64 <= i64::from(i32::MAX));
        }
        assert!(!Format::Int8.fits(1 << 17) && !Format::Int16.fits(1 << 18));
    }
}
