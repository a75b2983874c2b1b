//! Rows whose tokens the router gives: drafts that are checked, and tokens that are forced.

use kernels::SamplingParams;
use lorax_shard::step::{NewSequence, Rows, Step};

use crate::harness::{Router, Shard, prompt, rows};

fn cases() -> Vec<SamplingParams> {
    let warm = || SamplingParams { temperature: 1.5, seed: 3, ..SamplingParams::default() };
    vec![
        SamplingParams::default(),
        warm(),
        SamplingParams { seed: 4, ..warm() },
        SamplingParams { top_k: 5, ..warm() },
        SamplingParams { top_p: 0.7, ..warm() },
        SamplingParams { typical_p: 0.6, ..warm() },
        SamplingParams { repetition_penalty: 1.8, ..SamplingParams::default() },
        SamplingParams { frequency_penalty: 1.5, ..SamplingParams::default() },
        SamplingParams { presence_penalty: 2.0, ..warm() },
        SamplingParams { repetition_penalty: 0.5, frequency_penalty: -1.0, ..warm() },
        SamplingParams { logit_bias: vec![(3, 4.0), (9, -2.0)], ..warm() },
    ]
}

fn new(sampling: &SamplingParams) -> NewSequence {
    NewSequence { sampling: sampling.clone(), ..prompt(5) }
}

/// Rows from a position on, the last of which have these tokens, with tokens sampled from the last `sample`.
fn given(position: usize, count: usize, tokens: &[u32], sample: usize) -> Step {
    let rows = Rows { sample, tokens: tokens.to_vec(), ..rows(5, position, count, &[], false) };
    Step { rows: vec![rows], ..Step::default() }
}

async fn begin(router: &mut Router<'_, kernels::cpu::CpuBackend>, new: NewSequence) -> Vec<u32> {
    let rows = vec![rows(5, 0, new.tokens.len(), &[3, 9, 12], true)];
    router.send(Step { added: vec![new], rows, ..Step::default() }).await;
    router.tokens().await
}

/// What a sequence goes on with, one token a step from this position on.
async fn go_on(
    router: &mut Router<'_, kernels::cpu::CpuBackend>,
    positions: std::ops::Range<usize>,
) -> Vec<u32> {
    let mut tokens = Vec::new();
    for position in positions {
        router.send(given(position, 1, &[], 1)).await;
        tokens.extend(router.tokens().await);
    }
    tokens
}

#[tokio::test]
async fn given_tokens_are_taken_as_if_they_had_been_sampled() {
    let shard = Shard::start();
    for params in cases() {
        let mut router = shard.attach().await;
        let mut plain = begin(&mut router, new(&params)).await;
        plain.extend(go_on(&mut router, 20..31).await);
        // All tokens are given.
        let mut router = shard.attach().await;
        assert_eq!(begin(&mut router, new(&params)).await, plain[..1]);
        router.send(given(20, 4, &plain[..4], 4)).await;
        assert_eq!(router.tokens().await, plain[1..5], "{params:?}");
        assert_eq!(go_on(&mut router, 24..31).await, plain[5..], "{params:?}");
        // The first row's token is on its way, and the next step is sent before this one is answered.
        let mut router = shard.attach().await;
        let first = vec![rows(5, 0, 20, &[3, 9, 12], true)];
        router.send(Step { added: vec![new(&params)], rows: first, ..Step::default() }).await;
        router.send(given(20, 3, &plain[1..3], 3)).await;
        assert_eq!(router.tokens().await, plain[..1]);
        assert_eq!(router.tokens().await, plain[1..4], "{params:?}");
        assert_eq!(go_on(&mut router, 23..31).await, plain[4..], "{params:?}");
        // Wrong drafts are replaced, and leave no trace.
        let mut router = shard.attach().await;
        begin(&mut router, new(&params)).await;
        let wrong: Vec<u32> = plain[1..4].iter().map(|token| (token + 1) % 96).collect();
        router.send(given(20, 4, &[&plain[..1], &wrong].concat(), 4)).await;
        assert_eq!(router.tokens().await[0], plain[1], "{params:?}");
        router.send(given(21, 3, &plain[1..4], 2)).await;
        assert_eq!(router.tokens().await, plain[3..5], "from the last two rows, {params:?}");
        assert_eq!(go_on(&mut router, 24..31).await, plain[5..], "{params:?}");
    }
}

#[tokio::test]
async fn forced_tokens_are_like_those_of_a_sequence_that_resumes() {
    let shard = Shard::start();
    for (params, forced) in cases().into_iter().zip([1, 2, 3, 5, 8, 4, 7, 6, 9, 1, 2]) {
        let tokens: Vec<u32> = (0..forced).map(|i| 11 + 7 * i).collect();
        let at = 20 + tokens.len();
        let mut router = shard.attach().await;
        let resumed = NewSequence { tokens: [prompt(5).tokens, tokens.clone()].concat(), ..new(&params) };
        let mut expected = begin(&mut router, resumed).await;
        expected.extend(go_on(&mut router, at..at + 6).await);
        // Without a token being sampled before, and in place of one that was.
        for sample in [false, true] {
            let mut router = shard.attach().await;
            let first = vec![rows(5, 0, 20, &[3, 9, 12], sample)];
            router.send(Step { added: vec![new(&params)], rows: first, ..Step::default() }).await;
            let (head, tail) = tokens.split_at(tokens.len() / 2);
            for (position, part) in [(20, head), (20 + head.len(), tail)] {
                if !part.is_empty() {
                    router
                        .send(given(position, part.len(), part, usize::from(position + part.len() == at)))
                        .await;
                }
            }
            let mut got = Vec::new();
            let steps = 2 + usize::from(!head.is_empty());
            for _ in 0..steps {
                got = router.tokens().await;
            }
            got.extend(go_on(&mut router, at..at + 6).await);
            assert_eq!(got, expected, "{params:?}");
        }
    }
}

#[tokio::test]
async fn rows_of_a_prompt_can_be_sampled_from() {
    let shard = Shard::start();
    for (params, sample) in cases().into_iter().zip([1, 2, 3, 4, 5, 7, 10, 15, 19, 20, 20]) {
        // What each beginning of the prompt goes on with.
        let mut expected = Vec::new();
        for len in 21 - sample..21 {
            let mut router = shard.attach().await;
            let tokens = prompt(5).tokens[..len].to_vec();
            expected
                .extend(begin(&mut router, NewSequence { tokens, prompt_len: len, ..new(&params) }).await);
        }
        let mut router = shard.attach().await;
        let first = Rows { sample, ..rows(5, 0, 20, &[3, 9, 12], false) };
        router.send(Step { added: vec![new(&params)], rows: vec![first], ..Step::default() }).await;
        assert_eq!(router.tokens().await, expected, "{params:?}");
        let mut alone = shard.attach().await;
        begin(&mut alone, new(&params)).await;
        let plain = go_on(&mut alone, 20..25).await;
        let mut router = shard.attach().await;
        let first = Rows { sample, ..rows(5, 0, 20, &[3, 9, 12], false) };
        router.send(Step { added: vec![new(&params)], rows: vec![first], ..Step::default() }).await;
        router.tokens().await;
        assert_eq!(go_on(&mut router, 20..25).await, plain, "the last one is what follows");
    }
}

#[tokio::test]
async fn rows_that_contradict_what_is_known_are_refused() {
    let shard = Shard::start();
    for (step, cause) in [
        (given(20, 2, &[1, 2, 3], 1), "given tokens 3 is out of range, limit 3"),
        (given(20, 1, &[1; 40], 1), "given tokens 40 is out of range, limit 2"),
        (given(18, 2, &[1, 2], 1), "sequence 5 is given a token at position 18 of its prompt"),
        (given(19, 2, &[1, 2], 1), "sequence 5 is given a token at position 19 of its prompt"),
        (given(0, 1, &[1], 1), "sequence 5 is given a token at position 0 of its prompt"),
        (given(20, 2, &[1, 2], 3), "rows to sample from 3 is out of range, limit 3"),
        (given(20, 1, &[], 2), "rows to sample from 2 is out of range, limit 2"),
        (given(20, 1, &[], usize::MAX), "rows to sample from 18446744073709551615 is out of range, limit 2"),
        (given(22, 1, &[], 1), "sequence 5 has no token at or before position 22"),
        (given(25, 1, &[4], 1), "sequence 5 has no token at or before position 25"),
    ] {
        let mut router = shard.attach().await;
        begin(&mut router, new(&SamplingParams::default())).await;
        router.send(step).await;
        assert_eq!(router.events.error().await, cause);
    }
    let mut router = shard.attach().await;
    begin(&mut router, new(&SamplingParams::default())).await;
    router.send(given(20, 2, &[95, 96], 1)).await;
    let refused = router.result().await.refused;
    assert_eq!(refused[0].reason, "token 96 is out of range, limit 96", "its sequence fails alone");
}
