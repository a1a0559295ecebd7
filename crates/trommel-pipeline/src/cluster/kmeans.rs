//! Flat k-means on a sample that fits in memory: k-means++ start, Lloyd's rounds, and balancing.
//!
//! Deterministic at any thread count: distances come from blocks of one shape, and each centroid is the sum of its rows
//! in row order.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use trommel_core::seed::Stream;
use trommel_kernels::nearest::{Centroids, Nearest};

/// How to fit.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Clusters, at least 1; the result has fewer when the sample has fewer distinct rows.
    pub k: usize,
    /// Rounds after the start.
    pub iterations: u32,
    /// A cluster above this multiple of the uniform share is split and the smallest one dissolved (CR); off if `None`.
    pub balance: Option<f64>,
    /// The source of the start.
    pub stream: Stream,
}

/// Fits k-means to `sample`, which is `(rows, dimensions)` with at least one row.
pub fn fit(sample: &[f32], dimensions: usize, settings: &Settings) -> Centroids {
    let mut generator = settings.stream.generator();
    let points = start(sample, dimensions, settings.k, &mut generator);
    refine(points, sample, dimensions, settings, &mut generator)
}

/// The rounds of [`fit`], from the centroids `points`; `generator` chooses how a large cluster is split.
pub fn refine(
    points: Vec<f32>,
    sample: &[f32],
    dimensions: usize,
    settings: &Settings,
    generator: &mut ChaCha8Rng,
) -> Centroids {
    let mut centroids = Centroids::new(points, dimensions);
    for round in 0..settings.iterations {
        let nearest = centroids.nearest(sample);
        let members = members(&nearest, centroids.count());
        let mut points = means(sample, dimensions, &members);
        revive_empty(sample, dimensions, &nearest, &members, &mut points);
        // The last rounds only settle what the splits have stirred.
        if let Some(limit) = settings.balance.filter(|_| round + 5 < settings.iterations) {
            split_large(sample, dimensions, &members, limit, &mut points, generator);
        }
        centroids = Centroids::new(points, dimensions);
    }
    centroids
}

/// Greedy k-means++ [Arthur and Vassilvitskii 2007, section 5]: each further centroid is the best of a few rows drawn in
/// proportion to their squared distance from those chosen before. Rows past the first `16 * k` (at least 4,096) take no
/// part in the start: the sample's order is random, and the cost is quadratic in k.
fn start(sample: &[f32], dimensions: usize, k: usize, generator: &mut ChaCha8Rng) -> Vec<f32> {
    let rows = (sample.len() / dimensions).min((16 * k).max(4096));
    let row = |i: usize| &sample[i * dimensions..(i + 1) * dimensions];
    let points = Centroids::new(sample[..rows * dimensions].to_vec(), dimensions);
    let candidates = 2 + (k as f64).ln() as usize;
    // For each row of `chosen`, the distances of all rows once it is a centroid too, and their sum.
    let with = |distances: &[f32], chosen: &[usize]| -> Vec<(f64, Vec<f32>)> {
        let newest: Vec<f32> = chosen.iter().flat_map(|&i| row(i)).copied().collect();
        let closer = points.closer(&newest, distances).into_par_iter().map(|closer| {
            let mut distances = distances.to_vec();
            closer.iter().for_each(|found| distances[found.index as usize] = found.squared_distance);
            (distances.iter().map(|&d| f64::from(d)).sum(), distances)
        });
        closer.collect()
    };
    let first = generator.random_range(0..rows);
    let mut centroids = row(first).to_vec();
    let mut best = with(&vec![f32::INFINITY; rows], &[first]).pop();
    while let Some((total, distances)) = best.filter(|(total, _)| centroids.len() < k * dimensions && *total > 0.0) {
        let drawn: Vec<usize> = (0..candidates).map(|_| draw(&distances, generator.random::<f64>() * total)).collect();
        let tried = drawn.iter().zip(with(&distances, &drawn)).min_by(|a, b| a.1.0.total_cmp(&b.1.0));
        best = tried.map(|(&chosen, with_it)| {
            centroids.extend_from_slice(row(chosen));
            with_it
        });
    }
    centroids
}

/// The row at `place` when rows lie side by side, each as wide as its distance.
fn draw(distances: &[f32], place: f64) -> usize {
    let mut left = place;
    for (i, &distance) in distances.iter().enumerate() {
        left -= f64::from(distance);
        if left < 0.0 {
            return i;
        }
    }
    // Rounding can leave a crumb at the end; the last row that is not a centroid takes it.
    distances.iter().rposition(|&d| d > 0.0).unwrap_or(0)
}

/// The rows of each cluster, in order.
pub fn members(nearest: &[Nearest], count: usize) -> Vec<Vec<u32>> {
    let mut members = vec![Vec::new(); count];
    for (row, found) in nearest.iter().enumerate() {
        members[found.index as usize].push(row as u32);
    }
    members
}

/// The mean of each cluster's rows; zeros for an empty one.
fn means(sample: &[f32], dimensions: usize, members: &[Vec<u32>]) -> Vec<f32> {
    let mut points = vec![0.0; members.len() * dimensions];
    points.par_chunks_mut(dimensions).zip(members).for_each(|(point, rows)| {
        for &row in rows {
            let vector = &sample[row as usize * dimensions..][..dimensions];
            point.iter_mut().zip(vector).for_each(|(sum, x)| *sum += x);
        }
        let scale = 1.0 / rows.len().max(1) as f32;
        point.iter_mut().for_each(|x| *x *= scale);
    });
    points
}

/// An empty cluster starts again at the row that is farthest from its centroid.
fn revive_empty(sample: &[f32], dimensions: usize, nearest: &[Nearest], members: &[Vec<u32>], points: &mut [f32]) {
    let empty: Vec<usize> = (0..members.len()).filter(|&c| members[c].is_empty()).collect();
    if empty.is_empty() {
        return;
    }
    let mut farthest: Vec<usize> = (0..nearest.len()).collect();
    farthest.sort_by(|&a, &b| nearest[b].squared_distance.total_cmp(&nearest[a].squared_distance).then(a.cmp(&b)));
    for (cluster, row) in empty.into_iter().zip(farthest) {
        points[cluster * dimensions..][..dimensions].copy_from_slice(&sample[row * dimensions..][..dimensions]);
    }
}

/// Gives each too large cluster a second centroid, one of its own rows, taken from the smallest clusters.
fn split_large(
    sample: &[f32],
    dimensions: usize,
    members: &[Vec<u32>],
    limit: f64,
    points: &mut [f32],
    generator: &mut ChaCha8Rng,
) {
    let rows: usize = members.iter().map(Vec::len).sum();
    let largest_allowed = limit * rows as f64 / members.len() as f64;
    let mut by_size: Vec<usize> = (0..members.len()).collect();
    by_size.sort_by_key(|&c| (std::cmp::Reverse(members[c].len()), c));
    let large = by_size.iter().filter(|&&c| members[c].len() as f64 > largest_allowed);
    for (&large, &small) in large.zip(by_size.iter().rev()) {
        // Dissolving a cluster that is nearly as large would only move the problem.
        if 2 * members[small].len() >= members[large].len() {
            break;
        }
        let row = members[large][generator.random_range(0..members[large].len())] as usize;
        points[small * dimensions..][..dimensions].copy_from_slice(&sample[row * dimensions..][..dimensions]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use linfa::DatasetBase;
    use linfa::traits::{Fit, Predict};
    use linfa_clustering::KMeans;
    use ndarray::Array2;

    /// `blobs` clouds of `per` rows each around well separated corners.
    fn clouds(blobs: usize, per: usize, dimensions: usize) -> Vec<f32> {
        let noise = Stream::new(5, "noise");
        let mut rows = Vec::new();
        for i in 0..blobs * per {
            for d in 0..dimensions {
                let center = if d % blobs == i % blobs { 4.0 } else { 0.0 };
                rows.push(center + noise.uniform(&((i * dimensions + d) as u64).to_le_bytes()) as f32);
            }
        }
        rows
    }

    fn settings(k: usize, balance: Option<f64>) -> Settings {
        Settings { k, iterations: 20, balance, stream: Stream::new(1, "kmeans") }
    }

    fn inertia(sample: &[f32], centroids: &Centroids) -> f64 {
        centroids.nearest(sample).iter().map(|n| f64::from(n.squared_distance)).sum()
    }

    #[test]
    fn as_good_as_linfa_on_separated_clouds() {
        let (blobs, per, dimensions) = (6, 60, 12);
        let sample = clouds(blobs, per, dimensions);
        let ours = inertia(&sample, &fit(&sample, dimensions, &settings(blobs, None)));
        let array = Array2::from_shape_vec((blobs * per, dimensions), sample.iter().map(|&x| f64::from(x)).collect()).unwrap();
        let model = KMeans::params(blobs).n_runs(3).fit(&DatasetBase::from(array.clone())).unwrap();
        let labels = model.predict(&array);
        let theirs: f64 = array
            .rows()
            .into_iter()
            .zip(labels.iter())
            .map(|(row, &label)| (&row - &model.centroids().row(label)).mapv(|x| x * x).sum())
            .sum();
        assert!(ours <= theirs * 1.001, "inertia {ours} against linfa's {theirs}");
    }

    #[test]
    fn balancing_bounds_the_largest_cluster() {
        // One cloud holds 90% of the rows.
        let mut sample = clouds(1, 900, 8);
        sample.extend(clouds(8, 100, 8).iter().map(|x| x + 10.0));
        let largest = |balance| {
            let centroids = fit(&sample, 8, &settings(16, balance));
            members(&centroids.nearest(&sample), centroids.count()).iter().map(Vec::len).max().unwrap()
        };
        assert!(largest(Some(1.5)) < largest(None), "{} {}", largest(Some(1.5)), largest(None));
    }

    #[test]
    fn fewer_distinct_rows_than_clusters() {
        let sample = [[1.0f32, 2.0]; 10].concat();
        let centroids = fit(&sample, 2, &settings(4, None));
        assert_eq!(centroids.points(), [1.0, 2.0]);
    }

    #[test]
    fn threads_do_not_change_the_bits() {
        let sample = clouds(5, 300, 16);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| fit(&sample, 16, &settings(20, Some(1.5)))).points().to_vec()
        };
        assert_eq!(on(1), on(2));
    }
}
