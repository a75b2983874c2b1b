//! Sixteen lanes of f32 on whatever vector unit the machine has.
//!
//! Kernels are written once over [`Simd`] and compiled for every tier; [`run`] picks at run time. All methods are
//! `unsafe` because they need their tier's instructions, and pointers that are good for 16 lanes.

use std::arch::x86_64::*;

use half::f16;

/// To nearest even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

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
    /// The smaller; `b` where one is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger; `b` where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a · 2^n` for integral n in [-126, 127].
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V;
    /// `v`, and 0 in lanes where `x < limit`.
    unsafe fn zero_below(x: Self::V, limit: f32, v: Self::V) -> Self::V;
    /// The lower bf16 of each of 16 u32, widened.
    unsafe fn widen_low(p: *const u32) -> Self::V;
    /// The upper bf16 of each of 16 u32, widened.
    unsafe fn widen_high(p: *const u32) -> Self::V;
    /// Sixteen f16, widened.
    unsafe fn load_half(p: *const u16) -> Self::V;
    /// Rounded to sixteen f16, to nearest even.
    unsafe fn store_half(p: *mut u16, v: Self::V);
    /// The sum of all lanes in the order of a tree: lanes i and i + 8, then i and i + 4, and so on.
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

/// The sum of eight lanes in the order of a tree.
#[inline(always)]
unsafe fn sum_of_eight(v: __m256) -> f32 {
    // SAFETY: the caller's promise: AVX.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

/// The largest of eight lanes.
#[inline(always)]
unsafe fn largest_of_eight(v: __m256) -> f32 {
    // SAFETY: the caller's promise: AVX.
    unsafe {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

/// AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY of all bodies below: the trait's callers promise the tier's instructions and good pointers.
impl Simd for Avx512 {
    type V = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<0>(a) }
    }
    #[inline(always)]
    unsafe fn scale(a: __m512, n: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m512, limit: f32, v: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(limit)), v) }
    }
    #[inline(always)]
    unsafe fn widen_low(p: *const u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn widen_high(p: *const u32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p.cast()), mask))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(v), high))
        }
    }
    #[inline(always)]
    unsafe fn largest(v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            largest_of_eight(_mm256_max_ps(_mm512_castps512_ps256(v), high))
        }
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_half(p: *mut u16, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(v)) }
    }
}

/// 2^n for integral n in [-126, 127].
#[inline(always)]
unsafe fn power_of_two(n: __m256) -> __m256 {
    // SAFETY: the caller's promise: AVX2. n + 127 is the biased exponent.
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

/// AVX2 with FMA: sixteen lanes are two registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY of all bodies below: the trait's callers promise the tier's instructions and good pointers.
impl Simd for Avx2 {
    type V = (__m256, __m256);
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { (_mm256_round_ps::<0>(a.0), _mm256_round_ps::<0>(a.1)) }
    }
    #[inline(always)]
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { Self::mul(a, (power_of_two(n.0), power_of_two(n.1))) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: Self::V, limit: f32, v: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let limit = _mm256_set1_ps(limit);
            let (low, high) =
                (_mm256_cmp_ps::<_CMP_GE_OQ>(x.0, limit), _mm256_cmp_ps::<_CMP_GE_OQ>(x.1, limit));
            (_mm256_and_ps(low, v.0), _mm256_and_ps(high, v.1))
        }
    }
    #[inline(always)]
    unsafe fn widen_low(p: *const u32) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()));
            let (low, high) = (_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high));
            (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn widen_high(p: *const u32) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let (low, high) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()));
            let (low, high) = (_mm256_and_si256(low, mask), _mm256_and_si256(high, mask));
            (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        // SAFETY: see above.
        unsafe { sum_of_eight(_mm256_add_ps(v.0, v.1)) }
    }
    #[inline(always)]
    unsafe fn largest(v: Self::V) -> f32 {
        // SAFETY: see above.
        unsafe { largest_of_eight(_mm256_max_ps(v.0, v.1)) }
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> Self::V {
        // SAFETY: see above.
        unsafe {
            (_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())))
        }
    }
    #[inline(always)]
    unsafe fn store_half(p: *mut u16, v: Self::V) {
        // SAFETY: see above.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<NEAREST>(v.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<NEAREST>(v.1));
        }
    }
}

/// No vector unit that we know: plain arrays, which the compiler vectorizes as it can.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

// SAFETY of all bodies below: the trait's callers promise good pointers.
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
        // Rounded twice: without the instruction, a fused multiply-add is a slow library call.
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

/// A vector unit, from the plainest to the widest. All of them widen bf16 to f32 and multiply that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// No vector instructions.
    Scalar,
    /// AVX2, FMA and F16C; bf16 widened to f32.
    Avx2,
    /// AVX-512; bf16 widened to f32.
    Avx512,
}

impl Tier {
    /// The tiers that this machine can run.
    pub fn available() -> Vec<Tier> {
        let mut tiers = vec![Tier::Scalar];
        let fma = is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        if is_x86_feature_detected!("avx2") && fma {
            tiers.push(Tier::Avx2);
        }
        if is_x86_feature_detected!("avx512f") && fma {
            tiers.push(Tier::Avx512);
        }
        tiers
    }
}

/// Work that is written once for all vector units. `run` must be `#[inline(always)]`, so that it is compiled with the
/// instructions of the tier that it is called for.
pub(super) trait Kernel {
    /// What the work gives.
    type Output;
    /// # Safety
    /// The machine has the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs a kernel on a tier.
#[inline]
pub(super) fn run<K: Kernel>(tier: Tier, kernel: K) -> K::Output {
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn avx512<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: this function's features are those of the tier.
        unsafe { kernel.run::<Avx512>() }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: as above.
        unsafe { kernel.run::<Avx2>() }
    }
    // SAFETY: a backend is only made for a tier that the machine has.
    unsafe {
        match tier {
            Tier::Avx512 => avx512(kernel),
            Tier::Avx2 => avx2(kernel),
            Tier::Scalar => kernel.run::<Scalar>(),
        }
    }
}
