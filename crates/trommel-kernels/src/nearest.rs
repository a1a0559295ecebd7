//! The nearest of many centroids, the step of clustering that must scale.
//!
//! `|x - c|^2 = |x|^2 - 2 x.c + |c|^2`, so the work is one matrix product per block of rows. Its first look is in fewer bits,
//! where the processor multiplies those faster; then every centroid that could be the nearest, by the bound of the rounding, is
//! looked at again in `f32`, with sums in one order. So the answers have the same bits on every processor, wherever a vector
//! stands:
//!
//! ```text
//!   score(c) = |c|^2 - 2 x'.c'          x', c' rounded
//!   |score(c) - exact(c)| <= 2 (|x - x'| |c| + |x'| |c - c'|) + (what sums in f32 lose)      [Cauchy-Schwarz]
//!   candidates: score(c) <= lowest score + 2 * bound
//! ```

use rayon::prelude::*;

use crate::bf16::round_to_bf16;
use crate::isa::Isa;
use crate::matmul::{Matrix, MatrixMut, Target};
use crate::panels::{Panels, Precision};
use crate::vectorize::{LANES, dot, fold, vectorized};

/// The first look in whole numbers.
mod integers;

use integers::Format;

/// Rows of a block.
const ROWS: usize = 128;
/// Centroids of a block. In floats, 128 x 512 scores are 256 KB, which stay in the second-level cache.
const COLUMNS: usize = 512;

/// The numbers of the first look: they decide the time, and not the answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstLook {
    /// As they are.
    F32,
    /// Rounded to 8 bits of mantissa.
    Bf16,
    /// Rounded to 8-bit integers, each vector on a scale of its own; for `Isa::Avx512Vnni` and above.
    Int8,
    /// The same with integers of at most 16 bits, for `Isa::Avx2` and above.
    Int16,
}

impl FirstLook {
    /// Those that the processor has for vectors of so many dimensions.
    pub fn all(dimensions: usize) -> Vec<FirstLook> {
        let integers = [(FirstLook::Int8, Format::Int8), (FirstLook::Int16, Format::Int16)];
        let integers = integers.into_iter().filter(|(_, format)| format.fits(dimensions)).map(|(look, _)| look);
        [FirstLook::F32, FirstLook::Bf16].into_iter().chain(integers).collect()
    }

    /// The fastest for the processor and vectors of so many dimensions.
    fn fastest(dimensions: usize) -> FirstLook {
        match Isa::current() {
            // Tiles multiply several times as many pairs as registers multiply bytes.
            Isa::Amx => FirstLook::Bf16,
            _ if Format::Int8.fits(dimensions) => FirstLook::Int8,
            isa if isa >= Isa::Avx512Bf16 => FirstLook::Bf16,
            // In AVX-512 they are no faster than floats.
            Isa::Avx2 if Format::Int16.fits(dimensions) => FirstLook::Int16,
            _ => FirstLook::F32,
        }
    }

    /// The fastest one of more bits.
    fn with_more_bits(self) -> FirstLook {
        match self {
            FirstLook::Int8 if Isa::current() >= Isa::Avx512Bf16 => FirstLook::Bf16,
            _ => FirstLook::F32,
        }
    }
}

/// Points that vectors are compared with.
#[derive(Debug)]
pub struct Centroids {
    points: Vec<f32>,
    squared_norms: Vec<f32>,
    dimensions: usize,
    look: FirstLook,
    rounded: Rounded,
    sizes: Vec<Size>,
    /// The longest centroid, and the longest difference between a centroid and what it is rounded to.
    largest: Size,
}

/// The centroids of the first look.
#[derive(Debug)]
enum Rounded {
    /// Blocks of (dimensions, `COLUMNS`) each.
    Floats(Vec<Panels>, Precision),
    Integers(integers::Panels),
}

/// Length of a vector, and of what rounding takes from it.
#[derive(Debug, Clone, Copy, Default)]
struct Size {
    squared_norm: f32,
    norm: f32,
    residual: f32,
}

impl Size {
    fn new(dimensions: usize, squared_norm: f32, squared_residual: f32) -> Size {
        // A square may be less than a normal number by as much as that, and lengths are not to be underestimated.
        let lost = dimensions as f32 * f32::MIN_POSITIVE;
        Size { squared_norm, norm: (squared_norm + lost).sqrt(), residual: (squared_residual + lost).sqrt() }
    }

    fn of(vector: &[f32], precision: Precision) -> Size {
        let squared_norm = squared_norm(vector);
        match precision {
            Precision::F32 => Size { residual: 0.0, ..Size::new(vector.len(), squared_norm, 0.0) },
            Precision::Bf16 => Size::new(vector.len(), squared_norm, squared_residual(vector)),
        }
    }

    fn largest(sizes: &[Size]) -> Size {
        sizes.iter().fold(Size::default(), |largest, size| Size {
            squared_norm: largest.squared_norm.max(size.squared_norm),
            norm: largest.norm.max(size.norm),
            residual: largest.residual.max(size.residual),
        })
    }
}

/// What was found of some rows.
struct Found<'a> {
    /// The highest score of a candidate, for each row.
    limits: &'a mut [f32],
    /// How far a candidate may be above the lowest score of its row, which lowers the limit.
    within: Option<&'a [f32]>,
    candidates: &'a mut [Vec<Candidate>],
}

impl Found<'_> {
    /// Lowers the limit of a row, one of whose scores is `lowest`, and returns it.
    fn lower_limit(&mut self, row: usize, lowest: f32) -> f32 {
        let limit = &mut self.limits[row];
        if let Some(within) = self.within {
            *limit = limit.min(lowest + within[row]);
        }
        *limit
    }
}

/// Memory for a block of rows.
#[derive(Debug, Default)]
struct Scratch {
    scores: Vec<f32>,
    rows: integers::Rows,
}

/// A centroid that may be the nearest.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    index: u32,
    score: f32,
}

/// The nearest centroid of one vector.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nearest {
    /// Row of the centroid; the first one of several at the same distance.
    pub index: u32,
    /// Squared Euclidean distance, at least 0.
    pub squared_distance: f32,
}

impl Centroids {
    /// `points` is `(centroids, dimensions)`, with at least one centroid, and of finite squared lengths. Vectors far below 1e-15 are
    /// told apart only as far as their squares are normal numbers.
    pub fn new(points: Vec<f32>, dimensions: usize) -> Self {
        let mut centroids = Self::with_first_look(FirstLook::fastest(dimensions), points, dimensions);
        while centroids.leaves_many() {
            centroids = Self::with_first_look(centroids.look.with_more_bits(), centroids.points, dimensions);
        }
        centroids
    }

    /// Whether the first look has too few bits for these centroids, so that many would stay candidates: it takes as much from a
    /// product as they differ by, or one long centroid widens the doubt about all. Never so of `f32`.
    fn leaves_many(&self) -> bool {
        let mean = |part: fn(&Size) -> f32| self.sizes.iter().map(part).sum::<f32>() / self.count() as f32;
        let norm = mean(|size| size.norm);
        let mut middle = vec![0.0; self.dimensions];
        for point in self.points.chunks_exact(self.dimensions) {
            middle.iter_mut().zip(point).for_each(|(sum, x)| *sum += x / self.count() as f32);
        }
        let variance = mean(|size| size.squared_norm) - squared_norm(&middle);
        let residual = mean(|size| size.residual);
        residual > 0.0 && (residual * norm > 0.03 * variance || self.largest.norm > 16.0 * norm)
    }

    /// [`Centroids::new`] with another first look, one that the processor has.
    pub fn with_first_look(look: FirstLook, points: Vec<f32>, dimensions: usize) -> Self {
        assert!(
            dimensions > 0 && !points.is_empty() && points.len().is_multiple_of(dimensions),
            "centroids have a wrong shape"
        );
        let (rounded, sizes) = match look {
            FirstLook::F32 => Self::in_floats(Precision::F32, &points, dimensions),
            FirstLook::Bf16 => Self::in_floats(Precision::Bf16, &points, dimensions),
            FirstLook::Int8 => Self::in_integers(Format::Int8, &points, dimensions),
            FirstLook::Int16 => Self::in_integers(Format::Int16, &points, dimensions),
        };
        let squared_norms = sizes.iter().map(|size| size.squared_norm).collect();
        let largest = Size::largest(&sizes);
        Centroids { points, squared_norms, dimensions, look, rounded, sizes, largest }
    }

    fn in_floats(precision: Precision, points: &[f32], dimensions: usize) -> (Rounded, Vec<Size>) {
        let blocks = points.chunks(COLUMNS * dimensions).map(|points| {
            let mut panels = Panels::new(precision);
            panels.pack(Matrix::new(points, points.len() / dimensions, dimensions).transposed());
            panels
        });
        let sizes = points.chunks_exact(dimensions).map(|point| Size::of(point, precision)).collect();
        (Rounded::Floats(blocks.collect(), precision), sizes)
    }

    fn in_integers(format: Format, points: &[f32], dimensions: usize) -> (Rounded, Vec<Size>) {
        let (panels, sizes) = integers::Panels::new(format, points, dimensions);
        (Rounded::Integers(panels), sizes)
    }

    /// Number of centroids.
    pub fn count(&self) -> usize {
        self.sizes.len()
    }

    /// The numbers, `(centroids, dimensions)`.
    pub fn points(&self) -> &[f32] {
        &self.points
    }

    /// The nearest centroid of each of `vectors`, which is `(rows, dimensions)` and finite.
    pub fn nearest(&self, vectors: &[f32]) -> Vec<Nearest> {
        assert!(vectors.len().is_multiple_of(self.dimensions), "vectors have a wrong shape");
        let mut found = vec![Nearest { index: 0, squared_distance: f32::INFINITY }; vectors.len() / self.dimensions];
        found.par_chunks_mut(ROWS).zip(vectors.par_chunks(ROWS * self.dimensions)).for_each_init(
            || (Scratch::default(), vec![Vec::new(); ROWS]),
            |(scratch, candidates), (found, vectors)| {
                let sizes = self.find_candidates(vectors, scratch, &mut candidates[..found.len()]);
                let rows = vectors.chunks_exact(self.dimensions).zip(sizes).zip(candidates);
                found.iter_mut().zip(rows).for_each(|(found, ((vector, size), candidates))| {
                    *found = self.nearest_of(vector, size, candidates);
                });
            },
        );
        found
    }

    /// For each of `vectors`, the points whose [`squared_distance`] from it is below their limit, in their order, with it. There is
    /// a limit for each point, and `index` is the point.
    pub fn closer(&self, vectors: &[f32], limits: &[f32]) -> Vec<Vec<Nearest>> {
        assert!(vectors.len().is_multiple_of(self.dimensions) && limits.len() == self.count(), "a wrong shape");
        let rows = vectors.len() / self.dimensions;
        let mut packed = integers::Rows::default();
        let sizes = self.sizes(vectors, &mut packed);
        let reach: Vec<f32> = sizes.into_iter().map(|size| self.reach(size)).collect();
        let of_block = |first: usize| {
            let limits = &limits[first..(first + COLUMNS).min(self.count())];
            let shifted: Vec<f32> = self.squared_norms[first..].iter().zip(limits).map(|(norm, limit)| norm - limit).collect();
            let (mut reach, mut candidates) = (reach.clone(), vec![Vec::new(); rows]);
            let mut found = Found { limits: &mut reach, within: None, candidates: &mut candidates };
            self.score(vectors, &packed, first, &shifted, &mut Vec::new(), &mut found);
            let closer = vectors.chunks_exact(self.dimensions).zip(candidates).map(|(vector, candidates)| {
                let found = candidates.into_iter().map(|candidate| {
                    let point = &self.points[candidate.index as usize * self.dimensions..][..self.dimensions];
                    Nearest { index: candidate.index, squared_distance: squared_distance(point, vector) }
                });
                found.filter(|found| found.squared_distance < limits[found.index as usize - first]).collect::<Vec<_>>()
            });
            closer.collect::<Vec<_>>()
        };
        let blocks = (0..self.count().div_ceil(COLUMNS)).into_par_iter().map(|block| of_block(block * COLUMNS));
        let blocks: Vec<_> = blocks.collect();
        (0..rows).map(|row| blocks.iter().flat_map(|found| &found[row]).copied().collect()).collect()
    }

    /// The sizes of `vectors`, rounded as centroids are. Whole numbers go to `packed`; products of others round by themselves.
    fn sizes(&self, vectors: &[f32], packed: &mut integers::Rows) -> Vec<Size> {
        match &self.rounded {
            Rounded::Floats(_, precision) => {
                vectors.chunks_exact(self.dimensions).map(|vector| Size::of(vector, *precision)).collect()
            }
            Rounded::Integers(panels) => panels.pack(packed, vectors, self.dimensions),
        }
    }

    /// Offers to `found` the scores `norm - 2 x.c` of one block of centroids, from `first` on.
    fn score(
        &self,
        vectors: &[f32],
        packed: &integers::Rows,
        first: usize,
        norms: &[f32],
        scores: &mut Vec<f32>,
        found: &mut Found<'_>,
    ) {
        let blocks = match &self.rounded {
            Rounded::Integers(panels) => return panels.score(packed, first, norms, found),
            Rounded::Floats(blocks, _) => blocks,
        };
        let rows = vectors.len() / self.dimensions;
        scores.resize(rows * norms.len(), 0.0);
        let products = MatrixMut::new(scores, rows, norms.len());
        blocks[first / COLUMNS].multiply(products, Target::Overwrite, Matrix::new(vectors, rows, self.dimensions));
        for (row, scores) in scores.chunks_exact_mut(norms.len()).enumerate() {
            let limit = found.lower_limit(row, to_scores(scores, norms));
            collect_up_to(scores, limit, first as u32, &mut found.candidates[row]);
        }
    }

    /// The highest score, less the limit, of a point that can be closer than its limit.
    fn reach(&self, size: Size) -> f32 {
        let lengths = size.norm + self.largest.norm;
        // As in `bound`, and for the distance that is compared with the limit in the end, which is a sum in f32 too.
        let summing = (3 * self.dimensions + 8) as f32 * f32::EPSILON * lengths * lengths;
        2.0 * rounding(size, self.largest) + summing - size.squared_norm
    }

    /// Leaves, for each of the `vectors` of one block, the centroids that can be the nearest, in their order; returns the sizes of
    /// the vectors.
    fn find_candidates(&self, vectors: &[f32], scratch: &mut Scratch, candidates: &mut [Vec<Candidate>]) -> Vec<Size> {
        let sizes = self.sizes(vectors, &mut scratch.rows);
        // The nearest centroid's score is at most so far above the lowest one.
        let within: Vec<f32> = sizes.iter().map(|size| 2.0 * self.bound(*size, self.largest)).collect();
        let mut limits = vec![f32::INFINITY; candidates.len()];
        candidates.iter_mut().for_each(Vec::clear);
        let mut found = Found { limits: &mut limits, within: Some(&within), candidates };
        for first in (0..self.count()).step_by(COLUMNS) {
            let norms = &self.squared_norms[first..(first + COLUMNS).min(self.count())];
            self.score(vectors, &scratch.rows, first, norms, &mut scratch.scores, &mut found);
        }
        for (row, size) in sizes.iter().enumerate() {
            let candidates = &mut found.candidates[row];
            candidates.retain(|candidate| candidate.score <= found.limits[row]);
            if candidates.len() > 1 {
                // Each by its own bound now.
                let bound = |candidate: &Candidate| self.bound(*size, self.sizes[candidate.index as usize]);
                let limit = candidates.iter().map(|c| c.score + bound(c)).fold(f32::INFINITY, f32::min);
                candidates.retain(|candidate| candidate.score - bound(candidate) <= limit);
            }
        }
        sizes
    }

    /// How far the score of a centroid can be from the exact one.
    fn bound(&self, vector: Size, centroid: Size) -> f32 {
        // A sum of n numbers in f32, in whatever order, is off by at most n roundings of the sum of their magnitudes. So is the exact
        // one, and `EPSILON` is two of them. A sum of whole numbers is off by nothing, is rounded, and multiplied by two scales.
        let lengths = (vector.norm + centroid.norm) * centroid.norm;
        2.0 * (rounding(vector, centroid) + (self.dimensions + 4) as f32 * f32::EPSILON * lengths)
    }

    /// The candidate at the lowest distance, the first one of several.
    fn nearest_of(&self, vector: &[f32], size: Size, candidates: &[Candidate]) -> Nearest {
        let mut best = Nearest { index: 0, squared_distance: f32::INFINITY };
        for candidate in candidates {
            let at = candidate.index as usize;
            let point = &self.points[at * self.dimensions..(at + 1) * self.dimensions];
            let squared_distance = self.squared_norms[at] - 2.0 * product(vector, point);
            if squared_distance < best.squared_distance {
                best = Nearest { index: candidate.index, squared_distance };
            }
        }
        best.squared_distance = (best.squared_distance + size.squared_norm).max(0.0);
        best
    }
}

/// The most that rounding takes from the product of two vectors. [Cauchy-Schwarz]
fn rounding(a: Size, b: Size) -> f32 {
    a.residual * b.norm + (a.norm + a.residual) * b.residual
}

vectorized! {
    /// Turns products into scores, `norm - 2 product`, and returns the lowest.
    fn to_scores(products: &mut [f32], norms: &[f32]) -> f32 {
        let mut lowest = [f32::INFINITY; LANES];
        let (mut lanes, norm_lanes) = (products.chunks_exact_mut(LANES), norms.chunks_exact(LANES));
        let norms_left = norm_lanes.remainder();
        for (products, norms) in (&mut lanes).zip(norm_lanes) {
            for lane in 0..LANES {
                products[lane] = norms[lane] - 2.0 * products[lane];
                lowest[lane] = if products[lane] < lowest[lane] { products[lane] } else { lowest[lane] };
            }
        }
        for (product, norm) in lanes.into_remainder().iter_mut().zip(norms_left) {
            *product = norm - 2.0 * *product;
            lowest[0] = if *product < lowest[0] { *product } else { lowest[0] };
        }
        lowest.into_iter().fold(f32::INFINITY, f32::min)
    }
}

/// Appends the scores of at most `limit`; the first one belongs to the centroid `first`.
fn collect_up_to(scores: &[f32], limit: f32, first: u32, candidates: &mut Vec<Candidate>) {
    for (chunk, scores) in scores.chunks(4 * LANES).enumerate() {
        if any_up_to(scores, limit) {
            let first = first + (chunk * 4 * LANES) as u32;
            let these = scores.iter().zip(first..).filter(|(score, _)| **score <= limit);
            candidates.extend(these.map(|(&score, index)| Candidate { index, score }));
        }
    }
}

vectorized! {
    fn any_up_to(scores: &[f32], limit: f32) -> bool {
        scores.iter().fold(false, |any, score| any | (*score <= limit))
    }
}

vectorized! {
    fn product(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
}

vectorized! {
    /// The squared length of what rounding to `bf16` takes from a vector.
    fn squared_residual(vector: &[f32]) -> f32 {
        let mut sums = [0f32; LANES];
        for vector in vector.chunks(LANES) {
            for (sum, x) in sums.iter_mut().zip(vector) {
                let residual = x - round_to_bf16(*x);
                *sum += residual * residual;
            }
        }
        fold(sums)
    }
}

vectorized! {
    /// The sum of the squares of a vector.
    pub fn squared_norm(vector: &[f32]) -> f32 {
        dot(vector, vector)
    }
}

vectorized! {
    /// The squared Euclidean distance of two vectors of one length.
    pub fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [0f32; 16];
        let (a_lanes, b_lanes) = (a.chunks_exact(16), b.chunks_exact(16));
        let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| (x - y) * (x - y)).sum();
        for (x, y) in a_lanes.zip(b_lanes) {
            for lane in 0..16 {
                let difference = x[lane] - y[lane];
                sums[lane] += difference * difference;
            }
        }
        crate::vectorize::fold(sums) + tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::numbers;

    #[test]
    fn nearest_equals_the_naive_search_at_odd_sizes() {
        for (rows, count, dimensions) in [(1, 1, 1), (3, 2, 5), (130, 513, 33), (257, 1030, 64), (0, 4, 8)] {
            let (vectors, points) = (numbers(rows * dimensions, 1), numbers(count * dimensions, 99));
            for look in FirstLook::all(1) {
                let found = Centroids::with_first_look(look, points.clone(), dimensions).nearest(&vectors);
                assert_eq!(found.len(), rows);
                for (found, vector) in found.iter().zip(vectors.chunks_exact(dimensions)) {
                    let distances: Vec<f32> = points.chunks_exact(dimensions).map(|p| squared_distance(vector, p)).collect();
                    let lowest = distances.iter().copied().fold(f32::INFINITY, f32::min);
                    assert!((distances[found.index as usize] - lowest).abs() < 1e-5);
                    assert!((found.squared_distance - lowest).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn closer_points_are_those_of_the_naive_search() {
        for (count, dimensions) in [(1, 1), (2, 5), (513, 33), (1030, 64)] {
            for scale in [1e-6, 1.0, 40.0] {
                let vector: Vec<f32> = numbers(dimensions, 1).iter().map(|x| x * scale).collect();
                let mut points: Vec<f32> = numbers(count * dimensions, 99).iter().map(|x| x * scale).collect();
                // A long one, which widens the doubt about all.
                points[..dimensions].iter_mut().for_each(|x| *x *= 100.0);
                let distance = |i: usize| squared_distance(&points[i * dimensions..][..dimensions], &vector);
                // By one unit in the last place: a limit is met, or missed, or there is none.
                let limit = |i: usize| [distance(i), distance(i).next_up(), f32::INFINITY][i % 3];
                let limits: Vec<f32> = (0..count).map(limit).collect();
                let of = |i: usize| Nearest { index: i as u32, squared_distance: distance(i) };
                let wanted: Vec<Nearest> = (0..count).filter(|i| i % 3 > 0).map(of).collect();
                for look in FirstLook::all(1) {
                    let centroids = Centroids::with_first_look(look, points.clone(), dimensions);
                    assert_eq!(
                        centroids.closer(&[vector.clone(), vector.clone()].concat(), &limits),
                        [wanted.clone(), wanted.clone()]
                    );
                    assert!(centroids.closer(&[], &limits).is_empty());
                }
            }
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_first_look() {
        // Centroids that differ by less than a `bf16` can tell, some of them large, and rows at many scales.
        let (dimensions, count) = (40, 600);
        let base = numbers(dimensions, 3);
        let points: Vec<f32> = numbers(count * dimensions, 4)
            .iter()
            .enumerate()
            .map(|(i, x)| (base[i % dimensions] + 1e-3 * x) * if i / dimensions == 77 { 50.0 } else { 1.0 })
            .collect();
        let vectors: Vec<f32> = numbers(200 * dimensions, 5)
            .iter()
            .enumerate()
            .map(|(i, x)| (base[i % dimensions] + 1e-3 * x) * [1.0, 0.0, 40.0, 1e-6][i / dimensions % 4])
            .collect();
        let found = |look| Centroids::with_first_look(look, points.clone(), dimensions).nearest(&vectors);
        for look in FirstLook::all(1) {
            assert!(found(look) == found(FirstLook::F32), "{look:?}");
        }
    }

    #[test]
    fn squares_that_are_no_normal_numbers_change_no_bits_and_infinite_ones_end_no_program() {
        let dimensions = 64;
        let scaled = |rows: usize, salt: u64, scale: f32| -> Vec<f32> {
            numbers(rows * dimensions, salt).iter().map(|x| x * scale).collect()
        };
        for count in [3, 64, 600] {
            for (of_points, of_vectors) in
                [(1e-24, 1.0), (1e-21, 1e-21), (1e-23, 1e-23), (1e12, 1e-12), (1e19, 1.0), (1.0, 1e19)]
            {
                let found = |look| {
                    let centroids = Centroids::with_first_look(look, scaled(count, 1, of_points), dimensions);
                    let vectors = scaled(200, 2, of_vectors);
                    (centroids.nearest(&vectors), centroids.closer(&vectors, &vec![1.0; count]).len())
                };
                for look in FirstLook::all(1) {
                    let (found, expected) = (found(look), found(FirstLook::F32));
                    assert!(of_points.max(of_vectors) > 1e18 || found == expected, "{look:?} {count} {of_points} {of_vectors}");
                }
            }
        }
    }

    #[test]
    fn long_centroids_and_large_numbers_are_looked_at_in_more_bits() {
        let (dimensions, count) = (64, 100);
        let look = |change: &dyn Fn(&mut [f32])| {
            let mut points = numbers(count * dimensions, 1);
            points.chunks_exact_mut(dimensions).for_each(change);
            Centroids::new(points, dimensions).look
        };
        let fastest = FirstLook::fastest(dimensions);
        assert_eq!(look(&|_| {}), fastest);
        assert_ne!(look(&|point| point[0] = 40.0), FirstLook::Int8);
        assert_eq!(look(&|point| point.iter_mut().for_each(|x| *x = 1.0 + 1e-3 * *x)), FirstLook::F32);
    }

    #[test]
    fn an_answer_does_not_depend_on_its_place() {
        let (dimensions, rows) = (48, 300);
        let vectors = numbers(rows * dimensions, 7);
        let centroids = Centroids::new(numbers(700 * dimensions, 8), dimensions);
        let together = centroids.nearest(&vectors);
        for row in [0, 1, 127, 128, 299] {
            let alone = centroids.nearest(&vectors[row * dimensions..(row + 1) * dimensions]);
            assert_eq!(alone[0], together[row]);
        }
    }

    #[test]
    fn the_first_of_equal_centroids_wins() {
        let centroids = Centroids::new(vec![1.0, 0.0, 1.0, 0.0], 2);
        assert_eq!(centroids.nearest(&[1.0, 0.0]), [Nearest { index: 0, squared_distance: 0.0 }]);
    }
}
