//! `AdamW` over flat buffers, and the norm of a gradient. [Loshchilov and Hutter, arXiv 1711.05101]

use rayon::prelude::*;

use crate::vectorize::vectorized;

/// Numbers that one task handles; fixed, so that sums do not depend on the number of threads.
const CHUNK: usize = 1 << 15;

/// The factors of one step; letters as in the paper.
#[derive(Debug, Clone, Copy)]
pub struct Factors {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Share of the parameter that is taken away, times the learning rate.
    pub decay: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// `1 - beta1^step`, which undoes the bias of the first moment towards its start at zero.
    pub correction1: f32,
    /// `1 - beta2^step`.
    pub correction2: f32,
    /// What the gradient is multiplied with first: below 1 where its norm is clipped.
    pub gradient_scale: f32,
}

/// One step of parameters, with the first moment `m` and the second moment `v`; all four of equal length. Leaves zeros in
/// `gradient`, for the next sum.
pub fn step(parameters: &mut [f32], gradient: &mut [f32], m: &mut [f32], v: &mut [f32], factors: Factors) {
    assert!(parameters.len() == gradient.len() && parameters.len() == m.len() && parameters.len() == v.len());
    if parameters.len() <= CHUNK {
        return step_chunk(parameters, gradient, m, v, factors);
    }
    let chunks = parameters.par_chunks_mut(CHUNK).zip(gradient.par_chunks_mut(CHUNK));
    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    chunks.zip(moments).for_each(|((parameters, gradient), (m, v))| step_chunk(parameters, gradient, m, v, factors));
}

vectorized! {
    pub(crate) fn step_chunk(parameters: &mut [f32], gradient: &mut [f32], m: &mut [f32], v: &mut [f32], factors: Factors) {
        let f = factors;
        let (rate, root) = (f.learning_rate / f.correction1, 1.0 / f.correction2);
        let keep = 1.0 - f.learning_rate * f.decay;
        for (((p, gradient), m), v) in parameters.iter_mut().zip(gradient).zip(m).zip(v) {
            let g = *gradient * f.gradient_scale;
            let first = f.beta1 * *m + (1.0 - f.beta1) * g;
            let second = f.beta2 * *v + (1.0 - f.beta2) * g * g;
            *p = keep * *p - rate * first / ((second * root).sqrt() + f.epsilon);
            // All writes after all reads: buffers that begin at like addresses would make each read wait for a write.
            (*gradient, *m, *v) = (0.0, first, second);
        }
    }
}

/// The Euclidean norm of a vector, summed in `f64` in a fixed order.
pub fn norm(x: &[f32]) -> f64 {
    let sums: Vec<f64> = x.par_chunks(CHUNK).map(sum_of_squares).collect();
    sums.iter().sum::<f64>().sqrt()
}

vectorized! {
    fn sum_of_squares(x: &[f32]) -> f64 {
        let mut sums = [0f64; 16];
        let lanes = x.chunks_exact(16);
        let tail: f64 = lanes.remainder().iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        for x in lanes {
            for lane in 0..16 {
                sums[lane] += f64::from(x[lane]) * f64::from(x[lane]);
            }
        }
        sums.iter().sum::<f64>() + tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers};

    #[test]
    fn two_steps_equal_the_textbook() {
        let n = CHUNK + 3;
        let (start, gradients) = (numbers(n, 1), [numbers(n, 2), numbers(n, 3)]);
        let (mut p, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
        for (t, gradient) in gradients.iter().enumerate() {
            let (power, mut gradient) = (t as i32 + 1, gradient.clone());
            let factors = Factors {
                learning_rate: 0.01,
                decay: 0.1,
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                correction1: 1.0 - 0.9f32.powi(power),
                correction2: 1.0 - 0.95f32.powi(power),
                gradient_scale: 0.5,
            };
            step(&mut p, &mut gradient, &mut m, &mut v, factors);
            assert!(gradient.iter().all(|g| *g == 0.0));
        }
        for i in (0..n).step_by(97).chain([n - 1]) {
            let (mut p64, mut m64, mut v64) = (f64::from(start[i]), 0.0, 0.0);
            for (t, gradient) in gradients.iter().enumerate() {
                let g = 0.5 * f64::from(gradient[i]);
                m64 = 0.9 * m64 + 0.1 * g;
                v64 = 0.95 * v64 + 0.05 * g * g;
                let power = t as i32 + 1;
                let (m_hat, v_hat) = (m64 / (1.0 - 0.9f64.powi(power)), v64 / (1.0 - 0.95f64.powi(power)));
                p64 = p64 - 0.01 * 0.1 * p64 - 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
            }
            close(f64::from(p[i]), p64, 1e-6);
        }
    }

    #[test]
    fn the_norm_is_exact_enough_and_keeps_nan() {
        let mut x = vec![0.1f32; 3 * CHUNK + 5];
        let expected = (f64::from(0.1f32).powi(2) * x.len() as f64).sqrt();
        assert!((norm(&x) / expected - 1.0).abs() < 1e-12);
        x[CHUNK] = f32::NAN;
        assert!(norm(&x).is_nan());
    }
}
