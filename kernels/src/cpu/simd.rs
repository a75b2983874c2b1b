//! Sixteen lanes of f32 on any vector unit.
//!
//! Kernels are written once over [`Simd`] and compiled for every tier; [`run`] chooses one at run time. All methods are
//! `unsafe`: the machine must have the tier's instructions, and pointers must be valid for 16 lanes.

#[cfg(target_arch = "x86_64")]
mod x86;

use half::f16;

/// A vector unit.
pub(super) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Whether there are registers for 24 accumulators beside the operands.
    const WIDE: bool;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The minimum of each lane, and `b` where one is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The maximum of each lane, and `b` where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Rounds to the nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a · 2^n` for integral n in [-126, 127].
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V;
    /// `v`, but 0 in lanes where `x < limit`.
    unsafe fn zero_below(x: Self::V, limit: f32, v: Self::V) -> Self::V;
    /// Widens the lower bf16 of each of 16 u32.
    unsafe fn widen_low(p: *const u32) -> Self::V;
    /// Widens the upper bf16 of each of 16 u32.
    unsafe fn widen_high(p: *const u32) -> Self::V;
    /// Widens sixteen f16.
    unsafe fn load_half(p: *const u16) -> Self::V;
    /// Rounds to sixteen f16, to nearest even.
    unsafe fn store_half(p: *mut u16, v: Self::V);
    /// The sum of all lanes, as a tree: lanes i and i + 8 are added first, then i and i + 4, and so on.
    unsafe fn sum(v: Self::V) -> f32;
    /// The largest lane.
    unsafe fn largest(v: Self::V) -> f32;

    /// eˣ to about 2 ulp; 0 below -87. Range reduction by ln 2 in two parts and a polynomial of degree 6 (the scheme
    /// of Cody and Waite, 1980).
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: no memory is touched.
        unsafe {
            let clamped = Self::max(x, Self::splat(-87.0));
            let n = Self::round(Self::mul(clamped, Self::splat(std::f32::consts::LOG2_E)));
            let r = Self::fma(n, Self::splat(-0.693_359_4), clamped);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.0 / 720.0);
            for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
                p = Self::fma(p, r, Self::splat(c));
            }
            Self::zero_below(x, -87.0, Self::scale(p, n))
        }
    }
}

/// Plain arrays, for machines without a vector unit that we support. The compiler vectorizes them as it can.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

// SAFETY of all bodies below: the trait's callers promise valid pointers.
impl Simd for Scalar {
    type V = [f32; 16];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: see above.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: see above.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // This rounds twice, because without the instruction a fused multiply-add is a slow library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn zero_below(x: Self::V, limit: f32, v: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] >= limit { v[i] } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn widen_low(p: *const u32) -> Self::V {
        // SAFETY: see above.
        unsafe { p.cast::<[u32; 16]>().read_unaligned() }.map(|x| f32::from_bits(x << 16))
    }
    #[inline(always)]
    unsafe fn widen_high(p: *const u32) -> Self::V {
        // SAFETY: see above.
        unsafe { p.cast::<[u32; 16]>().read_unaligned() }.map(|x| f32::from_bits(x & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn sum(mut v: Self::V) -> f32 {
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                v[i] += v[i + width];
            }
        }
        v[0]
    }
    #[inline(always)]
    unsafe fn largest(v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> Self::V {
        // SAFETY: see above.
        unsafe { p.cast::<[f16; 16]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_half(p: *mut u16, v: Self::V) {
        // SAFETY: see above.
        unsafe { p.cast::<[f16; 16]>().write_unaligned(v.map(f16::from_f32)) }
    }
}

/// A vector unit, in ascending order of width. All of them widen bf16 to f32 before they multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// No vector instructions.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512.
    Avx512,
}

impl Tier {
    /// The tiers that this machine can run.
    pub fn available() -> Vec<Tier> {
        #[cfg(target_arch = "x86_64")]
        let wide = x86::tiers();
        #[cfg(not(target_arch = "x86_64"))]
        let wide = [];
        [Tier::Scalar].into_iter().chain(wide).collect()
    }
}

/// A kernel that is written once for all tiers. `run` must be `#[inline(always)]`, so that it is compiled with the
/// instructions of the tier that it is called for.
pub(super) trait Kernel {
    /// The kernel's result.
    type Output;
    /// # Safety
    /// The machine has the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs a kernel on a tier.
#[inline]
pub(super) fn run<K: Kernel>(tier: Tier, kernel: K) -> K::Output {
    // SAFETY: a backend is only made for a tier that the machine has.
    unsafe {
        match tier {
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => x86::avx512(kernel),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => x86::avx2(kernel),
            _ => kernel.run::<Scalar>(),
        }
    }
}
