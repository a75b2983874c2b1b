//! Every operation of the CPU backend at the shapes of SmolLM2-135M, beside the ceilings of this machine.
//!
//! `cargo bench -p kernels --bench ops [-- FILTER]`. A result is checked against the reference before it is timed, and
//! weights rotate through more memory than caches hold. Times are the best of many, since other work on the machine
//! only ever adds to them.
#![allow(clippy::print_stdout, reason = "printing is its purpose")]

#[path = "../../examples/machine/ceiling.rs"]
mod ceiling;
mod linear;
mod rows;
mod step;

use std::time::Instant;

use ceiling::Ceiling;
use kernels::{
    Backend, DType, HostTensor,
    cpu::{CpuBackend, CpuMat},
    reference::Table,
};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Bytes that no cache holds.
const BEYOND_CACHE: usize = 192 << 20;

/// Prints timings, those whose names contain the filter.
struct Bench {
    ops: CpuBackend,
    ceiling: Ceiling,
    filter: Option<String>,
}

/// What one call moves and computes.
#[derive(Clone, Copy)]
struct Cost {
    /// Bytes read at least.
    bytes: usize,
    /// Multiplications and additions.
    flops: usize,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// Times `f`, which is given the number of its call.
    fn time(&self, name: &str, cost: Cost, mut f: impl FnMut(usize) -> kernels::Result<()>) -> Outcome<()> {
        let mut best = f64::INFINITY;
        let begin = Instant::now();
        let mut calls = 0;
        while calls < 20 || begin.elapsed().as_secs_f64() < 0.4 {
            let start = Instant::now();
            f(calls)?;
            best = best.min(start.elapsed().as_secs_f64());
            calls += 1;
        }
        let (gb_s, gflops) = (cost.bytes as f64 * 1e-9 / best, cost.flops as f64 * 1e-9 / best);
        let share = (gb_s / self.ceiling.read_gb_s).max(gflops / self.ceiling.f32_gflops);
        let micros = best * 1e6;
        println!(
            "{name:<48} {micros:>10.1} µs {gb_s:>7.1} GB/s {gflops:>7.1} GFLOP/s {:>4.0} %",
            share * 100.0
        );
        Ok(())
    }
}

/// A matrix with the values of a table.
fn mat(ops: &CpuBackend, table: &Table) -> kernels::Result<CpuMat> {
    let mut x = ops.mat(table.rows(), table.cols)?;
    ops.fill(&mut x, &table.data)?;
    Ok(x)
}

/// A table as it would come from a file.
fn tensor(table: &Table) -> HostTensor<'static> {
    let data = table.data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    HostTensor { dtype: DType::F32, rows: table.rows(), cols: table.cols, data: data.into() }
}

fn main() -> Outcome<()> {
    let threads = std::thread::available_parallelism()?.get();
    let ceiling = Ceiling::measure(threads);
    println!("{threads} threads, {ceiling:?}");
    // Cargo passes `--bench`.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    for dtype in [DType::Bf16, DType::F32] {
        let bench = Bench { ops: CpuBackend::new(dtype, threads)?, ceiling, filter: filter.clone() };
        println!("\n{dtype:?} on {:?}", bench.ops.tier());
        step::all(&bench)?;
        linear::all(&bench)?;
        rows::all(&bench)?;
    }
    Ok(())
}
