//! Which instructions our kernels use: found once, and lowered by `TROMMEL_ISA`. The gemm crate, which multiplies where no
//! tile does, chooses its own.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::amx;

/// A level of instructions; each contains those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every processor of the target has.
    Portable,
    /// AVX2, FMA, BMI1 and BMI2.
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL.
    Avx512,
    /// AVX-512 with products of 8-bit integers.
    Avx512Vnni,
    /// The same with products of `bf16` pairs.
    Avx512Bf16,
    /// The same and AMX, tiles of `bf16` pairs, which the system has permitted.
    Amx,
}

/// The variable that lowers the level: `portable`, `avx2`, `avx512`, `avx512vnni`, `avx512bf16` or `amx`.
pub const VARIABLE: &str = "TROMMEL_ISA";

const NAMES: [(&str, Isa); 6] = [
    ("portable", Isa::Portable),
    ("avx2", Isa::Avx2),
    ("avx512", Isa::Avx512),
    ("avx512vnni", Isa::Avx512Vnni),
    ("avx512bf16", Isa::Avx512Bf16),
    ("amx", Isa::Amx),
];

impl Isa {
    /// The level that the kernels use: the processor's, or what [`VARIABLE`] asks for if that is lower. [`Isa::check`] says
    /// whether it asks for something else.
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Isa::asked().ok().flatten().map_or(Isa::detected(), |asked| asked.min(Isa::detected())))
    }

    /// The name in [`VARIABLE`].
    pub fn name(self) -> &'static str {
        NAMES[self as usize].0
    }

    /// Says what is wrong with [`VARIABLE`]: a name that is none, or a level that this processor does not have.
    pub fn check() -> Result<(), String> {
        match Isa::asked()? {
            Some(asked) if asked > Isa::detected() => {
                Err(format!("{VARIABLE} asks for `{}`, and this processor has `{}`", asked.name(), Isa::detected().name()))
            }
            _ => Ok(()),
        }
    }

    fn asked() -> Result<Option<Isa>, String> {
        let Some(text) = std::env::var_os(VARIABLE) else { return Ok(None) };
        let found = NAMES.iter().find(|(name, _)| text == *name).map(|(_, isa)| Some(*isa));
        let known = NAMES.map(|(name, _)| name).join(", ");
        found.ok_or_else(|| format!("{VARIABLE} is `{}`; it can be one of {known}", text.display()))
    }

    #[cfg(target_arch = "x86_64")]
    fn detected() -> Isa {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
        match (avx2, avx512, vnni, is_x86_feature_detected!("avx512bf16")) {
            (true, true, true, true) if has_amx() && amx::permitted() => Isa::Amx,
            (true, true, true, true) => Isa::Avx512Bf16,
            (true, true, true, false) => Isa::Avx512Vnni,
            (true, true, false, _) => Isa::Avx512,
            (true, false, ..) => Isa::Avx2,
            (false, ..) => Isa::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detected() -> Isa {
        Isa::Portable
    }
}

/// Whether the processor has tiles of `bf16`. [Intel SDM, volume 2, CPUID, leaf 7]
#[cfg(target_arch = "x86_64")]
fn has_amx() -> bool {
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    std::arch::x86_64::__cpuid(0).eax >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES
}
