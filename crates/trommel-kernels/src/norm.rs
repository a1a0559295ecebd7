//! Root-mean-square normalisation of rows.
//!
//! `y = x / sqrt(mean(x^2) + epsilon) * gain`, for each row of `x` (rows, width). One thread works on the rows it is given.

use crate::vectorize::{dot, vectorized};

vectorized! {
    /// Writes the normalised rows of `x` (rows, width) to `y` (rows, width). `gain` is (width).
    pub fn forward(x: &[f32], gain: &[f32], epsilon: f32, y: &mut [f32]) {
        assert_eq!(x.len(), y.len());
        for (x, y) in x.chunks_exact(gain.len()).zip(y.chunks_exact_mut(gain.len())) {
            let scale = reciprocal_root_mean_square(x, epsilon);
            for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
                *y = x * scale * gain;
            }
        }
    }
}

vectorized! {
    /// Adds the gradient of `x` to `x_gradient` (rows, width) and that of the gain to `gain_gradient` (width), and writes
    /// the normalised rows again to `y`, because the gradient of the next weight needs them and they were not kept.
    ///
    /// With `s = 1 / rms(x)`, `z = x * s` and `g = gradient * gain`: `dx = s * (g - z * mean(g * z))`.
    pub fn backward(
        x: &[f32],
        gain: &[f32],
        epsilon: f32,
        gradient: &[f32],
        y: &mut [f32],
        x_gradient: &mut [f32],
        gain_gradient: &mut [f32],
    ) {
        let width = gain.len();
        assert!(x.len() == gradient.len() && x.len() == x_gradient.len() && x.len() == y.len());
        assert_eq!(gain_gradient.len(), width);
        let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
        for (((x, gradient), x_gradient), y) in rows.zip(x_gradient.chunks_exact_mut(width)).zip(y.chunks_exact_mut(width)) {
            let scale = reciprocal_root_mean_square(x, epsilon);
            // `y` first holds gradient * gain, whose product with x is needed before x's gradient can be formed.
            for ((y, gradient), gain) in y.iter_mut().zip(gradient).zip(gain) {
                *y = gradient * gain;
            }
            let along = dot(y, x) * scale * scale / width as f32;
            for i in 0..width {
                x_gradient[i] += scale * (y[i] - x[i] * along);
                let z = x[i] * scale;
                gain_gradient[i] += gradient[i] * z;
                y[i] = z * gain[i];
            }
        }
    }
}

#[inline(always)]
fn reciprocal_root_mean_square(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers, slope};

    #[test]
    fn gradients_equal_finite_differences_at_odd_widths() {
        for (rows, width) in [(1, 1), (1, 5), (3, 16), (2, 37)] {
            let (x, gain, weight) = (numbers(rows * width, 1), numbers(width, 2), numbers(rows * width, 3));
            let value = |x: &[f32], gain: &[f32]| {
                let mut y = vec![0.0; x.len()];
                forward(x, gain, 1e-5, &mut y);
                y.iter().zip(&weight).map(|(y, w)| f64::from(y * w)).sum::<f64>()
            };
            let (mut y, mut dx, mut dgain) = (vec![0.0; x.len()], vec![1.0; x.len()], vec![0.0; width]);
            backward(&x, &gain, 1e-5, &weight, &mut y, &mut dx, &mut dgain);
            let mut forward_y = vec![0.0; x.len()];
            forward(&x, &gain, 1e-5, &mut forward_y);
            assert_eq!(y, forward_y);
            for (i, dx) in dx.iter().enumerate() {
                close(f64::from(*dx) - 1.0, slope(&x, i, |x| value(x, &gain)), 2e-2);
            }
            for (i, dgain) in dgain.iter().enumerate() {
                close(f64::from(*dgain), slope(&gain, i, |gain| value(&x, gain)), 2e-2);
            }
        }
    }

    #[test]
    fn a_nan_is_not_hidden() {
        let mut y = [0.0; 2];
        forward(&[f32::NAN, 1.0], &[1.0, 1.0], 1e-5, &mut y);
        assert!(y.iter().all(|y| y.is_nan()));
    }
}
