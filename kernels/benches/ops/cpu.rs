//! The CPU of this machine, at the shapes of SmolLM2-135M. Times are the best of many, since other work on the machine
//! only ever adds to them. Activations stay in caches, as in a step: what works on them alone may beat memory's ceiling.

#[path = "../../examples/machine/ceiling.rs"]
mod ceiling;

use std::time::Instant;

use ceiling::Ceiling;
use kernels::{DType, Heads, LoraSite, cpu::CpuBackend};

use crate::{Bench, Machine, Outcome, Peak, Shapes, layer_sites, step};

pub(crate) const HIDDEN: usize = 576;
pub(crate) const INNER: usize = 1536;
pub(crate) const VOCAB: usize = 49152;
pub(crate) const HEADS: Heads = Heads { query: 9, kv: 3, dim: 64 };
/// Ranks of eight adapters that share a step.
pub(crate) const RANKS: [usize; 8] = [4, 8, 16, 32, 8, 16, 4, 32];

pub(crate) struct Cpu(CpuBackend);

impl Machine for Cpu {
    type Ops = CpuBackend;
    /// More than caches hold.
    const ROTATED: usize = 192 << 20;
    const ELEMENT: usize = 4;

    fn ops(&self) -> &CpuBackend {
        &self.0
    }

    fn seconds(&self, f: &mut dyn FnMut(usize) -> kernels::Result<()>) -> kernels::Result<f64> {
        let mut best = f64::INFINITY;
        let begin = Instant::now();
        let mut calls = 0;
        while calls < 20 || begin.elapsed().as_secs_f64() < 0.4 {
            let start = Instant::now();
            f(calls)?;
            best = best.min(start.elapsed().as_secs_f64());
            calls += 1;
        }
        Ok(best)
    }
}

fn shapes() -> Shapes {
    let mut sites = layer_sites(HIDDEN, INNER, HEADS).to_vec();
    sites.push(("lm_head", LoraSite::head(HIDDEN, VOCAB)));
    sites.push(("large", LoraSite::linear(4096, &[4096])));
    Shapes {
        hidden: HIDDEN,
        inner: INNER,
        heads: HEADS,
        vocab: VOCAB,
        sites,
        ranks: RANKS.to_vec(),
        mixes: vec![(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (64, 0), (512, 0), (1, 1), (8, 8), (512, 1)],
        rows: vec![1, 8, 512],
        attention: vec![(1, 1, 511), (8, 1, 511), (8, 1, 2047), (1, 512, 0), (1, 512, 1536)],
        sampled: vec![1, 8],
    }
}

pub(crate) fn run(filter: Option<String>) -> Outcome<()> {
    let threads = std::thread::available_parallelism()?.get();
    let ceiling = Ceiling::measure(threads);
    println!("{threads} threads, {ceiling:?}");
    let peak = Peak { gb_s: ceiling.read_gb_s, gflops: ceiling.f32_gflops };
    for dtype in [DType::Bf16, DType::F32] {
        let machine = Cpu(CpuBackend::new(dtype, threads)?);
        println!("\n{dtype:?} on {:?}", machine.0.tier());
        let bench = Bench { machine, shapes: shapes(), peak, filter: filter.clone() };
        step::all(&bench)?;
        bench.operations()?;
    }
    Ok(())
}
