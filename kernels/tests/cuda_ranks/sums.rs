//! Sums and columns of small integers, which are exact however they are added.

use std::time::{Duration, Instant};

use kernels::{
    Batch, DType, Matrix, SamplingParams, Span,
    cuda::{CudaBackend, CudaMat},
    prelude::*,
    testing::{Numbers, batch},
};

use super::support::{PATIENCE, all_succeed, all_succeed_in, expect_same_bits, threads};

/// The most blocks that two ranks may have on a GPU at the same time: one for each row, and few that gather.
const MOST_ROWS: usize = 64;

/// The element of a rank's matrix in one round.
fn element(round: usize, rank: usize, i: usize) -> f32 {
    ((round * 31 + rank * 17 + i * 7) % 127) as f32 - 63.0
}

/// The matrices of a rank. They are made before any kernel waits for another rank, and freed after the last one.
struct Rounds<'a> {
    be: &'a CudaBackend,
    /// By columns; more are added where ranks are processes.
    mats: Vec<CudaMat>,
    sizes: Numbers,
    delays: Numbers,
}

impl Rounds<'_> {
    fn new(be: &CudaBackend) -> Rounds<'_> {
        // Widths of whole packs, of pairs, odd ones, and some that take several turns of a block's threads.
        let widths = [8, 64, 256, 1024, 4096, 8192, 8200, 2, 30, 1002, 1, 7, 33, 999];
        let mats = widths.iter().map(|&cols| be.wide_mat(MOST_ROWS, cols).unwrap()).collect();
        be.group().barrier(PATIENCE).unwrap();
        Rounds { be, mats, sizes: Numbers(7), delays: Numbers(be.rank() as u64 + 100) }
    }

    fn delay(&mut self) {
        if self.delays.below(20) == 0 {
            let (since, delay) = (Instant::now(), Duration::from_micros(self.delays.below(1500) as u64));
            while since.elapsed() < delay {
                std::hint::spin_loop();
            }
        }
    }

    /// Sums a matrix of other sizes than before, and checks each element.
    fn sum(&mut self, round: usize) {
        let (rank, ranks) = (self.be.rank(), self.be.ranks());
        let index = self.sizes.below(self.mats.len());
        // Few rows most of the time, which leaves time for more sums.
        let most_rows = if self.sizes.below(30) == 0 { MOST_ROWS } else { 3 };
        let rows = self.sizes.below(most_rows) + 1;
        self.delay();
        let x = &mut self.mats[index];
        let cols = x.cols();
        let own: Vec<f32> = (0..rows * cols).map(|i| element(round, rank, i)).collect();
        self.be.fill(x, &own).unwrap();
        self.be.all_reduce(x).unwrap();
        let got = self.be.download(x).unwrap();
        assert_eq!(got.len(), rows * cols);
        for (i, got) in got.iter().enumerate() {
            let expected: f32 = (0..ranks).map(|rank| element(round, rank, i)).sum();
            assert_eq!(*got, expected, "round {round}, rank {rank}, element {i} of {rows} x {cols}");
        }
    }
}

/// Gathers columns: `each` of every rank, and `last` of the last.
fn gather(be: &CudaBackend, round: usize, rows: usize, each: usize, last: usize) -> [CudaMat; 2] {
    let (rank, ranks) = (be.rank(), be.ranks());
    let own_cols = if rank + 1 == ranks { last } else { each };
    let cols = (ranks - 1) * each + last;
    let mut x = be.wide_mat(rows, own_cols).unwrap();
    // Not an integer, as most logits are not.
    let value = |row: usize, col: usize| element(round, 0, row * cols + col) + 0.123_456_7;
    let own = (0..rows * own_cols).map(|i| value(i / own_cols, rank * each + i % own_cols));
    be.fill(&mut x, &own.collect::<Vec<_>>()).unwrap();
    let mut y = be.wide_mat(rows, cols).unwrap();
    // What the buffer had before must not show.
    be.fill(&mut y, &vec![f32::NAN; rows * cols]).unwrap();
    be.gather_columns(&x, &mut y).unwrap();
    for (i, got) in be.download(&y).unwrap().iter().enumerate() {
        let expected = value(i / cols, i % cols);
        assert_eq!(*got, expected, "round {round}, rank {rank}, element {i} of {rows} x {cols}");
    }
    [x, y]
}

const GATHERED: [(usize, usize, usize); 10] = [
    (1, 64, 64),
    (3, 5, 5),
    (4, 8, 12),
    (16, 128, 100),
    (2, 7, 1),
    (1, 2, 9),
    (5, 4, 4),
    (64, 500, 500),
    (1, 16_032, 16_032),
    (7, 1001, 999),
];

/// Two ranks, whose kernels run side by side.
#[test]
fn of_threads() {
    let count = std::env::var("LORAX_REDUCTIONS").map_or(2000, |count| count.parse().unwrap());
    threads(|be| {
        let mut rounds = Rounds::new(be);
        (0..count).for_each(|round| rounds.sum(round));
    });
}

/// Two ranks in processes of their own, which map each other's memory.
#[test]
fn of_two_processes() {
    all_succeed("sums::of_two_processes", 2, |be| {
        let mut rounds = Rounds::new(be);
        for round in 0..100 {
            rounds.sum(round);
            if let Some(&(rows, each, last)) = GATHERED.get(round / 10).filter(|_| round % 10 == 9) {
                gather(be, round, rows, each, last);
            }
        }
    });
}

/// More ranks, which time the ways of their sums first: in one shot, in two.
#[test]
fn of_three_processes() {
    all_succeed("sums::of_three_processes", 3, |be| {
        let mut rounds = Rounds::new(be);
        (0..20).for_each(|round| rounds.sum(round));
        for (round, &(rows, each, last)) in GATHERED.iter().enumerate() {
            gather(be, round, rows, each, last);
        }
    });
}

/// Parts that f16 cannot hold, whose sum it can or cannot, and small ones beside large ones, in a model of f16.
fn beyond_f16(be: &CudaBackend) {
    let (rank, ranks) = (be.rank() as f32, be.ranks() as f32);
    let element = |i: usize, rank: f32| match i % 11 {
        0 => 70_000.0,
        1 => -1e6 * (rank + 1.0),
        2 if rank == 0.0 => 3e38,
        2 => -3e38 / (ranks - 1.0),
        3 => 1e-9,
        4 => 1.0 + 2.0_f32.powi(-20),
        5 => 65_504.0,
        6 => 65_520.0 - 131_040.0 * (rank % 2.0),
        7 => 0.1,
        8 => -0.0,
        9 => f32::MIN_POSITIVE,
        _ => i as f32,
    };
    for (rows, cols) in [(1, 8), (3, 4096), (64, 1024), (2, 8200), (1, 7), (5, 33), (1, 2)] {
        let mut x = be.wide_mat(rows, cols).unwrap();
        let own: Vec<f32> = (0..rows * cols).map(|i| element(i, rank)).collect();
        be.fill(&mut x, &own).unwrap();
        be.all_reduce(&mut x).unwrap();
        let got = be.download(&x).unwrap();
        for (i, got) in got.iter().enumerate() {
            let sum = (0..be.ranks()).fold(0.0, |sum, rank| sum + element(i, rank as f32));
            assert_eq!(*got, sum, "element {i} of {rows} x {cols}");
        }
        expect_same_bits(be, "sums", &got);
    }
}

#[test]
fn beyond_f16_of_two_processes() {
    all_succeed_in(DType::F16, "sums::beyond_f16_of_two_processes", 2, beyond_f16);
}

#[test]
fn beyond_f16_of_three_processes() {
    all_succeed_in(DType::F16, "sums::beyond_f16_of_three_processes", 3, beyond_f16);
}

/// A message of more bytes than an arena has room for goes in parts.
#[test]
fn of_a_large_matrix() {
    all_succeed("sums::of_a_large_matrix", 2, |be| {
        let (rows, cols) = (5000, 4096);
        let mut x = be.wide_mat(rows, cols).unwrap();
        let own: Vec<f32> = (0..rows * cols).map(|i| element(0, be.rank(), i)).collect();
        for _ in 0..2 {
            be.fill(&mut x, &own).unwrap();
            be.all_reduce(&mut x).unwrap();
            for (i, got) in be.download(&x).unwrap().iter().enumerate() {
                assert_eq!(*got, element(0, 0, i) + element(0, 1, i), "element {i}");
            }
        }
        // 48 MiB of each rank.
        gather(be, 0, 100, 120_000, 130_000);
    });
}

/// Captured steps of one, two and three sums, replayed in a changing order with sums outside of steps in between: the
/// arenas' halves take turns wherever a sum comes from.
#[test]
fn in_replayed_steps() {
    all_succeed("sums::in_replayed_steps", 2, |be| {
        let host: Batch = batch(&[(1, 3)], &[]);
        let mut batches: Vec<_> =
            (0..3).map(|_| be.batch(1, host.blocks.len(), &[Span::Causal]).unwrap()).collect();
        let mut sampler = be.sampler(1, 8).unwrap();
        be.seat(&mut sampler, 0, &SamplingParams::default(), &[], &[]).unwrap();
        let (rows, cols) = (5, 1024);
        let mut x = be.wide_mat(rows, cols).unwrap();
        let mut rounds = Rounds::new(be);
        let mut order = Numbers(5);
        for round in 0..300 {
            let which = order.below(3);
            be.upload(&host, &mut batches[which]).unwrap();
            let own: Vec<f32> = (0..rows * cols).map(|i| element(round, be.rank(), i) % 8.0).collect();
            be.fill(&mut x, &own).unwrap();
            rounds.delay();
            be.step(&batches[which], None, || (0..=which).try_for_each(|_| be.all_reduce(&mut x))).unwrap();
            for (i, got) in be.download(&x).unwrap().iter().enumerate() {
                let sum = element(round, 0, i) % 8.0 + element(round, 1, i) % 8.0;
                let expected = sum * (1 << which) as f32;
                assert_eq!(*got, expected, "round {round}: element {i} after {} sums", which + 1);
            }
            if round % 7 == 0 {
                rounds.sum(round);
            }
        }
        assert!(be.launches() < 200, "most steps were replayed");
    });
}
