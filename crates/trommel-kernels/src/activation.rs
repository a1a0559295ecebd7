//! The nonlinearities of the MLP, over packed rows.
//!
//! `SwiGLU` takes rows of gate and up side by side, (rows, 2 * width), and gives `silu(gate) * up`; `GELU` takes (rows,
//! width). Both backward passes give the activation again beside the gradient: the gradient of the next weight needs it,
//! and computing it twice costs less than keeping it.

use crate::vectorize::{exp, sigmoid, vectorized};

vectorized! {
    /// `out = gate * sigmoid(gate) * up`. `packed` is (rows, 2 * width), `out` is (rows, width).
    pub fn swiglu_forward(packed: &[f32], width: usize, out: &mut [f32]) {
        assert_eq!(packed.len(), 2 * out.len());
        for (packed, out) in packed.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = packed.split_at(width);
            for i in 0..width {
                out[i] = gate[i] * sigmoid(gate[i]) * up[i];
            }
        }
    }
}

vectorized! {
    /// Writes the gradient of `packed` (rows, 2 * width) to `packed_gradient`, and replaces `gradient` (rows, width), the
    /// gradient of the output, by the output.
    pub fn swiglu_backward(packed: &[f32], width: usize, gradient: &mut [f32], packed_gradient: &mut [f32]) {
        assert!(packed.len() == 2 * gradient.len() && packed.len() == packed_gradient.len());
        let rows = packed.chunks_exact(2 * width).zip(gradient.chunks_exact_mut(width));
        for ((packed, gradient), packed_gradient) in rows.zip(packed_gradient.chunks_exact_mut(2 * width)) {
            let (gate, up) = packed.split_at(width);
            let (gate_gradient, up_gradient) = packed_gradient.split_at_mut(width);
            for i in 0..width {
                let s = sigmoid(gate[i]);
                let silu = gate[i] * s;
                // d silu(g) / dg = s + g s (1 - s) = s + silu(g) (1 - s)
                gate_gradient[i] = gradient[i] * up[i] * (s + silu * (1.0 - s));
                up_gradient[i] = gradient[i] * silu;
                gradient[i] = silu * up[i];
            }
        }
    }
}

/// sqrt(2 / pi)
const GELU_SCALE: f32 = 0.797_884_6;
/// The cubic coefficient of the tanh form of GELU. [Hendrycks and Gimpel, arXiv 1606.08415]
const GELU_CUBE: f32 = 0.044_715;

/// `(1 + tanh(u)) / 2 = sigmoid(2u)` with the polynomial of the tanh form.
#[inline(always)]
fn gelu_gate(x: f32) -> f32 {
    1.0 / (1.0 + exp(-2.0 * GELU_SCALE * (x + GELU_CUBE * x * x * x)))
}

vectorized! {
    /// `out = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2`, which PyTorch names `gelu_pytorch_tanh`.
    pub fn gelu_forward(x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), out.len());
        for (x, out) in x.iter().zip(out) {
            *out = x * gelu_gate(*x);
        }
    }
}

vectorized! {
    /// Writes the gradient of `x` to `x_gradient` and replaces `gradient`, the gradient of the output, by the output.
    pub fn gelu_backward(x: &[f32], gradient: &mut [f32], x_gradient: &mut [f32]) {
        assert!(x.len() == gradient.len() && x.len() == x_gradient.len());
        for i in 0..x.len() {
            let s = gelu_gate(x[i]);
            let slope = 2.0 * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * x[i] * x[i]);
            x_gradient[i] = gradient[i] * (s + x[i] * s * (1.0 - s) * slope);
            gradient[i] = x[i] * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers, slope};

    #[test]
    fn swiglu_gradients_equal_finite_differences() {
        for (rows, width) in [(1, 1), (2, 17)] {
            let (packed, weight) = (numbers(rows * 2 * width, 1), numbers(rows * width, 2));
            let value = |packed: &[f32]| {
                let mut out = vec![0.0; rows * width];
                swiglu_forward(packed, width, &mut out);
                out.iter().zip(&weight).map(|(y, w)| f64::from(y * w)).sum::<f64>()
            };
            let (mut out, mut gradient, mut expected) = (weight.clone(), vec![0.0; packed.len()], vec![0.0; rows * width]);
            swiglu_backward(&packed, width, &mut out, &mut gradient);
            swiglu_forward(&packed, width, &mut expected);
            assert_eq!(out, expected);
            for (i, gradient) in gradient.iter().enumerate() {
                close(f64::from(*gradient), slope(&packed, i, value), 1e-3);
            }
        }
    }

    #[test]
    fn gelu_equals_its_definition_and_its_finite_differences() {
        let x: Vec<f32> = (-50..=50).map(|i| i as f32 * 0.1).collect();
        let mut out = vec![0.0; x.len()];
        gelu_forward(&x, &mut out);
        for (x, out) in x.iter().zip(&out) {
            let x = f64::from(*x);
            let expected = 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            close(f64::from(*out), expected, 1e-6);
        }
        let (mut again, mut gradient) = (vec![1.0; x.len()], vec![0.0; x.len()]);
        gelu_backward(&x, &mut again, &mut gradient);
        assert_eq!(again, out);
        for (i, gradient) in gradient.iter().enumerate() {
            let value = |x: &[f32]| {
                let mut out = vec![0.0; x.len()];
                gelu_forward(x, &mut out);
                f64::from(out[i])
            };
            close(f64::from(*gradient), slope(&x, i, value), 1e-3);
        }
    }
}
