//! Every operation of a backend beside the ceilings of its machine: of the CPU at the shapes of SmolLM2-135M, of the
//! card (with the feature `cuda`) at those of Llama-3.1-8B.
//!
//! `cargo bench -p kernels [--features cuda] --bench ops [-- FILTER]`. A result is checked against the reference before
//! it is timed, and weights come from memory, not from a cache. What a time is, each machine says.
#![allow(clippy::print_stdout, reason = "printing is its purpose")]

mod attention;
#[cfg(not(feature = "cuda"))]
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod linear;
mod rows;
mod sampling;
#[cfg(not(feature = "cuda"))]
mod step;

use kernels::{Backend, DType, Heads, HostTensor, LoraSite, Span, reference::Table};

#[cfg(not(feature = "cuda"))]
use cpu as machine;
#[cfg(feature = "cuda")]
use cuda as machine;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A backend with a clock.
trait Machine {
    type Ops: Backend;
    /// Bytes of weights that the calls of a timing rotate through, where the clock does not empty the caches.
    const ROTATED: usize;
    /// Bytes of one element of an activation.
    const ELEMENT: usize;

    fn ops(&self) -> &Self::Ops;

    /// Seconds that one call of `f` takes, which is given the number of its call.
    fn seconds(&self, f: &mut dyn FnMut(usize) -> kernels::Result<()>) -> kernels::Result<f64>;
}

/// What the machine does at most.
#[derive(Clone, Copy)]
struct Peak {
    gb_s: f64,
    gflops: f64,
}

/// The model whose shapes are timed, and in what numbers of rows.
struct Shapes {
    hidden: usize,
    inner: usize,
    heads: Heads,
    vocab: usize,
    /// Products, by name. That of the head is `lm_head`: few rows, no adapters.
    sites: Vec<(&'static str, LoraSite)>,
    /// Ranks of the resident adapters.
    ranks: Vec<usize>,
    /// Rows of a product, and adapters that share them evenly.
    mixes: Vec<(usize, usize)>,
    /// Rows of what works row by row.
    rows: Vec<usize>,
    /// Sequences that attend, rows of each, tokens before those.
    attention: Vec<(usize, usize, usize)>,
    /// Rows that are sampled, ascending; the head has no more.
    sampled: Vec<usize>,
}

/// Prints timings, those whose names contain the filter.
struct Bench<M> {
    machine: M,
    shapes: Shapes,
    peak: Peak,
    filter: Option<String>,
}

/// What one call moves and computes.
#[derive(Clone, Copy)]
struct Cost {
    /// Bytes read and written at least.
    bytes: usize,
    /// Multiplications and additions.
    flops: usize,
}

impl<M: Machine> Bench<M> {
    fn ops(&self) -> &M::Ops {
        self.machine.ops()
    }

    fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// Times `f`, which is given the number of its call.
    fn time(&self, name: &str, cost: Cost, mut f: impl FnMut(usize) -> kernels::Result<()>) -> Outcome<()> {
        let seconds = self.machine.seconds(&mut f)?;
        let (gb_s, gflops) = (cost.bytes as f64 * 1e-9 / seconds, cost.flops as f64 * 1e-9 / seconds);
        let share = 100.0 * (gb_s / self.peak.gb_s).max(gflops / self.peak.gflops);
        let (flops, unit) = if gflops < 1e3 { (gflops, 'G') } else { (gflops * 1e-3, 'T') };
        let micros = seconds * 1e6;
        println!("{name:<48} {micros:>10.1} µs {gb_s:>7.1} GB/s {flops:>7.1} {unit}FLOP/s {share:>4.0} %");
        Ok(())
    }

    fn operations(&self) -> Outcome<()> {
        linear::all(self)?;
        rows::all(self)?;
        attention::all(self)?;
        sampling::all(self)
    }
}

/// The projections of a decoder's layer.
fn layer_sites(hidden: usize, inner: usize, heads: Heads) -> [(&'static str, LoraSite); 4] {
    let (query, kv) = (heads.query * heads.dim, heads.kv * heads.dim);
    [
        ("qkv", LoraSite::linear(hidden, &[query, kv, kv])),
        ("o", LoraSite::linear(query, &[hidden])),
        ("gate_up", LoraSite::linear(hidden, &[inner, inner])),
        ("down", LoraSite::linear(inner, &[hidden])),
    ]
}

/// A matrix with the values of a table.
fn mat<B: Backend>(ops: &B, table: &Table) -> kernels::Result<B::Mat> {
    filled(ops, ops.mat(table.rows(), table.cols)?, table)
}

/// As [`mat`], of f32.
fn wide_mat<B: Backend>(ops: &B, table: &Table) -> kernels::Result<B::Mat> {
    filled(ops, ops.wide_mat(table.rows(), table.cols)?, table)
}

fn filled<B: Backend>(ops: &B, mut x: B::Mat, table: &Table) -> kernels::Result<B::Mat> {
    ops.fill(&mut x, &table.data)?;
    Ok(x)
}

/// A table as it would come from a file.
fn tensor(table: &Table) -> HostTensor<'static> {
    let data = table.data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    HostTensor { dtype: DType::F32, rows: table.rows(), cols: table.cols, data: data.into() }
}

/// A step on the device.
fn uploaded<B: Backend>(ops: &B, host: &kernels::Batch) -> kernels::Result<B::Batch> {
    let mut batch = ops.batch(host.rows(), host.blocks.len(), &[Span::Causal])?;
    ops.upload(host, &mut batch)?;
    Ok(batch)
}

fn main() -> Outcome<()> {
    // Cargo passes `--bench`.
    machine::run(std::env::args().skip(1).find(|arg| !arg.starts_with('-')))
}
