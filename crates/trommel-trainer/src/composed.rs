//! The model's operations, composed of candle's differentiable ones: what the tape runs, which is the oracle of the CPU's and
//! the GPU's passes in the tests.
//!
//! candle's fused `softmax_last_dim`, `rms_norm`, `layer_norm` and `rope` have no backward pass and silently cut the
//! gradient, so none of them appears here.

use candle_core::{D, DType, Result, Tensor};
use trommel_kernels::panels::Precision;

use crate::model::Activation;

/// `x / sqrt(mean(x^2) + eps) * gain` for `x` (.., width), `gain` (width).
pub(crate) fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    let root_mean_square = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&root_mean_square)?.broadcast_mul(gain)
}

/// Turns `x` (batch, heads, time, head) by its positions; `cosines` and `sines` are (time, head / 2).
pub(crate) fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (left, right) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_left = (left.broadcast_mul(cosines)? - right.broadcast_mul(sines)?)?;
    let turned_right = (right.broadcast_mul(cosines)? + left.broadcast_mul(sines)?)?;
    Tensor::cat(&[turned_left, turned_right], D::Minus1)
}

/// Zero where a query sees a key, minus infinity elsewhere: (batch, 1, time, time) for `starts` (batch, time).
pub(crate) fn mask(starts: &Tensor) -> Result<Tensor> {
    let (batch, time) = starts.dims2()?;
    let position = Tensor::arange(0u32, time as u32, starts.device())?;
    let (query, key) = (position.reshape((1, time, 1))?, position.reshape((1, 1, time))?);
    let causal = key.broadcast_le(&query)?.broadcast_as((batch, time, time))?;
    let within = starts.reshape((batch, time, 1))?.broadcast_le(&key)?;
    let seen = causal.mul(&within)?;
    let (zero, never) = (Tensor::new(0f32, starts.device())?, Tensor::new(f32::NEG_INFINITY, starts.device())?);
    seen.where_cond(&zero.broadcast_as(seen.shape())?, &never.broadcast_as(seen.shape())?)?.unsqueeze(1)
}

/// Attention of turned `q`, `k` and of `v`, each (batch, heads, time, head), under [`mask`]; in `bf16` they are rounded, and so
/// are the shares and the result, as by PyTorch's autocast.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, precision: Precision) -> Result<Tensor> {
    let rounded = |x: &Tensor| match precision {
        Precision::F32 => x.contiguous(),
        Precision::Bf16 => x.to_dtype(DType::BF16)?.to_dtype(DType::F32)?.contiguous(),
    };
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (rounded(q)?.matmul(&rounded(&k.transpose(2, 3)?)?)? * scale)?.broadcast_add(mask)?;
    rounded(&rounded(&log_softmax(&scores)?.exp()?)?.matmul(&rounded(v)?)?)
}

/// The logarithm of the softmax over the last dimension.
fn log_softmax(x: &Tensor) -> Result<Tensor> {
    // The shift by the largest number cancels, so no gradient flows through it.
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    shifted.broadcast_sub(&log_sum)
}

/// The nonlinearity over packed rows (.., packed * mlp), giving (.., mlp).
pub(crate) fn activate(packed: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Gelu => packed.gelu(),
        Activation::SwiGlu => {
            let mlp = packed.dim(D::Minus1)? / 2;
            packed.narrow(D::Minus1, 0, mlp)?.silu()?.mul(&packed.narrow(D::Minus1, mlp, mlp)?)
        }
    }
}

/// `x weight^T` for `x` (rows, in), `weight` (out, in); in `bf16` the operands are rounded, and so is the result.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, precision: Precision) -> Result<Tensor> {
    match precision {
        Precision::F32 => x.matmul(&weight.t()?),
        Precision::Bf16 => x.to_dtype(DType::BF16)?.matmul(&weight.to_dtype(DType::BF16)?.t()?)?.to_dtype(DType::F32),
    }
}

/// The negative log-likelihood of `targets` (rows), times `counted` (rows), which is one or zero; `logits` is (rows, vocab).
pub(crate) fn losses(logits: &Tensor, targets: &Tensor, counted: &Tensor) -> Result<Tensor> {
    let at_target = log_softmax(&logits.to_dtype(DType::F32)?)?.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
    at_target.neg()?.mul(counted)
}

/// The cross-entropy of the softmax of `logits` from that of the `taught` logits, each (rows, vocab); (rows).
pub(crate) fn cross_entropy(taught: &Tensor, logits: &Tensor) -> Result<Tensor> {
    let shares = log_softmax(&taught.to_dtype(DType::F32)?)?.exp()?;
    shares.mul(&log_softmax(&logits.to_dtype(DType::F32)?)?)?.sum(D::Minus1)?.neg()
}
