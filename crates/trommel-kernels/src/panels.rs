//! Products with a right operand that was rearranged once: most of the time of training goes into these.
//!
//! The gemm crate rearranges its operands anew for each product, which for a weight and the few hundred rows of a sequence
//! is a sixth of the time. Here the right operand becomes panels of 64 columns, once for many products, and the left one
//! is read where it lies. With AVX-512 a tile of 6 rows and 64 columns stays in 24 registers:
//!
//! ```text
//!                     panel: 64 columns
//!                   +-------------------+
//!      depth  l --> | b0   b1   b2   b3 |        4 loads, 6 broadcasts and 24 multiply-adds for each l
//!                   +-------------------+
//!   6 rows  a[r][l] | acc[r][0..4]      |
//!                   +-------------------+
//! ```
//!
//! Without AVX-512 the gemm crate multiplies with each panel. Sums run over blocks of `DEPTH` in order, whatever the
//! number of rows, so a row's result does not depend on the rows beside it.

use rayon::prelude::*;

use crate::matmul::{Matrix, MatrixMut, Target, multiply};

/// Columns of a panel: four AVX-512 registers.
const WIDTH: usize = 64;
/// Rows of a panel that are used before the next panel: 64 KB, which the second cache holds beside the left operand.
const DEPTH: usize = 256;

/// A right operand, as panels of 64 columns; the last one is filled up with zeros.
#[derive(Debug, Default)]
pub struct Panels {
    rows: usize,
    columns: usize,
    data: Vec<f32>, // per panel: (rows, WIDTH)
}

impl Panels {
    /// Replaces the content by that of `right`, on all threads.
    pub fn pack(&mut self, right: Matrix<'_>) {
        self.resize(&right);
        self.data
            .par_chunks_mut((WIDTH * right.rows).max(1))
            .enumerate()
            .for_each(|(panel, numbers)| fill(panel, numbers, right));
    }

    /// [`Panels::pack`] on the calling thread.
    pub fn pack_here(&mut self, right: Matrix<'_>) {
        self.resize(&right);
        self.data.chunks_mut((WIDTH * right.rows).max(1)).enumerate().for_each(|(panel, numbers)| fill(panel, numbers, right));
    }

    fn resize(&mut self, right: &Matrix<'_>) {
        (self.rows, self.columns) = (right.rows, right.columns);
        self.data.resize(right.rows * right.columns.next_multiple_of(WIDTH), 0.0);
    }

    /// Rows of the right operand.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `out = left * panels`, or `out += left * panels`, on the calling thread.
    pub fn multiply(&self, out: MatrixMut<'_>, target: Target, left: Matrix<'_>) {
        assert_eq!(left.columns, self.rows, "inner sizes of a product differ");
        assert_eq!((out.rows, out.columns), (left.rows, self.columns), "outer sizes of a product differ");
        if self.rows == 0 || out.rows == 0 || out.columns == 0 {
            return multiply(out, target, 1.0, left, Matrix::new(&[], self.rows, self.columns));
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            return self.multiply_avx512(out, target, left);
        }
        self.multiply_portable(out, target, left);
    }

    fn multiply_portable(&self, out: MatrixMut<'_>, target: Target, left: Matrix<'_>) {
        for (panel, numbers) in self.data.chunks_exact(WIDTH * self.rows).enumerate() {
            let first = panel * WIDTH;
            let columns = WIDTH.min(self.columns - first);
            let out = MatrixMut::strided(&mut out.data[first..], out.rows, columns, out.row_stride);
            multiply(out, target, 1.0, left, Matrix::strided(numbers, self.rows, columns, WIDTH));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "calls the AVX-512 tiles")]
    fn multiply_avx512(&self, out: MatrixMut<'_>, target: Target, left: Matrix<'_>) {
        for from in (0..self.rows).step_by(DEPTH) {
            let depth = DEPTH.min(self.rows - from);
            let add = target == Target::Add || from > 0;
            for (panel, numbers) in self.data.chunks_exact(WIDTH * self.rows).enumerate() {
                let first = panel * WIDTH;
                let columns = WIDTH.min(self.columns - first);
                let numbers = &numbers[from * WIDTH..(from + depth) * WIDTH];
                for row in (0..out.rows).step_by(avx512::ROWS) {
                    let rows = avx512::ROWS.min(out.rows - row);
                    let a = &left.data[row * left.row_stride + from * left.column_stride..];
                    let out_data = &mut out.data[row * out.row_stride + first..];
                    let tile = avx512::Tile {
                        depth,
                        a: a.as_ptr(),
                        a_row: left.row_stride,
                        a_step: left.column_stride,
                        b: numbers.as_ptr(),
                        out: out_data.as_mut_ptr(),
                        out_row: out.row_stride,
                        columns,
                        add,
                    };
                    // SAFETY: the caller found AVX-512. `left` and `out` lie within their slices (checked where they were
                    // made), and the tile has `rows` of their rows, `depth` of `left`'s columns and `columns` of `out`'s;
                    // `numbers` holds `depth` rows of 64. `out` is borrowed mutably, so it overlaps no operand.
                    unsafe { avx512::multiply(tile, rows) }
                }
            }
        }
    }
}

/// Writes one panel of `right`.
fn fill(panel: usize, numbers: &mut [f32], right: Matrix<'_>) {
    let first = panel * WIDTH;
    let columns = WIDTH.min(right.columns - first);
    let source = &right.data[first * right.column_stride..];
    for (row, numbers) in numbers.chunks_exact_mut(WIDTH).enumerate() {
        let (numbers, rest) = numbers.split_at_mut(columns);
        let source = &source[row * right.row_stride..];
        if right.column_stride == 1 {
            numbers.copy_from_slice(&source[..columns]);
        } else {
            for (column, number) in numbers.iter_mut().enumerate() {
                *number = source[column * right.column_stride];
            }
        }
        rest.fill(0.0);
    }
}

/// The tiles, in the instructions of AVX-512.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_ps,
        _mm512_setzero_ps,
    };

    use super::WIDTH;

    /// Rows of a tile.
    pub(super) const ROWS: usize = 6;
    /// Numbers in a register.
    const LANES: usize = 16;
    /// Registers per row of a tile.
    const PARTS: usize = WIDTH / LANES;

    /// One tile: `out[r][c] (+)= sum_l a[r * a_row + l * a_step] * b[l][c]`.
    #[derive(Clone, Copy)]
    pub(super) struct Tile {
        pub(super) depth: usize,
        pub(super) a: *const f32,
        pub(super) a_row: usize,
        pub(super) a_step: usize,
        pub(super) b: *const f32, // (depth, WIDTH)
        pub(super) out: *mut f32,
        pub(super) out_row: usize,
        pub(super) columns: usize,
        pub(super) add: bool,
    }

    /// Multiplies a tile of `rows` rows, 1 to [`ROWS`].
    ///
    /// # Safety
    /// The processor has AVX-512F; the pointers of `tile` may be read and written at every element that its sizes name.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn multiply(tile: Tile, rows: usize) {
        // SAFETY: as the caller promised, for as many rows as it named.
        unsafe {
            match rows {
                1 => multiply_rows::<1>(tile),
                2 => multiply_rows::<2>(tile),
                3 => multiply_rows::<3>(tile),
                4 => multiply_rows::<4>(tile),
                5 => multiply_rows::<5>(tile),
                _ => multiply_rows::<ROWS>(tile),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_rows<const R: usize>(tile: Tile) {
        let mut sums: [[__m512; PARTS]; R] = [[_mm512_setzero_ps(); PARTS]; R];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.depth {
            // SAFETY: `b` is at row l of the panel and `a` at column l of the rows, both within the tile.
            unsafe {
                let right: [__m512; PARTS] = std::array::from_fn(|part| _mm512_loadu_ps(b.add(part * LANES)));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let left = _mm512_set1_ps(*a.add(row * tile.a_row));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_fmadd_ps(left, right, *sum);
                    }
                }
            }
            // The last step may leave the slice, but nothing is read there.
            a = a.wrapping_add(tile.a_step);
            b = b.wrapping_add(WIDTH);
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (part, mut sum) in sums.into_iter().enumerate() {
                let columns = tile.columns.saturating_sub(part * LANES).min(LANES);
                let mask = ((1u32 << columns) - 1) as u16;
                let out = tile.out.wrapping_add(row * tile.out_row + part * LANES);
                // SAFETY: the mask leaves out the columns that the tile does not have.
                unsafe {
                    if tile.add {
                        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out));
                    }
                    _mm512_mask_storeu_ps(out, mask, sum);
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
    fn products_equal_the_naive_loop_at_odd_sizes() {
        let sizes = [(1, 1, 1), (6, 3, 64), (7, 33, 65), (20, DEPTH + 5, 150), (5, 2 * DEPTH, 16), (3, 0, 4), (4, 7, 128)];
        for (m, k, n) in sizes {
            let (a, b, start) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * (n + 3), 3));
            let at: Vec<f32> = (0..k * m).map(|i| a[(i % m) * k + i / m]).collect();
            let bt: Vec<f32> = (0..n * k).map(|i| b[(i % k.max(1)) * n + i / k.max(1)]).collect();
            let mut panels = Panels::default();
            panels.pack(Matrix::new(&[1.0; 300], 2, 150));
            for (left, right) in [
                (Matrix::new(&a, m, k), Matrix::new(&b, k, n)),
                (Matrix::new(&at, k, m).transposed(), Matrix::new(&bt, n, k).transposed()),
            ] {
                panels.pack(right);
                let expected = |target: Target, i: usize| {
                    let (row, column) = (i / (n + 3), i % (n + 3));
                    let product = |l: usize| f64::from(a[row * k + l]) * f64::from(b[l * n + column]);
                    let kept = if target == Target::Add || column >= n { f64::from(start[i]) } else { 0.0 };
                    kept + if column < n { (0..k).map(product).sum() } else { 0.0 }
                };
                for target in [Target::Overwrite, Target::Add] {
                    for portable in [false, true] {
                        let mut out = start.clone();
                        let view = MatrixMut::strided(&mut out, m, n, n + 3);
                        if portable && k > 0 {
                            panels.multiply_portable(view, target, left)
                        } else {
                            panels.multiply(view, target, left)
                        }
                        for (i, out) in out.iter().enumerate() {
                            close(f64::from(*out), expected(target, i), 1e-5);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (a, b) = (numbers(9 * 300, 1), numbers(300 * 70, 2));
        let mut panels = Panels::default();
        panels.pack_here(Matrix::new(&b, 300, 70));
        let product = |rows: std::ops::Range<usize>| {
            let mut out = vec![0.0; rows.len() * 70];
            let left = Matrix::new(&a[rows.start * 300..rows.end * 300], rows.len(), 300);
            panels.multiply(MatrixMut::new(&mut out, rows.len(), 70), Target::Overwrite, left);
            out
        };
        assert_eq!(product(0..9)[5 * 70..6 * 70], product(5..6));
    }
}
