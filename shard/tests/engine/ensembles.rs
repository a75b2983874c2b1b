//! Sequences with several adapters.

use kernels::cpu::CpuBackend;
use lorax_shard::step::{Member, NewSequence, Output, Pooling, PoolingKind, Step};

use crate::{
    harness::{Router, Shard, prompt, rows},
    vocabularies::write_resized,
};

/// The hidden states of a prompt of 20 tokens under some members, in chunks of `chunk` rows.
async fn states(router: &mut Router<'_, CpuBackend>, members: &[(u32, f32)], chunk: usize) -> Vec<f32> {
    let members = members.iter().map(|&(slot, weight)| Member { slot, weight }).collect();
    let pooling = Some(Pooling { kind: PoolingKind::None, normalize: false, classes: false });
    // One that runs beside it has an adapter alone.
    let beside = NewSequence { members: vec![Member::alone(1)], pooling, ..prompt(6) };
    let mut added = vec![NewSequence { members, pooling, ..prompt(5) }, beside];
    let mut states = Vec::new();
    for position in (0..20).step_by(chunk) {
        let count = chunk.min(20 - position);
        let mut all = vec![rows(5, position, count, if position == 0 { &[1, 2] } else { &[] }, false)];
        if position == 0 && count < 12 {
            all.push(rows(6, 0, 20, &[3, 4], false));
        }
        router.send(Step { added: std::mem::take(&mut added), rows: all, ..Step::default() }).await;
        for output in router.result().await.outputs {
            if let Output::HiddenStates { sequence: 5, values, .. } = output {
                states.extend(values);
            }
        }
    }
    router.send(Step { dropped: vec![5, 6], ..Step::default() }).await;
    router.result().await;
    states
}

fn distance(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

#[tokio::test]
async fn members_are_added_by_their_weights() {
    let shard = Shard::start();
    let (one, two) = (shard.staged("one").await, shard.staged("two").await);
    let mut router = shard.attach().await;
    router.send(Step { load: vec![(0, one), (1, two)], ..Step::default() }).await;
    assert_eq!(router.slot_event().await.1, None);
    assert_eq!(router.slot_event().await.1, None);
    // Lists that give the same sums.
    for (list, same) in [
        (&[(0, 0.5), (0, 0.5)][..], &[(0, 1.0)][..]),
        (&[(0, 1.0), (0, -1.0)], &[]),
        (&[(0, 0.0), (1, 0.0)], &[]),
        (&[(0, 0.0)], &[]),
        (&[(0, 0.0), (1, 1.0)], &[(1, 1.0)]),
        (&[(1, 1.0), (0, 0.0)], &[(1, 1.0)]),
        (&[(0, 1.0), (1, 1.0)], &[(1, 1.0), (0, 1.0)]),
        (&[(0, 0.25), (0, 0.25), (1, 0.5), (1, 0.5)], &[(0, 0.5), (1, 1.0)]),
        (&[(0, 2.0), (0, -1.0)], &[(0, 1.0)]),
        (&[(0, -0.5), (1, 1.5), (0, 1.0)], &[(0, 0.5), (1, 1.5)]),
    ] {
        let whole = states(&mut router, list, 20).await;
        let expected = states(&mut router, same, 20).await;
        assert!(distance(&whole, &expected) < 1e-4, "{list:?}: {}", distance(&whole, &expected));
        for chunk in [1, 7, 11] {
            assert_eq!(states(&mut router, list, chunk).await, whole, "{list:?} in chunks of {chunk}");
        }
    }
    let lists: [&[(u32, f32)]; 6] =
        [&[], &[(0, 1.0)], &[(1, 1.0)], &[(0, 0.5)], &[(0, 1.0), (1, 1.0)], &[(0, 1.0), (1, -1.0)]];
    let mut all = Vec::new();
    for list in lists {
        all.push(states(&mut router, list, 20).await);
    }
    for (i, one) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|other| distance(one, other) > 1e-3), "{:?} is like another", lists[i]);
    }
}

#[tokio::test]
async fn adapters_that_are_not_sums_are_refused_in_ensembles() {
    let shard = Shard::start();
    write_resized(&shard, "resized", 101);
    let (resized, one) = (shard.staged("resized").await, shard.staged("one").await);
    let mut router = shard.attach().await;
    router.send(Step { load: vec![(0, resized), (1, one)], ..Step::default() }).await;
    assert_eq!(router.slot_event().await.1, None);
    assert_eq!(router.slot_event().await.1, None);
    for (i, (members, refused)) in [
        (&[(0, 1.0)][..], false),
        (&[(0, 0.5)], true),
        (&[(0, -1.0)], true),
        (&[(0, 1.0), (1, 1.0)], true),
        (&[(1, 1.0), (0, 1.0)], true),
        (&[(0, 0.5), (0, 0.5)], true),
        (&[(1, 1.0), (1, 1.0), (1, 1.0), (0, 0.0)], true),
        (&[(1, 1.0), (1, 1.0), (1, 1.0), (1, 0.0)], false),
        (&[(1, 0.5)], false),
        (&[(1, 1.0)], false),
        (&[], false),
    ]
    .into_iter()
    .enumerate()
    {
        let id = i as u64;
        let list = members.iter().map(|&(slot, weight)| Member { slot, weight }).collect();
        let added = vec![NewSequence { members: list, ..prompt(id) }];
        router.send(Step { added, rows: vec![rows(id, 0, 20, &[3, 9], true)], ..Step::default() }).await;
        let result = router.result().await;
        let reasons: Vec<_> = result.refused.iter().map(|refusal| refusal.reason.as_str()).collect();
        let expected = "an adapter of an ensemble, or one that begins within a prompt, has rows of its own for \
                        tokens; it may have low-rank deltas and biases alone";
        assert_eq!(reasons, if refused { vec![expected] } else { vec![] }, "{members:?}");
        router.send(Step { dropped: vec![id], ..Step::default() }).await;
        router.result().await;
    }
}
