//! What the tests of several kernels share: reproducible numbers and finite differences.

use crate::isa::Isa;
use crate::panels::Precision;

/// The levels that products in `precision` are tested on: the processor's, and tiles of AMX, emulated where it has none.
pub(crate) fn levels(precision: Precision) -> Vec<Isa> {
    let all = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Bf16, Isa::Amx];
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    crate::amx::emulator::install();
    let emulated =
        |isa| isa == Isa::Amx && precision == Precision::Bf16 && cfg!(all(target_arch = "x86_64", target_os = "linux"));
    all.into_iter().filter(|isa| *isa <= Isa::current() || emulated(*isa)).collect()
}

/// `n` numbers in [-1, 1), different for each `salt`.
pub(crate) fn numbers(n: usize, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = |_| {
        // Knuth's linear congruential generator; its upper bits are good enough for test data.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

/// The central difference of `value` in the number `i` of `x`.
pub(crate) fn slope(x: &[f32], i: usize, value: impl Fn(&[f32]) -> f64) -> f64 {
    let step = 1e-2f32;
    let at = |x_i: f32| {
        let mut x = x.to_vec();
        x[i] = x_i;
        value(&x)
    };
    (at(x[i] + step) - at(x[i] - step)) / (2.0 * f64::from(step))
}

/// Fails unless two numbers agree within `tolerance`, relative to 1 or to their size, whichever is larger.
#[track_caller]
pub(crate) fn close(got: f64, expected: f64, tolerance: f64) {
    let scale = 1f64.max(expected.abs());
    assert!((got - expected).abs() <= tolerance * scale, "{got} for {expected}");
}
