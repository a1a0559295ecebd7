//! Products with a right operand that was rearranged once: most of the time of training goes into these.
//!
//! The gemm crate rearranges its operands anew for each product, which for a weight and the few hundred rows of a sequence
//! is a sixth of the time. Here the right operand becomes panels of 64 columns, once for many products. With AVX-512 a
//! tile of 6 rows and 64 columns stays in 24 registers:
//!
//! ```text
//!                     panel: 64 columns
//!                   +-------------------+
//!      step  l -->  | b0   b1   b2   b3 |        4 loads, 6 broadcasts and 24 multiply-adds for each l
//!                   +-------------------+
//!   6 rows  a[r][l] | acc[r][0..4]      |
//!                   +-------------------+
//! ```
//!
//! In `Precision::F32` a step is one number of depth, and the left operand is read where it lies. In `Precision::Bf16` it
//! is a pair of `bf16` in 32 bits, so that one instruction multiplies and adds twice as many numbers; the left operand is
//! rounded and paired once per product. Sums are `f32` in both.
//!
//! With AVX-512, sums run over blocks of `DEPTH` steps in order, whatever the number of rows, so a row's result does not depend
//! on the rows beside it. Below AVX-512 the gemm crate, which chooses its own instructions, multiplies with each panel; where
//! no instruction multiplies pairs, the numbers are `f32` that were rounded to `bf16`.

use std::cell::RefCell;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::isa::Isa;
use crate::matmul::{Matrix, MatrixMut, Target, multiply};
use crate::vectorize::vectorized;

/// Columns of a panel: four AVX-512 registers.
const WIDTH: usize = 64;
/// Steps of a panel that are taken before the next panel: 64 KB, which the second cache holds beside the left operand.
const DEPTH: usize = 256;

/// The numbers that are multiplied; sums are `f32` always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to 8 bits of mantissa, to the nearest, ties to even.
    Bf16,
}

/// A right operand, as panels of 64 columns; the last one is filled up with zeros.
#[derive(Debug)]
pub struct Panels {
    rows: usize,
    columns: usize,
    isa: Isa,
    numbers: Numbers,
}

#[derive(Debug)]
enum Numbers {
    Whole(Vec<f32>),   // per panel: (rows, WIDTH)
    Rounded(Vec<f32>), // the same, rounded to `bf16`: where no instruction multiplies pairs
    Paired(Vec<u32>),  // per panel: (rows / 2 rounded up, WIDTH); the even row of a pair in the low half
}

/// A left operand in `bf16`, kept from product to product.
#[derive(Default)]
struct RoundedLeft {
    numbers: Vec<f32>,
    pairs: Vec<u32>,
}

thread_local! {
    static ROUNDED_LEFT: RefCell<RoundedLeft> = RefCell::default();
}

impl Panels {
    /// Without content, for numbers of this precision.
    pub fn new(precision: Precision) -> Panels {
        Self::for_level(Isa::current(), precision)
    }

    fn for_level(isa: Isa, precision: Precision) -> Panels {
        let numbers = match precision {
            Precision::F32 => Numbers::Whole(Vec::new()),
            Precision::Bf16 if isa >= Isa::Avx512Bf16 => Numbers::Paired(Vec::new()),
            Precision::Bf16 => Numbers::Rounded(Vec::new()),
        };
        Panels { rows: 0, columns: 0, isa, numbers }
    }

    /// Replaces the content by that of `right`, on all threads.
    pub fn pack(&mut self, right: Matrix<'_>) {
        self.replace(right, true);
    }

    /// [`Panels::pack`] on the calling thread.
    pub fn pack_here(&mut self, right: Matrix<'_>) {
        self.replace(right, false);
    }

    fn replace(&mut self, right: Matrix<'_>, all_threads: bool) {
        (self.rows, self.columns) = (right.rows, right.columns);
        let (rows, columns) = (right.rows, right.columns);
        match &mut self.numbers {
            Numbers::Whole(numbers) => {
                for_each_panel(numbers, rows, columns, all_threads, |panel, numbers| fill(panel, numbers, right));
            }
            Numbers::Rounded(numbers) => for_each_panel(numbers, rows, columns, all_threads, |panel, numbers| {
                fill(panel, numbers, right);
                round_all(numbers);
            }),
            Numbers::Paired(pairs) => {
                for_each_panel(pairs, rows.div_ceil(2), columns, all_threads, |panel, pairs| fill_pairs(panel, pairs, right));
            }
        }
    }

    /// Rows of the right operand.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `out = left * panels`, or `out += left * panels`, on the calling thread.
    pub fn multiply(&self, out: MatrixMut<'_>, target: Target, left: Matrix<'_>) {
        assert_eq!(left.columns, self.rows, "inner sizes of a product differ");
        assert_eq!((out.rows, out.columns), (left.rows, self.columns), "outer sizes of a product differ");
        if out.rows == 0 || out.columns == 0 {
            return;
        }
        if self.rows == 0 {
            return multiply(out, target, 1.0, left, Matrix::new(&[], 0, self.columns));
        }
        match &self.numbers {
            Numbers::Whole(numbers) => self.multiply_whole(numbers, out, target, left),
            Numbers::Rounded(numbers) => ROUNDED_LEFT.with_borrow_mut(|buffer| {
                self.multiply_whole(numbers, out, target, rounded(&mut buffer.numbers, left));
            }),
            #[cfg(target_arch = "x86_64")]
            Numbers::Paired(pairs) => ROUNDED_LEFT.with_borrow_mut(|buffer| {
                multiply_tiles(pairs, out, target, paired(&mut buffer.pairs, left), avx512bf16::multiply);
            }),
            #[cfg(not(target_arch = "x86_64"))]
            Numbers::Paired(_) => unreachable!("only x86-64 has the level that pairs are made for"),
        }
    }

    fn multiply_whole(&self, panels: &[f32], out: MatrixMut<'_>, target: Target, left: Matrix<'_>) {
        #[cfg(target_arch = "x86_64")]
        if self.isa >= Isa::Avx512 {
            let left = Left { data: left.data, row: left.row_stride, step: left.column_stride, steps: left.columns };
            return multiply_tiles(panels, out, target, left, avx512::multiply);
        }
        for (panel, numbers) in panels.chunks_exact(WIDTH * self.rows).enumerate() {
            let first = panel * WIDTH;
            let columns = WIDTH.min(self.columns - first);
            let out = MatrixMut::strided(&mut out.data[first..], out.rows, columns, out.row_stride);
            multiply(out, target, 1.0, left, Matrix::strided(numbers, self.rows, columns, WIDTH));
        }
    }
}

/// Makes room for panels of `steps` steps and calls `work` with the number of each and its content.
fn for_each_panel<T: Clone + Default + Send>(
    panels: &mut Vec<T>,
    steps: usize,
    columns: usize,
    all_threads: bool,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    panels.resize(steps * columns.next_multiple_of(WIDTH), T::default());
    let panel = (WIDTH * steps).max(1);
    if all_threads {
        panels.par_chunks_mut(panel).enumerate().for_each(|(i, panel)| work(i, panel));
    } else {
        panels.chunks_mut(panel).enumerate().for_each(|(i, panel)| work(i, panel));
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

/// Writes one panel of `right`, in pairs.
fn fill_pairs(panel: usize, pairs: &mut [u32], right: Matrix<'_>) {
    let first = panel * WIDTH;
    let columns = WIDTH.min(right.columns - first);
    let source = &right.data[first * right.column_stride..];
    if right.column_stride == 1 {
        for (step, pairs) in pairs.chunks_exact_mut(WIDTH).enumerate() {
            let (pairs, rest) = pairs.split_at_mut(columns);
            let even = &source[2 * step * right.row_stride..][..columns];
            let odd = if 2 * step + 1 < right.rows { &source[(2 * step + 1) * right.row_stride..][..columns] } else { &[] };
            interleave(even, odd, pairs);
            rest.fill(0);
        }
        return;
    }
    let mut along = [0; DEPTH];
    let steps = right.rows.div_ceil(2);
    if columns < WIDTH {
        pairs.fill(0);
    }
    for from in (0..steps).step_by(DEPTH) {
        let here = DEPTH.min(steps - from);
        for column in 0..columns {
            let start = column * right.column_stride + 2 * from * right.row_stride;
            if right.row_stride == 1 {
                let rows = (2 * here).min(right.rows - 2 * from);
                pair_up(&source[start..start + rows], &mut along[..here]);
            } else {
                for (step, pair) in along[..here].iter_mut().enumerate() {
                    let at = |row: usize| {
                        if row < right.rows { source[column * right.column_stride + row * right.row_stride] } else { 0.0 }
                    };
                    let row = 2 * (from + step);
                    *pair = round(at(row)) | round(at(row + 1)) << 16;
                }
            }
            for (pairs, pair) in pairs[from * WIDTH..].chunks_exact_mut(WIDTH).zip(&along[..here]) {
                pairs[column] = *pair;
            }
        }
    }
}

/// The `bf16` nearest to `x`, ties to even, in the low half; any NaN becomes the quiet one.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded }
}

/// The number of `bf16` that is nearest to `x`.
#[inline(always)]
pub(crate) fn round_to_bf16(x: f32) -> f32 {
    f32::from_bits(round(x) << 16)
}

vectorized! {
    /// Rounds each number to `bf16`.
    fn round_all(numbers: &mut [f32]) {
        numbers.iter_mut().for_each(|x| *x = round_to_bf16(*x));
    }
}

vectorized! {
    /// Pairs numbers that follow each other; the last one of an odd number is paired with zero.
    fn pair_up(numbers: &[f32], pairs: &mut [u32]) {
        let whole = numbers.chunks_exact(2);
        if let ([last], Some(pair)) = (whole.remainder(), pairs.last_mut()) {
            *pair = round(*last);
        }
        for (numbers, pair) in whole.zip(pairs) {
            *pair = round(numbers[0]) | round(numbers[1]) << 16;
        }
    }
}

vectorized! {
    /// Pairs each number of `even` with that of `odd` beside it, or with zero where there is none.
    fn interleave(even: &[f32], odd: &[f32], pairs: &mut [u32]) {
        if odd.is_empty() {
            pairs.iter_mut().zip(even).for_each(|(pair, even)| *pair = round(*even));
        }
        for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(odd) {
            *pair = round(*even) | round(*odd) << 16;
        }
    }
}

/// A left operand: row r has its step l at `data[r * row + l * step]`.
#[derive(Clone, Copy)]
struct Left<'a, T> {
    data: &'a [T],
    row: usize,
    step: usize,
    steps: usize,
}

/// Rounds the numbers of `left` to `bf16`, into `buffer`.
fn rounded<'a>(buffer: &'a mut Vec<f32>, left: Matrix<'_>) -> Matrix<'a> {
    let (rows, columns) = (left.rows, left.columns);
    buffer.clear();
    if left.row_stride == 1 {
        (0..columns).for_each(|column| buffer.extend_from_slice(&left.data[column * left.column_stride..][..rows]));
        round_all(buffer);
        return Matrix::new(buffer, columns, rows).transposed();
    }
    assert_eq!(left.column_stride, 1, "one of a matrix's strides is 1");
    (0..rows).for_each(|row| buffer.extend_from_slice(&left.data[row * left.row_stride..][..columns]));
    round_all(buffer);
    Matrix::new(buffer, rows, columns)
}

/// Rounds and pairs the numbers of `left`, into `buffer`, in the order in which they lie.
fn paired<'a>(buffer: &'a mut Vec<u32>, left: Matrix<'_>) -> Left<'a, u32> {
    let (rows, steps) = (left.rows, left.columns.div_ceil(2));
    if buffer.len() < rows * steps {
        buffer.resize(rows * steps, 0);
    }
    let data = &mut buffer[..rows * steps];
    if left.row_stride == 1 {
        for (step, pairs) in data.chunks_exact_mut(rows).enumerate() {
            let at = |column: usize| &left.data[column * left.column_stride..][..rows];
            interleave(at(2 * step), if 2 * step + 1 < left.columns { at(2 * step + 1) } else { &[] }, pairs);
        }
        return Left { data, row: 1, step: rows, steps };
    }
    assert_eq!(left.column_stride, 1, "one of a matrix's strides is 1");
    for (row, pairs) in data.chunks_exact_mut(steps).enumerate() {
        pair_up(&left.data[row * left.row_stride..][..left.columns], pairs);
    }
    Left { data, row: steps, step: 1, steps }
}

/// Rows of a tile.
const ROWS: usize = 6;

/// One tile: `out[r][c] (+)= sum over l of a[r * a_row + l * a_step] * b[l][c]`, for `rows` rows, 1 to [`ROWS`].
#[derive(Clone, Copy)]
struct Tile<T> {
    rows: usize,
    steps: usize,
    a: *const T,
    a_row: usize,
    a_step: usize,
    b: *const T, // (steps, WIDTH)
    out: *mut f32,
    out_row: usize,
    columns: usize,
    add: bool,
}

/// Multiplies tile by tile.
#[expect(unsafe_code, reason = "calls a tile on raw pointers")]
fn multiply_tiles<T>(panels: &[T], out: MatrixMut<'_>, target: Target, left: Left<'_, T>, multiply: unsafe fn(Tile<T>)) {
    let last = (out.rows - 1) * left.row + (left.steps - 1) * left.step;
    assert!(last < left.data.len() && panels.len() == left.steps * out.columns.next_multiple_of(WIDTH));
    for from in (0..left.steps).step_by(DEPTH) {
        let steps = DEPTH.min(left.steps - from);
        let add = target == Target::Add || from > 0;
        for (panel, numbers) in panels.chunks_exact(WIDTH * left.steps).enumerate() {
            let first = panel * WIDTH;
            let columns = WIDTH.min(out.columns - first);
            let b = numbers[from * WIDTH..(from + steps) * WIDTH].as_ptr();
            for row in (0..out.rows).step_by(ROWS) {
                let a = left.data[row * left.row + from * left.step..].as_ptr();
                let rows = ROWS.min(out.rows - row);
                let out_row = out.row_stride;
                let out = out.data[row * out_row + first..].as_mut_ptr();
                let tile = Tile { rows, steps, a, a_row: left.row, a_step: left.step, b, out, out_row, columns, add };
                // SAFETY: the caller chose a `multiply` whose instructions there are. The tile has `rows` rows from `row`,
                // and `steps` steps from `from` of `left`, whose last element is within its slice, as was asserted; `b` has
                // `steps` rows of 64; `out` has the rows and `columns` columns by the promise of `MatrixMut`, and overlaps
                // no operand because it is borrowed mutably.
                unsafe { multiply(tile) }
            }
        }
    }
}

/// A module with the tiles of one element type, in the instructions of AVX-512.
macro_rules! tiles {
    ($(#[$meta:meta])* $module:ident, $features:literal, $element:ty, $load:expr, $splat:expr, $multiply_add:expr) => {
        $(#[$meta])*
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
        mod $module {
            use std::arch::x86_64::*;

            use super::{ROWS, Tile, WIDTH};

            /// Sums in a register.
            const LANES: usize = 16;
            /// Registers per row of a tile.
            const PARTS: usize = WIDTH / LANES;

            /// Multiplies a tile.
            ///
            /// # Safety
            /// The processor has the instructions; the pointers of `tile` may be read and written at every element that
            /// its sizes name.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn multiply(tile: Tile<$element>) {
                // SAFETY: as the caller promised, for as many rows as it named.
                unsafe {
                    match tile.rows {
                        1 => multiply_rows::<1>(tile),
                        2 => multiply_rows::<2>(tile),
                        3 => multiply_rows::<3>(tile),
                        4 => multiply_rows::<4>(tile),
                        5 => multiply_rows::<5>(tile),
                        _ => multiply_rows::<ROWS>(tile),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn multiply_rows<const R: usize>(tile: Tile<$element>) {
                let mut sums: [[__m512; PARTS]; R] = [[_mm512_setzero_ps(); PARTS]; R];
                let (mut a, mut b) = (tile.a, tile.b);
                for _ in 0..tile.steps {
                    // SAFETY: `b` is at step l of the panel and `a` at step l of the rows, both within the tile.
                    unsafe {
                        let right: [_; PARTS] = std::array::from_fn(|part| $load(b.add(part * LANES)));
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let left = $splat(*a.add(row * tile.a_row));
                            for (sum, right) in sums.iter_mut().zip(right) {
                                *sum = $multiply_add(*sum, left, right);
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
    };
}

tiles! {
    /// Tiles of `f32`.
    avx512, "avx512f", f32,
    |at: *const f32| _mm512_loadu_ps(at),
    |x: f32| _mm512_set1_ps(x),
    |sum, left, right| _mm512_fmadd_ps(left, right, sum)
}

tiles! {
    /// Tiles of pairs of `bf16`.
    avx512bf16, "avx512f,avx512bf16", u32,
    |at: *const u32| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())),
    |x: u32| std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x.cast_signed())),
    |sum, left, right| _mm512_dpbf16_ps(sum, left, right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{close, numbers};

    const LEVELS: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    #[test]
    fn products_equal_the_naive_loop_at_odd_sizes() {
        let sizes = [
            (1, 1, 1),
            (6, 3, 64),
            (7, 33, 65),
            (20, DEPTH + 5, 150),
            (5, 2 * DEPTH, 16),
            (3, 0, 4),
            (0, 3, 4),
            (4, 7, 128),
            (3, 2 * DEPTH + 3, 5),
        ];
        for (m, k, n) in sizes {
            let (a, b, start) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * (n + 3), 3));
            let at: Vec<f32> = (0..k * m).map(|i| a[(i % m) * k + i / m]).collect();
            let bt: Vec<f32> = (0..n * k).map(|i| b[(i % k.max(1)) * n + i / k.max(1)]).collect();
            for precision in [Precision::F32, Precision::Bf16] {
                let value = |x: f32| if precision == Precision::F32 { x } else { f32::from_bits(round(x) << 16) };
                let expected = |target: Target, i: usize| {
                    let (row, column) = (i / (n + 3), i % (n + 3));
                    let product = |l: usize| f64::from(value(a[row * k + l])) * f64::from(value(b[l * n + column]));
                    let kept = if target == Target::Add || column >= n { f64::from(start[i]) } else { 0.0 };
                    kept + if column < n { (0..k).map(product).sum() } else { 0.0 }
                };
                for isa in LEVELS.into_iter().filter(|isa| *isa <= Isa::current()) {
                    let mut panels = Panels::for_level(isa, precision);
                    panels.pack(Matrix::new(&[1.0; 300], 2, 150));
                    for (left, right) in [
                        (Matrix::new(&a, m, k), Matrix::new(&b, k, n)),
                        (Matrix::new(&at, k, m).transposed(), Matrix::new(&bt, n, k).transposed()),
                    ] {
                        panels.pack(right);
                        for target in [Target::Overwrite, Target::Add] {
                            let mut out = start.clone();
                            panels.multiply(MatrixMut::strided(&mut out, m, n, n + 3), target, left);
                            for (i, out) in out.iter().enumerate() {
                                close(f64::from(*out), expected(target, i), 1e-5);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (a, b) = (numbers(9 * 300, 1), numbers(300 * 70, 2));
        for precision in [Precision::F32, Precision::Bf16] {
            let mut panels = Panels::new(precision);
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

    #[test]
    fn rounding_follows_the_half_crate() {
        let odd =
            [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 3.0, f32::MAX, -f32::MAX, 1.0 + f32::EPSILON];
        let ties = (0..64u32).map(|i| f32::from_bits(0x3f80_7f80 + i * 0x40));
        for x in odd.into_iter().chain(ties).chain(numbers(1000, 5)) {
            assert_eq!(round(x), u32::from(half::bf16::from_f32(x).to_bits()), "{x}");
        }
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
            assert!(f32::from_bits(round(nan) << 16).is_nan());
        }
    }

    #[test]
    fn nan_and_infinity_pass_through() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut panels = Panels::new(precision);
            panels.pack(Matrix::new(&[1.0, 2.0, 3.0, 4.0], 2, 2));
            let product = |left: [f32; 2]| {
                let mut out = [0.0; 2];
                panels.multiply(MatrixMut::new(&mut out, 1, 2), Target::Overwrite, Matrix::new(&left, 1, 2));
                out
            };
            assert!(product([f32::NAN, 0.0]).iter().all(|x| x.is_nan()));
            assert_eq!(product([f32::INFINITY, 1.0]), [f32::INFINITY; 2]);
        }
    }
}
