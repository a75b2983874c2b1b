//! Adapters of the shape of Llama-3.1-8B, of rank 16 on all projections, on their way to the GPU: staging, one and several
//! at once; loading; locking host memory in several ways; and how long launches take while memory is locked. One JSON line
//! for each figure. `cargo bench -p kernels --features cuda --bench adapters`
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints and fails by panicking")]

use std::{
    ffi::c_void,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cudarc::driver::{result, sys};
use kernels::{
    DType, HostTensor, LoraPart, LoraSite, LowRank, Output, Projection, Span,
    cuda::{CudaAdapter, CudaBackend},
    prelude::*,
    testing::batch,
};

const LAYERS: usize = 32;
const RANK: usize = 16;
/// Inputs and outputs of the sites of a layer.
const SITES: [(usize, &[usize]); 4] =
    [(4096, &[4096, 1024, 1024]), (4096, &[4096]), (4096, &[14336, 14336]), (14336, &[4096])];
const GIB: usize = 1 << 30;
/// Bytes that are locked for a figure.
const LOCKED: usize = 4 * GIB;
/// Launches between two marks.
const LAUNCHES: usize = 200;

fn sites() -> Vec<LoraSite> {
    let layer = || SITES.iter().map(|(inputs, outputs)| LoraSite::linear(*inputs, outputs));
    (0..LAYERS).flat_map(|_| layer()).collect()
}

fn adapter(sites: &[LoraSite]) -> Vec<LoraPart> {
    let matrix = |rows: usize, cols: usize| {
        let data: Vec<u8> = (0..rows * cols).flat_map(|i| (0x3c00 + i as u16 % 64).to_le_bytes()).collect();
        HostTensor { dtype: DType::Bf16, rows, cols, data: data.into() }
    };
    let mut parts = Vec::new();
    for (index, site) in sites.iter().enumerate() {
        for (slice, &outputs) in site.outputs.iter().enumerate() {
            let (a, b) = (matrix(RANK, site.inputs), matrix(outputs, RANK));
            let low_rank = Some(LowRank { rank: RANK, scale: 2.0, a, b });
            let (magnitude, bias, rows) = (None, None, None);
            parts.push(LoraPart { site: index, slice, low_rank, magnitude, bias, rows, content: 1 });
        }
    }
    parts
}

fn report(what: &str, bytes: usize, took: Duration) {
    let (ms, rate) = (took.as_secs_f64() * 1e3, bytes as f64 / took.as_secs_f64() / 1e9);
    println!("{{\"what\":\"{what}\",\"ms\":{ms:.3},\"gb_per_s\":{rate:.2}}}");
}

fn main() {
    let sites = sites();
    let parts = adapter(&sites);
    let shapes: Vec<_> = parts.iter().map(LoraPart::shape).collect();
    locking();
    let ops = CudaBackend::new(DType::Bf16, 0).unwrap();
    let bytes = ops.host_bytes(&sites, &shapes).unwrap();
    let stage = || ops.stage(&sites, &parts).unwrap();
    let start = Instant::now();
    drop(stage());
    report("stage, memory locked on the way", bytes, start.elapsed());
    launches(&ops, "quiet", false);
    // The pool grows beside launches: without and with steps that it gives way to.
    for (what, is_step) in [("memory is locked", false), ("memory is locked beside steps", true)] {
        let more = if is_step { 2 * LOCKED } else { LOCKED };
        ops.expect_adapters(more, more);
        launches(&ops, what, is_step);
    }
    ops.expect_adapters(6 * LOCKED, 6 * LOCKED);
    // The pool is full, or steps hold it up.
    launches(&ops, "memory is locked", false);
    launches(&ops, "memory is locked", false);
    launches(&ops, "memory is locked", false);
    for count in [1, 1, 4, 16] {
        let start = Instant::now();
        let staged: Vec<CudaAdapter> = thread::scope(|scope| {
            let threads: Vec<_> = (0..count).map(|_| scope.spawn(stage)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        report(&format!("stage of {count} at once"), count * bytes, start.elapsed());
        drop(staged);
    }
    launches_beside(&ops, "adapters are staged", &|| drop(stage()));
    let adapter = Arc::new(stage());
    let mut slots = ops.lora_slots(&sites, 1).unwrap();
    for _ in 0..3 {
        let start = Instant::now();
        ops.load(&mut slots, 0, &adapter, &[]).unwrap();
        let begun = start.elapsed();
        while ops.loaded(&mut slots).unwrap().is_empty() {}
        report("load", bytes, start.elapsed());
        println!("{{\"what\":\"load, until it returns\",\"us\":{:.1}}}", begun.as_secs_f64() * 1e6);
    }
}

/// Launches while something is done again and again on another thread.
fn launches_beside(ops: &CudaBackend, what: &str, work: &(dyn Fn() + Sync)) {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                work();
            }
        });
        launches(ops, what, false);
        ended.store(true, Ordering::Relaxed);
    });
}

/// How long launches take on the host, for two seconds.
fn launches(ops: &CudaBackend, what: &str, is_step: bool) {
    let data = vec![0_u8; 2 * 4096 * 4096];
    let weight = HostTensor { dtype: DType::Bf16, rows: 4096, cols: 4096, data: data.into() };
    let weight = ops.weight(&[weight]).unwrap();
    let (x, mut y) = (ops.mat(32, 4096).unwrap(), ops.mat(32, 4096).unwrap());
    let host = batch(&[(1, 0)], &[None]);
    let mut device = ops.batch(1, host.blocks.len(), &[Span::Causal]).unwrap();
    let (mut taken, start) = (Vec::new(), Instant::now());
    while start.elapsed() < Duration::from_secs(2) {
        if is_step {
            ops.upload(&host, &mut device).unwrap();
        }
        for _ in 0..LAUNCHES {
            let before = Instant::now();
            ops.linear(&x, Projection::new(&weight, None), Output::Store(&mut y)).unwrap();
            taken.push(before.elapsed());
        }
        let mark = ops.mark().unwrap();
        while !ops.reached(&mark) {
            std::hint::spin_loop();
        }
    }
    taken.sort_unstable();
    let at = |share: f64| taken[((taken.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    let [median, p99, p999, most] = [0.5, 0.99, 0.999, 1.0].map(at);
    let count = taken.len();
    println!(
        "{{\"what\":\"launches, {what}\",\"count\":{count},\"us\":{median:.1},\"p99\":{p99:.1},\"p999\":{p999:.1},\"most\":{most:.1}}}"
    );
}

/// Locks host memory, allocated by the driver or by the process, in parts of several sizes.
fn locking() {
    result::init().unwrap();
    let device = result::device::get(0).unwrap();
    // SAFETY: the device is there, and the context lives until the process ends.
    let context = unsafe { result::primary_ctx::retain(device) }.unwrap();
    // SAFETY: just retained.
    unsafe { result::ctx::set_current(context) }.unwrap();
    for size in [2 << 20, 8 << 20, 32 << 20, 128 << 20] {
        time_locking("allocate", size, &|| {
            // SAFETY: the context is current.
            let at = unsafe { result::malloc_host(size, sys::CU_MEMHOSTALLOC_PORTABLE) }.unwrap();
            (at, Instant::now())
        });
        time_locking("register", size, &|| {
            let at = populated(size);
            let start = Instant::now();
            // SAFETY: the memory was just mapped with this size.
            let code = unsafe { sys::cuMemHostRegister_v2(at, size, sys::CU_MEMHOSTREGISTER_PORTABLE) };
            assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
            (at, start)
        });
    }
}

/// Memory of the process, on huge pages where there are any, all of it there.
fn populated(size: usize) -> *mut c_void {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, aligned within a larger one; advice that is refused does no harm.
    unsafe {
        let at = libc::mmap(ptr::null_mut(), size + (2 << 20), access, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let at = at.wrapping_byte_add(at.align_offset(2 << 20));
        libc::madvise(at, size, libc::MADV_HUGEPAGE);
        at.cast::<u8>().write_bytes(0, size);
        at
    }
}

/// `lock` returns its memory, and when the driver's part began if that is not all of it.
fn time_locking(what: &str, size: usize, lock: &dyn Fn() -> (*mut c_void, Instant)) {
    let (start, mut slowest, mut taken) = (Instant::now(), Duration::ZERO, Vec::new());
    let mut in_driver = Duration::ZERO;
    for _ in 0..LOCKED / size {
        let before = Instant::now();
        let (at, began) = lock();
        let took = if what == "register" { began.elapsed() } else { before.elapsed() };
        (slowest, in_driver) = (slowest.max(took), in_driver + took);
        taken.push(at);
    }
    let all = start.elapsed();
    let (mib, most) = (size >> 20, slowest.as_secs_f64() * 1e3);
    let each = in_driver.as_secs_f64() * 1e3 / taken.len() as f64;
    println!(
        "{{\"what\":\"{what} {mib} MiB\",\"gb_per_s\":{:.2},\"ms_in_driver\":{each:.3},\"most_ms\":{most:.3}}}",
        LOCKED as f64 / all.as_secs_f64() / 1e9
    );
    for at in taken {
        // SAFETY: locked above, and unlocked once; of a mapping, what is beside the locked part stays.
        unsafe {
            if what == "register" {
                assert_eq!(sys::cuMemHostUnregister(at), sys::CUresult::CUDA_SUCCESS);
                libc::munmap(at, size);
            } else {
                result::free_host(at).unwrap();
            }
        }
    }
}
