//! Products tile by tile in the instructions of AVX-512: what stays in registers, and in which order tiles are taken.
//!
//! A tile is a few rows by one panel of columns, 24 registers of sums in all, so that one multiply-add runs in each cycle:
//!
//! ```text
//!                     panel: 64 columns                          panel: 32 columns
//!                   +-------------------+                        +---------+
//!      step  l -->  | b0   b1   b2   b3 |                        | b0   b1 |
//!                   +-------------------+                        +---------+
//!   6 rows  a[r][l] | acc[r][0..4]      |     12 rows  a[r][l]   | acc[r]  |
//!                   +-------------------+                        +---------+
//! ```
//!
//! Sums run over blocks of `DEPTH` steps in order, whatever the number of rows, so a row's result does not depend on the rows
//! beside it.

use crate::matmul::{MatrixMut, Target};

/// Steps of a panel that are taken before the next panel: 64 KB, which the second cache holds beside the left operand.
pub(crate) const DEPTH: usize = 256;

/// Columns of a panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// 32: for products with as few columns as an attention head has.
    Narrow,
    /// 64.
    Wide,
}

impl Width {
    /// The number of columns.
    pub(crate) fn columns(self) -> usize {
        match self {
            Width::Narrow => 32,
            Width::Wide => 64,
        }
    }

    /// Rows of a tile.
    fn rows(self) -> usize {
        match self {
            Width::Narrow => 12,
            Width::Wide => 6,
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

/// One tile: `out[r][c] (+)= sum over l of a[r * a_row + l * a_step] * b[l][c]`, for `rows` rows, 1 to [`Width::rows`].
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

/// A number, or a pair of numbers, that tiles are made of.
pub(crate) trait Element: Sized {
    /// Multiplies a tile of a panel of 64 columns.
    ///
    /// # Safety
    /// The processor has the instructions; the pointers of `tile` may be read and written at every element that its sizes
    /// name.
    #[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
    unsafe fn multiply_wide(tile: Tile<Self>);

    /// [`Element::multiply_wide`], for 32 columns.
    ///
    /// # Safety
    /// As there.
    #[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
    unsafe fn multiply_narrow(tile: Tile<Self>);
}

/// `out = left * right`, or `out += left * right`, tile by tile.
///
/// # Safety
/// The processor has the instructions of `T`'s tiles.
#[expect(unsafe_code, reason = "calls a tile on raw pointers")]
pub(crate) unsafe fn multiply<T: Element>(out: MatrixMut<'_>, target: Target, left: Left<'_, T>, right: Right<'_, T>) {
    assert!(out.rows > 0 && left.steps > 0, "a product without numbers");
    let (width, last) = (right.width.columns(), (out.rows - 1) * left.row + (left.steps - 1) * left.step);
    assert!(last < left.data.len() && right.first + left.steps <= right.steps);
    assert_eq!(right.panels.len(), right.steps * out.columns.next_multiple_of(width));
    for from in (0..left.steps).step_by(DEPTH) {
        let steps = DEPTH.min(left.steps - from);
        let add = target == Target::Add || from > 0;
        for (panel, numbers) in right.panels.chunks_exact(width * right.steps).enumerate() {
            let first = panel * width;
            let columns = width.min(out.columns - first);
            let b = numbers[(right.first + from) * width..(right.first + from + steps) * width].as_ptr();
            for row in (0..out.rows).step_by(right.width.rows()) {
                let a = left.data[row * left.row + from * left.step..].as_ptr();
                let rows = right.width.rows().min(out.rows - row);
                let out_row = out.row_stride;
                let out = out.data[row * out_row + first..].as_mut_ptr();
                let tile = Tile { rows, steps, a, a_row: left.row, a_step: left.step, b, out, out_row, columns, add };
                // SAFETY: the instructions are there, as the caller promised. The tile has `rows` rows from `row`, and
                // `steps` steps from `from` of `left`, whose last element is within its slice, as was asserted; `b` has
                // `steps` rows of the panel; `out` has the rows and `columns` columns by the promise of `MatrixMut`, and
                // overlaps no operand because it is borrowed mutably.
                unsafe {
                    match right.width {
                        Width::Narrow => T::multiply_narrow(tile),
                        Width::Wide => T::multiply_wide(tile),
                    }
                }
            }
        }
    }
}

/// The tiles of one element type, in the instructions of AVX-512.
macro_rules! tiles {
    ($module:ident, $features:literal, $element:ty, $load:expr, $splat:expr, $multiply_add:expr) => {
        #[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
        mod $module {
            use std::arch::x86_64::*;

            use super::{Element, Tile};

            /// Sums in a register.
            const LANES: usize = 16;

            impl Element for $element {
                #[target_feature(enable = $features)]
                unsafe fn multiply_wide(tile: Tile<Self>) {
                    // SAFETY: as the caller promised, for as many rows as it named.
                    unsafe {
                        match tile.rows {
                            1 => multiply_rows::<1, 4>(tile),
                            2 => multiply_rows::<2, 4>(tile),
                            3 => multiply_rows::<3, 4>(tile),
                            4 => multiply_rows::<4, 4>(tile),
                            5 => multiply_rows::<5, 4>(tile),
                            _ => multiply_rows::<6, 4>(tile),
                        }
                    }
                }

                #[target_feature(enable = $features)]
                unsafe fn multiply_narrow(tile: Tile<Self>) {
                    // SAFETY: as the caller promised, for as many rows as it named.
                    unsafe {
                        match tile.rows {
                            1 => multiply_rows::<1, 2>(tile),
                            2 => multiply_rows::<2, 2>(tile),
                            3 => multiply_rows::<3, 2>(tile),
                            4 => multiply_rows::<4, 2>(tile),
                            5 => multiply_rows::<5, 2>(tile),
                            6 => multiply_rows::<6, 2>(tile),
                            7 => multiply_rows::<7, 2>(tile),
                            8 => multiply_rows::<8, 2>(tile),
                            9 => multiply_rows::<9, 2>(tile),
                            10 => multiply_rows::<10, 2>(tile),
                            11 => multiply_rows::<11, 2>(tile),
                            _ => multiply_rows::<12, 2>(tile),
                        }
                    }
                }
            }

            /// Multiplies a tile of `R` rows by `P` registers.
            #[target_feature(enable = $features)]
            unsafe fn multiply_rows<const R: usize, const P: usize>(tile: Tile<$element>) {
                let mut sums: [[__m512; P]; R] = [[_mm512_setzero_ps(); P]; R];
                let (mut a, mut b) = (tile.a, tile.b);
                for _ in 0..tile.steps {
                    // SAFETY: `b` is at step l of the panel and `a` at step l of the rows, both within the tile.
                    unsafe {
                        let right: [_; P] = std::array::from_fn(|part| $load(b.add(part * LANES)));
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let left = $splat(*a.add(row * tile.a_row));
                            for (sum, right) in sums.iter_mut().zip(right) {
                                *sum = $multiply_add(*sum, left, right);
                            }
                        }
                    }
                    // The last step may leave the slice, but nothing is read there.
                    a = a.wrapping_add(tile.a_step);
                    b = b.wrapping_add(P * LANES);
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
    };
}

#[cfg(target_arch = "x86_64")]
tiles!(avx512, "avx512f", f32, |at: *const f32| _mm512_loadu_ps(at), |x: f32| _mm512_set1_ps(x), |sum, left, right| {
    _mm512_fmadd_ps(left, right, sum)
});

// Pairs of `bf16`, the first number in the low half.
#[cfg(target_arch = "x86_64")]
tiles!(
    avx512bf16,
    "avx512f,avx512bf16",
    u32,
    |at: *const u32| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())),
    |x: u32| std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x.cast_signed())),
    |sum, left, right| _mm512_dpbf16_ps(sum, left, right)
);
