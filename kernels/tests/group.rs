//! Ranks as threads of this process, each with a group and a backend of its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/rounds.rs"]
mod rounds;

use std::{
    ops::Range,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kernels::{
    DType, Error, Group, HostTensor, LinearLora, LoraPart, LoraSite, PeerFault, Projection, Result, RowSet,
    Span,
    cpu::{CpuBackend, CpuMat, CpuSlots, Panels},
    prelude::*,
    reference::Table,
    testing::{Numbers, assert_close, batch},
};

/// Runs `f` on as many threads as ranks, and returns what each returned.
fn ranks<T: Send>(ranks: usize, f: impl Fn(&Path, usize) -> T + Sync) -> Vec<T> {
    let folder = tempfile::tempdir().unwrap();
    let (f, path) = (&f, folder.path());
    thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || f(path, rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// As [`ranks`], with a group for each.
fn groups<T: Send>(count: usize, patience: Duration, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    ranks(count, |folder, rank| {
        f(Group::join(folder, rank, count, rounds::PATIENCE).unwrap().with_patience(patience))
    })
}

/// The rank and the fault that an operation failed with.
fn fault<T>(result: Result<T>) -> (usize, PeerFault) {
    match result {
        Err(Error::Peer { rank, fault, .. }) => (rank, fault),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn sums_are_exact_and_the_same_on_all_ranks() {
    for count in [1, 2, 3, 4, 8] {
        let rounds = if count == 8 { 300 } else { 1000 };
        let hashes = ranks(count, |folder, rank| {
            let be = rounds::rank_of(folder, rank, count, rounds::PATIENCE).unwrap();
            assert_eq!((be.rank(), be.ranks()), (rank, count));
            rounds::run(&be, rounds)
        });
        assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{count} ranks: {hashes:?}");
    }
}

/// Sums that round: the order of the additions is the same on every rank.
#[test]
fn rounded_sums_have_the_same_bits_on_all_ranks() {
    let sums = ranks(3, |folder, rank| {
        let be = rounds::rank_of(folder, rank, 3, rounds::PATIENCE).unwrap();
        let mut x = be.wide_mat(3, 777).unwrap();
        let own: Vec<f32> = (0..3 * 777).map(|i| 0.1 * (i + rank * 1000) as f32 - 7.3).collect();
        be.fill(&mut x, &own).unwrap();
        be.all_reduce(&mut x).unwrap();
        be.download(&x).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    });
    assert!(sums[1] == sums[0] && sums[2] == sums[0]);
}

#[test]
fn messages_of_all_sizes_are_exchanged() {
    let got = groups(4, rounds::PATIENCE, |group| {
        (0..200).all(|round: usize| {
            let message = |rank: usize| vec![rank as u8 + 1; (round * round * 7 + rank) % 100_000];
            let got = group.exchange(&message(group.rank())).unwrap();
            got == (0..4).map(message).collect::<Vec<_>>()
        })
    });
    assert_eq!(got, [true; 4]);
}

/// What all ranks have posted, as soon as they have.
fn posted(group: &Group, place: u64, about: u64) -> Vec<Vec<u8>> {
    let since = Instant::now();
    loop {
        if let Some(posts) = group.posted(place, about) {
            return posts.iter().map(|bytes| bytes.to_vec()).collect();
        }
        group.check("test", 0, since).unwrap();
        thread::yield_now();
    }
}

#[test]
fn what_is_posted_comes_when_all_ranks_have_posted_it() {
    let expected = |about: u64| (0..3).map(|rank| vec![rank + about as u8; 1000]).collect::<Vec<_>>();
    groups(3, rounds::PATIENCE, |group| {
        let own = |about: u64| vec![group.rank() as u8 + about as u8; 1000];
        for place in 0..50 {
            // A rank may post long before or after the others.
            group.post(place, 1, &own(1)).unwrap();
        }
        for place in 0..50 {
            assert_eq!(posted(&group, place, 1), expected(1));
            assert_eq!(group.posted(place, 2), None);
        }
        group.barrier(rounds::PATIENCE).unwrap();
        // A rank that tells the same again need not wait for the others; something else has to come from all.
        assert_eq!(posted(&group, 7, 1), expected(1));
        group.barrier(rounds::PATIENCE).unwrap();
        group.post(7, 2, &own(2)).unwrap();
        assert_eq!(group.posted(7, 1), None);
        assert_eq!(posted(&group, 7, 2), expected(2));
        group.barrier(rounds::PATIENCE).unwrap();
    });
}

#[test]
fn what_some_ranks_have_posted_can_be_seen() {
    for count in [1, 2, 3, 5] {
        groups(count, rounds::PATIENCE, |group| {
            // The ranks post one after the other.
            for rank in 0..count {
                assert_eq!(group.posted_so_far(7, 1).iter().flatten().count(), rank);
                group.barrier(rounds::PATIENCE).unwrap();
                if group.rank() == rank {
                    group.post(7, 1, &[rank as u8]).unwrap();
                }
                let since = Instant::now();
                while group.posted_so_far(7, 1)[rank].is_none() {
                    group.check("test", rank, since).unwrap();
                    thread::yield_now();
                }
                group.barrier(rounds::PATIENCE).unwrap();
            }
            let told = group.posted_so_far(7, 1);
            assert!(told.iter().enumerate().all(|(rank, bytes)| bytes.as_deref() == Some(&[rank as u8][..])));
            assert!(group.posted_so_far(7, 2).iter().chain(&group.posted_so_far(8, 1)).all(Option::is_none));
            group.barrier(rounds::PATIENCE).unwrap();
        });
    }
}

#[test]
fn a_failure_is_returned_once() {
    groups(2, rounds::PATIENCE, |group| {
        let own: &[u8] = if group.rank() == 1 { b"" } else { b"squares" };
        group.post(3, 1, own).unwrap();
        assert_eq!(posted(&group, 3, 1), [b"squares".to_vec(), Vec::new()]);
        assert_eq!(group.posted(3, 1), None);
        group.barrier(rounds::PATIENCE).unwrap();
        // One that nobody has asked for.
        group.post(4, 1, b"").unwrap();
        group.barrier(rounds::PATIENCE).unwrap();
        group.forget_failures();
        assert_eq!(group.posted(4, 1), None);
        // Later both succeed.
        group.post(3, 1, b"squares").unwrap();
        assert_eq!(posted(&group, 3, 1), [b"squares", b"squares"]);
        group.barrier(rounds::PATIENCE).unwrap();
    });
}

#[test]
fn failures_of_an_earlier_attempt_are_not_those_of_the_next() {
    groups(2, rounds::PATIENCE, |group| {
        for attempt in 1..20 {
            // Both fail, so that nobody asks for what the other one has told.
            group.begin(3, 2 * attempt);
            group.post(3, 1, b"").unwrap();
            group.begin(3, 2 * attempt + 1);
            group.post(3, 1, b"squares").unwrap();
            assert_eq!(posted(&group, 3, 1), [b"squares", b"squares"], "attempt {attempt}");
            group.barrier(rounds::PATIENCE).unwrap();
        }
    });
}

/// A matrix with ones.
fn ones(be: &CpuBackend, cols: usize) -> CpuMat {
    let mut x = be.wide_mat(1, cols).unwrap();
    be.fill(&mut x, &vec![1.0; cols]).unwrap();
    x
}

/// Parts travel as f32 whatever the model is of: neither their range nor their digits are those of a shorter type.
#[test]
fn parts_keep_their_range_and_digits() {
    let values = [
        70_000.0,
        -1e6,
        65_504.0,
        65_520.0,
        3e38,
        -3e38,
        1e-9,
        f32::MIN_POSITIVE,
        1.0 + f32::EPSILON,
        0.1,
        16_777_215.0,
        -0.0,
    ];
    for dtype in [DType::F32, DType::Bf16] {
        let sums = groups(2, rounds::PATIENCE, |group| {
            let rank = group.rank();
            let be = CpuBackend::new(dtype, 1).unwrap().with_group(Arc::new(group)).unwrap();
            let mut x = be.wide_mat(2, values.len()).unwrap();
            // Of the second row, the sums are 0.
            let sign = if rank == 0 { 1.0 } else { -1.0 };
            let own = values.iter().copied().chain(values.iter().map(|value| sign * value));
            let scaled: Vec<f32> =
                own.enumerate().map(|(i, x)| if i == 4 || i == 5 { x / 2.0 } else { x }).collect();
            be.fill(&mut x, &scaled).unwrap();
            be.all_reduce(&mut x).unwrap();
            (be.download(&x).unwrap(), be)
        });
        for (sums, _) in &sums {
            for (i, &value) in values.iter().enumerate() {
                let sum = if i == 4 || i == 5 { value } else { value + value };
                assert_eq!(sums[i], sum, "{value}, {dtype:?}");
                assert_eq!(sums[values.len() + i], 0.0, "{value}, {dtype:?}");
            }
        }
    }
}

#[test]
fn a_rank_that_leaves_fails_every_operation_of_the_others() {
    // What a rank returns lives until all have returned: those that are left do not see each other end.
    let left = ranks(3, |folder, rank| {
        let be = rounds::rank_of(folder, rank, 3, rounds::PATIENCE).unwrap();
        let mut x = ones(&be, 8);
        be.all_reduce(&mut x).unwrap();
        if rank == 1 {
            return None;
        }
        let reduced = fault(be.all_reduce(&mut x));
        assert_eq!(be.group().lost(), Some(1));
        assert_eq!(fault(be.gather_columns(&x, &mut be.wide_mat(1, 24).unwrap())), reduced);
        assert_eq!(fault(be.group().exchange(b"?")), reduced);
        assert_eq!(fault(be.group().barrier(rounds::PATIENCE)), reduced);
        Some((reduced, be))
    });
    let faults = left.iter().map(|left| left.as_ref().map(|(fault, _)| *fault));
    assert!(faults.eq([Some((1, PeerFault::Ended)), None, Some((1, PeerFault::Ended))]));
}

#[test]
fn a_rank_that_does_not_come_is_named_in_time() {
    let patience = Duration::from_millis(300);
    let left = ranks(3, |folder, rank| {
        let be = rounds::rank_of(folder, rank, 3, patience).unwrap();
        let since = Instant::now();
        let got = (rank != 2).then(|| fault(be.all_reduce(&mut ones(&be, 8))));
        assert!(since.elapsed() < 20 * patience);
        (got, be)
    });
    let late = Some((2, PeerFault::Late(patience)));
    assert!(left.iter().map(|(fault, _)| *fault).eq([late, late, None]));
}

#[test]
fn ranks_that_run_different_operations_are_told() {
    let left = ranks(2, |folder, rank| {
        let be = rounds::rank_of(folder, rank, 2, rounds::PATIENCE).unwrap();
        (fault(be.all_reduce(&mut ones(&be, 8 + rank))), be)
    });
    let faults = left.iter().map(|(fault, _)| *fault);
    assert!(faults.eq([(1, PeerFault::Differs), (0, PeerFault::Differs)]));
}

#[test]
fn columns_that_do_not_add_up_are_refused() {
    let refused = ranks(2, |folder, rank| {
        let be = rounds::rank_of(folder, rank, 2, rounds::PATIENCE).unwrap();
        let x = ones(&be, 8);
        // Rank 0 could not know how many columns the last rank has.
        let cols = if rank == 0 { 7 } else { 4 };
        let got = be.gather_columns(&x, &mut be.wide_mat(1, cols).unwrap());
        (matches!(got, Err(Error::Shape { .. })), be)
    });
    assert!(refused.iter().all(|(refused, _)| *refused));
    let be = CpuBackend::new(DType::F32, 1).unwrap();
    let x = ones(&be, 8);
    assert!(be.gather_columns(&x, &mut be.wide_mat(1, 9).unwrap()).is_err());
}

#[test]
fn a_group_that_does_not_fill_is_refused() {
    let (short, folder) = (Duration::from_millis(200), tempfile::tempdir().unwrap());
    assert_eq!(fault(Group::join(folder.path(), 0, 2, short)), (1, PeerFault::Late(short)));
    assert_eq!(fault(Group::join(folder.path(), 1, 2, short)), (0, PeerFault::Late(short)));
    assert_eq!(fault(Group::join(folder.path(), 3, 4, short)), (0, PeerFault::Late(short)));
    assert!(matches!(Group::join(folder.path(), 2, 2, short), Err(Error::Index { index: 2, limit: 2, .. })));
    let missing = folder.path().join("missing");
    assert!(matches!(Group::join(&missing, 0, 2, short), Err(Error::Group { rank: 0, .. })));
    // One rank was told of three ranks, the other of two.
    let got = ranks(2, |folder, rank| fault(Group::join(folder, rank, 2 + rank, short)));
    assert!(got.iter().any(|(_, fault)| *fault == PeerFault::Differs), "{got:?}");
}

#[test]
fn a_socket_of_an_earlier_process_is_no_obstacle() {
    let folder = tempfile::tempdir().unwrap();
    for rank in 0..2 {
        drop(std::os::unix::net::UnixListener::bind(folder.path().join(format!("rank-{rank}"))).unwrap());
    }
    let path = folder.path();
    let joined = thread::scope(|scope| {
        let join = |rank| scope.spawn(move || Group::join(path, rank, 2, rounds::PATIENCE).map(Arc::new));
        let threads = [join(1), join(0)];
        threads.map(|thread| thread.join().unwrap().map(|group| group.ranks()).unwrap())
    });
    assert_eq!(joined, [2, 2]);
}

/// One projection with an adapter that has a magnitude, as the columns of one of `ranks` ranks see it.
struct Share {
    x: Table,
    w: Table,
    part: LoraPart,
}

fn columns(table: &Table, cols: Range<usize>) -> Table {
    let data = table.data.chunks_exact(table.cols).flat_map(|row| row[cols.clone()].to_vec()).collect();
    Table { cols: cols.len(), data }
}

impl Share {
    fn new([rows, inputs, outputs, lora_rank]: [usize; 4], (rank, ranks): (usize, usize)) -> Share {
        let mut numbers = Numbers((inputs * outputs) as u64);
        let (x, w) = (numbers.table(rows, inputs), numbers.table(outputs, inputs));
        let (a, b) = (numbers.table(lora_rank, inputs), numbers.table(outputs, lora_rank).data);
        let magnitude = (0..outputs).map(|_| 1.0 + numbers.number()).collect();
        let own = |table: &Table| columns(table, rank * inputs / ranks..(rank + 1) * inputs / ranks);
        let delta = LoraPart::delta((0, 0), lora_rank, 0.5, &own(&a).data, &b);
        let part = LoraPart { magnitude: Some(magnitude), content: 7, ..delta };
        Share { x: own(&x), w: own(&w), part }
    }

    fn site(&self, ranks: usize) -> LoraSite {
        let outputs = self.w.data.len() / self.w.cols;
        LoraSite { is_partial: ranks > 1, ..LoraSite::linear(self.w.cols, &[outputs]) }
    }

    /// Loads the adapter, and waits until it is loaded.
    fn load(&self, be: &CpuBackend, weight: &Panels) -> CpuSlots {
        let sites = [self.site(be.ranks())];
        let staged = Arc::new(be.stage(&sites, std::slice::from_ref(&self.part)).unwrap());
        let mut slots = be.lora_slots(&sites, 1).unwrap();
        be.load(&mut slots, 0, &staged, &[weight]).unwrap();
        let since = Instant::now();
        while be.loaded(&mut slots).unwrap().is_empty() {
            be.group().check("test", 0, since).unwrap();
            thread::yield_now();
        }
        be.group().barrier(rounds::PATIENCE).unwrap();
        slots
    }

    /// The products, summed over all ranks.
    fn products(&self, be: &CpuBackend) -> Vec<f32> {
        let tensor = HostTensor::from_f32(self.w.data.len() / self.w.cols, self.w.cols, &self.w.data);
        let weight = be.weight(&[tensor]).unwrap();
        let slots = self.load(be, &weight);
        let rows = self.x.data.len() / self.x.cols;
        let host = batch(&[(rows, 0)], &[Some(0)]);
        let mut device = be.batch(rows, host.blocks.len(), &[Span::Causal]).unwrap();
        be.upload(&host, &mut device).unwrap();
        let mut x = be.mat(rows, self.x.cols).unwrap();
        be.fill(&mut x, &self.x.data).unwrap();
        let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
        let mut y = be.wide_mat(rows, self.w.data.len() / self.w.cols).unwrap();
        be.matmul(&x, Projection::new(&weight, Some(lora)), &mut y).unwrap();
        be.all_reduce(&mut y).unwrap();
        be.download(&y).unwrap()
    }
}

/// Each rank has some columns of a weight, and the norms are over all.
#[test]
fn gains_are_those_of_all_columns() {
    for shape in [
        [1, 8, 1, 1],
        [1, 64, 16, 8],
        [3, 24, 5, 2],
        [2, 96, 33, 64],
        [7, 128, 100, 3],
        [5, 40, 17, 9],
        [1, 256, 31, 16],
        [4, 48, 48, 1],
        [2, 16, 64, 32],
        [9, 72, 7, 128],
    ] {
        let alone = CpuBackend::new(DType::F32, 1).unwrap();
        let expected = Share::new(shape, (0, 1)).products(&alone);
        for count in [2, 4, 8] {
            let got = ranks(count, |folder, rank| {
                let be = rounds::rank_of(folder, rank, count, rounds::PATIENCE).unwrap();
                Share::new(shape, (rank, count)).products(&be)
            });
            assert!(got.iter().all(|sums| *sums == got[0]), "{shape:?} on {count} ranks");
            assert_close(&format!("{shape:?} on {count} ranks"), &got[0], &expected, DType::F32);
        }
    }
}

/// A rank that cannot load an adapter says so; later all can.
#[test]
fn a_load_ends_where_another_rank_cannot_load() {
    let shape = [1, 64, 16, 8];
    let expected = Share::new(shape, (0, 1)).products(&CpuBackend::new(DType::F32, 1).unwrap());
    let got = ranks(2, |folder, rank| {
        let be = rounds::rank_of(folder, rank, 2, rounds::PATIENCE).unwrap();
        let share = Share::new(shape, (rank, 2));
        let tensor = HostTensor::from_f32(16, 32, &share.w.data);
        let weight = be.weight(&[tensor]).unwrap();
        if rank == 0 {
            share.load(&be, &weight);
        } else {
            be.group().post(0, 7, b"").unwrap();
            be.group().barrier(rounds::PATIENCE).unwrap();
        }
        share.products(&be)
    });
    for sums in got {
        assert_close("after a failure", &sums, &expected, DType::F32);
    }
}
