//! How far apart the experts of a projected network have grown, and in how many directions. [PE 2.5]
//!
//! Layer by layer, an expert's MLP is `W_i = sum_r alpha_(i,r) T_r`. Their differences from the mean MLP have the products
//!
//! ```text
//!   G = (A - mean) (T T^T) (A - mean)^T      (k, k), with A = alpha (k, h) and T the basis (h, numbers of an MLP)
//! ```
//!
//! so no MLP is formed: the singular values of the stacked differences are the roots of the eigenvalues of `G`, and the
//! squared distance of two experts is `G_ii + G_jj - 2 G_ij`.

use linfa_linalg::eigh::EigValshInto;
use ndarray::{Array2, Axis};
use trommel_core::error::{Error, Result};
use trommel_kernels::projection as kernel;

use crate::model::Config;
use crate::projected::Tensors;

/// What the experts of a network differ by.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// Singular values of each layer's coefficients `alpha`, falling.
    pub coefficients: Vec<Vec<f64>>,
    /// Singular values of each layer's MLPs minus their mean, over that of the mean repeated for each expert, falling: the root
    /// of the sum of their squares is how far an expert is from the mean, relative to the mean's norm.
    pub mlps: Vec<Vec<f64>>,
    /// The norm of the difference of each pair's MLPs, over all layers, relative to the norm of the mean MLP; (k, k).
    pub distances: Array2<f64>,
}

/// That of a projected network.
pub fn spectrum(config: &Config, parameters: &[f32]) -> Result<Spectrum> {
    let tensors = Tensors::of(config).ok_or_else(|| Error::config("the checkpoint is not a projected network"))?;
    let experts = config.experts();
    let (mut coefficients, mut mlps) = (Vec::new(), Vec::new());
    let (mut products, mut mean_square) = (Array2::zeros((experts, experts)), 0.0);
    for layer in 0..config.layers {
        let basis = tensors.basis(parameters, layer);
        let capacity = basis.len();
        let gram = shaped(capacity, capacity, kernel::gram(&basis))?;
        let alpha = shaped(experts, capacity, tensors.alpha(parameters, layer).into_iter().flatten().map(f64::from).collect())?;
        let mean = alpha.mean_axis(Axis(0)).ok_or_else(|| Error::internal("a network without experts"))?;
        let apart = &alpha - &mean;
        let layer_products = apart.dot(&gram).dot(&apart.t());
        let layer_mean_square = mean.dot(&gram).dot(&mean);
        coefficients.push(singular_values(alpha.dot(&alpha.t()))?);
        let scale = (experts as f64 * layer_mean_square).sqrt();
        mlps.push(singular_values(layer_products.clone())?.into_iter().map(|value| value / scale).collect());
        products += &layer_products;
        mean_square += layer_mean_square;
    }
    let distances = Array2::from_shape_fn((experts, experts), |(i, j)| {
        let square: f64 = products[[i, i]] + products[[j, j]] - 2.0 * products[[i, j]];
        (square.max(0.0) / mean_square).sqrt()
    });
    Ok(Spectrum { coefficients, mlps, distances })
}

fn shaped(rows: usize, columns: usize, numbers: Vec<f64>) -> Result<Array2<f64>> {
    Array2::from_shape_vec((rows, columns), numbers).map_err(|e| Error::internal("a matrix of another shape").source(e))
}

/// The singular values of a matrix, falling, from the products of its rows.
fn singular_values(products: Array2<f64>) -> Result<Vec<f64>> {
    let squares = products.eigvalsh_into().map_err(|e| Error::internal("the eigendecomposition failed").source(e))?;
    // Rounding can leave a square of zero slightly below it.
    let mut values: Vec<f64> = squares.iter().map(|square| square.max(0.0).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Projection, preset};
    use crate::parameters::{Layout, mlp_range};
    use crate::projected::project;

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    // Reference, by hand: rows (3, 0) and (4, 5) have the products 9, 12 and 41, whose eigenvalues are 45 and 5.
    #[test]
    fn singular_values_of_a_known_matrix() {
        let rows = ndarray::array![[3.0, 0.0], [4.0, 5.0]];
        close(&singular_values(rows.dot(&rows.t())).unwrap(), &[45.0_f64.sqrt(), 5.0_f64.sqrt()]);
    }

    #[test]
    fn the_spectrum_is_that_of_the_mlps_of_the_experts() {
        let experts = 3;
        let config = Config { context: 8, projection: Some(Projection::new(experts)), ..preset("slm-600k", 300).unwrap() };
        let layout = Layout::new(&config);
        let mut parameters = layout.initial(7);
        // Experts begin equal.
        let start = spectrum(&config, &parameters).unwrap();
        assert!(start.distances.iter().chain(start.mlps.iter().flatten()).all(|x| *x < 1e-6), "{start:?}");
        for basis in layout.slots().iter().filter(|slot| slot.is_basis()) {
            parameters[basis.range.clone()].iter_mut().enumerate().for_each(|(i, t)| *t += 0.02 * (i as f32).sin());
        }

        let found = spectrum(&config, &parameters).unwrap();
        let only = |i: usize| (0..experts).map(|e| f64::from(u8::from(e == i))).collect::<Vec<_>>();
        let models: Vec<Vec<f32>> = (0..experts).map(|i| project(&config, &parameters, &only(i)).unwrap()).collect();
        let of_layer = |layer: usize| {
            let mlp = mlp_range(&config.plain(), layer);
            let numbers = models.iter().flat_map(|model| &model[mlp.clone()]).map(|x| f64::from(*x)).collect();
            shaped(experts, mlp.len(), numbers).unwrap()
        };
        let layers: Vec<Array2<f64>> = (0..config.layers).map(of_layer).collect();
        for (stacked, found) in layers.iter().zip(&found.mlps) {
            let mean = stacked.mean_axis(Axis(0)).unwrap();
            let apart = stacked - &mean;
            let scale = (experts as f64 * mean.dot(&mean)).sqrt();
            let expected = singular_values(apart.dot(&apart.t())).unwrap();
            close(found, &expected.iter().map(|value| value / scale).collect::<Vec<_>>());
        }
        let square = |rows: &Array2<f64>, i: usize, j: usize| (&rows.row(i) - &rows.row(j)).mapv(|x| x * x).sum();
        let mean_square: f64 = layers.iter().map(|l| l.mean_axis(Axis(0)).unwrap().mapv(|x| x * x).sum()).sum();
        for ((i, j), distance) in found.distances.indexed_iter() {
            let expected: f64 = layers.iter().map(|rows| square(rows, i, j)).sum();
            close(&[*distance], &[(expected / mean_square).sqrt()]);
        }
        assert!(found.distances[[0, 1]] > 0.01, "{found:?}");
    }
}
