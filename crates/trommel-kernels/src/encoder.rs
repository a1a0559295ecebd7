//! What an encoder layer does between its matrix products, in place, each step one pass over memory; for inference.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use crate::vectorize::{LANES, fold, vectorized};

vectorized! {
    /// `x + bias`, over the rows of `x` (rows, width).
    pub fn add_bias(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
    }
}

vectorized! {
    /// `gelu(x + bias)`, over the rows of `x` (rows, width).
    pub fn add_bias_and_gelu(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x = gelu(*x + b));
        }
    }
}

/// The weights of a layer normalisation.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// (width).
    pub weight: Vec<f32>,
    /// (width).
    pub bias: Vec<f32>,
    /// Added to the variance; keeps a constant row finite.
    pub epsilon: f32,
}

impl LayerNorm {
    /// `weight * normalized(x) + bias`, over the rows of `x` (rows, width). [Ba et al., arXiv 1607.06450]
    pub fn apply(&self, x: &mut [f32]) {
        layer_norm(x, &self.weight, &self.bias, self.epsilon);
    }
}

vectorized! {
    fn layer_norm(x: &mut [f32], weight: &[f32], bias: &[f32], epsilon: f32) {
        let width = weight.len() as f32;
        for row in x.chunks_exact_mut(weight.len()) {
            let mean = sum(row, |x| x) / width;
            row.iter_mut().for_each(|x| *x -= mean);
            let scale = 1.0 / (sum(row, |x| x * x) / width + epsilon).sqrt();
            for ((x, w), b) in row.iter_mut().zip(weight).zip(bias) {
                *x = *x * scale * w + b;
            }
        }
    }
}

#[inline(always)]
fn sum(row: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    for row in row.chunks(LANES) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += of(*x);
        }
    }
    fold(sums)
}

/// `x * P(X <= x)` for a standard normal `X`: `0.5 x (1 + erf(x / sqrt 2))`. [Hendrycks and Gimpel, arXiv 1606.08415]
#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * FRAC_1_SQRT_2))
}

/// The error function as a quotient of polynomials, within 2e-7: the coefficients of Eigen's `perf`, which TensorFlow
/// and XLA use too. Beyond the clamp it is 1 in f32.
#[inline(always)]
fn erf(x: f32) -> f32 {
    const NUMERATOR: [f32; 5] = [2.290_506_6e-4, 3.408_291e-3, 5.095_569_4e-2, 1.852_083_2e-1, FRAC_2_SQRT_PI];
    const DENOMINATOR: [f32; 7] =
        [-1.179_160_3e-7, 2.354_796_6e-5, 1.017_962_5e-3, 1.407_047_e-2, 1.109_850_5e-1, 4.974_692_4e-1, 1.0];
    let x = x.clamp(-3.743_921_3, 3.743_921_3);
    let square = x * x;
    let horner = |coefficients: &[f32]| coefficients.iter().fold(0.0, |sum, c| sum * square + c);
    x * horner(&NUMERATOR) / horner(&DENOMINATOR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers};

    // Reference, PyTorch 2: torch.nn.functional.gelu(torch.tensor([-3., -1., -.1, 0., .5, 2., 9.]))
    #[test]
    fn gelu_is_the_exact_one() {
        let expected = [
            (-3.0, -0.004_049_69),
            (-1.0, -0.158_655_25),
            (-0.1, -0.046_017_21),
            (0.0, 0.0),
            (0.5, 0.345_731_23),
            (2.0, 1.954_499_7),
            (9.0, 9.0),
        ];
        for (x, y) in expected {
            let mut got = [x - 1.0];
            add_bias_and_gelu(&mut got, &[1.0]);
            assert!((got[0] - y).abs() < 4e-7 * y.abs().max(1.0), "gelu({x}) = {}, expected {y}", got[0]);
        }
    }

    #[test]
    fn layer_norm_equals_the_definition() {
        for (rows, width) in [(1, 1), (3, 20), (2, 37)] {
            let (mut x, weight, bias) = (numbers(rows * width, 1), numbers(width, 2), numbers(width, 3));
            let start: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            LayerNorm { weight: weight.clone(), bias: bias.clone(), epsilon: 1e-6 }.apply(&mut x);
            for (row, got) in start.chunks_exact(width).zip(x.chunks_exact(width)) {
                let mean = row.iter().sum::<f64>() / width as f64;
                let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                for i in 0..width {
                    let normal = (row[i] - mean) / (variance + 1e-6).sqrt();
                    close(f64::from(got[i]), normal * f64::from(weight[i]) + f64::from(bias[i]), 2e-5);
                }
            }
        }
    }
}
