//! Tiles of four 8-bit integers to a step: one instruction multiplies and adds 64 of them.

use std::arch::x86_64::*;

use super::{Found, Tile};
use crate::vectorize::LANES;

/// Registers of a panel, and its centroids.
const PARTS: usize = 4;
const PANEL: usize = PARTS * LANES;

#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn score(tile: &Tile<'_>, found: &mut Found<'_>) {
    for_rows!(score_rows(tile, found))
}

#[target_feature(enable = "avx512f,avx512vnni")]
#[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
fn score_rows<const R: usize>(tile: &Tile<'_>, found: &mut Found<'_>) {
    let Tile { numbers: panel, scales, norms, rows, row, .. } = *tile;
    let steps = rows.steps;
    let left = &rows.numbers[row * steps..(row + R) * steps];
    assert!(panel.len() == steps * PANEL && scales.len() == PANEL && norms.len() == PANEL);
    let mut sums: [[__m512i; PARTS]; R] = std::array::from_fn(|r| [_mm512_set1_epi32(-rows.offsets[row + r]); PARTS]);
    let (mut left, mut right) = (left.as_ptr(), panel.as_ptr());
    for _ in 0..steps {
        // SAFETY: `right` is at one of the steps of the panel and `left` at the same step of the first row, and the rows lie
        // `steps` steps apart, as the two slices were measured.
        unsafe {
            let right: [_; PARTS] = std::array::from_fn(|part| _mm512_loadu_si512(right.add(part * LANES).cast()));
            for (r, sums) in sums.iter_mut().enumerate() {
                let four = _mm512_set1_epi32(*left.add(r * steps));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm512_dpbusd_epi32(*sum, right, four);
                }
            }
        }
        left = left.wrapping_add(1);
        right = right.wrapping_add(PANEL);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        let twice = _mm512_set1_ps(2.0 * rows.scales[row + r]);
        let limit = _mm512_set1_ps(found.limits[row + r]);
        let mut any = 0;
        let scores: [__m512; PARTS] = std::array::from_fn(|part| {
            // SAFETY: both slices have `PARTS` registers.
            let (scales, norms) = unsafe {
                let at = part * LANES;
                (_mm512_loadu_ps(scales.as_ptr().add(at)), _mm512_loadu_ps(norms.as_ptr().add(at)))
            };
            let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[part]), scales);
            let score = _mm512_fnmadd_ps(product, twice, norms);
            any |= _mm512_cmp_ps_mask::<_CMP_LE_OQ>(score, limit);
            score
        });
        if any != 0 {
            note(tile, row + r, scores, found);
        }
    }
}

/// Takes the scores of a row, at least one of which is not above its limit.
#[target_feature(enable = "avx512f")]
#[inline(never)]
#[expect(unsafe_code, reason = "writes registers through a raw pointer")]
fn note(tile: &Tile<'_>, row: usize, scores: [__m512; PARTS], found: &mut Found<'_>) {
    let lowest = _mm512_min_ps(_mm512_min_ps(scores[0], scores[1]), _mm512_min_ps(scores[2], scores[3]));
    let limit = _mm512_set1_ps(found.lower_limit(row, _mm512_reduce_min_ps(lowest)));
    let (mut numbers, mut mask) = ([0f32; PANEL], 0u64);
    for (part, score) in scores.into_iter().enumerate() {
        mask |= u64::from(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(score, limit)) << (part * LANES);
        // SAFETY: there are as many numbers.
        unsafe { _mm512_storeu_ps(numbers.as_mut_ptr().add(part * LANES), score) }
    }
    tile.take(row, mask, &numbers, found);
}
