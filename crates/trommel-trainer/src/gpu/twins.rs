//! The operations in plain Rust, which run the passes in tests on a machine without a GPU. Both are held against the tape.

use candle_core::{DType, Device, Result, Tensor};
use trommel_kernels::adamw::{self, Factors};
use trommel_kernels::cross_entropy::IGNORED;
use trommel_kernels::{activation, embedding, norm};

use super::ops::{ByToken, Factor, Heads, Kernels, Normed, QUERIES, Spot, as_is, dims};
use crate::model::Activation;

/// Slow and simple.
#[derive(Debug)]
pub(super) struct Twins;

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

fn tensor(numbers: Vec<f32>, shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn read(spot: &Spot) -> Result<Vec<f32>> {
    floats(&spot.buffer.narrow(0, spot.start, spot.len)?)
}

fn write(spot: &Spot, numbers: Vec<f32>) -> Result<()> {
    spot.buffer.slice_set(&tensor(numbers, &[spot.len], DType::F32)?, 0, spot.start)
}

fn add(spot: &Spot, numbers: &[f32]) -> Result<()> {
    write(spot, read(spot)?.iter().zip(numbers).map(|(sum, x)| sum + x).collect())
}

/// The first key of each query, (sequences, time).
fn first_keys(starts: &Tensor) -> Result<Vec<usize>> {
    Ok(starts.flatten_all()?.to_vec1::<u32>()?.into_iter().map(|start| start as usize).collect())
}

/// Turns a pair of each half by its angle.
fn turn(left: f32, right: f32, cosine: f32, sine: f32) -> [f32; 2] {
    [left * cosine - right * sine, right * cosine + left * sine]
}

/// Calls `each` with the places of a pair in the packed rows and in the part that it belongs to, with its part, cosine and sine.
fn pairs(heads: Heads, turns: &[Tensor; 2], mut each: impl FnMut(usize, usize, usize, [f32; 2])) -> Result<()> {
    let (half, [cosines, sines]) = (heads.head / 2, turns.each_ref().map(floats));
    let (cosines, sines) = (cosines?, sines?);
    for row in 0..heads.rows() {
        let (sequence, position) = (row / heads.time, row % heads.time);
        for part in 0..3 {
            for head in 0..heads.heads {
                let packed = ((row * 3 + part) * heads.heads + head) * heads.head;
                let own = ((sequence * heads.heads + head) * heads.time + position) * heads.head;
                for j in 0..half {
                    let angle = position * half + j;
                    each(packed + j, own + j, part, if part == 2 { [1.0, 0.0] } else { [cosines[angle], sines[angle]] });
                }
            }
        }
    }
    Ok(())
}

impl Kernels for Twins {
    fn memory(&self) -> usize {
        8 << 30
    }

    fn multiply(&self, a: Factor<'_>, b: Factor<'_>, dtype: DType) -> Result<Tensor> {
        let matrix = |factor: Factor<'_>| {
            let tensor = factor.tensor.to_dtype(DType::F32)?.contiguous()?;
            if factor.transposed { tensor.transpose(tensor.rank() - 2, tensor.rank() - 1)?.contiguous() } else { Ok(tensor) }
        };
        matrix(a)?.matmul(&matrix(b)?)?.to_dtype(dtype)
    }

    fn multiply_into(&self, a: Factor<'_>, b: Factor<'_>, out: &Tensor, row: usize) -> Result<()> {
        let product = self.multiply(a, b, DType::F32)?;
        let ((_, m, n), (_, rows, columns)) = (dims(as_is(&product))?, dims(as_is(out))?);
        let (mut numbers, product) = (floats(out)?, floats(&product)?);
        for (out, product) in numbers.chunks_exact_mut(rows * columns).zip(product.chunks_exact(m * n)) {
            for (out, product) in out.chunks_exact_mut(columns).skip(row).zip(product.chunks_exact(n)) {
                out[..n].copy_from_slice(product);
            }
        }
        out.slice_set(&tensor(numbers, out.dims(), out.dtype())?, 0, 0)
    }

    fn room(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::full(f32::NAN, shape, &Device::Cpu)?.to_dtype(dtype)
    }

    fn mix(&self, alpha: &Tensor, basis: &Tensor, dtype: DType) -> Result<Tensor> {
        alpha.matmul(basis)?.to_dtype(dtype)
    }

    fn add_product(&self, a: Factor<'_>, b: Factor<'_>, sum: &Spot) -> Result<()> {
        let product = floats(&self.multiply(a, b, DType::F32)?)?;
        if sum.fresh { write(sum, product) } else { add(sum, &product) }
    }

    fn norm(&self, x: &Tensor, branch: Option<&Tensor>, gain: &Tensor, epsilon: f64, dtype: DType) -> Result<Normed> {
        let stream = match branch {
            Some(branch) => (x + branch.to_dtype(DType::F32)?)?,
            None => x.clone(),
        };
        let (numbers, gain) = (floats(&stream)?, floats(gain)?);
        let mut rows = vec![0.0; numbers.len()];
        norm::forward(&numbers, &gain, epsilon as f32, &mut rows);
        let inverse = |row: &[f32]| {
            let square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            1.0 / (square + epsilon as f32).sqrt()
        };
        let inverse: Vec<f32> = numbers.chunks_exact(gain.len()).map(inverse).collect();
        let count = inverse.len();
        Ok(Normed { rows: tensor(rows, x.dims(), dtype)?, inverse: tensor(inverse, &[count], DType::F32)?, stream })
    }

    fn norm_backward(
        &self,
        normed: &Normed,
        gain: &Tensor,
        gradient: &Tensor,
        stream: Option<Tensor>,
        gain_gradient: &Spot,
    ) -> Result<(Tensor, Tensor)> {
        let (x, g, inverse) = (floats(&normed.stream)?, floats(gradient)?, floats(&normed.inverse)?);
        let gain = floats(gain)?;
        let mut out = stream.map_or_else(|| Ok(vec![0.0; x.len()]), |stream| floats(&stream))?;
        let mut gains = vec![0.0; gain.len()];
        let rows = x.chunks_exact(gain.len()).zip(g.chunks_exact(gain.len())).zip(out.chunks_exact_mut(gain.len()));
        for (((x, g), out), scale) in rows.zip(inverse) {
            let dot: f32 = (0..gain.len()).map(|j| g[j] * gain[j] * x[j]).sum();
            for j in 0..gain.len() {
                gains[j] += g[j] * x[j] * scale;
                out[j] += g[j] * gain[j] * scale - x[j] * dot * scale.powi(3) / gain.len() as f32;
            }
        }
        add(gain_gradient, &gains)?;
        let out = tensor(out, normed.stream.dims(), DType::F32)?;
        Ok((out.clone(), out.to_dtype(normed.rows.dtype())?))
    }

    fn split_heads(&self, qkv: &Tensor, heads: Heads, turns: &[Tensor; 2]) -> Result<[Tensor; 3]> {
        let (x, half) = (floats(qkv)?, heads.head / 2);
        let mut parts = [(); 3].map(|()| vec![0.0; x.len() / 3]);
        pairs(heads, turns, |packed, own, part, [cosine, sine]| {
            let [left, right] = turn(x[packed], x[packed + half], cosine, sine);
            (parts[part][own], parts[part][own + half]) = (left, right);
        })?;
        let [q, k, v] = parts.map(|part| tensor(part, &[heads.sequences * heads.heads, heads.time, heads.head], qkv.dtype()));
        Ok([q?, k?, v?])
    }

    fn join_heads(&self, parts: [&Tensor; 3], heads: Heads, turns: &[Tensor; 2]) -> Result<Tensor> {
        let half = heads.head / 2;
        let [q, k, v] = parts.map(floats);
        let from = [q?, k?, v?];
        let mut qkv = vec![0.0; 3 * from[0].len()];
        pairs(heads, turns, |packed, own, part, [cosine, sine]| {
            let [left, right] = turn(from[part][own], from[part][own + half], cosine, -sine);
            (qkv[packed], qkv[packed + half]) = (left, right);
        })?;
        tensor(qkv, &[heads.rows(), 3 * heads.heads * heads.head], parts[0].dtype())
    }

    fn swap(&self, x: &Tensor, dims: [usize; 4]) -> Result<Tensor> {
        x.reshape(dims.as_slice())?.transpose(1, 2)?.contiguous()?.flatten_all()
    }

    fn softmax(&self, scores: &Tensor, starts: &Tensor, heads: Heads, dtype: DType) -> Result<Tensor> {
        let (mut numbers, first) = (floats(scores)?, first_keys(starts)?);
        for (row, scores) in numbers.chunks_exact_mut(heads.time).enumerate() {
            let query = row % heads.time;
            let end = heads.time.min((query / QUERIES + 1) * QUERIES);
            let seen = first[row / heads.time / heads.heads * heads.time + query]..query + 1;
            let top = scores[seen.clone()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = scores[seen.clone()].iter().map(|score| ((score - top) * heads.scale()).exp()).sum();
            for (key, score) in scores[..end].iter_mut().enumerate() {
                *score = if seen.contains(&key) { ((*score - top) * heads.scale()).exp() / total } else { 0.0 };
            }
        }
        tensor(numbers, scores.dims(), dtype)
    }

    fn softmax_backward(&self, shares: &Tensor, gradient: &Tensor, _: &Tensor, heads: Heads) -> Result<Tensor> {
        let (p, mut numbers) = (floats(shares)?, floats(gradient)?);
        for (row, (p, g)) in p.chunks_exact(heads.time).zip(numbers.chunks_exact_mut(heads.time)).enumerate() {
            let end = heads.time.min((row % heads.time / QUERIES + 1) * QUERIES);
            let (p, g) = (&p[..end], &mut g[..end]);
            let dot: f32 = p.iter().zip(g.iter()).map(|(p, g)| p * g).sum();
            p.iter().zip(g).for_each(|(p, g)| *g = p * (*g - dot) * heads.scale());
        }
        tensor(numbers, shares.dims(), shares.dtype())
    }

    fn activate(&self, packed: &Tensor, activation: Activation) -> Result<Tensor> {
        let (rows, mlp) = (packed.dim(0)?, packed.dim(1)? / activation.packed());
        let mut out = vec![0.0; rows * mlp];
        match activation {
            Activation::SwiGlu => activation::swiglu_forward(&floats(packed)?, mlp, &mut out),
            Activation::Gelu => activation::gelu_forward(&floats(packed)?, &mut out),
        }
        tensor(out, &[rows, mlp], packed.dtype())
    }

    fn activate_backward(&self, packed: &Tensor, gradient: &Tensor, activation: Activation) -> Result<(Tensor, Tensor)> {
        let (numbers, mut out) = (floats(packed)?, floats(gradient)?);
        let mut packed_gradient = vec![0.0; numbers.len()];
        match activation {
            Activation::SwiGlu => activation::swiglu_backward(&numbers, gradient.dim(1)?, &mut out, &mut packed_gradient),
            Activation::Gelu => activation::gelu_backward(&numbers, &mut out, &mut packed_gradient),
        }
        Ok((tensor(out, gradient.dims(), packed.dtype())?, tensor(packed_gradient, packed.dims(), packed.dtype())?))
    }

    fn cross_entropy(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        scale: Option<f32>,
        dtype: DType,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (mut numbers, vocab) = (floats(logits)?, logits.dim(1)?);
        let mut losses = Vec::new();
        for (logits, target) in numbers.chunks_exact_mut(vocab).zip(targets.to_vec1::<u32>()?) {
            if target == IGNORED {
                losses.push(0.0);
                logits.fill(0.0);
                continue;
            }
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = logits.iter().map(|logit| (logit - top).exp()).sum();
            losses.push(total.ln() + top - logits[target as usize]);
            for (token, logit) in logits.iter_mut().enumerate() {
                let own = if token == target as usize { 1.0 } else { 0.0 };
                *logit = scale.unwrap_or(0.0) * ((*logit - top).exp() / total - own);
            }
        }
        let gradient = scale.map(|_| tensor(numbers, logits.dims(), dtype)).transpose()?;
        let rows = losses.len();
        Ok((tensor(losses, &[rows], DType::F32)?, gradient))
    }

    fn add_rows(&self, rows: &Tensor, by_token: &ByToken, table: &Spot) -> Result<()> {
        let (numbers, mut sums) = (floats(rows)?, read(table)?);
        let mut tokens = vec![0; by_token.order.len()];
        for (token, bounds) in by_token.tokens.iter().zip(by_token.bounds.windows(2)) {
            by_token.order[bounds[0] as usize..bounds[1] as usize].iter().for_each(|row| tokens[*row as usize] = *token);
        }
        embedding::backward(&numbers, rows.dim(1)?, &tokens, &mut sums);
        write(table, sums)
    }

    fn squares(&self, parts: &[Spot]) -> Result<f64> {
        parts.iter().map(|part| Ok(adamw::norm(&read(part)?).powi(2))).sum()
    }

    fn adamw(
        &self,
        parameters: &Spot,
        gradient: &Spot,
        moments: [&Spot; 2],
        factors: Factors,
        rates: Option<&[f32]>,
    ) -> Result<()> {
        let [mut p, mut g, mut m, mut v] = [read(parameters)?, read(gradient)?, read(moments[0])?, read(moments[1])?];
        let rates = rates.unwrap_or(&[1.0]);
        let part = p.len() / rates.len();
        for (i, rate) in rates.iter().enumerate() {
            let at = i * part..(i + 1) * part;
            let factors = Factors { learning_rate: factors.learning_rate * rate, ..factors };
            adamw::step(&mut p[at.clone()], &mut g[at.clone()], &mut m[at.clone()], &mut v[at], factors);
        }
        write(parameters, p)?;
        write(moments[0], m)?;
        write(moments[1], v)
    }
}
