//! What the machine can do at best: how fast memory is read, and how fast registers are multiplied.

use std::{hint::black_box, thread, time::Instant};

/// Ceilings of some threads together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ceiling {
    /// 10⁹ bytes a second, read in order from memory that no cache holds.
    pub(crate) read_gb_s: f64,
    /// 10⁹ operations a second of f32 multiply-adds, two operations each.
    pub(crate) f32_gflops: f64,
}

impl Ceiling {
    /// Measures them, best of a few.
    pub(crate) fn measure(threads: usize) -> Ceiling {
        let best = |times: usize, f: &dyn Fn() -> f64| (0..times).map(|_| f()).fold(0.0, f64::max);
        let data = on_huge_pages(64 << 20);
        Ceiling {
            read_gb_s: best(12, &|| read(threads, &data)),
            f32_gflops: best(60, &|| arithmetic(threads, f32_operations)),
        }
    }
}

/// Ones, on huge pages where the system has them: reading through small pages is slower than memory.
fn on_huge_pages(len: usize) -> Vec<f32> {
    let mut data = Vec::<f32>::with_capacity(len);
    #[cfg(target_os = "linux")]
    {
        let skip = data.as_ptr().align_offset(4096);
        // SAFETY: a hint about whole pages inside of the vector's memory.
        unsafe {
            let first = data.as_mut_ptr().add(skip).cast();
            libc::madvise(first, (len - skip) * size_of::<f32>(), libc::MADV_HUGEPAGE);
        }
    }
    data.resize(len, 1.0);
    data
}

/// GB/s of reading everything once.
fn read(threads: usize, data: &[f32]) -> f64 {
    let start = Instant::now();
    thread::scope(|scope| {
        for part in data.chunks(data.len().div_ceil(threads)) {
            scope.spawn(|| black_box(sum(part)));
        }
    });
    size_of_val(data) as f64 * 1e-9 / start.elapsed().as_secs_f64()
}

/// GFLOP/s of a loop in registers on all threads. `work` returns the operations that it did.
fn arithmetic(threads: usize, work: fn() -> f64) -> f64 {
    let start = Instant::now();
    let total: f64 = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).sum()
    });
    total * 1e-9 / start.elapsed().as_secs_f64()
}

/// Rounds of a loop in registers: about a millisecond, so that the best of many falls into a quiet moment.
const ROUNDS: usize = 200_000;
/// Independent chains of multiply-adds: enough to hide the latency of one, and with their operands in 16 registers.
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    use super::{CHAINS, ROUNDS};

    #[target_feature(enable = "avx512f")]
    pub(super) fn sum512(data: &[f32]) -> f32 {
        let mut sums = [_mm512_setzero_ps(); 8];
        for part in data.chunks_exact(128) {
            for (sum, x) in sums.iter_mut().zip(part.chunks_exact(16)) {
                // SAFETY: a chunk has 16 elements.
                *sum = _mm512_add_ps(*sum, unsafe { _mm512_loadu_ps(x.as_ptr()) });
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma512() -> f64 {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut acc = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..ROUNDS {
            acc.iter_mut().for_each(|acc| *acc = _mm512_fmadd_ps(a, *acc, b));
        }
        black_box(acc.map(|acc| _mm512_reduce_add_ps(acc)));
        (ROUNDS * CHAINS * 32) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma256() -> f64 {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut acc = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..ROUNDS {
            acc.iter_mut().for_each(|acc| *acc = _mm256_fmadd_ps(a, *acc, b));
        }
        black_box(acc.map(|acc| _mm256_cvtss_f32(acc)));
        (ROUNDS * CHAINS * 16) as f64
    }
}

fn sum(data: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has the instructions.
        return unsafe { x86::sum512(data) };
    }
    let mut sums = [0.0; 64];
    for part in data.chunks_exact(64) {
        sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
    sums.iter().sum()
}

fn f32_operations() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has the instructions.
        return unsafe { x86::fma512() };
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: as above.
        return unsafe { x86::fma256() };
    }
    let (a, b) = (black_box(0.5_f32), black_box(0.25_f32));
    let mut acc = [0.0_f32; 32];
    for _ in 0..ROUNDS {
        acc.iter_mut().for_each(|acc| *acc = a * *acc + b);
    }
    black_box(acc);
    (ROUNDS * 32 * 2) as f64
}
