//! Sums over ranks, and columns of all ranks, in captured steps: microseconds of each by size. One JSON line for each
//! figure. `cargo bench -p kernels --features cuda --bench ranks -- 2` times two ranks, in processes of their own.
//!
//! The end of a branch is timed twice: with one kernel for deltas, sum, stream and norm, and with one for the deltas and
//! another one for the rest. With fewer GPUs than ranks, the processes take turns on one, and the figures say nothing of
//! several. Of one rank there are no sums.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints and fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use kernels::{
    Branch, DType, Group, LinearLora, LoraSite, Norm, NormKind, Output, Projection, Residual, RowSet, Span,
    cuda::{CudaBackend, Transport, gpus},
    prelude::*,
    testing::{Numbers, batch},
};

/// How a process is told which rank it is, of how many, by which transport, and where they meet.
const RANK: &str = "LORAX_BENCH_RANK";
const PATIENCE: Duration = Duration::from_secs(60);
const HIDDEN: usize = 4096;
/// Rows of sums: 8 KiB to 16 MiB on their way.
const ROWS: [usize; 12] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048];
/// Operations of a captured step, and steps of a figure.
const OPS: usize = 16;
const STEPS: usize = 10;
const VOCAB: usize = 128_256;

fn main() {
    if let Ok(told) = std::env::var(RANK) {
        let words: Vec<&str> = told.splitn(4, ' ').collect();
        let transport = if words[2] == "nccl" { Transport::Nccl } else { Transport::Fastest };
        rank(words[0].parse().unwrap(), words[1].parse().unwrap(), transport, Path::new(words[3]));
        return;
    }
    let ranks = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(2_usize);
    let gpus = gpus(DType::Bf16).0.len();
    if gpus < ranks {
        println!("{{\"what\":\"{ranks} ranks take turns on {gpus} GPU: no figures of several\"}}");
    }
    for transport in ["fastest", "nccl"] {
        // NCCL refuses two ranks on one GPU.
        if transport == "fastest" || gpus >= ranks && ranks > 1 {
            start(ranks, transport);
        }
    }
}

fn start(ranks: usize, transport: &str) {
    let folder: PathBuf = std::env::temp_dir().join(format!("lorax-ranks-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let process = |rank| {
        let told = format!("{rank} {ranks} {transport} {}", folder.display());
        Command::new(std::env::current_exe().unwrap()).env(RANK, told).spawn().unwrap()
    };
    let started: Vec<_> = (0..ranks).map(process).collect();
    for mut process in started {
        assert!(process.wait().unwrap().success());
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

fn rank(rank: usize, ranks: usize, transport: Transport, folder: &Path) {
    let group = Group::join(folder, rank, ranks, PATIENCE).unwrap().with_patience(PATIENCE);
    let ordinal = if gpus(DType::Bf16).0.len() >= ranks { rank } else { 0 };
    let be = CudaBackend::new(DType::Bf16, ordinal).unwrap();
    let be = be.with_transport(Arc::new(group), transport).unwrap();
    let report = |what: &str, bytes: usize, micros: f64| {
        if rank == 0 {
            let by = if transport == Transport::Nccl { "NCCL" } else { "fastest" };
            println!(
                "{{\"what\":\"{what}\",\"ranks\":{ranks},\"by\":\"{by}\",\"bytes\":{bytes},\"us\":{micros:.2}}}"
            );
        }
    };
    if rank == 0 {
        println!("{{\"what\":\"{}\",\"ranks\":{ranks}}}", be.describe_transport());
    }
    for rows in ROWS {
        let mut x = be.wide_mat(rows, HIDDEN).unwrap();
        report("sum", rows * HIDDEN * 2, time(&be, |_| be.all_reduce(&mut x)));
    }
    for rows in [1, 32, 128] {
        let x = be.wide_mat(rows, VOCAB / ranks).unwrap();
        let mut y = be.wide_mat(rows, VOCAB / ranks * ranks).unwrap();
        report("columns", rows * VOCAB / ranks * 4, time(&be, |_| be.gather_columns(&x, &mut y)));
    }
    for rows in [1, 32, 64, 128, 256] {
        for adapters in [0, rows.min(32)] {
            // Only what is not scaled has a kernel that does all.
            for (kernels, scale) in [("one kernel", 1.0), ("two kernels", 1.0 + f32::EPSILON)] {
                let micros = branch(&be, rows, adapters, scale);
                report(&format!("branch, {adapters} adapters, {kernels}"), rows * HIDDEN * 2, micros);
            }
        }
    }
    be.group().barrier(PATIENCE).unwrap();
}

/// The end of a branch: a product of few inputs with its deltas, the sum, the stream, the norm.
fn branch(be: &CudaBackend, rows: usize, adapters: usize, scale: f32) -> f64 {
    let (inputs, mut numbers) = (256, Numbers(3));
    let sites = [LoraSite::linear(inputs, &[HIDDEN])];
    let mut slots = be.lora_slots(&sites, adapters.max(1)).unwrap();
    for slot in 0..adapters {
        let adapter = be.stage(&sites, &[numbers.part((0, 0), &sites[0], 16)]).unwrap();
        be.load(&mut slots, slot as u32, &Arc::new(adapter), &[]).unwrap();
    }
    let mut loaded = 0;
    while loaded < adapters {
        loaded += be.loaded(&mut slots).unwrap().len();
    }
    let of: Vec<_> = (0..rows).map(|row| Some(row as u32).filter(|_| adapters > 0)).collect();
    let of: Vec<_> = of.into_iter().map(|slot| slot.map(|slot| slot % adapters.max(1) as u32)).collect();
    let table = numbers.table(HIDDEN, inputs);
    let data: Vec<u8> = table.data.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensor = kernels::HostTensor { dtype: DType::F32, rows: HIDDEN, cols: inputs, data: data.into() };
    let weight = be.weight(&[tensor]).unwrap();
    let norm = be.vector(&[1.0; HIDDEN]).unwrap();
    let mut x = be.mat(rows, inputs).unwrap();
    be.fill(&mut x, &numbers.table(rows, inputs).data).unwrap();
    let mut stream = be.wide_mat(rows, HIDDEN).unwrap();
    let mut products = be.wide_mat(rows, HIDDEN).unwrap();
    let mut y = be.mat(rows, HIDDEN).unwrap();
    let host = batch(&vec![(1, 3); rows], &of);
    time_step(be, &host, Some(&slots), |device| {
        let lora = LinearLora { slots: &slots, site: 0, batch: device, rows: RowSet::All };
        let norm = Norm { kind: NormKind::Rms, weight: &norm, bias: None, eps: 1e-5 };
        let next = Some((norm, &mut y));
        let to = Residual {
            stream: &mut stream,
            products: &mut products,
            post: None,
            scale,
            branch: Branch::Only,
            next,
        };
        be.linear(&x, Projection::new(&weight, Some(lora)), Output::Residual(to))
    })
}

/// Microseconds of one operation of a captured step.
fn time(be: &CudaBackend, op: impl FnMut(&kernels::cuda::CudaBatch) -> kernels::Result<()>) -> f64 {
    time_step(be, &batch(&[(1, 3)], &[]), None, op)
}

fn time_step(
    be: &CudaBackend,
    host: &kernels::Batch,
    slots: Option<&kernels::cuda::CudaSlots>,
    mut op: impl FnMut(&kernels::cuda::CudaBatch) -> kernels::Result<()>,
) -> f64 {
    let mut device = be.batch(host.rows(), host.blocks.len(), &[Span::Causal]).unwrap();
    be.upload(host, &mut device).unwrap();
    let mut step = || be.step(&device, slots, || (0..OPS).try_for_each(|_| op(&device))).unwrap();
    (0..3).for_each(|_| step());
    be.synchronize().unwrap();
    let from = be.mark().unwrap();
    (0..STEPS).for_each(|_| step());
    let to = be.mark().unwrap();
    be.seconds_between(&from, &to).unwrap() * 1e6 / (OPS * STEPS) as f64
}
