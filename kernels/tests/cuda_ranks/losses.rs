//! A rank that ends, or that stands still.

use std::{
    io::Read,
    path::Path,
    time::{Duration, Instant},
};

use kernels::{Batch, Error, Group, Matrix, Span, prelude::*, testing::batch};

use super::support::{PATIENCE, Process, join, processes, say};

/// How long ranks wait for one that stands still.
const SHORT: Duration = Duration::from_secs(4);
/// Sums of small matrices before something happens.
const BEFORE: usize = 5;

/// Sums, until another rank is lost, and says what the error is.
fn sum_until_lost(folder: &Path, rank: usize, ranks: usize, patience: Duration, until: usize) {
    let be = join(folder, rank, ranks, patience).unwrap();
    let mut x = be.wide_mat(4, 512).unwrap();
    for round in 0.. {
        if round == BEFORE {
            say("summed");
        }
        if round == until {
            // Until the test ends this process.
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
            return;
        }
        be.fill(&mut x, &vec![1.0; 4 * 512]).unwrap();
        // Some in a row: when the device gives up the first one, no later one waits.
        let summed = (0..3).try_for_each(|_| be.all_reduce(&mut x)).and_then(|()| be.download(&x));
        match summed {
            Ok(got) => assert!(got.iter().all(|&sum| sum == (ranks as f32).powi(3)), "{got:?}"),
            Err(error @ Error::Peer { .. }) => {
                say(&format!("{error}"));
                // Stays, so that the others do not see this one end.
                std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
                return;
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(x.rows(), 4);
    }
}

fn wait_for_sums(started: &mut [Process]) {
    for process in started {
        assert_eq!(process.line(), "summed");
    }
}

#[test]
fn a_rank_that_is_killed_is_named_at_once() {
    let run = |folder: &Path, rank, ranks| sum_until_lost(folder, rank, ranks, PATIENCE, usize::MAX);
    processes("losses::a_rank_that_is_killed_is_named_at_once", 2, run, |started| {
        wait_for_sums(started);
        started[1].kill();
        let since = Instant::now();
        assert!(started[0].line().ends_with("rank 1 has ended"));
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    });
}

#[test]
fn a_rank_that_stands_still_is_named_in_time() {
    // Rank 0 launches nothing any more, but its process lives.
    let run = |folder: &Path, rank, ranks| {
        sum_until_lost(folder, rank, ranks, SHORT, if rank == 0 { BEFORE } else { usize::MAX });
    };
    processes("losses::a_rank_that_stands_still_is_named_in_time", 2, run, |started| {
        wait_for_sums(started);
        let since = Instant::now();
        let said = started[1].line();
        assert!(said.ends_with(&format!("rank 0 has not come within {SHORT:?}")), "{said}");
        assert!(since.elapsed() < SHORT + Duration::from_secs(10), "{:?}", since.elapsed());
    });
}

/// Sums in captured steps, and waits for less long once they are captured, as ranks do when they begin to serve.
#[test]
fn a_replayed_step_waits_as_long_as_the_group_does_now() {
    let run = |folder: &Path, rank, ranks| {
        let be = join(folder, rank, ranks, PATIENCE).unwrap();
        let host: Batch = batch(&[(1, 3)], &[]);
        let mut device = be.batch(1, host.blocks.len(), &[Span::Causal]).unwrap();
        let mut x = be.wide_mat(4, 512).unwrap();
        let mut step = || {
            be.upload(&host, &mut device)?;
            be.fill(&mut x, &vec![1.0; 4 * 512])?;
            be.step(&device, None, || be.all_reduce(&mut x))?;
            be.download(&x)
        };
        for _ in 0..BEFORE {
            assert!(step().unwrap().iter().all(|&sum| sum == ranks as f32));
        }
        be.group().set_patience(SHORT);
        say("summed");
        if rank == 1 {
            let since = Instant::now();
            let error = step().unwrap_err();
            say(&format!("{error}: {}", since.elapsed() < SHORT + (PATIENCE - SHORT) / 2));
        }
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    };
    processes("losses::a_replayed_step_waits_as_long_as_the_group_does_now", 2, run, |started| {
        wait_for_sums(started);
        let said = started[1].line();
        assert!(said.ends_with(&format!("rank 0 has not come within {SHORT:?}: true")), "{said}");
    });
}

#[test]
fn a_rank_that_brings_no_gpu_is_named_in_time() {
    // Rank 0 is in the group, and then does nothing.
    let run = |folder: &Path, rank, ranks| {
        if rank == 0 {
            let _group = Group::join(folder, rank, ranks, PATIENCE).unwrap();
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
            return;
        }
        let since = Instant::now();
        let error = join(folder, rank, ranks, SHORT).err().unwrap();
        say(&format!("{error}: {}", since.elapsed() < SHORT + PATIENCE / 2));
    };
    processes("losses::a_rank_that_brings_no_gpu_is_named_in_time", 2, run, |started| {
        assert_eq!(started[1].line(), format!("exchange: rank 0 has not come within {SHORT:?}: true"));
    });
}
