//! Tiles of two 16-bit integers to a step: an instruction multiplies 16 of them and adds pairs of products, another adds those to
//! the sums, which two more units do beside the multipliers.

use std::arch::x86_64::*;

use super::{Found, Tile};

/// Centroids of a register.
const LANES: usize = 8;
/// Registers of a panel, and its centroids.
const PARTS: usize = 2;
const PANEL: usize = PARTS * LANES;

#[target_feature(enable = "avx2,fma")]
pub(super) fn score(tile: &Tile<'_>, found: &mut Found<'_>) {
    for_rows!(score_rows(tile, found))
}

#[target_feature(enable = "avx2,fma")]
#[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
fn score_rows<const R: usize>(tile: &Tile<'_>, found: &mut Found<'_>) {
    let Tile { numbers: panel, scales, norms, rows, row, .. } = *tile;
    let steps = rows.steps;
    let left = &rows.numbers[row * steps..(row + R) * steps];
    assert!(panel.len() == steps * PANEL && scales.len() == PANEL && norms.len() == PANEL);
    let mut sums = [[_mm256_setzero_si256(); PARTS]; R];
    let (mut left, mut right) = (left.as_ptr(), panel.as_ptr());
    for _ in 0..steps {
        // SAFETY: `right` is at one of the steps of the panel and `left` at the same step of the first row, and the rows lie
        // `steps` steps apart, as the two slices were measured.
        unsafe {
            let right: [_; PARTS] = std::array::from_fn(|part| _mm256_loadu_si256(right.add(part * LANES).cast()));
            for (r, sums) in sums.iter_mut().enumerate() {
                let pair = _mm256_set1_epi32(*left.add(r * steps));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(right, pair));
                }
            }
        }
        left = left.wrapping_add(1);
        right = right.wrapping_add(PANEL);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        let twice = _mm256_set1_ps(2.0 * rows.scales[row + r]);
        let scores: [__m256; PARTS] = std::array::from_fn(|part| {
            // SAFETY: both slices have `PARTS` registers.
            let (scales, norms) = unsafe {
                let at = part * LANES;
                (_mm256_loadu_ps(scales.as_ptr().add(at)), _mm256_loadu_ps(norms.as_ptr().add(at)))
            };
            _mm256_fnmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[part]), scales), twice, norms)
        });
        if up_to(scores, found.limits[row + r]) != 0 {
            note(tile, row + r, scores, found);
        }
    }
}

/// Takes the scores of a row, at least one of which is not above its limit.
#[target_feature(enable = "avx2")]
#[inline(never)]
#[expect(unsafe_code, reason = "writes registers through a raw pointer")]
fn note(tile: &Tile<'_>, row: usize, scores: [__m256; PARTS], found: &mut Found<'_>) {
    let mut numbers = [0f32; PANEL];
    for (part, score) in scores.into_iter().enumerate() {
        // SAFETY: there are as many numbers.
        unsafe { _mm256_storeu_ps(numbers.as_mut_ptr().add(part * LANES), score) }
    }
    let limit = found.lower_limit(row, numbers.into_iter().fold(f32::INFINITY, f32::min));
    tile.take(row, up_to(scores, limit), &numbers, found);
}

/// Which scores are not above the limit, bit by bit.
#[target_feature(enable = "avx2")]
fn up_to(scores: [__m256; PARTS], limit: f32) -> u64 {
    let limit = _mm256_set1_ps(limit);
    scores.into_iter().enumerate().fold(0, |mask, (part, score)| {
        let below = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(score, limit));
        mask | u64::from(below.cast_unsigned()) << (part * LANES)
    })
}
