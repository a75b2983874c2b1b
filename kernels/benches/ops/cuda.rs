//! The first GPU, at the shapes of Llama-3.1-8B. A time is the median of some calls on the GPU's own clock, from the
//! end of a long read that leaves nothing of the operands in L2 to the end of the call: activations are cold as well,
//! which they would not be in a step. The host launches ahead of the GPU during that read.

use std::{cell::RefCell, ptr::null_mut, time::Instant};

use cudarc::driver::{DriverError, result};
use kernels::{
    DType, Heads, LoraSite, Output, Projection,
    cuda::{CudaBackend, CudaMat, CudaWeight},
    prelude::*,
    testing::Numbers,
};

use crate::{Bench, Machine, Outcome, Peak, Shapes, layer_sites, mat, tensor};

const HIDDEN: usize = 4096;
const INNER: usize = 14336;
const VOCAB: usize = 128_256;
const HEADS: Heads = Heads { query: 32, kv: 8, dim: 128 };
const ROWS: [usize; 6] = [1, 8, 32, 128, 512, 2048];
const ADAPTERS: usize = 32;
const RANK: usize = 16;

/// Calls before the timed ones: plans are made and kernels loaded.
const UNTIMED: usize = 3;
const TIMED: usize = 30;

struct Gpu {
    ops: CudaBackend,
    /// Several times L2. Reading it leaves no lines that would have to be written back during a timed call.
    flush: CudaWeight,
    row: CudaMat,
    sink: RefCell<CudaMat>,
}

impl Gpu {
    fn new() -> Outcome<Gpu> {
        let ops = CudaBackend::new(DType::Bf16, 0)?;
        let (inputs, outputs) = (8192, 16384);
        let mut numbers = Numbers(8);
        Ok(Gpu {
            flush: ops.weight(&[tensor(&numbers.table(outputs, inputs))])?,
            row: mat(&ops, &numbers.table(1, inputs))?,
            sink: RefCell::new(ops.mat(1, outputs)?),
            ops,
        })
    }

    fn peak(&self) -> Outcome<Peak> {
        Ok(Peak { gb_s: copy_gb_s()?, gflops: self.product_gflops()? })
    }

    /// GFLOP/s of a large product through cuBLASLt.
    fn product_gflops(&self) -> Outcome<f64> {
        let n = 8192;
        let mut numbers = Numbers(7);
        let weight = self.ops.weight(&[tensor(&numbers.table(n, n))])?;
        let (x, mut y) = (mat(&self.ops, &numbers.table(n, n))?, self.ops.mat(n, n)?);
        let by = Projection::new(&weight, None);
        let seconds = self.seconds(&mut |_| self.ops.linear(&x, by, Output::Store(&mut y)))?;
        Ok(2e-9 * (n as f64).powi(3) / seconds)
    }
}

/// GB/s of copies on the GPU, read and written together; best of a few.
fn copy_gb_s() -> Result<f64, DriverError> {
    const BYTES: usize = 2 << 30;
    const COPIES: usize = 4;
    let mut best = 0.0_f64;
    // SAFETY: the backend made its context this thread's; both buffers have that size and are freed behind the last
    // copy.
    unsafe {
        let (from, to) = (result::malloc_sync(BYTES)?, result::malloc_sync(BYTES)?);
        for _ in 0..6 {
            let start = Instant::now();
            for _ in 0..COPIES {
                result::memcpy_dtod_async(to, from, BYTES, null_mut())?;
            }
            result::stream::synchronize(null_mut())?;
            best = best.max((2 * COPIES * BYTES) as f64 * 1e-9 / start.elapsed().as_secs_f64());
        }
        result::free_sync(from)?;
        result::free_sync(to)?;
    }
    Ok(best)
}

impl Machine for Gpu {
    type Ops = CudaBackend;
    const ROTATED: usize = 0;
    const ELEMENT: usize = 2;

    fn ops(&self) -> &CudaBackend {
        &self.ops
    }

    fn seconds(&self, f: &mut dyn FnMut(usize) -> kernels::Result<()>) -> kernels::Result<f64> {
        let mut marks = Vec::new();
        for call in 0..UNTIMED + TIMED {
            let mut sink = self.sink.borrow_mut();
            let by = Projection::new(&self.flush, None);
            self.ops.linear(&self.row, by, Output::Store(&mut *sink))?;
            let start = self.ops.mark()?;
            f(call)?;
            marks.push((start, self.ops.mark()?));
        }
        let seconds = marks[UNTIMED..].iter().map(|(start, end)| self.ops.seconds_between(start, end));
        let mut seconds = seconds.collect::<kernels::Result<Vec<_>>>()?;
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[TIMED / 2])
    }
}

fn shapes() -> Shapes {
    let mut sites = layer_sites(HIDDEN, INNER, HEADS).to_vec();
    sites.push(("lm_head", LoraSite::head(HIDDEN, VOCAB)));
    let mixes = |rows: usize| {
        let mut adapters = vec![0, 1, rows.min(ADAPTERS)];
        adapters.dedup();
        adapters.into_iter().map(move |adapters| (rows, adapters))
    };
    Shapes {
        hidden: HIDDEN,
        inner: INNER,
        heads: HEADS,
        vocab: VOCAB,
        sites,
        ranks: vec![RANK; ADAPTERS],
        mixes: ROWS.into_iter().flat_map(mixes).collect(),
        rows: ROWS.to_vec(),
        attention: vec![(1, 1, 575), (8, 1, 575), (32, 1, 575), (128, 1, 575), (1, 512, 0), (1, 2048, 0)],
        sampled: vec![1, 8, 32, 128],
    }
}

pub(crate) fn run(filter: Option<String>) -> Outcome<()> {
    let machine = Gpu::new()?;
    let peak = machine.peak()?;
    let nothing = machine.seconds(&mut |_| Ok(()))? * 1e6;
    println!(
        "{}: copies {:.0} GB/s, products {:.0} TFLOP/s",
        machine.ops.name()?,
        peak.gb_s,
        peak.gflops * 1e-3
    );
    println!("a call of nothing takes {nothing:.1} µs, which is in all times");
    Bench { machine, shapes: shapes(), peak, filter }.operations()
}
