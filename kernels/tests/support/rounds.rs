//! What ranks do together in tests, whether they are threads or processes.

use std::{path::Path, sync::Arc, thread, time::Duration};

use kernels::{DType, Group, Result, cpu::CpuBackend, prelude::*, testing::Numbers};

/// How long ranks wait for each other where nothing is wrong.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The backend of a rank that joins the others in a folder.
pub(crate) fn rank_of(folder: &Path, rank: usize, ranks: usize, patience: Duration) -> Result<CpuBackend> {
    let group = Group::join(folder, rank, ranks, PATIENCE)?.with_patience(patience);
    CpuBackend::new(DType::F32, 1)?.with_group(Arc::new(group))
}

/// The element of a rank's matrix in one round: a small integer, so that sums are exact in any order.
fn element(round: usize, rank: usize, i: usize) -> f32 {
    ((round * 31 + rank * 17 + i * 7) % 251) as f32 - 125.0
}

/// Reduces and gathers matrices of changing sizes, with delays that differ between ranks, and checks each sum. Returns
/// a hash of all results.
pub(crate) fn run(be: &CpuBackend, rounds: usize) -> u64 {
    const MAX: usize = 40_000;
    let (rank, ranks) = (be.rank(), be.ranks());
    // All ranks draw the same sizes, and each its own delays.
    let (mut sizes, mut delays) = (Numbers(7), Numbers(rank as u64 + 100));
    let mut hash = 0_u64;
    let mut add = |values: &[f32]| {
        for value in values {
            hash = (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for round in 0..rounds {
        // Now and then a matrix of more than one chunk.
        let most = if sizes.below(50) == 0 { MAX } else { 300 };
        let (rows, cols) = (sizes.below(9) + 1, sizes.below(most) + ranks);
        if delays.below(100) == 0 {
            thread::park_timeout(Duration::from_micros(delays.below(1500) as u64));
        }
        if round % 8 == 7 {
            gather(be, round, rows, cols, &mut add);
            continue;
        }
        let mut x = be.wide_mat(rows, cols).unwrap();
        let own: Vec<f32> = (0..rows * cols).map(|i| element(round, rank, i)).collect();
        be.fill(&mut x, &own).unwrap();
        be.all_reduce(&mut x).unwrap();
        let got = be.download(&x).unwrap();
        for (i, got) in got.iter().enumerate() {
            let expected: f32 = (0..ranks).map(|rank| element(round, rank, i)).sum();
            assert_eq!(*got, expected, "round {round}, rank {rank}, element {i} of {rows} x {cols}");
        }
        add(&got);
    }
    hash
}

/// Gathers columns: `each` of every rank, and `more` of the last.
fn gather(be: &CpuBackend, round: usize, rows: usize, each: usize, add: &mut impl FnMut(&[f32])) {
    let (rank, ranks) = (be.rank(), be.ranks());
    let more = round % 5;
    let own_cols = if rank + 1 == ranks { each + more } else { each };
    let cols = ranks * each + more;
    let mut x = be.wide_mat(rows, own_cols).unwrap();
    let place = |row: usize, col: usize| row * cols + col;
    let own =
        (0..rows * own_cols).map(|i| element(round, 0, place(i / own_cols, rank * each + i % own_cols)));
    be.fill(&mut x, &own.collect::<Vec<_>>()).unwrap();
    let mut y = be.wide_mat(rows, cols).unwrap();
    // What the buffer had before must not show.
    be.fill(&mut y, &vec![f32::NAN; rows * cols]).unwrap();
    be.gather_columns(&x, &mut y).unwrap();
    let got = be.download(&y).unwrap();
    for (i, got) in got.iter().enumerate() {
        assert_eq!(*got, element(round, 0, i), "round {round}, rank {rank}, element {i} of {rows} x {cols}");
    }
    add(&got);
}
