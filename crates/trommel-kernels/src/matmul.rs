//! Products of matrices that lie in slices, in `f32`, on the calling thread.
//!
//! A product runs on one thread: the callers split their work over sequences or over rows of a weight, which are fixed by
//! the problem and not by the machine, so results have the same bits at any thread count.

use gemm::Parallelism;

/// A matrix in a slice: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// All of `data`, as rows without gaps.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// The first `columns` numbers of every `row_stride`.
    pub fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, columns, row_stride), "a {rows} x {columns} matrix exceeds its slice");
        Matrix { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The same numbers with rows and columns exchanged; nothing is copied.
    #[must_use]
    pub fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix to write to: element (i, j) is `data[i * row_stride + j]`.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// All of `data`, as rows without gaps.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// The first `columns` numbers of every `row_stride`; the numbers between rows are left alone.
    pub fn strided(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, columns, row_stride), "a {rows} x {columns} matrix exceeds its slice");
        MatrixMut { data, rows, columns, row_stride }
    }
}

fn fits(len: usize, rows: usize, columns: usize, row_stride: usize) -> bool {
    let needed = || (rows - 1).checked_mul(row_stride)?.checked_add(columns);
    rows == 0 || columns == 0 || (columns <= row_stride && needed().is_some_and(|needed| needed <= len))
}

/// What becomes of the numbers that are already in the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// They are replaced.
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `out = scale * left * right`, or `out += scale * left * right`.
#[expect(unsafe_code, reason = "the gemm crate takes pointers")]
pub fn multiply(out: MatrixMut<'_>, target: Target, scale: f32, left: Matrix<'_>, right: Matrix<'_>) {
    assert_eq!(left.columns, right.rows, "inner sizes of a product differ");
    assert_eq!((out.rows, out.columns), (left.rows, right.columns), "outer sizes of a product differ");
    if out.rows == 0 || out.columns == 0 {
        return;
    }
    let stride = |n: usize| n as isize;
    // SAFETY: the constructors checked that each matrix lies within its slice; `out` is borrowed mutably, so it overlaps
    // neither operand.
    unsafe {
        gemm::gemm(
            out.rows,
            out.columns,
            left.columns,
            out.data.as_mut_ptr(),
            1,
            stride(out.row_stride),
            target == Target::Add,
            left.data.as_ptr(),
            stride(left.column_stride),
            stride(left.row_stride),
            right.data.as_ptr(),
            stride(right.column_stride),
            stride(right.row_stride),
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, salt: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + salt * 13) % 23) as f32 * 0.1 - 1.0).collect()
    }

    #[test]
    fn products_equal_the_naive_loop_at_odd_sizes() {
        for (m, k, n) in [(1, 1, 1), (1, 7, 33), (5, 3, 2), (33, 65, 17), (64, 32, 130), (3, 0, 4)] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let start = numbers(m * (n + 3), 3);
            for target in [Target::Overwrite, Target::Add] {
                let mut out = start.clone();
                // Both operands arrive transposed, the destination with gaps between its rows.
                let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
                multiply(
                    MatrixMut::strided(&mut out, m, n, n + 3),
                    target,
                    0.5,
                    Matrix::new(&at, k, m).transposed(),
                    Matrix::new(&bt, n, k).transposed(),
                );
                for i in 0..m {
                    for j in 0..n + 3 {
                        let product: f32 = if j < n { (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum() } else { 0.0 };
                        let kept = if target == Target::Add || j >= n { start[i * (n + 3) + j] } else { 0.0 };
                        let (got, expected) = (out[i * (n + 3) + j], kept + 0.5 * product);
                        assert!((got - expected).abs() < 1e-4, "({m},{k},{n}) at ({i},{j}): {got} for {expected}");
                    }
                }
            }
        }
    }

    fn transpose(a: &[f32], rows: usize, columns: usize) -> Vec<f32> {
        (0..columns * rows).map(|i| a[(i % rows) * columns + i / rows]).collect()
    }

    #[test]
    #[should_panic(expected = "exceeds its slice")]
    fn a_matrix_larger_than_its_slice_is_refused() {
        Matrix::new(&[0.0; 5], 2, 3);
    }
}
