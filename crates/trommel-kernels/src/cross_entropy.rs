//! The output layer and its loss: logits against an embedding, and the negative log-likelihood of each target.
//!
//! Logits are the largest tensor of a small model, (rows, vocab). They are formed for a chunk of rows at a time; the
//! gradient is taken from the chunk while it is there, and the next chunk overwrites it.

use rayon::prelude::*;

use crate::attention::exp_sum;
use crate::matmul::{Matrix, MatrixMut, Target};
use crate::panels::{Panels, Precision};
use crate::vectorize::vectorized;

/// A target that no loss is taken of.
pub const IGNORED: u32 = u32::MAX;

/// Rows of one task; a chunk is a number of tasks.
const TASK_ROWS: usize = 128;
/// Rows of the embedding whose gradient one task sums.
const VOCAB_BLOCK: usize = 256;
/// Logits that a chunk may hold.
const CHUNK_NUMBERS: usize = 1 << 22;

fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_NUMBERS / vocab).next_multiple_of(TASK_ROWS)
}

/// Memory that calls share: the logits of one chunk, and the operands as the products need them.
#[derive(Debug)]
pub struct Scratch {
    logits: Vec<f32>,
    words: Panels,     // (width, vocab)
    embedding: Panels, // (vocab, width)
    hidden: Panels,    // (rows of the chunk, width)
}

impl Scratch {
    /// Memory for products in `precision`.
    pub fn new(precision: Precision) -> Self {
        let panels = || Panels::new(precision);
        Scratch { logits: Vec::new(), words: panels(), embedding: panels(), hidden: panels() }
    }
}

/// The loss of hidden rows against an embedding.
#[derive(Debug, Clone, Copy)]
pub struct Output<'a> {
    /// Rows of the last layer, (rows, width).
    pub hidden: &'a [f32],
    /// The embedding, (vocab, width).
    pub embedding: &'a [f32],
    /// Numbers per row.
    pub width: usize,
    /// The token that each row should predict, or [`IGNORED`]; (rows).
    pub targets: &'a [u32],
}

impl Output<'_> {
    fn vocab(&self) -> usize {
        self.embedding.len() / self.width
    }

    /// Writes the negative log-likelihood in nats of each target to `losses` (rows); zero where it is [`IGNORED`].
    pub fn losses(&self, losses: &mut [f32], scratch: &mut Scratch) {
        self.chunks(losses, scratch, 0.0, |_, _, _, _| {});
    }

    /// [`Output::losses`], and the gradients of `scale * sum of losses`: that of the hidden rows overwrites
    /// `hidden_gradient` (rows, width), that of the embedding is added to `embedding_gradient` (vocab, width).
    pub fn losses_and_gradients(
        &self,
        scale: f32,
        losses: &mut [f32],
        hidden_gradient: &mut [f32],
        embedding_gradient: &mut [f32],
        scratch: &mut Scratch,
    ) {
        assert!(hidden_gradient.len() == self.hidden.len() && embedding_gradient.len() == self.embedding.len());
        let (vocab, width) = (self.vocab(), self.width);
        scratch.embedding.pack(Matrix::new(self.embedding, vocab, width));
        self.chunks(losses, scratch, scale, |first, logits, embedding, hidden| {
            let rows = logits.len() / vocab;
            let hidden_gradient = &mut hidden_gradient[first * width..(first + rows) * width];
            let tasks = hidden_gradient.par_chunks_mut(TASK_ROWS * width).zip(logits.par_chunks(TASK_ROWS * vocab));
            tasks.for_each(|(gradient, logits)| {
                let rows = logits.len() / vocab;
                let logits = Matrix::new(logits, rows, vocab);
                embedding.multiply(MatrixMut::new(gradient, rows, width), Target::Overwrite, logits);
            });
            hidden.pack(Matrix::new(&self.hidden[first * width..], rows, width));
            embedding_gradient.par_chunks_mut(VOCAB_BLOCK * width).enumerate().for_each(|(block, gradient)| {
                let columns = gradient.len() / width;
                let logits = Matrix::strided(&logits[block * VOCAB_BLOCK..], rows, columns, vocab);
                hidden.multiply(MatrixMut::new(gradient, columns, width), Target::Add, logits.transposed());
            });
        });
    }

    /// Forms the logits of each chunk, takes the losses, and shows `use_chunk` the first row, the gradient of the logits,
    /// and the two other packed operands.
    fn chunks(
        &self,
        losses: &mut [f32],
        scratch: &mut Scratch,
        scale: f32,
        mut use_chunk: impl FnMut(usize, &[f32], &Panels, &mut Panels),
    ) {
        let (vocab, width, rows) = (self.vocab(), self.width, self.targets.len());
        assert!(self.hidden.len() == rows * width && self.embedding.len() == vocab * width && losses.len() == rows);
        let Scratch { logits, words, embedding, hidden: packed_hidden } = scratch;
        let step = chunk_rows(vocab).min(rows.max(1));
        if logits.len() < step * vocab {
            logits.resize(step * vocab, 0.0);
        }
        words.pack(Matrix::new(self.embedding, vocab, width).transposed());
        for first in (0..rows).step_by(step) {
            let here = step.min(rows - first);
            let logits = &mut logits[..here * vocab];
            let tasks = logits
                .par_chunks_mut(TASK_ROWS * vocab)
                .zip(losses[first..first + here].par_chunks_mut(TASK_ROWS))
                .zip(self.targets[first..first + here].par_chunks(TASK_ROWS))
                .zip(self.hidden[first * width..(first + here) * width].par_chunks(TASK_ROWS * width));
            tasks.for_each(|(((logits, losses), targets), hidden)| {
                let rows = targets.len();
                words.multiply(MatrixMut::new(logits, rows, vocab), Target::Overwrite, Matrix::new(hidden, rows, width));
                rows_of_losses(logits, targets, scale, losses);
            });
            use_chunk(first, logits, embedding, packed_hidden);
        }
    }
}

vectorized! {
    /// Writes each row's loss, and replaces the row of logits by `scale * (softmax - target)`, its gradient.
    fn rows_of_losses(logits: &mut [f32], targets: &[u32], scale: f32, losses: &mut [f32]) {
        let vocab = logits.len() / targets.len();
        for ((logits, target), loss) in logits.chunks_exact_mut(vocab).zip(targets).zip(losses) {
            if *target == IGNORED {
                logits.fill(0.0);
                *loss = 0.0;
                continue;
            }
            let at_target = logits[*target as usize];
            let largest = crate::attention::maximum(logits);
            let sum = exp_sum(logits, largest);
            *loss = largest + sum.ln() - at_target;
            let share = scale / sum;
            for logit in logits.iter_mut() {
                *logit *= share;
            }
            logits[*target as usize] -= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers, slope};

    fn naive(hidden: &[f32], embedding: &[f32], width: usize, targets: &[u32]) -> Vec<f64> {
        let row = |(hidden, target): (&[f32], &u32)| {
            if *target == IGNORED {
                return 0.0;
            }
            let product = |e: &[f32]| hidden.iter().zip(e).map(|(h, e)| f64::from(*h) * f64::from(*e)).sum::<f64>();
            let logits: Vec<f64> = embedding.chunks_exact(width).map(product).collect();
            logits.iter().map(|l| l.exp()).sum::<f64>().ln() - logits[*target as usize]
        };
        hidden.chunks_exact(width).zip(targets).map(row).collect()
    }

    #[test]
    fn losses_and_gradients_equal_the_definition() {
        for (rows, width, vocab) in [(1, 1, 2), (3, 5, 17), (130, 4, 300)] {
            let (hidden, embedding) = (numbers(rows * width, 1), numbers(vocab * width, 2));
            let targets: Vec<u32> = (0..rows).map(|i| if i == 1 { IGNORED } else { (i * 7 % vocab) as u32 }).collect();
            let output = Output { hidden: &hidden, embedding: &embedding, width, targets: &targets };
            let (mut losses, mut only_losses) = (vec![0.0; rows], vec![0.0; rows]);
            let (mut dhidden, mut dembedding) = (vec![0.0; hidden.len()], vec![1.0; embedding.len()]);
            let mut scratch = Scratch::new(Precision::F32);
            output.losses_and_gradients(0.5, &mut losses, &mut dhidden, &mut dembedding, &mut scratch);
            output.losses(&mut only_losses, &mut scratch);
            assert_eq!(losses, only_losses);
            for (got, expected) in losses.iter().zip(naive(&hidden, &embedding, width, &targets)) {
                close(f64::from(*got), expected, 1e-5);
            }
            let value = |hidden: &[f32], embedding: &[f32]| 0.5 * naive(hidden, embedding, width, &targets).iter().sum::<f64>();
            for i in (0..hidden.len()).step_by(1 + hidden.len() / 20) {
                close(f64::from(dhidden[i]), slope(&hidden, i, |h| value(h, &embedding)), 1e-3);
            }
            for i in (0..embedding.len()).step_by(1 + embedding.len() / 20) {
                close(f64::from(dembedding[i]) - 1.0, slope(&embedding, i, |e| value(&hidden, e)), 1e-3);
            }
        }
    }

    #[test]
    fn chunks_do_not_change_a_row() {
        // 70,000 words leave room for 128 rows in a chunk, so the rows fall into two.
        let (rows, vocab) = (140, 70_000);
        let (hidden, embedding) = (numbers(rows, 1), numbers(vocab, 2));
        let targets: Vec<u32> = (0..rows as u32).map(|i| i * 499).collect();
        let losses = |from: usize| {
            let output = Output { hidden: &hidden[from..], embedding: &embedding, width: 1, targets: &targets[from..] };
            let mut losses = vec![0.0; rows - from];
            output.losses(&mut losses, &mut Scratch::new(Precision::F32));
            losses
        };
        for (all, last) in losses(0)[130..].iter().zip(losses(130)) {
            close(f64::from(*all), f64::from(last), 1e-6);
        }
    }

    #[test]
    fn a_nan_reaches_the_loss() {
        let output = Output { hidden: &[f32::NAN], embedding: &[0.0, 1.0], width: 1, targets: &[0] };
        let mut losses = [0.0];
        output.losses(&mut losses, &mut Scratch::new(Precision::F32));
        assert!(losses[0].is_nan());
    }
}
