//! Rounding to `bf16`, and pairs of it: two numbers in 32 bits, the first in the low half, as one instruction multiplies them.
//!
//! Where the processor itself rounds, numbers below the smallest normal one become zero, for which its products take them
//! anyway. Any NaN becomes a quiet one.

use std::ops::Range;

use crate::isa::Isa;
use crate::vectorize::vectorized;

/// The `bf16` nearest to `x`, ties to even, in the low half; any NaN becomes the quiet one.
#[inline(always)]
pub(crate) fn round(x: f32) -> u32 {
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
    pub(crate) fn round_all(numbers: &mut [f32]) {
        numbers.iter_mut().for_each(|x| *x = round_to_bf16(*x));
    }
}

/// Pairs numbers that follow each other in a row; the last one of an odd number is paired with zero. Row `r` has the `columns`
/// numbers from `r * row_stride` on, and its pairs follow those of the row before.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls a variant after checking for its instructions"))]
pub(crate) fn pair_up(source: &[f32], row_stride: usize, (rows, columns): (usize, usize), pairs: &mut [u32]) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!((rows - 1) * row_stride + columns <= source.len() && rows * columns.div_ceil(2) == pairs.len());
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512Bf16 {
        // SAFETY: the level has the instructions, and the lengths were checked.
        return unsafe { hardware::pair_up(source, row_stride, (rows, columns), pairs) };
    }
    for (row, pairs) in pairs.chunks_exact_mut(columns.div_ceil(2)).enumerate() {
        for (numbers, pair) in source[row * row_stride..][..columns].chunks(2).zip(pairs) {
            *pair = round(numbers[0]) | numbers.get(1).map_or(0, |x| round(*x) << 16);
        }
    }
}

/// Pairs each number of an even row with that below it, or with zero below the last row. Row `r` has the `columns` numbers from
/// `r * row_stride` on; the pairs of rows `2 l` and `2 l + 1` go to row `l` of `out`, which are `stride` apart.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls a variant after checking for its instructions"))]
pub(crate) fn interleave(source: &[f32], row_stride: usize, (rows, columns): (usize, usize), out: &mut [u32], stride: usize) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= stride, "rows that overlap");
    assert!((rows - 1) * row_stride + columns <= source.len() && (rows.div_ceil(2) - 1) * stride + columns <= out.len());
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512Bf16 {
        // SAFETY: the level has the instructions, and the lengths were checked.
        return unsafe { hardware::interleave(source, row_stride, (rows, columns), out, stride) };
    }
    for (step, out) in out.chunks_mut(stride).take(rows.div_ceil(2)).enumerate() {
        let row = |row: usize| if row < rows { &source[row * row_stride..][..columns] } else { &[] };
        let (even, odd) = (row(2 * step), row(2 * step + 1));
        for (i, (pair, even)) in out.iter_mut().zip(even).enumerate() {
            *pair = round(*even) | odd.get(i).map_or(0, |x| round(*x) << 16);
        }
    }
}

/// [`interleave`] of numbers `columns` of `rows` rows that are in pairs themselves, `row_stride` pairs apart.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls a variant after checking for its instructions"))]
pub(crate) fn interleave_pairs(
    source: &[u32],
    row_stride: usize,
    rows: usize,
    columns: Range<usize>,
    out: &mut [u32],
    stride: usize,
) {
    if rows == 0 || columns.is_empty() {
        return;
    }
    assert!(columns.end <= 2 * row_stride && (rows - 1) * row_stride + columns.end.div_ceil(2) <= source.len());
    assert!(columns.len() <= stride, "rows that overlap");
    assert!((rows.div_ceil(2) - 1) * stride + columns.len() <= out.len());
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512Bf16 {
        // SAFETY: the level has the instructions, and the lengths were checked.
        return unsafe { hardware::interleave_pairs(source, row_stride, rows, columns, out, stride) };
    }
    let half = |row: usize, i: usize| if row < rows { source[row * row_stride + i / 2] >> (i % 2 * 16) & 0xffff } else { 0 };
    for (step, out) in out.chunks_mut(stride).take(rows.div_ceil(2)).enumerate() {
        out.iter_mut().zip(columns.clone()).for_each(|(pair, i)| *pair = half(2 * step, i) | half(2 * step + 1, i) << 16);
    }
}

vectorized! {
    /// The numbers of pairs, in their order; as many as `numbers` holds.
    pub(crate) fn unpair(pairs: &[u32], numbers: &mut [f32]) {
        // Two at a time without a condition, or the compiler writes each number by itself.
        let (whole, last) = numbers.as_chunks_mut::<2>();
        for (numbers, pair) in whole.iter_mut().zip(pairs) {
            *numbers = [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
        }
        if let ([number], Some(pair)) = (last, pairs.get(whole.len())) {
            *number = f32::from_bits(pair << 16);
        }
    }
}

/// Columns that [`pair_up_columns`] takes at once.
pub(crate) const COLUMNS: usize = 16;

/// Pairs the numbers of each of `columns` columns, at most 16, and writes pair `l` of every column to row `l` of `out`; rows
/// are `stride` apart and filled up to 16 with zeros. Column `c` has the `rows` numbers from `c * column_stride` on.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls a variant after checking for its instructions"))]
pub(crate) fn pair_up_columns(
    source: &[f32],
    column_stride: usize,
    (rows, columns): (usize, usize),
    out: &mut [u32],
    stride: usize,
) {
    assert!(rows > 0 && (1..=COLUMNS).contains(&columns) && stride >= COLUMNS);
    assert!((columns - 1) * column_stride + rows <= source.len() && (rows.div_ceil(2) - 1) * stride + COLUMNS <= out.len());
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512Bf16 {
        // SAFETY: the level has the instructions, and the lengths were checked.
        return unsafe { hardware::pair_up_columns(source, column_stride, (rows, columns), out, stride) };
    }
    for (step, out) in out.chunks_mut(stride).take(rows.div_ceil(2)).enumerate() {
        out[..COLUMNS].fill(0);
        for (column, pair) in out[..columns].iter_mut().enumerate() {
            let column = &source[column * column_stride..][..rows];
            *pair = round(column[2 * step]) | column.get(2 * step + 1).map_or(0, |x| round(*x) << 16);
        }
    }
}

/// Exchanges rows and columns of pairs: pair `l` of row `r` is at `l * stride + r` of `source` and goes to `r * out_stride + l`
/// of `out`.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls a variant after checking for its instructions"))]
pub(crate) fn turn_pairs(source: &[u32], stride: usize, (steps, rows): (usize, usize), out: &mut [u32], out_stride: usize) {
    assert!(steps > 0 && rows > 0 && rows <= stride && steps <= out_stride);
    assert!((steps - 1) * stride + rows <= source.len() && (rows - 1) * out_stride + steps <= out.len());
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512 {
        // SAFETY: the level has the instructions, and the lengths were checked.
        return unsafe { hardware::turn_pairs(source, stride, (steps, rows), out, out_stride) };
    }
    for (row, out) in out.chunks_mut(out_stride).take(rows).enumerate() {
        out[..steps].iter_mut().enumerate().for_each(|(step, pair)| *pair = source[step * stride + row]);
    }
}

/// The same in the instructions of the levels that multiply pairs.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
mod hardware {
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Numbers in a register.
    const LANES: usize = 16;

    /// A mask of the first `n` lanes, at most all.
    fn lanes(n: usize) -> u16 {
        ((1u32 << n.min(LANES)) - 1) as u16
    }

    /// Rounds 16 numbers of `low` and 16 of `high`, in this order.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn rounded(low: __m512, high: __m512) -> __m512i {
        // SAFETY: both are 512 bits without an invalid pattern.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
    }

    /// # Safety
    /// The processor has the instructions; the slices hold what the sizes name.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pair_up(source: &[f32], row_stride: usize, (rows, columns): (usize, usize), pairs: &mut [u32]) {
        let whole = columns / (2 * LANES) * 2 * LANES;
        let tail = columns - whole;
        for row in 0..rows {
            let (from, to) =
                (source.as_ptr().wrapping_add(row * row_stride), pairs.as_mut_ptr().wrapping_add(row * columns.div_ceil(2)));
            for at in (0..whole).step_by(2 * LANES) {
                // SAFETY: two registers of numbers and one of pairs are within the row.
                unsafe {
                    let pair = rounded(_mm512_loadu_ps(from.add(at)), _mm512_loadu_ps(from.add(at + LANES)));
                    _mm512_storeu_si512(to.add(at / 2).cast(), pair);
                }
            }
            if tail > 0 {
                // SAFETY: the masks leave out what lies beyond the row.
                unsafe {
                    let low = _mm512_maskz_loadu_ps(lanes(tail), from.add(whole));
                    let high = _mm512_maskz_loadu_ps(lanes(tail.saturating_sub(LANES)), from.wrapping_add(whole + LANES));
                    _mm512_mask_storeu_epi32(to.add(whole / 2).cast(), lanes(tail.div_ceil(2)), rounded(low, high));
                }
            }
        }
    }

    /// # Safety
    /// The processor has the instructions; the slices hold what the sizes name.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn interleave(
        source: &[f32],
        row_stride: usize,
        (rows, columns): (usize, usize),
        out: &mut [u32],
        stride: usize,
    ) {
        // Lane 2i is number i of the first half, lane 2i + 1 number i of the second.
        let order: [u16; 2 * LANES] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
        // SAFETY: the array has 512 bits.
        let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
        for step in 0..rows.div_ceil(2) {
            let even = source.as_ptr().wrapping_add(2 * step * row_stride);
            let odd = even.wrapping_add(row_stride);
            let to = out.as_mut_ptr().wrapping_add(step * stride);
            for at in (0..columns).step_by(LANES) {
                let here = lanes(columns - at);
                let below = if 2 * step + 1 < rows { here } else { 0 };
                // SAFETY: the masks leave out what lies beyond the rows.
                unsafe {
                    let low = _mm512_maskz_loadu_ps(here, even.add(at));
                    let high = _mm512_maskz_loadu_ps(below, odd.wrapping_add(at));
                    let pair = _mm512_permutexvar_epi16(order, rounded(low, high));
                    _mm512_mask_storeu_epi32(to.add(at).cast(), here, pair);
                }
            }
        }
    }

    /// # Safety
    /// The processor has the instructions; the slices hold what the sizes name.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn interleave_pairs(
        source: &[u32],
        row_stride: usize,
        rows: usize,
        columns: Range<usize>,
        out: &mut [u32],
        stride: usize,
    ) {
        /// Pairs of rows that are asked for before they are read: the processor does not foresee pieces that lie far apart.
        const AHEAD: usize = 8;
        // Lane 2i is number i of one row's half, lane 2i + 1 that of the other row's.
        let halves = [0, LANES].map(|half| std::array::from_fn(|i| (half + i / 2 + i % 2 * 2 * LANES) as u16));
        // SAFETY: each array has 512 bits.
        let halves = halves.map(|half: [u16; 2 * LANES]| unsafe { _mm512_loadu_si512(half.as_ptr().cast()) });
        let row = |row: usize| source.as_ptr().wrapping_add(row * row_stride).cast::<i16>().wrapping_add(columns.start);
        for step in 0..rows.div_ceil(2) {
            let to = out.as_mut_ptr().wrapping_add(step * stride);
            for at in (0..columns.len()).step_by(2 * LANES) {
                let left = columns.len() - at;
                let here = u32::MAX >> (2 * LANES - left.min(2 * LANES));
                let below = if 2 * step + 1 < rows { here } else { 0 };
                for ahead in [0, 1] {
                    _mm_prefetch::<_MM_HINT_T0>(row(2 * (step + AHEAD) + ahead).wrapping_add(at).cast());
                }
                // SAFETY: the masks leave out what lies beyond the columns.
                unsafe {
                    let even = _mm512_maskz_loadu_epi16(here, row(2 * step).add(at));
                    let odd = _mm512_maskz_loadu_epi16(below, row(2 * step + 1).wrapping_add(at));
                    for (half, order) in halves.into_iter().enumerate() {
                        let pair = _mm512_permutex2var_epi16(even, order, odd);
                        let mask = lanes(left.saturating_sub(half * LANES));
                        _mm512_mask_storeu_epi32(to.wrapping_add(at + half * LANES).cast(), mask, pair);
                    }
                }
            }
        }
    }

    /// # Safety
    /// The processor has the instructions; the slices hold what the sizes name.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pair_up_columns(
        source: &[f32],
        column_stride: usize,
        (rows, columns): (usize, usize),
        out: &mut [u32],
        stride: usize,
    ) {
        for from in (0..rows).step_by(2 * LANES) {
            let here = (rows - from).min(2 * LANES);
            let (low, high) = (lanes(here), lanes(here.saturating_sub(LANES)));
            let mut lines = [_mm512_setzero_si512(); LANES];
            for (column, line) in lines[..columns].iter_mut().enumerate() {
                let at = source.as_ptr().wrapping_add(column * column_stride + from);
                // SAFETY: the masks leave out what lies beyond the column.
                *line = unsafe { rounded(_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at.wrapping_add(LANES))) };
            }
            for (step, line) in transposed(lines).into_iter().take(here.div_ceil(2)).enumerate() {
                // SAFETY: the caller has checked that `out` has 16 numbers of each row.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().add((from / 2 + step) * stride).cast(), line) }
            }
        }
    }

    /// # Safety
    /// The processor has the instructions; the slices hold what the sizes name.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn turn_pairs(
        source: &[u32],
        stride: usize,
        (steps, rows): (usize, usize),
        out: &mut [u32],
        out_stride: usize,
    ) {
        for (step, row) in (0..steps).step_by(LANES).flat_map(|step| (0..rows).step_by(LANES).map(move |row| (step, row))) {
            let (steps_here, rows_here) = ((steps - step).min(LANES), (rows - row).min(LANES));
            let mut lines = [_mm512_setzero_si512(); LANES];
            for (i, line) in lines[..steps_here].iter_mut().enumerate() {
                // SAFETY: the mask leaves out what lies beyond the rows.
                *line = unsafe {
                    _mm512_maskz_loadu_epi32(lanes(rows_here), source.as_ptr().add((step + i) * stride + row).cast())
                };
            }
            for (i, line) in transposed(lines).into_iter().take(rows_here).enumerate() {
                // SAFETY: the mask leaves out what lies beyond the steps.
                unsafe {
                    let to = out.as_mut_ptr().add((row + i) * out_stride + step);
                    _mm512_mask_storeu_epi32(to.cast(), lanes(steps_here), line);
                }
            }
        }
    }

    /// Exchanges rows and columns of 16 x 16 numbers of 32 bits.
    #[target_feature(enable = "avx512f")]
    fn transposed(mut r: [__m512i; LANES]) -> [__m512i; LANES] {
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in (0..LANES).step_by(4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        // Now quarter q of r[4 i + k] is column 4 q + k of rows 4 i to 4 i + 3.
        for k in 0..4 {
            let even = [0, 8].map(|i| _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0x88));
            let odd = [0, 8].map(|i| _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0xdd));
            t[k] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
            t[8 + k] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
            t[4 + k] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
            t[12 + k] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
        }
        t
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::numbers;

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
    fn pairs_hold_rounded_numbers_at_every_length() {
        let special = [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 0.0, -0.0, 1.0 + f32::EPSILON];
        let x: Vec<f32> = special.into_iter().chain(numbers(200, 1)).collect();
        let pair = |low: Option<&f32>, high: Option<&f32>| low.map_or(0, |x| round(*x)) | high.map_or(0, |x| round(*x)) << 16;
        for n in 1..100usize {
            let mut pairs = vec![7; n.div_ceil(2)];
            pair_up(&x, n, (1, n), &mut pairs);
            let expected: Vec<u32> = x[..n].chunks(2).map(|x| pair(x.first(), x.get(1))).collect();
            assert_eq!(pairs, expected);

            let (rows, stride) = (n % 4 + 1, n + 3);
            let source = numbers(rows * stride, 2);
            let number = |row: usize, column: usize| (row < rows && column < n).then(|| &source[row * stride + column]);
            let mut pairs = vec![7; rows * n.div_ceil(2)];
            pair_up(&source, stride, (rows, n), &mut pairs);
            let mut packed = vec![7; rows.div_ceil(2) * stride];
            interleave(&source, stride, (rows, n), &mut packed, stride);
            for row in 0..rows {
                let got = &pairs[row * n.div_ceil(2)..(row + 1) * n.div_ceil(2)];
                assert!(got.iter().enumerate().all(|(i, got)| *got == pair(number(row, 2 * i), number(row, 2 * i + 1))));
                let got = &packed[row / 2 * stride..(row / 2 + 1) * stride];
                let expected = |i: usize| if i < n { pair(number(row & !1, i), number(row | 1, i)) } else { 7 };
                assert!(got.iter().enumerate().all(|(i, got)| *got == expected(i)));
            }
        }
        for (rows, columns) in [(1, 0..1), (2, 4..100), (5, 2..35), (4, 0..70), (3, 8..40)] {
            let width = columns.end + 3;
            let source = numbers(rows * width, 3);
            let mut paired = vec![0; rows * width.div_ceil(2)];
            pair_up(&source, width, (rows, width), &mut paired);
            let mut back = vec![0.0; width];
            unpair(&paired, &mut back);
            assert!(back.iter().zip(&source).all(|(back, x)| *back == round_to_bf16(*x)));
            let stride = columns.len() + 2;
            let mut got = vec![7; rows.div_ceil(2) * stride];
            interleave_pairs(&paired, width.div_ceil(2), rows, columns.clone(), &mut got, stride);
            for (i, got) in got.iter().enumerate() {
                let (step, column) = (i / stride, columns.start + i % stride);
                let number = |row: usize| (row < rows).then(|| &source[row * width + column]);
                let expected = if column < columns.end { pair(number(2 * step), number(2 * step + 1)) } else { 7 };
                assert_eq!(*got, expected);
            }
        }
        let mut pairs = [0; 1];
        pair_up(&[f32::NAN, 1.0], 2, (1, 2), &mut pairs);
        assert!(f32::from_bits(pairs[0] << 16).is_nan());
    }

    #[test]
    fn columns_of_pairs_are_turned() {
        for (rows, columns, column_stride) in [(1usize, 1, 1), (5, 3, 9), (32, 16, 32), (67, 16, 70), (64, 7, 64)] {
            let x = numbers(columns * column_stride, 3);
            let stride = 20;
            let mut out = vec![9; rows.div_ceil(2) * stride];
            pair_up_columns(&x, column_stride, (rows, columns), &mut out, stride);
            for (step, line) in out.chunks_exact(stride).enumerate() {
                for (column, got) in line.iter().enumerate() {
                    let at = |row: usize| if row < rows { round(x[column * column_stride + row]) } else { 0 };
                    let pair = |_| at(2 * step) | at(2 * step + 1) << 16;
                    let expected = if column < columns {
                        pair(())
                    } else if column < COLUMNS {
                        0
                    } else {
                        9
                    };
                    assert_eq!(*got, expected);
                }
            }
        }
    }

    #[test]
    fn turned_pairs_change_places() {
        for (steps, rows, stride) in [(1, 1, 1), (5, 3, 9), (16, 16, 16), (33, 32, 64), (256, 31, 31)] {
            let source: Vec<u32> = (0..steps as u32 * stride as u32).collect();
            let out_stride = steps + 3;
            let mut out = vec![u32::MAX; rows * out_stride];
            turn_pairs(&source, stride, (steps, rows), &mut out, out_stride);
            for (i, got) in out.iter().enumerate() {
                let (row, step) = (i / out_stride, i % out_stride);
                assert_eq!(*got, if step < steps { source[step * stride + row] } else { u32::MAX });
            }
        }
    }
}
