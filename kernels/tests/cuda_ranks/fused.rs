//! Products and deltas of every rank, summed over the ranks, added to the residual stream and normed: in one launch where
//! the GPU has a kernel for that, and by one operation after the other.

use std::sync::Arc;

use kernels::{
    Batch, Branch, DType, HostTensor, LinearLora, LoraPart, LoraSite, LowRank, Output, Projection, Residual,
    RowSet, Span,
    cuda::{CudaBackend, CudaBatch, CudaMat, CudaSlots, CudaVector, CudaWeight},
    prelude::*,
    reference::{self, Base, Table},
    testing::{Numbers, assert_close, batch},
};

use super::support::{PATIENCE, all_succeed, all_succeed_in, expect_same_bits, filled, rms, tensor, threads};

const INPUTS: usize = 256;
/// Ranks of the adapters, of which the second one and the last one also have a magnitude, and the last one a bias.
const LORA_RANKS: [usize; 5] = [1, 8, 16, 40, 17];

/// A projection of the whole model, and what its outputs should be.
struct Case {
    host: Batch,
    x: Table,
    w: Table,
    bias: Vec<f32>,
    adapters: Vec<Vec<LoraPart>>,
    stream: Table,
    norm: Vec<f32>,
    /// The stream with the products.
    sums: Table,
    normed: Table,
}

impl Case {
    /// `sequences`: rows and tokens before them. `slots`: their adapters.
    fn new(outputs: usize, sequences: &[(usize, usize)], slots: &[Option<u32>]) -> Case {
        let mut numbers = Numbers(41);
        let host = batch(sequences, slots);
        let site = site(INPUTS, outputs);
        let adapter = |(i, &rank): (usize, &usize)| {
            let mut part = numbers.part((0, 0), &site, rank);
            part.bias = (i == 4).then(|| numbers.table(1, outputs).data);
            let magnitude = || numbers.table(1, outputs).data.iter().map(|x| 3.0 + x).collect();
            part.magnitude = matches!(i, 1 | 4).then(magnitude);
            // Squares are told by content, and those of two cases differ.
            part.content = ((outputs << 16 | host.rows()) << 8 | i) as u64;
            vec![part]
        };
        let adapters: Vec<_> = LORA_RANKS.iter().enumerate().map(adapter).collect();
        let (x, w) = (numbers.table(host.rows(), INPUTS), numbers.table(outputs, INPUTS));
        let (bias, norm) = (numbers.table(1, outputs).data, numbers.table(1, outputs).data);
        let stream = numbers.table(host.rows(), outputs);
        let base = Base { weight: &w, bias: Some(&bias), site: (0, &site) };
        let mut sums = reference::adapted_linear(&x, base, (&host.segments, &adapters), outputs);
        reference::add(&stream, &mut sums);
        let normed = reference::rms_norm(&sums, &norm, 1e-5);
        Case { host, x, w, bias, adapters, stream, norm, sums, normed }
    }
}

fn site(inputs: usize, outputs: usize) -> LoraSite {
    LoraSite::linear(inputs, &[outputs])
}

/// The columns of a matrix that a rank has.
fn columns(table: &Table, rank: usize, ranks: usize) -> Table {
    let own = table.cols / ranks;
    let data = (0..table.rows()).flat_map(|i| table.row(i)[rank * own..][..own].iter().copied());
    Table { cols: own, data: data.collect() }
}

/// A rank's part of an adapter: its columns of A, all of B, and the bias on rank 0 alone.
fn part_of(part: &LoraPart, rank: usize, ranks: usize) -> LoraPart {
    let mut part = part.clone();
    let LowRank { a, .. } = part.low_rank.as_mut().unwrap();
    let own = columns(&Table { cols: a.cols, data: a.to_f32() }, rank, ranks);
    *a = HostTensor::from_f32(own.rows(), own.cols, &own.data);
    part.bias = part.bias.filter(|_| rank == 0);
    part
}

/// What a rank has of a case, on the device.
struct Share {
    x: CudaMat,
    w: CudaWeight,
    bias: Option<CudaVector>,
    norm: CudaVector,
    slots: CudaSlots,
    device: CudaBatch,
    stream: CudaMat,
    products: CudaMat,
    y: CudaMat,
    /// For the composed way.
    sums: CudaMat,
}

impl Share {
    fn new(be: &CudaBackend, case: &Case) -> Share {
        let (rank, ranks, rows, outputs) = (be.rank(), be.ranks(), case.host.rows(), case.w.rows());
        let (x, w) = (columns(&case.x, rank, ranks), columns(&case.w, rank, ranks));
        let sites = [LoraSite { is_partial: true, ..site(INPUTS / ranks, outputs) }];
        let w = be.weight(&[tensor(&w)]).unwrap();
        let mut slots = be.lora_slots(&sites, case.adapters.len()).unwrap();
        for (slot, parts) in case.adapters.iter().enumerate() {
            let parts: Vec<_> = parts.iter().map(|part| part_of(part, rank, ranks)).collect();
            let adapter = Arc::new(be.stage(&sites, &parts).unwrap());
            be.load(&mut slots, slot as u32, &adapter, &[&w]).unwrap();
        }
        let mut loaded = 0;
        while loaded < case.adapters.len() {
            loaded += be.loaded(&mut slots).unwrap().len();
        }
        let mut device = be.batch(256, case.host.blocks.len(), &[Span::Causal]).unwrap();
        be.upload(&case.host, &mut device).unwrap();
        Share {
            x: filled(be, be.mat(rows, INPUTS / ranks).unwrap(), &x),
            w,
            bias: (rank == 0).then(|| be.vector(&case.bias).unwrap()),
            norm: be.vector(&case.norm).unwrap(),
            slots,
            device,
            stream: filled(be, be.wide_mat(rows, outputs).unwrap(), &case.stream),
            products: be.wide_mat(rows, outputs).unwrap(),
            y: be.mat(rows, outputs).unwrap(),
            sums: be.wide_mat(rows, outputs).unwrap(),
        }
    }

    /// One operation; returns the launches.
    fn fused(&mut self, be: &CudaBackend) -> u64 {
        let before = be.launches();
        let Share { x, w, bias, slots, device, stream, products, norm, y, .. } = self;
        let next = Some((rms(norm), y));
        let to = Residual { stream, products, post: None, scale: 1.0, branch: Branch::Only, next };
        let by = projection(w, bias.as_ref(), (slots, device));
        be.linear(x, by, Output::Residual(to)).unwrap();
        be.launches() - before
    }

    /// One operation after the other; returns the launches.
    fn composed(&mut self, be: &CudaBackend) -> u64 {
        let before = be.launches();
        let Share { x, w, bias, slots, device, sums, stream, norm, y, .. } = self;
        be.matmul(x, projection(w, bias.as_ref(), (slots, device)), sums).unwrap();
        be.all_reduce(sums).unwrap();
        be.add(sums, None, 1.0, stream).unwrap();
        be.normalize(stream, rms(norm), y).unwrap();
        be.launches() - before
    }
}

fn projection<'a>(
    weight: &'a CudaWeight,
    bias: Option<&'a CudaVector>,
    (slots, batch): (&'a CudaSlots, &'a CudaBatch),
) -> Projection<'a, CudaBackend> {
    Projection { weight, bias, lora: Some(LinearLora { slots, site: 0, batch, rows: RowSet::All }) }
}

/// Both ways give what the whole model gives, and the same bits on every rank.
fn check(be: &CudaBackend, case: &Case, what: &str) {
    let mut share = Share::new(be, case);
    let mut launches = [0; 2];
    for (way, launches) in ["fused", "composed"].into_iter().zip(&mut launches) {
        be.fill(&mut share.stream, &case.stream.data).unwrap();
        be.fill(&mut share.y, &vec![f32::NAN; case.stream.data.len()]).unwrap();
        be.download(&share.y).unwrap();
        be.group().barrier(PATIENCE).unwrap();
        *launches = if way == "fused" { share.fused(be) } else { share.composed(be) };
        let (sums, normed) = (be.download(&share.stream).unwrap(), be.download(&share.y).unwrap());
        let what = format!("{way}: {what}");
        assert_close(&format!("{what}: stream"), &sums, &case.sums.data, be.dtype());
        assert_close(&format!("{what}: norm"), &normed, &case.normed.data, be.dtype());
        expect_same_bits(be, &what, &sums);
        expect_same_bits(be, &what, &normed);
    }
    assert!(launches[0] < launches[1], "{what}: {launches:?} launches");
    be.group().barrier(PATIENCE).unwrap();
}

/// Adapters of all kinds, and rows without one.
fn mixed(rows: usize) -> Vec<Option<u32>> {
    (0..rows).map(|i| Some(i as u32 % 6).filter(|&slot| slot < 5)).collect()
}

/// Adapters with nothing but a delta.
fn plain(rows: usize) -> Vec<Option<u32>> {
    (0..rows).map(|i| [Some(0), Some(2), None, Some(3)][i % 4]).collect()
}

/// Widths that no kernel takes as a whole.
#[test]
fn odd_widths_of_two_threads() {
    let cases = [72, 100, 33, 8320].map(|outputs| Case::new(outputs, &[(1, 3); 7], &mixed(7)));
    threads(|be| {
        for case in &cases {
            let mut share = Share::new(be, case);
            be.download(&share.y).unwrap();
            be.group().barrier(PATIENCE).unwrap();
            share.fused(be);
            let (sums, normed) = (be.download(&share.stream).unwrap(), be.download(&share.y).unwrap());
            assert_close("stream", &sums, &case.sums.data, DType::Bf16);
            assert_close("norm", &normed, &case.normed.data, DType::Bf16);
            expect_same_bits(be, "stream", &sums);
            be.group().barrier(PATIENCE).unwrap();
        }
    });
}

/// The products of both branches are summed together where no row has an adapter.
#[test]
fn parallel_branches_of_two_threads() {
    let cases = [vec![], mixed(6)].map(|slots| Case::new(512, &[(1, 3); 6], &slots));
    threads(|be| {
        for case in &cases {
            let mut share = Share::new(be, case);
            let mut expected = case.sums.clone();
            for (sum, before) in expected.data.iter_mut().zip(&case.stream.data) {
                *sum += *sum - before;
            }
            let normed = reference::rms_norm(&expected, &case.norm, 1e-5);
            be.download(&share.y).unwrap();
            be.group().barrier(PATIENCE).unwrap();
            let Share { x, w, bias, slots, device, stream, products, norm, y, .. } = &mut share;
            for branch in [Branch::First, Branch::Second] {
                let next = (branch == Branch::Second).then(|| (rms(norm), &mut *y));
                let (stream, products) = (&mut *stream, &mut *products);
                let to = Residual { stream, products, post: None, scale: 1.0, branch, next };
                let by = projection(w, bias.as_ref(), (slots, device));
                be.linear(x, by, Output::Residual(to)).unwrap();
            }
            let (sums, got) = (be.download(stream).unwrap(), be.download(y).unwrap());
            assert_close("stream", &sums, &expected.data, DType::Bf16);
            assert_close("norm", &got, &normed.data, DType::Bf16);
            expect_same_bits(be, "stream", &sums);
            be.group().barrier(PATIENCE).unwrap();
        }
    });
}

/// A rank that cannot load an adapter tells the others, whose loads end. The next adapter of the slot is loaded by all.
#[test]
fn norms_of_a_rank_that_fails() {
    let case = Case::new(512, &[(1, 3); 4], &[Some(1); 4]);
    all_succeed("fused::norms_of_a_rank_that_fails", 2, |be| {
        let (rank, ranks) = (be.rank(), be.ranks());
        let sites = [LoraSite { is_partial: true, ..site(INPUTS / ranks, 512) }];
        let weight = be.weight(&[tensor(&columns(&case.w, rank, ranks))]).unwrap();
        let mut slots = be.lora_slots(&sites, 1).unwrap();
        for content in [7, 8, 9] {
            let mut part = part_of(&case.adapters[1][0], rank, ranks);
            part.content = content;
            if content == 8 && rank == 1 {
                be.group().post(0, content, &[]).unwrap();
            } else {
                let adapter = Arc::new(be.stage(&sites, &[part]).unwrap());
                be.load(&mut slots, 0, &adapter, &[&weight]).unwrap();
                while be.loaded(&mut slots).unwrap() != [0] {}
            }
            be.group().barrier(PATIENCE).unwrap();
        }
    });
}

#[test]
fn rows_of_processes() {
    for_processes(DType::Bf16, "fused::rows_of_processes", 2);
}

/// Deltas and sums are two launches then.
#[test]
fn rows_of_processes_in_f16() {
    for_processes(DType::F16, "fused::rows_of_processes_in_f16", 2);
}

#[test]
fn rows_of_four_processes() {
    for_processes(DType::Bf16, "fused::rows_of_four_processes", 4);
}

fn for_processes(dtype: DType, test: &str, ranks: usize) {
    all_succeed_in(dtype, test, ranks, |be| {
        for (outputs, rows) in [(512, 1), (512, 33), (512, 100), (4096, 8), (4096, 32), (8192, 4), (8192, 20)]
        {
            for (which, slots) in [("mixed", mixed(rows)), ("plain", plain(rows)), ("no", vec![])] {
                let case = Case::new(outputs, &vec![(1, 3); rows], &slots);
                check(be, &case, &format!("{rows} rows of {outputs} with {which} adapters"));
            }
        }
        let case = Case::new(512, &[(90, 0), (1, 7), (40, 3)], &[Some(3), Some(4), None]);
        check(be, &case, "prompts");
    });
}
