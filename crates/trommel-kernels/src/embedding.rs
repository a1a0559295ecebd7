//! Rows of a table by token, and the gradient of the table.

use rayon::prelude::*;

use crate::vectorize::vectorized;

/// Copies the row of `table` (vocab, width) of each token to `out` (tokens, width). Every token is below `vocab`.
pub fn forward(table: &[f32], width: usize, tokens: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), tokens.len() * width);
    for (token, out) in tokens.iter().zip(out.chunks_exact_mut(width)) {
        let from = *token as usize * width;
        out.copy_from_slice(&table[from..from + width]);
    }
}

/// Vocabulary rows that one task owns. Each task reads all tokens and adds those of its own rows, in the order of the
/// tokens, so no two tasks write to one row and the sums do not depend on the number of threads.
const BLOCK: usize = 256;

/// Adds each row of `gradient` (tokens, width) to the row of `table_gradient` (vocab, width) of its token.
pub fn backward(gradient: &[f32], width: usize, tokens: &[u32], table_gradient: &mut [f32]) {
    assert_eq!(gradient.len(), tokens.len() * width);
    table_gradient.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, rows)| {
        for (token, gradient) in tokens.iter().zip(gradient.chunks_exact(width)) {
            let Some(row) = (*token as usize).checked_sub(block * BLOCK).filter(|row| row * width < rows.len()) else {
                continue;
            };
            for (sum, gradient) in rows[row * width..(row + 1) * width].iter_mut().zip(gradient) {
                *sum += gradient;
            }
        }
    });
}

/// Adds rows of `table` (vocab, width) to `sum` (width): of each pair the row of that number, times the factor.
pub fn add_scaled_rows(table: &[i8], rows: &[(u32, f32)], sum: &mut [f32]) {
    for_each_row(table, rows, sum);
}

/// Rows that are added while a part of the sum is in a register.
const TOGETHER: usize = 4;

vectorized! {
    fn for_each_row(table: &[i8], rows: &[(u32, f32)], sum: &mut [f32]) {
        let width = sum.len();
        let row_of = |row: u32| &table[row as usize * width..][..width];
        let (together, rest) = rows.as_chunks::<TOGETHER>();
        for rows in together {
            let [a, b, c, d] = rows.map(|(row, factor)| (row_of(row), factor));
            for ((((sum, w), x), y), z) in sum.iter_mut().zip(a.0).zip(b.0).zip(c.0).zip(d.0) {
                let after_two = *sum + a.1 * f32::from(*w) + b.1 * f32::from(*x);
                *sum = after_two + c.1 * f32::from(*y) + d.1 * f32::from(*z);
            }
        }
        for (row, factor) in rest {
            for (sum, x) in sum.iter_mut().zip(row_of(*row)) {
                *sum += factor * f32::from(*x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::numbers;

    #[test]
    fn repeated_tokens_add_up_over_block_borders() {
        let (vocab, width) = (BLOCK + 3, 5);
        let tokens = [0, BLOCK as u32, 2, BLOCK as u32 + 2, 0, BLOCK as u32];
        let table = numbers(vocab * width, 1);
        let mut out = vec![0.0; tokens.len() * width];
        forward(&table, width, &tokens, &mut out);
        assert_eq!(out[width..2 * width], table[BLOCK * width..(BLOCK + 1) * width]);

        let gradient = numbers(tokens.len() * width, 2);
        let mut sums = vec![0.0; vocab * width];
        backward(&gradient, width, &tokens, &mut sums);
        let mut expected = vec![0.0; vocab * width];
        for (row, token) in tokens.iter().enumerate() {
            for i in 0..width {
                expected[*token as usize * width + i] += gradient[row * width + i];
            }
        }
        assert_eq!(sums, expected);
    }

    #[test]
    fn scaled_rows_add_up() {
        let table = [1, 2, -128, 127, 0, 5];
        let mut sum = [1.0, 1.0];
        add_scaled_rows(&table, &[(2, 2.0), (1, 0.0), (0, 0.5), (2, 2.0)], &mut sum);
        assert_eq!(sum, [1.5, 22.0]);
        add_scaled_rows(&table, &[], &mut sum);
        assert_eq!(sum, [1.5, 22.0]);
        add_scaled_rows(&table, &[(0, 1.0), (1, 1.0), (2, 1.0), (0, 2.0), (1, 0.5), (2, 3.0)], &mut sum);
        assert_eq!(sum, [-187.5, 238.5]);
    }
}
