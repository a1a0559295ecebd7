//! The element-wise steps of the forward pass, each one pass over memory.
//!
//! candle composes them from several operations with a new tensor each, and its `gelu_erf` calls the C library once per
//! number: together as slow as the matrix products. Here every step works in place and has no branches, so that the
//! compiler turns it into vector instructions. They run on the CPU and have no gradients: the encoder is only read.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, LOG2_E};

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, bail};

/// `x + bias`, over the rows of `x` `(rows, width)`.
pub(crate) struct AddBias;
/// `gelu(x + bias)`, over the rows of `x` `(rows, width)`.
pub(crate) struct BiasGelu;
/// `x + y` for `x`, `y` of one shape.
pub(crate) struct Add;
/// `weight * normalized(x) + bias` over the rows of `x` `(rows, width)`.
pub(crate) struct LayerNorm {
    /// Keeps a constant row finite.
    pub(crate) epsilon: f64,
}
/// `softmax(scale * x)` over the last of `x`'s dimensions.
pub(crate) struct ScaledSoftmax {
    /// `1 / sqrt(head width)`.
    pub(crate) scale: f32,
}

impl InplaceOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_layout: &Layout, bias: &CpuStorage, bias_layout: &Layout) -> Result<()> {
        let bias = read(bias, bias_layout)?;
        for row in write(x, x_layout)?.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        Ok(())
    }
}

impl InplaceOp2 for BiasGelu {
    fn name(&self) -> &'static str {
        "bias_gelu"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_layout: &Layout, bias: &CpuStorage, bias_layout: &Layout) -> Result<()> {
        let bias = read(bias, bias_layout)?;
        for row in write(x, x_layout)?.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x = gelu(*x + b));
        }
        Ok(())
    }
}

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add_in_place"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_layout: &Layout, y: &CpuStorage, y_layout: &Layout) -> Result<()> {
        write(x, x_layout)?.iter_mut().zip(read(y, y_layout)?).for_each(|(x, y)| *x += y);
        Ok(())
    }
}

impl InplaceOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm_in_place"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<()> {
        let (weight, bias) = (read(weight, weight_layout)?, read(bias, bias_layout)?);
        let width = weight.len() as f32;
        for row in write(x, x_layout)?.chunks_exact_mut(weight.len()) {
            let mean = sum(row) / width;
            row.iter_mut().for_each(|x| *x -= mean);
            let variance = sum_of_squares(row) / width;
            let scale = 1.0 / (variance + self.epsilon as f32).sqrt();
            for ((x, w), b) in row.iter_mut().zip(weight).zip(bias) {
                *x = *x * scale * w + b;
            }
        }
        Ok(())
    }
}

impl InplaceOp1 for ScaledSoftmax {
    fn name(&self) -> &'static str {
        "scaled_softmax"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = *layout.dims().last().unwrap_or(&1);
        for row in write(x, layout)?.chunks_exact_mut(width) {
            let shift = self.scale * maximum(row);
            row.iter_mut().for_each(|x| *x = exp(self.scale * *x - shift));
            let share = 1.0 / sum(row);
            row.iter_mut().for_each(|x| *x *= share);
        }
        Ok(())
    }
}

fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("the operand must be f32 and contiguous"),
    }
}

fn write<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => bail!("the operand must be f32 and contiguous"),
    }
}

/// Partial results that a reduction keeps apart, so that it needs no order among them and can use vector instructions.
const LANES: usize = 16;

fn fold(row: &[f32], start: f32, step: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, *x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = step(*lane, *x);
    }
    lanes.into_iter().fold(start, join)
}

fn sum(row: &[f32]) -> f32 {
    fold(row, 0.0, |a, x| a + x, |a, b| a + b)
}

fn sum_of_squares(row: &[f32]) -> f32 {
    fold(row, 0.0, |a, x| a + x * x, |a, b| a + b)
}

fn maximum(row: &[f32]) -> f32 {
    let larger = |a: f32, x: f32| if x > a { x } else { a };
    fold(row, f32::NEG_INFINITY, larger, larger)
}

/// `x * P(X <= x)` for a standard normal `X`: `0.5 x (1 + erf(x / sqrt 2))`.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * FRAC_1_SQRT_2))
}

/// The error function as a quotient of polynomials, within 2e-7: the coefficients of Eigen's `perf`, which TensorFlow
/// and XLA use too. Beyond the clamp it is 1 in f32.
fn erf(x: f32) -> f32 {
    const NUMERATOR: [f32; 5] = [2.290_506_6e-4, 3.408_291e-3, 5.095_569_4e-2, 1.852_083_2e-1, FRAC_2_SQRT_PI];
    const DENOMINATOR: [f32; 7] =
        [-1.179_160_3e-7, 2.354_796_6e-5, 1.017_962_5e-3, 1.407_047_e-2, 1.109_850_5e-1, 4.974_692_4e-1, 1.0];
    let x = x.clamp(-3.743_921_3, 3.743_921_3);
    let square = x * x;
    x * horner(&NUMERATOR, square) / horner(&DENOMINATOR, square)
}

/// `e^x` for `x <= 0`, within 2e-7 of it, by the reduction and the polynomial of Cephes' `expf`; 0 below -87.
fn exp(x: f32) -> f32 {
    const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let x = x.max(-87.0);
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, of which the first has few enough bits that `n` times it is exact.
    let rest = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let fraction = horner(&POLYNOMIAL, rest) * rest * rest + rest + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    fraction * power
}

fn horner<const N: usize>(coefficients: &[f32; N], x: f32) -> f32 {
    coefficients.iter().fold(0.0, |sum, c| sum * x + c)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

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
            assert!((gelu(x) - y).abs() < 4e-7 * y.abs().max(1.0), "gelu({x}) = {}, expected {y}", gelu(x));
        }
    }

    #[test]
    fn exp_follows_the_standard_library() {
        for i in 0..8_700 {
            let x = -(i as f32) / 100.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 3e-7, "{x}: {} {}", exp(x), x.exp());
        }
        assert!(exp(-1e30) < 1e-37);
    }

    // candle's composed operations are the reference.
    #[test]
    fn layer_norm_and_softmax_follow_candle() {
        let device = Device::Cpu;
        let values: Vec<f32> = (0..60).map(|i| ((i * 37) % 60) as f32 * 0.3 - 9.0).collect();
        let x = Tensor::from_slice(&values, (3, 20), &device).unwrap();
        let weight = Tensor::from_slice(&values[..20], 20, &device).unwrap();
        let bias = Tensor::from_slice(&values[20..40], 20, &device).unwrap();
        let expected = candle_nn::ops::layer_norm_slow(&x, &weight, &bias, 1e-12).unwrap();
        let ours = x.copy().unwrap();
        ours.inplace_op3(&weight, &bias, &LayerNorm { epsilon: 1e-12 }).unwrap();
        close(&ours, &expected);

        let expected = candle_nn::ops::softmax(&(&x * 0.25).unwrap(), 1).unwrap();
        let ours = x.copy().unwrap();
        ours.inplace_op1(&ScaledSoftmax { scale: 0.25 }).unwrap();
        close(&ours, &expected);
    }

    fn close(ours: &Tensor, expected: &Tensor) {
        let (ours, expected) = (ours.flatten_all().unwrap(), expected.flatten_all().unwrap());
        for (a, b) in ours.to_vec1::<f32>().unwrap().iter().zip(expected.to_vec1::<f32>().unwrap()) {
            assert!((a - b).abs() < 2e-5, "{a} {b}");
        }
    }
}
