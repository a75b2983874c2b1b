//! Prints what this machine can do, as JSON: read bandwidth and peak arithmetic of two threads or more.
#![allow(clippy::print_stdout, reason = "printing is its purpose")]

use std::{thread, time::Instant};

use kernels::{Backend, DType, HostTensor, Matrix, cpu::CpuBackend};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let threads = thread::available_parallelism()?.get();
    let read = best(8, || read_bandwidth(threads));
    let flops = product_flops(&CpuBackend::new(DType::F32, threads)?)?;
    println!(r#"{{"threads": {threads}, "read_gb_s": {read:.1}, "f32_gflops": {flops:.0}}}"#);
    Ok(())
}

fn best(times: usize, f: impl Fn() -> f64) -> f64 {
    (0..times).map(|_| f()).fold(0.0, f64::max)
}

/// GB/s of summing 512 MB that no cache holds.
fn read_bandwidth(threads: usize) -> f64 {
    let data = vec![1u64; 64 << 20];
    let start = Instant::now();
    let total: u64 = thread::scope(|scope| {
        let workers: Vec<_> = data
            .chunks(data.len().div_ceil(threads))
            .map(|part| scope.spawn(|| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x))))
            .collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).sum()
    });
    assert_eq!(total, data.len() as u64);
    data.len() as f64 * 8e-9 / start.elapsed().as_secs_f64()
}

/// GFLOP/s of a product whose operands stay in the caches near the cores.
fn product_flops(ops: &CpuBackend) -> Outcome<f64> {
    let (rows, cols, outputs) = (96, 512, 256);
    let zeros = vec![0; cols * outputs * 4];
    let w = ops.weight(&[HostTensor { dtype: DType::F32, rows: outputs, cols, data: zeros.into() }])?;
    let (mut x, mut y) = (ops.mat(rows, cols)?, ops.mat(rows, outputs)?);
    x.set_rows(rows);
    let mut fastest = f64::INFINITY;
    for _ in 0..2000 {
        let start = Instant::now();
        ops.linear(&x, &w, None, None, &mut y)?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Ok((2 * rows * cols * outputs) as f64 / fastest * 1e-9)
}
