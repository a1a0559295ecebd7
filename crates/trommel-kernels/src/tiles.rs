//! Products tile by tile in the instructions of AVX-512 and AVX2: what stays in registers, and in which order tiles are taken.
//!
//! A tile is a few rows by one panel of columns, in as many registers of sums as keep the multipliers busy: 24 of 16 numbers in
//! AVX-512, 12 of 8 numbers in AVX2.
//!
//! ```text
//!   AVX-512, panel: 64 columns               panel: 32 columns         AVX2, panel: 16 columns
//!                   +-------------------+                +---------+                +---------+
//!      step  l -->  | b0   b1   b2   b3 |                | b0   b1 |                | b0   b1 |
//!                   +-------------------+                +---------+                +---------+
//!   6 rows  a[r][l] | acc[r][0..4]      |    12 rows     | acc[r]  |     6 rows     | acc[r]  |
//!                   +-------------------+                +---------+                +---------+
//! ```
//!
//! Sums run over blocks of `DEPTH` steps in order, whatever the number of rows, so a row's result does not depend on the rows
//! beside it.

use crate::isa::Isa;
use crate::matmul::{MatrixMut, Target};

/// Steps of a panel that are taken before the next panel: 64 KB, which the second cache holds beside the left operand.
pub(crate) const DEPTH: usize = 256;

/// Columns of a panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// 16: for AVX2.
    Slim,
    /// 32: for products with as few columns as an attention head has.
    Narrow,
    /// 64.
    Wide,
}

impl Width {
    /// This one, or the only one that AVX2's tiles are made for.
    pub(crate) fn at(self, isa: Isa) -> Width {
        if isa == Isa::Avx2 { Width::Slim } else { self }
    }

    /// The number of columns.
    pub(crate) fn columns(self) -> usize {
        match self {
            Width::Slim => 16,
            Width::Narrow => 32,
            Width::Wide => 64,
        }
    }
}

/// A left operand: row r has its step l at `data[r * row + l * step]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Left<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) row: usize,
    pub(crate) step: usize,
    pub(crate) steps: usize,
}

/// A right operand: panels of `steps` steps each, of which a product takes those from `first` on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Right<'a, T> {
    pub(crate) panels: &'a [T],
    pub(crate) width: Width,
    pub(crate) steps: usize,
    pub(crate) first: usize,
}

impl<T> Right<'_, T> {
    /// Fails unless the sizes of a product fit its operands.
    pub(crate) fn check(&self, out: &MatrixMut<'_>, left: &Left<'_, T>) {
        assert!(out.rows > 0 && left.steps > 0, "a product without numbers");
        let last = (out.rows - 1) * left.row + (left.steps - 1) * left.step;
        assert!(last < left.data.len() && self.first + left.steps <= self.steps);
        assert_eq!(self.panels.len(), self.steps * out.columns.next_multiple_of(self.width.columns()));
    }
}

/// One tile: `out[r][c] (+)= sum over l of a[r * a_row + l * a_step] * b[l][c]`, for `rows` rows, at most [`Instructions::rows`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile<T> {
    rows: usize,
    steps: usize,
    a: *const T,
    a_row: usize,
    a_step: usize,
    b: *const T, // (steps, columns of the panel)
    out: *mut f32,
    out_row: usize,
    columns: usize,
    add: bool,
}

/// The instructions of one level, for numbers or pairs of them.
pub(crate) trait Instructions {
    /// A number, or a pair of numbers.
    type Number: Copy;

    /// Rows of a tile in a panel of this width.
    fn rows(width: Width) -> usize;

    /// Multiplies a tile of a panel of this width.
    ///
    /// # Safety
    /// The processor has the instructions; the pointers of `tile` may be read and written at every element that its sizes
    /// name.
    #[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
    unsafe fn multiply(width: Width, tile: Tile<Self::Number>);
}

/// `out = left * right`, or `out += left * right`, tile by tile.
///
/// # Safety
/// The processor has the instructions.
#[expect(unsafe_code, reason = "calls a tile on raw pointers")]
pub(crate) unsafe fn multiply<I: Instructions>(
    out: MatrixMut<'_>,
    target: Target,
    left: Left<'_, I::Number>,
    right: Right<'_, I::Number>,
) {
    right.check(&out, &left);
    let width = right.width.columns();
    let tile_rows = I::rows(right.width);
    for from in (0..left.steps).step_by(DEPTH) {
        let steps = DEPTH.min(left.steps - from);
        let add = target == Target::Add || from > 0;
        for (panel, numbers) in right.panels.chunks_exact(width * right.steps).enumerate() {
            let first = panel * width;
            let columns = width.min(out.columns - first);
            let b = numbers[(right.first + from) * width..(right.first + from + steps) * width].as_ptr();
            for row in (0..out.rows).step_by(tile_rows) {
                let a = left.data[row * left.row + from * left.step..].as_ptr();
                let rows = tile_rows.min(out.rows - row);
                let out_row = out.row_stride;
                let out = out.data[row * out_row + first..].as_mut_ptr();
                let tile = Tile { rows, steps, a, a_row: left.row, a_step: left.step, b, out, out_row, columns, add };
                // SAFETY: the instructions are there, as the caller promised. The tile has `rows` rows from `row`, and
                // `steps` steps from `from` of `left`, whose last element is within its slice, as was checked; `b` has
                // `steps` rows of the panel; `out` has the rows and `columns` columns by the promise of `MatrixMut`, and
                // overlaps no operand because it is borrowed mutably.
                unsafe { I::multiply(right.width, tile) }
            }
        }
    }
}

/// The tiles of one level.
macro_rules! tiles {
    (
        $(#[$meta:meta])* $level:ident in $module:ident, $features:literal, $number:ty, $register:ty, $lanes:literal,
        [$($width:ident, $parts:literal registers, $most:literal rows: $($rows:literal)*;)*],
        $zero:expr, $load:expr, $splat:expr, $multiply_add:expr, $finish:expr $(,)?
    ) => {
        $(#[$meta])*
        #[cfg(target_arch = "x86_64")]
        pub(crate) struct $level;

        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
        mod $module {
            use std::arch::x86_64::*;

            use super::*;

            impl Instructions for $level {
                type Number = $number;

                fn rows(width: Width) -> usize {
                    match width {
                        $(Width::$width => $most,)*
                        _ => unreachable!("a panel for other instructions"),
                    }
                }

                #[target_feature(enable = $features)]
                unsafe fn multiply(width: Width, tile: Tile<$number>) {
                    // SAFETY: as the caller promised, for as many rows as it named.
                    unsafe {
                        match (width, tile.rows) {
                            $($((Width::$width, $rows) => multiply_rows::<$rows, $parts>(tile),)*)*
                            _ => unreachable!("a tile of too many rows"),
                        }
                    }
                }
            }

            /// Multiplies a tile of `R` rows by `P` registers.
            #[target_feature(enable = $features)]
            unsafe fn multiply_rows<const R: usize, const P: usize>(tile: Tile<$number>) {
                let mut sums: [[$register; P]; R] = [[$zero; P]; R];
                let (mut a, mut b) = (tile.a, tile.b);
                for _ in 0..tile.steps {
                    // SAFETY: `b` is at step l of the panel and `a` at step l of the rows, both within the tile.
                    unsafe {
                        let right: [_; P] = std::array::from_fn(|part| $load(b.add(part * $lanes)));
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let left = $splat(*a.add(row * tile.a_row));
                            for (sum, right) in sums.iter_mut().zip(right) {
                                *sum = $multiply_add(*sum, left, right);
                            }
                        }
                    }
                    // The last step may leave the slice, but nothing is read there.
                    a = a.wrapping_add(tile.a_step);
                    b = b.wrapping_add(P * $lanes);
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    // SAFETY: the row has as many columns.
                    unsafe { $finish(tile.out.wrapping_add(row * tile.out_row), tile.columns, tile.add, sums) }
                }
            }
        }
    };
}

/// Adds registers to the first `columns` numbers, or replaces those by them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[expect(unsafe_code, reason = "instructions of one processor family, on a raw pointer")]
unsafe fn finish_512<const P: usize>(out: *mut f32, columns: usize, add: bool, sums: [std::arch::x86_64::__m512; P]) {
    use std::arch::x86_64::*;
    const LANES: usize = 16;
    for (part, mut sum) in sums.into_iter().enumerate() {
        let mask = ((1u32 << columns.saturating_sub(part * LANES).min(LANES)) - 1) as u16;
        let out = out.wrapping_add(part * LANES);
        // SAFETY: the mask leaves out the columns that the caller does not have.
        unsafe {
            if add {
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out));
            }
            _mm512_mask_storeu_ps(out, mask, sum);
        }
    }
}

/// The same for AVX2, whose masks are slow.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[expect(unsafe_code, reason = "instructions of one processor family, on a raw pointer")]
unsafe fn finish_256<const P: usize>(out: *mut f32, columns: usize, add: bool, sums: [std::arch::x86_64::__m256; P]) {
    use std::arch::x86_64::*;
    const LANES: usize = 8;
    // SAFETY: all columns of the registers are there, or each number is looked at.
    unsafe {
        if columns < P * LANES {
            let numbers = std::slice::from_raw_parts(sums.as_ptr().cast::<f32>(), columns);
            return finish_some(std::slice::from_raw_parts_mut(out, columns), add, numbers);
        }
        for (part, mut sum) in sums.into_iter().enumerate() {
            let out = out.add(part * LANES);
            if add {
                sum = _mm256_add_ps(sum, _mm256_loadu_ps(out));
            }
            _mm256_storeu_ps(out, sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[cold]
fn finish_some(out: &mut [f32], add: bool, sums: &[f32]) {
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = if add { sum + *out } else { *sum });
}

tiles!(
    /// AVX2 with multiply-adds.
    Avx2 in avx2, "avx2,fma", f32, __m256, 8,
    [Slim, 2 registers, 6 rows: 1 2 3 4 5 6;],
    _mm256_setzero_ps(),
    |at: *const f32| _mm256_loadu_ps(at),
    |x: f32| _mm256_set1_ps(x),
    |sum, left, right| _mm256_fmadd_ps(left, right, sum),
    finish_256,
);

tiles!(
    /// AVX-512.
    Avx512 in avx512, "avx512f", f32, __m512, 16,
    [Wide, 4 registers, 6 rows: 1 2 3 4 5 6; Narrow, 2 registers, 12 rows: 1 2 3 4 5 6 7 8 9 10 11 12;],
    _mm512_setzero_ps(),
    |at: *const f32| _mm512_loadu_ps(at),
    |x: f32| _mm512_set1_ps(x),
    |sum, left, right| _mm512_fmadd_ps(left, right, sum),
    finish_512,
);

tiles!(
    /// AVX-512 with products of pairs of `bf16`, the first number in the low half.
    Avx512Bf16 in avx512bf16, "avx512f,avx512bf16", u32, __m512, 16,
    [Wide, 4 registers, 6 rows: 1 2 3 4 5 6; Narrow, 2 registers, 12 rows: 1 2 3 4 5 6 7 8 9 10 11 12;],
    _mm512_setzero_ps(),
    |at: *const u32| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())),
    |x: u32| std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x.cast_signed())),
    |sum, left, right| _mm512_dpbf16_ps(sum, left, right),
    finish_512,
);
