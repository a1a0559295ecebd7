//! One body, several instruction sets.
//!
//! The workspace is compiled for the baseline of its target, so that one binary runs everywhere. `vectorized!` compiles
//! a loop once more for AVX2 and for AVX-512 and picks at run time. The body is plain Rust, and the compiler neither
//! reorders sums nor contracts a product and a sum into one operation, so every variant returns the same bits: a sum that
//! should use all lanes says so itself, with an array of `LANES` partial sums.

/// Partial sums in a reduction: the `f32` lanes of one AVX-512 register.
pub(crate) const LANES: usize = 16;

/// Declares a function whose body is compiled for the baseline, for AVX2 and for AVX-512, and chosen at run time.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $return:ty)? $body:block) => {
        $(#[$meta])*
        #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls a variant after checking for its instructions"))]
        $vis fn $name($($arg: $type),*) $(-> $return)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $return)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi1,bmi2")]
                fn avx512($($arg: $type),*) $(-> $return)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,bmi1,bmi2")]
                fn avx2($($arg: $type),*) $(-> $return)? {
                    body($($arg),*)
                }
                match $crate::isa::Isa::current() {
                    // SAFETY: the level has every feature that `avx512` is compiled for.
                    isa if isa >= $crate::isa::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the level has every feature that `avx2` is compiled for.
                    $crate::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorized;

/// Sum of products of two slices of equal length, in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut sums = [0f32; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_lanes.zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    fold(sums) + tail
}

/// The sum of the lanes, pairwise.
#[inline(always)]
pub(crate) fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `e^x` to about 2 units in the last place, as straight-line code that vectorizes. Arguments are clamped to
/// [-87.3, 88.3], where the result is a normal number; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // A comparison that NaN fails keeps NaN, where `f32::max` would drop it.
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, so that n * LN2_HIGH is exact. [Cephes expf]
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let mantissa = (p * r).mul_add(r, r) + 1.0;
    let exponent = shifted.to_bits().wrapping_add(127) << 23;
    mantissa * f32::from_bits(exponent)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere_and_keeps_nan() {
        for i in -8_700..8_800 {
            let x = i as f32 * 0.01;
            let relative = (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs();
            assert!(relative < 3e-7, "exp({x}) is off by {relative}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn dot_handles_every_tail() {
        for n in 0..40 {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected: f32 = a.iter().map(|x| x * x).sum();
            assert_eq!(dot(&a, &a), expected);
        }
    }
}
