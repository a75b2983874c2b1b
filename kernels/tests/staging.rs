//! Reading matrices into the memory of adapters: in chunks, on several threads, into pieces that end anywhere.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use kernels::{
    DType, Error, HostTensor, LoraPart, LoraSite, LowRank, MatrixSource, Result,
    cpu::CpuBackend,
    prelude::*,
    testing::{Numbers, Stage},
};

/// Outputs of a block of B.
const BLOCK: usize = 64;

fn part<M>(rank: usize, [a, b]: [M; 2]) -> LoraPart<M> {
    let low_rank = Some(LowRank { rank, scale: 1.0, a, b });
    LoraPart { site: 0, slice: 0, low_rank, magnitude: None, bias: None, rows: None, content: 0 }
}

fn tensor(numbers: &mut Numbers, rows: usize, cols: usize) -> HostTensor<'static> {
    HostTensor::from_f32(rows, cols, &numbers.table(rows, cols).data)
}

fn bytes_of(dtype: DType, x: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => x.to_le_bytes().into(),
        DType::Bf16 => half::bf16::from_f32(x).to_le_bytes().into(),
        DType::F16 => half::f16::from_f32(x).to_le_bytes().into(),
    }
}

/// What the memory must hold, element by element; `None` where nothing is written.
fn expected(dtype: DType, parts: &[LoraPart]) -> Vec<Option<u8>> {
    let mut memory: Vec<Option<u8>> = Vec::new();
    let mut put = |values: &mut dyn Iterator<Item = f32>| {
        values.for_each(|x| memory.extend(bytes_of(dtype, x).into_iter().map(Some)));
        memory.resize(memory.len().next_multiple_of(256), None);
    };
    for LowRank { rank, a, b, .. } in parts.iter().filter_map(|part| part.low_rank.as_ref()) {
        put(&mut a.to_f32().into_iter());
        let values = b.to_f32();
        let element = |output: usize, r: usize| values.get(output * rank + r).copied().unwrap_or(0.0);
        let blocks = (0..b.rows).step_by(BLOCK);
        put(&mut blocks.flat_map(|first| {
            (0..*rank).flat_map(move |r| (first..first + BLOCK).map(move |output| element(output, r)))
        }));
    }
    memory
}

#[test]
fn matrices_are_laid_out_wherever_pieces_end() {
    let mut numbers = Numbers(5);
    // The sizes of parts (rank, inputs, outputs), each smaller and larger than a chunk of 64 KiB.
    let adapters: [&[(usize, usize, usize)]; 6] = [
        &[(1, 1, 1)],
        &[(3, 5, 63), (16, 33, 64), (8, 2, 65)],
        &[(16, 4096, 4096), (16, 4096, 1024)],
        &[(64, 1000, 130), (1, 70_000, 9), (2, 9, 70_000)],
        &[(130, 700, 300), (129, 31, 1)],
        &[(512, 200, 200)],
    ];
    for sizes in adapters {
        let parts: Vec<_> = sizes
            .iter()
            .map(|&(rank, inputs, outputs)| {
                part(rank, [tensor(&mut numbers, rank, inputs), tensor(&mut numbers, outputs, rank)])
            })
            .collect();
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let (expected, bytes) = (expected(dtype, &parts), Stage::bytes_of(dtype, &parts));
            assert_eq!(expected.len(), bytes, "{sizes:?}");
            for piece in [1 << 21, 1 << 16, 100_003, 4098] {
                // Over what was there before.
                let mut stage = Stage::new(bytes, piece);
                for threads in [1, 4] {
                    stage.allow(threads);
                    stage.fill(dtype, &parts).unwrap();
                    let got = stage.bytes();
                    let is_as_expected = |(at, x): (usize, &Option<u8>)| x.is_none_or(|x| got[at] == x);
                    let wrong = expected.iter().enumerate().position(|pair| !is_as_expected(pair));
                    assert_eq!(wrong, None, "{sizes:?}, {dtype:?}, pieces of {piece}");
                }
            }
        }
    }
}

/// A matrix of which some rows cannot be read, and that counts how often each row has been read.
struct Faulty {
    shape: [usize; 2],
    /// The first row that cannot be read, and the number that its error has.
    fault: Option<(usize, usize)>,
    reads: Vec<AtomicUsize>,
}

impl Faulty {
    fn new(shape: [usize; 2], fault: Option<(usize, usize)>) -> Faulty {
        Faulty { shape, fault, reads: (0..shape[0]).map(|_| AtomicUsize::new(0)).collect() }
    }
}

impl MatrixSource for Faulty {
    type Error = Error;

    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn read(&self, rows: Range<usize>, dtype: DType, to: &mut [u8]) -> Result<()> {
        assert_eq!(to.len(), rows.len() * self.shape[1] * dtype.size());
        for row in rows.clone() {
            self.reads[row].fetch_add(1, Ordering::Relaxed);
        }
        match self.fault.filter(|(row, _)| rows.contains(row)) {
            Some((row, number)) => Err(Error::Index { op: "read", what: "row", index: row, limit: number }),
            None => {
                to.fill(0);
                Ok(())
            }
        }
    }
}

#[test]
fn of_several_faults_the_first_is_told_and_every_row_is_read_once() {
    let rank = 16;
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let sites = [LoraSite::linear(5000, &[3000])];
    let parts = |faults: [Option<(usize, usize)>; 6]| -> Vec<LoraPart<Faulty>> {
        let of_part = |at: usize| {
            part(
                rank,
                [Faulty::new([rank, 5000], faults[2 * at]), Faulty::new([3000, rank], faults[2 * at + 1])],
            )
        };
        (0..3).map(of_part).collect()
    };
    let none = None;
    // The faults of A and B of three parts, and the number of the first.
    let cases = [
        ([Some((0, 1)), none, none, none, none, none], 1),
        ([Some((15, 1)), Some((0, 2)), none, none, none, none], 1),
        ([none, Some((2999, 2)), Some((0, 3)), none, none, none], 2),
        ([none, Some((0, 2)), Some((0, 3)), Some((0, 4)), none, none], 2),
        ([none, none, Some((7, 3)), none, Some((0, 5)), none], 3),
        ([none, none, none, Some((1500, 4)), Some((0, 5)), Some((1, 6))], 4),
        ([none, none, none, none, Some((9, 5)), Some((0, 6))], 5),
        ([none, none, none, none, none, Some((2999, 6))], 6),
        ([none, none, none, none, none, Some((0, 6))], 6),
        ([Some((9, 1)), Some((9, 2)), Some((9, 3)), Some((9, 4)), Some((9, 5)), Some((9, 6))], 1),
    ];
    for (faults, first) in cases {
        for run in 0..40 {
            let parts = parts(faults);
            let mut stage = Stage::new(Stage::bytes_of(DType::F32, &parts), 1 << 16);
            stage.allow(1 + run % 8);
            let Error::Index { limit, .. } = stage.fill(DType::F32, &parts).unwrap_err() else { panic!() };
            assert_eq!(limit, first, "{faults:?}");
        }
    }
    let is_read_once = |parts: &[LoraPart<Faulty>]| {
        let matrices = parts.iter().filter_map(|part| part.low_rank.as_ref());
        let mut reads = matrices.flat_map(|low_rank| low_rank.a.reads.iter().chain(&low_rank.b.reads));
        reads.all(|reads| reads.load(Ordering::Relaxed) == 1)
    };
    let parts = parts([none; 6]);
    let mut stage = Stage::new(Stage::bytes_of(DType::F32, &parts), 1 << 16);
    stage.allow(8);
    stage.fill(DType::F32, &parts).unwrap();
    assert!(is_read_once(&parts));
    let one = [part(rank, [Faulty::new([rank, 5000], none), Faulty::new([3000, rank], none)])];
    ops.stage(&sites, &one).unwrap();
    assert!(is_read_once(&one));
    let one = [part(rank, [Faulty::new([rank, 5000], none), Faulty::new([3000, rank], Some((700, 9)))])];
    assert!(matches!(ops.stage(&sites, &one), Err(Error::Index { limit: 9, .. })));
}

/// A matrix that tells how many threads have read it.
struct Threads<'a>([usize; 2], &'a Mutex<Vec<std::thread::ThreadId>>);

impl MatrixSource for Threads<'_> {
    type Error = Error;

    fn shape(&self) -> [usize; 2] {
        self.0
    }

    fn read(&self, _: Range<usize>, _: DType, to: &mut [u8]) -> Result<()> {
        self.1.lock().unwrap().push(std::thread::current().id());
        to.fill(0);
        Ok(())
    }
}

#[test]
fn a_small_adapter_is_read_on_the_calling_thread_alone() {
    let threads = Mutex::new(Vec::new());
    for (rank, inputs, outputs) in [(1, 1, 1), (8, 64, 64), (16, 2048, 2048), (16, 100, 20_000)] {
        let parts = [part(rank, [Threads([rank, inputs], &threads), Threads([outputs, rank], &threads)])];
        let mut stage = Stage::new(Stage::bytes_of(DType::Bf16, &parts), 1 << 21);
        stage.allow(8);
        stage.fill(DType::Bf16, &parts).unwrap();
    }
    let threads = threads.into_inner().unwrap();
    assert!(threads.len() >= 8 && threads.iter().all(|thread| *thread == std::thread::current().id()));
}
