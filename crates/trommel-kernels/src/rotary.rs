//! Rotary positions (RoPE), in the half-rotation order of Hugging Face's Llama.
//!
//! Within a head of `d` numbers, number `i < d/2` and number `i + d/2` form a plane, which position `t` turns by the angle
//! `t * theta^(-2i/d)`. The product of a turned query and a turned key depends on the difference of their positions only,
//! so positions need not restart where a document begins. [Su et al., arXiv 2104.09864]

use crate::vectorize::vectorized;

/// Cosines and sines of every position and plane.
#[derive(Debug, Clone)]
pub struct Table {
    half: usize,
    cosines: Vec<f32>, // (positions, half)
    sines: Vec<f32>,   // (positions, half)
}

/// Which way to turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// By the position's angle: the forward pass.
    Forward,
    /// Back by it: the backward pass, since the gradient of a rotation is its inverse.
    Backward,
}

impl Table {
    /// The angles of positions `0..positions` for heads of `head` numbers; `head` is even.
    pub fn new(positions: usize, head: usize, theta: f64) -> Self {
        assert!(head.is_multiple_of(2), "rotary positions need an even head size, not {head}");
        let half = head / 2;
        let angle = |i: usize| (i / half) as f64 * theta.powf(-2.0 * (i % half) as f64 / head as f64);
        let angles: Vec<f64> = (0..positions * half).map(angle).collect();
        Table {
            half,
            cosines: angles.iter().map(|a| a.cos() as f32).collect(),
            sines: angles.iter().map(|a| a.sin() as f32).collect(),
        }
    }

    /// The cosines, (positions, head / 2).
    pub fn cosines(&self) -> &[f32] {
        &self.cosines
    }

    /// The sines, (positions, head / 2).
    pub fn sines(&self) -> &[f32] {
        &self.sines
    }

    /// Turns the first `heads` heads of each row of `x` (rows, row_stride); row `r` stands at position `first + r`.
    pub fn apply(&self, x: &mut [f32], row_stride: usize, heads: usize, first: usize, turn: Turn) {
        assert!(heads * self.half * 2 <= row_stride, "{heads} heads do not fit into a row");
        let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
        let from = first * self.half;
        rotate(x, row_stride, heads, &self.cosines[from..], &self.sines[from..], self.half, sign);
    }
}

vectorized! {
    fn rotate(x: &mut [f32], row_stride: usize, heads: usize, cosines: &[f32], sines: &[f32], half: usize, sign: f32) {
        let angles = cosines.chunks_exact(half).zip(sines.chunks_exact(half));
        assert!(x.len() / row_stride <= cosines.len() / half, "a position lies beyond the table");
        for (row, (cosines, sines)) in x.chunks_exact_mut(row_stride).zip(angles) {
            for head in row[..heads * half * 2].chunks_exact_mut(half * 2) {
                let (left, right) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b, cosine, sine) = (left[i], right[i], cosines[i], sign * sines[i]);
                    left[i] = a * cosine - b * sine;
                    right[i] = b * cosine + a * sine;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers};

    #[test]
    fn turning_back_restores_and_values_are_left_alone() {
        let table = Table::new(8, 6, 10_000.0);
        let start = numbers(3 * 20, 1);
        let mut x = start.clone();
        table.apply(&mut x, 20, 2, 4, Turn::Forward);
        assert!(x[12..20] == start[12..20] && x[..12] != start[..12]);
        table.apply(&mut x, 20, 2, 4, Turn::Backward);
        for (x, start) in x.iter().zip(&start) {
            close(f64::from(*x), f64::from(*start), 1e-6);
        }
    }

    #[test]
    fn products_depend_on_the_distance_only() {
        let (query, key) = (numbers(4, 1), numbers(4, 2));
        let table = Table::new(10, 4, 100.0);
        let product = |t: usize, s: usize| {
            let (mut query, mut key) = (query.clone(), key.clone());
            table.apply(&mut query, 4, 1, t, Turn::Forward);
            table.apply(&mut key, 4, 1, s, Turn::Forward);
            query.iter().zip(&key).map(|(q, k)| f64::from(q * k)).sum::<f64>()
        };
        close(product(9, 6), product(3, 0), 1e-6);
    }
}
