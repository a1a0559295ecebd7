//! The nearest of many centroids, the step of clustering that must scale.
//!
//! `|x - c|^2 = |x|^2 - 2 x.c + |c|^2`, so the work is one matrix product per block of rows. Every block has the same
//! shape (the last one is padded with zeros), so that a vector's answer has the same bits wherever it stands.

use rayon::prelude::*;

use crate::matmul::{Matrix, MatrixMut, Target, multiply};
use crate::vectorize::{dot, vectorized};

/// Rows of a block.
const ROWS: usize = 128;
/// Centroids of a block: 128 x 512 scores are 256 KB, which stay in the second-level cache.
const COLUMNS: usize = 512;

/// Points that vectors are compared with.
#[derive(Debug, Clone)]
pub struct Centroids {
    points: Vec<f32>,
    squared_norms: Vec<f32>,
    dimensions: usize,
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
    /// `points` is `(centroids, dimensions)`, with at least one centroid, all finite.
    pub fn new(points: Vec<f32>, dimensions: usize) -> Self {
        assert!(
            dimensions > 0 && !points.is_empty() && points.len().is_multiple_of(dimensions),
            "centroids have a wrong shape"
        );
        let squared_norms = points.chunks_exact(dimensions).map(squared_norm).collect();
        Centroids { points, squared_norms, dimensions }
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
            || (vec![0.0; ROWS * COLUMNS], vec![0.0; ROWS * self.dimensions]),
            |(scores, padded), (found, vectors)| {
                padded[..vectors.len()].copy_from_slice(vectors);
                padded[vectors.len()..].fill(0.0);
                self.nearest_of_block(padded, scores, found);
            },
        );
        found
    }

    fn nearest_of_block(&self, vectors: &[f32], scores: &mut [f32], found: &mut [Nearest]) {
        for (block, points) in self.points.chunks(COLUMNS * self.dimensions).enumerate() {
            let columns = points.len() / self.dimensions;
            let scores = &mut scores[..ROWS * columns];
            multiply(
                MatrixMut::new(scores, ROWS, columns),
                Target::Overwrite,
                -2.0,
                Matrix::new(vectors, ROWS, self.dimensions),
                Matrix::new(points, columns, self.dimensions).transposed(),
            );
            let first = block * COLUMNS;
            let norms = &self.squared_norms[first..first + columns];
            for (best, scores) in found.iter_mut().zip(scores.chunks_exact_mut(columns)) {
                let lowest = add_and_find_lowest(scores, norms);
                if lowest < best.squared_distance {
                    let position = scores.iter().position(|&s| s == lowest).unwrap_or(0);
                    *best = Nearest { index: (first + position) as u32, squared_distance: lowest };
                }
            }
        }
        for (best, vector) in found.iter_mut().zip(vectors.chunks_exact(self.dimensions)) {
            best.squared_distance = (best.squared_distance + squared_norm(vector)).max(0.0);
        }
    }
}

vectorized! {
    /// Adds `norms` to `scores` and returns the lowest sum.
    fn add_and_find_lowest(scores: &mut [f32], norms: &[f32]) -> f32 {
        let mut lowest = f32::INFINITY;
        for (score, norm) in scores.iter_mut().zip(norms) {
            *score += norm;
            lowest = if *score < lowest { *score } else { lowest };
        }
        lowest
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

    fn numbers(n: usize, salt: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i ^ salt).wrapping_mul(2_654_435_761) >> 8) as f32 / (1u32 << 24) as f32 - 0.5).collect()
    }

    #[test]
    fn nearest_equals_the_naive_search_at_odd_sizes() {
        for (rows, count, dimensions) in [(1, 1, 1), (3, 2, 5), (130, 513, 33), (257, 1030, 64), (0, 4, 8)] {
            let (vectors, points) = (numbers(rows * dimensions, 1), numbers(count * dimensions, 99));
            let found = Centroids::new(points.clone(), dimensions).nearest(&vectors);
            assert_eq!(found.len(), rows);
            for (found, vector) in found.iter().zip(vectors.chunks_exact(dimensions)) {
                let distances: Vec<f32> = points.chunks_exact(dimensions).map(|p| squared_distance(vector, p)).collect();
                let lowest = distances.iter().copied().fold(f32::INFINITY, f32::min);
                assert!((distances[found.index as usize] - lowest).abs() < 1e-5);
                assert!((found.squared_distance - lowest).abs() < 1e-5);
            }
        }
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
