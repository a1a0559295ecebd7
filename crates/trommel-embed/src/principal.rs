//! Principal component analysis: the directions in which vectors differ most.

use linfa_linalg::eigh::{EigSort, EighInto};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use trommel_core::error::{Error, Result};

/// A mean and the leading principal directions of some vectors.
pub(crate) struct Principal {
    /// `(width)`.
    mean: Array1<f64>,
    /// `(width, dimensions)`, columns orthonormal, the largest variance first.
    directions: Array2<f64>,
    /// The standard deviation along each direction, falling.
    pub(crate) deviations: Vec<f64>,
    /// The part of the vectors' variance that lies within the directions, 0 to 1.
    pub(crate) explained: f64,
}

impl Principal {
    /// The `dimensions` leading directions of `vectors` `(n, width)`.
    pub(crate) fn fit(vectors: ArrayView2<f64>, dimensions: usize) -> Result<Self> {
        let mean = vectors.mean_axis(Axis(0)).ok_or_else(|| Error::internal("no vectors to analyse"))?;
        let centred = &vectors - &mean;
        let covariance = centred.t().dot(&centred) / vectors.nrows() as f64; // (width, width)
        let failed = |e| Error::internal("the eigendecomposition failed").source(e);
        let (variances, directions) = covariance.eigh_into().map_err(failed)?.sort_eig_desc();
        let total = variances.sum();
        let explained = if total > 0.0 { variances.slice(s![..dimensions]).sum() / total } else { 1.0 };
        // Rounding can leave a variance of zero slightly below it.
        let deviations = variances.iter().take(dimensions).map(|variance| variance.max(0.0).sqrt()).collect();
        let mut directions = directions.slice(s![.., ..dimensions]).to_owned();
        directions.columns_mut().into_iter().for_each(|mut direction| {
            // A direction and its opposite serve equally; the one whose largest entry is positive is taken.
            let largest = direction.iter().fold(0.0_f64, |largest, x| if x.abs() > largest.abs() { *x } else { largest });
            direction *= largest.signum();
        });
        Ok(Principal { mean, directions, deviations, explained })
    }

    /// `vectors` `(n, width)` in the coordinates of the directions: `(n, dimensions)`.
    pub(crate) fn project(&self, vectors: ArrayView2<f64>) -> Array2<f64> {
        (&vectors - &self.mean).dot(&self.directions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Reference, by hand: the points lie on the line x = y around (1, 1), at 2 sqrt 2, 0 and -2 sqrt 2 along (1, 1).
    #[test]
    fn a_line_has_one_direction() {
        let points = ndarray::array![[3.0, 3.0], [1.0, 1.0], [-1.0, -1.0]];
        let principal = Principal::fit(points.view(), 1).unwrap();
        assert!((principal.explained - 1.0).abs() < 1e-12);
        assert!((principal.deviations[0] - (16.0_f64 / 3.0).sqrt()).abs() < 1e-12);
        let projected = principal.project(points.view());
        let expected = [8.0_f64.sqrt(), 0.0, -(8.0_f64.sqrt())];
        for (x, y) in projected.iter().zip(expected) {
            assert!((x - y).abs() < 1e-12, "{x} {y}");
        }
    }
}
