//! Tests that need no GPU.

use std::{path::Path, thread, time::Duration};

use super::*;

#[test]
fn every_rank_knows_the_columns_of_all() {
    for (ranks, share, last) in
        [(1, 0, 7), (2, 5, 5), (2, 5, 1), (2, 3, 9), (4, 10, 7), (8, 1, 1), (8, 16_032, 16_040)]
    {
        let all = (ranks - 1) * share + last;
        for rank in 0..ranks {
            let own = if rank + 1 == ranks { last } else { share };
            let got = Shares::new(rank, ranks, own, all).unwrap();
            assert_eq!((got.share, got.last), (share, last), "rank {rank} of {ranks}");
        }
    }
    for (rank, ranks, own, all) in
        [(0, 1, 7, 8), (0, 2, 5, 5), (1, 2, 5, 5), (1, 3, 5, 10), (2, 3, 5, 14), (0, 2, 0, 4)]
    {
        assert!(Shares::new(rank, ranks, own, all).is_err(), "{own} of {all} on rank {rank} of {ranks}");
    }
}

#[test]
fn a_message_goes_in_parts_of_whole_rows() {
    let message = Message { at: 1000, rows: 10, cols: 8 };
    let parts: Vec<_> = message.parts(4).map(|(first, part)| (first, part.at, part.rows)).collect();
    assert_eq!(parts, [(0, 1000, 4), (4, 1128, 4), (8, 1256, 2)]);
    for (cols, model, bytes) in [
        (8, DType::Bf16, 160),
        (9, DType::Bf16, 360),
        (16, DType::Bf16, 320),
        (8, DType::F16, 320),
        (9, DType::F16, 360),
        (16, DType::F16, 640),
    ] {
        assert_eq!(Message { cols, ..message }.bytes(model), bytes, "{cols} columns, {model:?}");
    }
    assert_eq!(Message { rows: 0, ..message }.parts(4).count(), 0);
}

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Runs ranks as threads. What they return lives until all have returned.
pub(super) fn ranks<T: Send>(count: usize, body: impl Fn(Arc<Group>) -> T + Sync) -> Vec<T> {
    let folder = tempfile::tempdir().unwrap();
    let join = |path: &Path, rank| Arc::new(Group::join(path, rank, count, PATIENCE).unwrap());
    thread::scope(|scope| {
        let (folder, body, join) = (folder.path(), &body, &join);
        let threads: Vec<_> = (0..count).map(|rank| scope.spawn(move || body(join(folder, rank)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn ranks_agree_on_what_holds_on_all_of_them() {
    for holds in [
        &[true, true][..],
        &[true, false],
        &[false, true],
        &[false, false],
        &[true, true, true],
        &[true, true, false],
        &[false, true, true],
        &[true, false, true, true],
        &[true, true, true, true],
        &[false],
    ] {
        let agreed = ranks(holds.len(), |group| agree(&group, holds[group.rank()]).unwrap());
        assert_eq!(agreed, vec![holds.iter().all(|holds| *holds); holds.len()], "{holds:?}");
    }
}
