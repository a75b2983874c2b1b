//! Ranks as threads of this process, each with a group and a backend of its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/rounds.rs"]
mod rounds;

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kernels::{
    DType, Error, Group, PeerFault, Result,
    cpu::{CpuBackend, CpuMat},
    prelude::*,
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
    });
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
    });
}

/// A matrix with ones.
fn ones(be: &CpuBackend, cols: usize) -> CpuMat {
    let mut x = be.wide_mat(1, cols).unwrap();
    be.fill(&mut x, &vec![1.0; cols]).unwrap();
    x
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
