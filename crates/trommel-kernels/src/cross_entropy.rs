//! The output layer and its loss: logits against an embedding, and the negative log-likelihood of each target.
//!
//! Logits are the largest tensor of a small model, (rows, vocab), and nobody needs them whole. A task forms those of a few
//! rows, which stay in the cache of its core, takes the losses, and leaves the gradient of the logits in the numbers that
//! products read. When a chunk of rows is through, the gradient of the embedding is summed over it, and the next chunk
//! overwrites the first:
//!
//! ```text
//!   per chunk of rows:   per few rows: logits, losses, gradient of the hidden rows   | meet |   per block of words: sum
//! ```
//!
//! With a teacher, a task forms the teacher's logits of the same few rows beside them.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::attention::exp_sum;
use crate::lines::Lines;
use crate::matmul::{Matrix, MatrixMut, Target};
use crate::panels::{Panels, Precision};
use crate::rows::Rows;
use crate::vectorize::{dot, vectorized};

/// A target that no loss is taken of.
pub const IGNORED: u32 = u32::MAX;

/// Rows of one task: at a vocabulary of 8,192 their logits are 1 MB, which the second cache holds.
const TASK_ROWS: usize = 32;
/// Rows of the embedding whose gradient one task sums.
const VOCAB_BLOCK: usize = 256;
/// Logits whose gradient a chunk may hold.
const CHUNK_NUMBERS: usize = 1 << 22;

fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_NUMBERS / vocab).next_multiple_of(TASK_ROWS).max(TASK_ROWS)
}

thread_local! {
    /// The logits of one task, (TASK_ROWS, vocab), and with a teacher its logits and a row more.
    static LOGITS: RefCell<[Lines<f32>; 3]> = RefCell::default();
}

/// Memory that calls share: the gradient of the logits of one chunk, and the operands as the products need them.
#[derive(Debug)]
pub struct Scratch {
    gradients: Rows,   // (rows of the chunk, vocab)
    words: Panels,     // (width, vocab)
    embedding: Panels, // (vocab, width)
    hidden: Panels,    // (rows of the chunk, width)
    taught: Panels,    // (width of the teacher, vocab)
}

impl Scratch {
    /// Memory for products in `precision`.
    pub fn new(precision: Precision) -> Self {
        let panels = || Panels::new(precision);
        Scratch { gradients: Rows::new(precision), words: panels(), embedding: panels(), hidden: panels(), taught: panels() }
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

/// Another model over the same vocabulary, whose next-word distributions are learnt beside the targets. The loss of a row is
/// `(1 - weight) * NLL(target) + weight * temperature^2 * H(q, p)` with `q` and `p` the softmax of the teacher's and of our logits,
/// each divided by the temperature, and `H` their cross-entropy. [Hinton et al., arXiv 1503.02531]
#[derive(Debug, Clone, Copy)]
pub struct Teacher<'a> {
    /// Rows of its last layer, (rows, width), for the rows of the [`Output`].
    pub hidden: &'a [f32],
    /// Its embedding, (vocab, width).
    pub embedding: &'a [f32],
    /// Its numbers per row.
    pub width: usize,
    /// The share of the loss that it has (0 to 1).
    pub weight: f32,
    /// What logits are divided by (above 0).
    pub temperature: f32,
}

impl Output<'_> {
    fn vocab(&self) -> usize {
        self.embedding.len() / self.width
    }

    /// Writes the negative log-likelihood in nats of each target to `losses` (rows); zero where it is [`IGNORED`].
    pub fn losses(&self, losses: &mut [f32], scratch: &mut Scratch) {
        self.check(losses);
        let words = &mut scratch.words;
        words.pack(Matrix::new(self.embedding, self.vocab(), self.width).transposed());
        losses.par_chunks_mut(TASK_ROWS).with_max_len(1).enumerate().for_each(|(task, losses)| {
            self.run(task * TASK_ROWS, words, None, 0.0, losses, |_, _| {});
        });
    }

    /// The losses, mixed with those against a `teacher`, and the gradients of `scale * sum of losses`: that of the hidden rows
    /// overwrites `hidden_gradient` (rows, width), that of the embedding is added to `embedding_gradient` (vocab, width).
    pub fn losses_and_gradients(
        &self,
        teacher: Option<Teacher<'_>>,
        scale: f32,
        losses: &mut [f32],
        hidden_gradient: &mut [f32],
        embedding_gradient: &mut [f32],
        scratch: &mut Scratch,
    ) {
        self.check(losses);
        assert!(hidden_gradient.len() == self.hidden.len() && embedding_gradient.len() == self.embedding.len());
        let (vocab, width) = (self.vocab(), self.width);
        let Scratch { gradients, words, embedding, hidden, taught } = scratch;
        let table = Matrix::new(self.embedding, vocab, width);
        words.pack(table.transposed());
        embedding.pack(table);
        if let Some(teacher) = teacher {
            assert!(teacher.hidden.len() == self.targets.len() * teacher.width, "the teacher has seen other rows");
            taught.pack(Matrix::new(teacher.embedding, vocab, teacher.width).transposed());
        }
        let taught = &*taught;
        let teacher = teacher.map(|teacher| (teacher, taught));
        let step = chunk_rows(vocab);
        let chunks = losses.chunks_mut(step).zip(hidden_gradient.chunks_mut(step * width)).enumerate();
        for (chunk, (losses, hidden_gradient)) in chunks {
            let (first, rows) = (chunk * step, losses.len());
            gradients.reserve(rows, vocab);
            let tasks = gradients.parts(TASK_ROWS).into_par_iter().with_max_len(1).enumerate();
            let tasks = tasks.zip(losses.par_chunks_mut(TASK_ROWS)).zip(hidden_gradient.par_chunks_mut(TASK_ROWS * width));
            tasks.for_each(|(((task, mut gradients), losses), hidden_gradient)| {
                let rows = losses.len();
                let store = |row: usize, logits: &[f32]| gradients.store(row, Matrix::new(logits, 1, vocab));
                self.run(first + task * TASK_ROWS, words, teacher, scale, losses, store);
                let out = MatrixMut::new(hidden_gradient, rows, width);
                embedding.multiply_from(0, out, Target::Overwrite, gradients.operand());
            });
            hidden.pack(Matrix::new(&self.hidden[first * width..(first + rows) * width], rows, width));
            let blocks = embedding_gradient.par_chunks_mut(VOCAB_BLOCK * width).with_max_len(1).enumerate();
            blocks.for_each(|(block, sums)| {
                let sums = MatrixMut::new(sums, sums.len() / width, width);
                hidden.multiply_turned(sums, Target::Add, gradients, block * VOCAB_BLOCK);
            });
        }
    }

    fn check(&self, losses: &[f32]) {
        let (rows, width) = (self.targets.len(), self.width);
        assert!(self.hidden.len() == rows * width && self.embedding.len() == self.vocab() * width && losses.len() == rows);
    }

    /// Writes the `losses` of the rows from `first` on, and shows `use_gradient` the gradient of each row's logits while it lies
    /// in a cache.
    fn run(
        &self,
        first: usize,
        words: &Panels,
        teacher: Option<(Teacher<'_>, &Panels)>,
        scale: f32,
        losses: &mut [f32],
        mut use_gradient: impl FnMut(usize, &[f32]),
    ) {
        let vocab = self.vocab();
        let at = first..first + losses.len();
        let targets = &self.targets[at.clone()];
        LOGITS.with_borrow_mut(|[logits, taught, softened]| {
            let logits = logits_of(logits, self.hidden, self.width, words, vocab, at.clone());
            let mut taught = teacher.map(|(teacher, taught_words)| {
                softened.resize(vocab, 0.0);
                (teacher, logits_of(taught, teacher.hidden, teacher.width, taught_words, vocab, at))
            });
            for (row, (logits, (target, loss))) in logits.chunks_exact_mut(vocab).zip(targets.iter().zip(losses)).enumerate() {
                match &mut taught {
                    None => *loss = loss_of(logits, *target, scale),
                    Some((teacher, taught)) => {
                        let taught = &mut taught[row * vocab..(row + 1) * vocab];
                        *loss = distilled_loss(logits, taught, softened, *target, [teacher.weight, teacher.temperature], scale);
                    }
                }
                use_gradient(row, logits);
            }
        });
    }
}

/// The logits of the rows `at`, (rows, vocab), in `memory`.
fn logits_of<'a>(
    memory: &'a mut Lines<f32>,
    hidden: &[f32],
    width: usize,
    words: &Panels,
    vocab: usize,
    at: Range<usize>,
) -> &'a mut [f32] {
    let rows = at.len();
    if memory.len() < rows * vocab {
        memory.resize(rows * vocab, 0.0);
    }
    let logits = &mut memory[..rows * vocab];
    let hidden = Matrix::new(&hidden[at.start * width..at.end * width], rows, width);
    words.multiply(MatrixMut::new(logits, rows, vocab), Target::Overwrite, hidden);
    logits
}

vectorized! {
    /// [`loss_of`] with a share of the loss against the distribution of the `taught` logits, which it overwrites; `softened`
    /// (vocab) is memory. The gradient of a logit is `(1 - weight) (p - target) + weight * temperature (p_softened - q)`.
    fn distilled_loss(
        logits: &mut [f32],
        taught: &mut [f32],
        softened: &mut [f32],
        target: u32,
        share: [f32; 2],
        scale: f32,
    ) -> f32 {
        let [weight, temperature] = share;
        if target == IGNORED {
            logits.fill(0.0);
            return 0.0;
        }
        for ((softened, logit), taught) in softened.iter_mut().zip(logits.iter()).zip(taught.iter_mut()) {
            *softened = logit / temperature;
            *taught /= temperature;
        }
        let largest = crate::attention::maximum(taught);
        let taught_sum = exp_sum(taught, largest);
        let product = dot(taught, softened) / taught_sum;
        let largest = crate::attention::maximum(softened);
        let softened_sum = exp_sum(softened, largest);
        let against_teacher = largest + softened_sum.ln() - product;

        let at_target = logits[target as usize];
        let largest = crate::attention::maximum(logits);
        let sum = exp_sum(logits, largest);
        let against_target = largest + sum.ln() - at_target;
        let (own, soft) = (scale * (1.0 - weight) / sum, scale * weight * temperature / softened_sum);
        let theirs = scale * weight * temperature / taught_sum;
        for ((logit, softened), taught) in logits.iter_mut().zip(softened.iter()).zip(taught.iter()) {
            *logit = own * *logit + soft * softened - theirs * taught;
        }
        logits[target as usize] -= scale * (1.0 - weight);
        (1.0 - weight) * against_target + weight * temperature * temperature * against_teacher
    }
}

vectorized! {
    /// The loss of a row, whose logits it replaces by `scale * (softmax - target)`, their gradient.
    fn loss_of(logits: &mut [f32], target: u32, scale: f32) -> f32 {
        if target == IGNORED {
            logits.fill(0.0);
            return 0.0;
        }
        let at_target = logits[target as usize];
        let largest = crate::attention::maximum(logits);
        let sum = exp_sum(logits, largest);
        let share = scale / sum;
        for logit in logits.iter_mut() {
            *logit *= share;
        }
        logits[target as usize] -= scale;
        largest + sum.ln() - at_target
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
            output.losses_and_gradients(None, 0.5, &mut losses, &mut dhidden, &mut dembedding, &mut scratch);
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
    fn a_teacher_adds_its_share() {
        let (rows, width, vocab, teacher_width) = (35, 5, 40, 3);
        let (hidden, embedding) = (numbers(rows * width, 1), numbers(vocab * width, 2));
        let (teacher_hidden, teacher_embedding) = (numbers(rows * teacher_width, 3), numbers(vocab * teacher_width, 4));
        let targets: Vec<u32> = (0..rows).map(|i| if i == 1 { IGNORED } else { (i * 7 % vocab) as u32 }).collect();
        for (weight, temperature) in [(0.0, 1.0), (0.3, 1.0), (0.7, 2.5), (1.0, 0.5)] {
            let teacher =
                Teacher { hidden: &teacher_hidden, embedding: &teacher_embedding, width: teacher_width, weight, temperature };
            let logits = |hidden: &[f32], embedding: &[f32], width: usize, scale: f64| -> Vec<f64> {
                let product = |e: &[f32]| hidden.iter().zip(e).map(|(h, e)| f64::from(*h) * f64::from(*e)).sum::<f64>();
                embedding.chunks_exact(width).map(|e| product(e) / scale).collect()
            };
            let log_sum = |logits: &[f64]| logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            let value = |hidden: &[f32], embedding: &[f32], row: usize| -> f64 {
                if targets[row] == IGNORED {
                    return 0.0;
                }
                let (hidden, t) = (&hidden[row * width..(row + 1) * width], f64::from(temperature));
                let taught = &teacher_hidden[row * teacher_width..(row + 1) * teacher_width];
                let taught = logits(taught, &teacher_embedding, teacher_width, t);
                let (own, softened) = (logits(hidden, embedding, width, 1.0), logits(hidden, embedding, width, t));
                let share = |i: usize| (taught[i] - log_sum(&taught)).exp();
                let cross: f64 = (0..vocab).map(|i| share(i) * (log_sum(&softened) - softened[i])).sum();
                let w = f64::from(weight);
                (1.0 - w) * (log_sum(&own) - own[targets[row] as usize]) + w * t * t * cross
            };
            let output = Output { hidden: &hidden, embedding: &embedding, width, targets: &targets };
            let mut losses = vec![0.0; rows];
            let (mut dhidden, mut dembedding) = (vec![0.0; hidden.len()], vec![0.0; embedding.len()]);
            let mut scratch = Scratch::new(Precision::F32);
            output.losses_and_gradients(Some(teacher), 0.5, &mut losses, &mut dhidden, &mut dembedding, &mut scratch);
            for (row, loss) in losses.iter().enumerate() {
                close(f64::from(*loss), value(&hidden, &embedding, row), 1e-5);
            }
            let sum = |hidden: &[f32], embedding: &[f32]| 0.5 * (0..rows).map(|row| value(hidden, embedding, row)).sum::<f64>();
            for i in (0..hidden.len()).step_by(9) {
                close(f64::from(dhidden[i]), slope(&hidden, i, |h| sum(h, &embedding)), 1e-3);
            }
            for i in (0..embedding.len()).step_by(11) {
                close(f64::from(dembedding[i]), slope(&embedding, i, |e| sum(&hidden, e)), 1e-3);
            }
        }
    }

    #[test]
    fn chunks_do_not_change_a_row() {
        // 70,000 words leave room for 64 rows in a chunk, so the rows fall into three.
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
