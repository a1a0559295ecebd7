//! The nearest of many centroids, the step of clustering that must scale.
//!
//! `|x - c|^2 = |x|^2 - 2 x.c + |c|^2`, so the work is one matrix product per block of rows. It runs in `bf16` where the
//! processor multiplies that; then every centroid that could be the nearest, by the bound of the rounding, is looked at again
//! in `f32`, with sums in one order. So the answers have the same bits on every processor, wherever a vector stands:
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

/// Rows of a block.
const ROWS: usize = 128;
/// Centroids of a block: 128 x 512 scores are 256 KB, which stay in the second-level cache.
const COLUMNS: usize = 512;

/// Points that vectors are compared with.
#[derive(Debug)]
pub struct Centroids {
    points: Vec<f32>,
    squared_norms: Vec<f32>,
    dimensions: usize,
    blocks: Vec<Panels>, // (dimensions, COLUMNS) each
    precision: Precision,
    /// The longest centroid, and the longest difference between a centroid and what it is rounded to.
    largest: Size,
}

/// Length of a vector, and of what rounding takes from it.
#[derive(Debug, Clone, Copy, Default)]
struct Size {
    norm: f32,
    residual: f32,
}

impl Size {
    fn of(vector: &[f32], precision: Precision) -> Size {
        let residual = if precision == Precision::Bf16 { squared_residual(vector).sqrt() } else { 0.0 };
        Size { norm: squared_norm(vector).sqrt(), residual }
    }
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
    /// `points` is `(centroids, dimensions)`, with at least one centroid, all finite. Vectors far below 1e-15 are told apart
    /// only as far as their squares are normal numbers.
    pub fn new(points: Vec<f32>, dimensions: usize) -> Self {
        let precision = if Isa::current() >= Isa::Avx512Bf16 { Precision::Bf16 } else { Precision::F32 };
        Self::in_precision(precision, points, dimensions)
    }

    /// [`Centroids::new`] with the first look in `precision`: it decides the time, and not the answers.
    pub fn in_precision(precision: Precision, points: Vec<f32>, dimensions: usize) -> Self {
        assert!(
            dimensions > 0 && !points.is_empty() && points.len().is_multiple_of(dimensions),
            "centroids have a wrong shape"
        );
        let blocks = points.chunks(COLUMNS * dimensions).map(|points| {
            let mut panels = Panels::new(precision);
            panels.pack(Matrix::new(points, points.len() / dimensions, dimensions).transposed());
            panels
        });
        let largest = points.chunks_exact(dimensions).fold(Size::default(), |largest, point| {
            let size = Size::of(point, precision);
            Size { norm: largest.norm.max(size.norm), residual: largest.residual.max(size.residual) }
        });
        let squared_norms = points.chunks_exact(dimensions).map(squared_norm).collect();
        Centroids { blocks: blocks.collect(), points, squared_norms, dimensions, precision, largest }
    }

    /// Number of centroids.
    pub fn count(&self) -> usize {
        self.squared_norms.len()
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
            || (vec![0.0; ROWS * COLUMNS], vec![Vec::new(); ROWS]),
            |(scores, candidates), (found, vectors)| {
                self.find_candidates(vectors, scores, &mut candidates[..found.len()]);
                let rows = found.iter_mut().zip(vectors.chunks_exact(self.dimensions)).zip(candidates);
                rows.for_each(|((found, vector), candidates)| *found = self.nearest_of(vector, candidates));
            },
        );
        found
    }

    /// For each of `vectors`, the points whose [`squared_distance`] from it is below their limit, in their order, with it. There is
    /// a limit for each point, and `index` is the point.
    pub fn closer(&self, vectors: &[f32], limits: &[f32]) -> Vec<Vec<Nearest>> {
        assert!(vectors.len().is_multiple_of(self.dimensions) && limits.len() == self.count(), "a wrong shape");
        let rows = vectors.len() / self.dimensions;
        let of_block = |(block, panels): (usize, &Panels)| {
            let first = block * COLUMNS;
            let norms = self.squared_norms[first..].iter().zip(&limits[first..]).take(COLUMNS);
            let norms: Vec<f32> = norms.map(|(norm, limit)| norm - limit).collect();
            let mut scores = vec![0.0; rows * norms.len()];
            let left = Matrix::new(vectors, rows, self.dimensions);
            panels.multiply(MatrixMut::new(&mut scores, rows, norms.len()), Target::Overwrite, left);
            let mut candidates = Vec::new();
            let closer =
                vectors.chunks_exact(self.dimensions).zip(scores.chunks_exact_mut(norms.len())).map(|(vector, scores)| {
                    score(scores, &norms);
                    candidates.clear();
                    collect_up_to(scores, self.reach(vector), first as u32, &mut candidates);
                    let found = candidates.iter().map(|candidate| {
                        let point = &self.points[candidate.index as usize * self.dimensions..][..self.dimensions];
                        Nearest { index: candidate.index, squared_distance: squared_distance(point, vector) }
                    });
                    found.filter(|found| found.squared_distance < limits[found.index as usize]).collect::<Vec<_>>()
                });
            closer.collect::<Vec<_>>()
        };
        let blocks: Vec<_> = self.blocks.par_iter().enumerate().map(of_block).collect();
        (0..rows).map(|row| blocks.iter().flat_map(|found| &found[row]).copied().collect()).collect()
    }

    /// The highest score, less the limit, of a point that can be closer than its limit.
    fn reach(&self, vector: &[f32]) -> f32 {
        let size = Size::of(vector, self.precision);
        let lengths = size.norm + self.largest.norm;
        // As in `doubt`, and for the distance that is compared with the limit in the end, which is a sum in f32 too.
        let summing = (3 * self.dimensions + 8) as f32 * f32::EPSILON * lengths * lengths;
        2.0 * self.rounding(size) + summing - squared_norm(vector)
    }

    /// Leaves, for each of the `vectors` of one block, the centroids that can be the nearest, in their order.
    fn find_candidates(&self, vectors: &[f32], scores: &mut [f32], candidates: &mut [Vec<Candidate>]) {
        let rows = candidates.len();
        let within: Vec<f32> = vectors.chunks_exact(self.dimensions).map(|vector| self.doubt(vector)).collect();
        let mut lowest = vec![f32::INFINITY; rows];
        candidates.iter_mut().for_each(Vec::clear);
        for (block, panels) in self.blocks.iter().enumerate() {
            let first = block * COLUMNS;
            let norms = &self.squared_norms[first..(first + COLUMNS).min(self.count())];
            let scores = &mut scores[..rows * norms.len()];
            let vectors = Matrix::new(vectors, rows, self.dimensions);
            panels.multiply(MatrixMut::new(scores, rows, norms.len()), Target::Overwrite, vectors);
            for (row, scores) in scores.chunks_exact_mut(norms.len()).enumerate() {
                lowest[row] = score(scores, norms).min(lowest[row]);
                collect_up_to(scores, lowest[row] + within[row], first as u32, &mut candidates[row]);
            }
        }
        for ((candidates, lowest), within) in candidates.iter_mut().zip(lowest).zip(within) {
            candidates.retain(|candidate| candidate.score <= lowest + within);
        }
    }

    /// How far the score of the nearest centroid can be above the lowest score: twice the bound of one score.
    fn doubt(&self, vector: &[f32]) -> f32 {
        let size = Size::of(vector, self.precision);
        // A sum of n numbers in f32, in whatever order, is off by at most n roundings of the sum of their magnitudes.
        let summing = (self.dimensions + 4) as f32 * f32::EPSILON * (size.norm + self.largest.norm) * self.largest.norm;
        4.0 * (self.rounding(size) + summing)
    }

    /// The most that rounding takes from the product of a vector and a centroid.
    fn rounding(&self, vector: Size) -> f32 {
        vector.residual * self.largest.norm + (vector.norm + vector.residual) * self.largest.residual
    }

    /// The candidate at the lowest distance, the first one of several.
    fn nearest_of(&self, vector: &[f32], candidates: &[Candidate]) -> Nearest {
        let mut best = Nearest { index: 0, squared_distance: f32::INFINITY };
        for candidate in candidates {
            let at = candidate.index as usize;
            let point = &self.points[at * self.dimensions..(at + 1) * self.dimensions];
            let squared_distance = self.squared_norms[at] - 2.0 * product(vector, point);
            if squared_distance < best.squared_distance {
                best = Nearest { index: candidate.index, squared_distance };
            }
        }
        best.squared_distance = (best.squared_distance + squared_norm(vector)).max(0.0);
        best
    }
}

vectorized! {
    /// Turns products into scores, `norm - 2 product`, and returns the lowest.
    fn score(products: &mut [f32], norms: &[f32]) -> f32 {
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

    const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

    #[test]
    fn nearest_equals_the_naive_search_at_odd_sizes() {
        for (rows, count, dimensions) in [(1, 1, 1), (3, 2, 5), (130, 513, 33), (257, 1030, 64), (0, 4, 8)] {
            let (vectors, points) = (numbers(rows * dimensions, 1), numbers(count * dimensions, 99));
            for precision in BOTH {
                let found = Centroids::in_precision(precision, points.clone(), dimensions).nearest(&vectors);
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
                for precision in BOTH {
                    let centroids = Centroids::in_precision(precision, points.clone(), dimensions);
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
    fn the_bits_do_not_depend_on_the_precision() {
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
        let [f32_found, bf16_found] =
            BOTH.map(|precision| Centroids::in_precision(precision, points.clone(), dimensions).nearest(&vectors));
        assert_eq!(f32_found, bf16_found);
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
