//! Scores in 8-bit integers, twice as many to an instruction as pairs of `bf16`.
//!
//! A vector is a scale times whole numbers from -127 to 127. The instruction multiplies signed by unsigned numbers, four at a time:
//! centroids are unsigned, with 128 added, and what that adds to a product is taken from the sum beforehand.
//!
//! ```text
//!   x = s q (about), c = t p (about)      x.c = s t (sum of q (p + 128)  -  128 sum of q)
//!
//!   panel: 64 centroids            b0   b1   b2   b3        four dimensions a step, all of them before the next panel:
//!   6 rows  q[r][l]            acc[r][0..4]                 scores are made, and compared, where the sums are
//! ```

use crate::isa::Isa;
use crate::lines::Lines;
use crate::vectorize::{LANES, fold, vectorized};

use super::{Candidate, Found, Size, squared_norm};

/// Centroids of a panel.
pub(super) const PANEL: usize = 64;
/// Rows of a tile: 24 registers of sums.
const TILE_ROWS: usize = 6;
/// Dimensions of a step.
const STEP: usize = 4;
/// Dimensions that a sum of 32 bits holds: of so many products, none is larger than 127 * 255. And their bytes' sum is one of whole
/// numbers in f32.
pub(super) const DIMENSIONS_MAX: usize = i32::MAX as usize / (127 * 255);

/// Centroids in bytes.
#[derive(Debug)]
pub(super) struct Panels {
    /// (panels, steps, `PANEL`, `STEP`); what is beyond the last centroid or dimension has any value.
    numbers: Lines<u8>,
    /// The scale of each centroid, filled up to whole panels.
    scales: Vec<f32>,
    steps: usize,
}

/// Rows in bytes.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// (rows, steps, `STEP`), with zeros beyond the last dimension.
    numbers: Vec<i8>,
    /// Of each row, the scale and 128 times the sum of its numbers.
    scales: Vec<f32>,
    offsets: Vec<i32>,
    steps: usize,
}

impl Panels {
    /// `points` is `(centroids, dimensions)`; returns the size of each as well. Fails if the processor does not multiply bytes.
    pub(super) fn new(points: &[f32], dimensions: usize) -> (Panels, Vec<Size>) {
        assert!(Isa::current() >= Isa::Avx512Vnni && dimensions <= DIMENSIONS_MAX, "no products of bytes");
        let mut rows = Rows::default();
        let sizes = rows.pack(points, dimensions);
        let (steps, count) = (rows.steps, sizes.len());
        let panels = count.div_ceil(PANEL);
        let mut numbers = Lines::default();
        numbers.resize(panels * steps * PANEL * STEP, 0);
        for (panel, rows) in numbers.chunks_exact_mut(steps * PANEL * STEP).zip(rows.numbers.chunks(PANEL * steps * STEP)) {
            for (column, row) in rows.chunks_exact(steps * STEP).enumerate() {
                for (step, four) in row.chunks_exact(STEP).enumerate() {
                    let at = (step * PANEL + column) * STEP;
                    panel[at..at + STEP].iter_mut().zip(four).for_each(|(byte, q)| *byte = q.cast_unsigned() ^ 0x80);
                }
            }
        }
        let mut scales = rows.scales;
        scales.resize(panels * PANEL, 0.0);
        (Panels { numbers, scales, steps }, sizes)
    }

    /// Offers to `found` the scores `norm - 2 x.c` of `rows` and the centroids from `first` on, a multiple of [`PANEL`], as many as
    /// there are norms.
    pub(super) fn score(&self, rows: &Rows, first: usize, norms: &[f32], found: &mut Found<'_>) {
        assert!(rows.steps == self.steps && first.is_multiple_of(PANEL));
        assert!(found.candidates.len() == rows.scales.len() && found.limits.len() == rows.scales.len());
        let panel_bytes = self.steps * PANEL * STEP;
        let panels = self.numbers[first / PANEL * panel_bytes..].chunks_exact(panel_bytes);
        let scales = self.scales[first..].chunks_exact(PANEL);
        for (panel, ((numbers, scales), norms)) in panels.zip(scales).zip(norms.chunks(PANEL)).enumerate() {
            let mut whole = [f32::INFINITY; PANEL];
            whole[..norms.len()].copy_from_slice(norms);
            let first = (first + panel * PANEL) as u32;
            for row in (0..rows.scales.len()).step_by(TILE_ROWS) {
                Tile { numbers, scales, norms: &whole, columns: norms.len(), rows, row, first }.score(found);
            }
        }
    }
}

impl Rows {
    /// Replaces the content by `vectors`, which is `(rows, dimensions)` and finite; returns their sizes.
    pub(super) fn pack(&mut self, vectors: &[f32], dimensions: usize) -> Vec<Size> {
        self.steps = dimensions.div_ceil(STEP);
        self.numbers.clear();
        self.numbers.resize(vectors.len() / dimensions * self.steps * STEP, 0);
        self.scales.clear();
        self.offsets.clear();
        let rows = vectors.chunks_exact(dimensions).zip(self.numbers.chunks_exact_mut(self.steps * STEP));
        rows.map(|(vector, numbers)| {
            let numbers = &mut numbers[..dimensions];
            let scale = largest(vector) / 127.0;
            // Of a scale that is hardly more than zero, the inverse would be infinite: all of the vector is residual.
            let inverse = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
            let (sum, squared_residual) = round(vector, scale, inverse, numbers);
            self.scales.push(scale);
            self.offsets.push(128 * sum as i32);
            Size::new(dimensions, squared_norm(vector), squared_residual)
        })
        .collect()
    }
}

vectorized! {
    fn largest(vector: &[f32]) -> f32 {
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
    /// Divides by the scale and rounds to the nearest whole number, ties to even; returns the sum of these, and the squared length
    /// of what rounding took from the vector.
    fn round(vector: &[f32], scale: f32, inverse: f32, numbers: &mut [i8]) -> (f32, f32) {
        // The spacing of f32 is 1 here, and the low byte of the bits is that of the whole number.
        const WHOLE: f32 = 1.5 * (1 << 23) as f32;
        let (mut sums, mut squares) = ([0f32; LANES], [0f32; LANES]);
        let mut round = |lane: usize, x: f32, number: &mut i8| {
            let whole = x * inverse + WHOLE;
            *number = whole.to_bits() as i8;
            let q = whole - WHOLE;
            let residual = x - scale * q;
            sums[lane] += q;
            squares[lane] += residual * residual;
        };
        let mut lanes = numbers.chunks_exact_mut(LANES);
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
}

/// A few rows by one panel.
struct Tile<'a> {
    numbers: &'a [u8],
    scales: &'a [f32],
    norms: &'a [f32],
    /// Centroids of the panel.
    columns: usize,
    rows: &'a Rows,
    row: usize,
    /// The first centroid of the panel.
    first: u32,
}

impl Tile<'_> {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "calls a variant whose instructions are there")]
    fn score(&self, found: &mut Found<'_>) {
        // SAFETY: `Panels::new` looked for these instructions.
        unsafe {
            match self.rows.scales.len() - self.row {
                1 => self.score_rows::<1>(found),
                2 => self.score_rows::<2>(found),
                3 => self.score_rows::<3>(found),
                4 => self.score_rows::<4>(found),
                5 => self.score_rows::<5>(found),
                _ => self.score_rows::<TILE_ROWS>(found),
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn score(&self, _: &mut Found<'_>) {
        unreachable!("panels of bytes are made only where the processor has the instructions");
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vnni")]
    #[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
    fn score_rows<const R: usize>(&self, found: &mut Found<'_>) {
        use std::arch::x86_64::*;
        const PARTS: usize = PANEL / LANES;
        let (steps, row) = (self.rows.steps, self.row);
        let (rows, panel) = (&self.rows.numbers[row * steps * STEP..(row + R) * steps * STEP], self.numbers);
        assert!(panel.len() == steps * PANEL * STEP && self.scales.len() == PANEL && self.norms.len() == PANEL);
        let mut sums: [[__m512i; PARTS]; R] = std::array::from_fn(|r| [_mm512_set1_epi32(-self.rows.offsets[row + r]); PARTS]);
        let (mut left, mut right) = (rows.as_ptr(), panel.as_ptr());
        for _ in 0..steps {
            // SAFETY: `right` is at one of the steps of the panel and `left` at the same step of the first row, and the rows lie
            // `steps` steps apart, as the two slices were measured.
            unsafe {
                let right: [_; PARTS] = std::array::from_fn(|part| _mm512_loadu_si512(right.add(part * LANES * STEP).cast()));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let four = _mm512_set1_epi32(left.add(r * steps * STEP).cast::<i32>().read_unaligned());
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_dpbusd_epi32(*sum, right, four);
                    }
                }
            }
            left = left.wrapping_add(STEP);
            right = right.wrapping_add(PANEL * STEP);
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let twice = _mm512_set1_ps(2.0 * self.rows.scales[row + r]);
            let limit = _mm512_set1_ps(found.limits[row + r]);
            let mut any = 0;
            let scores: [__m512; PARTS] = std::array::from_fn(|part| {
                // SAFETY: both slices have `PARTS` registers.
                let (scales, norms) = unsafe {
                    let at = part * LANES;
                    (_mm512_loadu_ps(self.scales.as_ptr().add(at)), _mm512_loadu_ps(self.norms.as_ptr().add(at)))
                };
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[part]), scales);
                let score = _mm512_fnmadd_ps(product, twice, norms);
                any |= _mm512_cmp_ps_mask::<_CMP_LE_OQ>(score, limit);
                score
            });
            if any != 0 {
                self.note(row + r, scores, found);
            }
        }
    }

    /// Takes the scores of a row, at least one of which is not above its limit.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    #[inline(never)]
    #[expect(unsafe_code, reason = "writes registers through a raw pointer")]
    fn note(&self, row: usize, scores: [std::arch::x86_64::__m512; PANEL / LANES], found: &mut Found<'_>) {
        use std::arch::x86_64::*;
        let lowest = _mm512_min_ps(_mm512_min_ps(scores[0], scores[1]), _mm512_min_ps(scores[2], scores[3]));
        let limit = _mm512_set1_ps(found.lower_limit(row, _mm512_reduce_min_ps(lowest)));
        let (mut numbers, mut mask) = ([0f32; PANEL], 0u64);
        for (part, score) in scores.into_iter().enumerate() {
            mask |= u64::from(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(score, limit)) << (part * LANES);
            // SAFETY: there are as many numbers.
            unsafe { _mm512_storeu_ps(numbers.as_mut_ptr().add(part * LANES), score) }
        }
        // A limit can be infinite, as norms beyond the last centroid are.
        mask &= u64::MAX >> (PANEL - self.columns);
        let candidates = &mut found.candidates[row];
        while mask != 0 {
            let column = mask.trailing_zeros();
            candidates.push(Candidate { index: self.first + column, score: numbers[column as usize] });
            mask &= mask - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::numbers;

    #[test]
    fn bytes_and_their_residual_make_the_vector() {
        let mut vectors = numbers(5 * 37, 3);
        vectors[37..74].fill(0.0);
        vectors[74..111].iter_mut().for_each(|x| *x *= 1e-40);
        vectors[111..148].iter_mut().for_each(|x| *x *= 1e15);
        let mut rows = Rows::default();
        let sizes = rows.pack(&vectors, 37);
        assert_eq!((rows.steps, rows.numbers.len(), sizes.len()), (10, 200, 5));
        for (i, (vector, numbers)) in vectors.chunks(37).zip(rows.numbers.chunks(40)).enumerate() {
            let rounded: Vec<f64> = numbers.iter().map(|q| f64::from(rows.scales[i]) * f64::from(*q)).collect();
            let residual: f64 = vector.iter().zip(&rounded).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum::<f64>().sqrt();
            let norm = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            // Squares of what is hardly more than zero vanish, and are taken for more.
            let more = f64::from(sizes[i].residual) - residual;
            assert!(more >= -1e-5 * residual && more <= 1e-5 * residual + 1e-18, "{i}");
            assert!(residual <= 0.01 * norm + 1e-22 && numbers[37..].iter().all(|q| *q == 0), "{i}");
            assert_eq!(rows.offsets[i], 128 * numbers.iter().map(|q| i32::from(*q)).sum::<i32>());
        }
        assert!(rows.numbers.iter().any(|q| *q == 127 || *q == -127));
    }
}
