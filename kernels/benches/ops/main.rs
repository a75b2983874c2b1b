//! Times every operation of a backend, and compares it with the machine's bandwidth and arithmetic throughput: on the
//! CPU at the shapes of SmolLM2-135M, on a GPU (with the feature `cuda`) at those of Llama-3.1-8B.
//!
//! `cargo bench -p kernels [--features cuda] --bench ops [-- FILTER]`. A result is compared with the reference before
//! it is timed. Weights are read from memory, not from a cache. Each machine's module says how it measures times.
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
    /// Bytes of weights through which the calls of a timing rotate, if the clock does not empty the caches.
    const ROTATED: usize;
    /// Bytes of an element of activations.
    const ELEMENT: usize;

    fn ops(&self) -> &Self::Ops;

    /// Measures the seconds that one call of `f` takes. `f` is given the number of the call.
    fn seconds(&self, f: &mut dyn FnMut(usize) -> kernels::Result<()>) -> kernels::Result<f64>;
}

/// The machine's bandwidth and arithmetic throughput.
#[derive(Clone, Copy)]
struct Peak {
    gb_s: f64,
    gflops: f64,
}

/// The model whose shapes are timed, and the numbers of rows.
struct Shapes {
    hidden: usize,
    inner: usize,
    heads: Heads,
    vocab: usize,
    /// The projections, by name. `lm_head` is the output projection, with few rows and no adapters.
    sites: Vec<(&'static str, LoraSite)>,
    /// The LoRA ranks of the resident adapters.
    ranks: Vec<usize>,
    /// The rows of a projection, and the number of adapters that share them evenly.
    mixes: Vec<(usize, usize)>,
    /// The rows of element-wise operations.
    rows: Vec<usize>,
    /// For attention: the number of sequences, the rows of each, and the tokens before those.
    attention: Vec<(usize, usize, usize)>,
    /// The rows that are sampled, ascending. The output projection has no more.
    sampled: Vec<usize>,
}

/// Prints the timings whose names contain the filter.
struct Bench<M> {
    machine: M,
    shapes: Shapes,
    peak: Peak,
    filter: Option<String>,
}

/// The work of one call.
#[derive(Clone, Copy)]
struct Cost {
    /// The smallest number of bytes that have to be read and written.
    bytes: usize,
    /// The number of multiplications and additions.
    flops: usize,
}

impl<M: Machine> Bench<M> {
    fn ops(&self) -> &M::Ops {
        self.machine.ops()
    }

    fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// Times `f`, which is given the number of the call.
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
