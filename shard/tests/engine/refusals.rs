//! Sequences that the shard cannot take fail alone.

use kernels::{SamplingParams, TokenMask};
use lorax_shard::step::{Mask, NewSequence, Refusal, Rows, Step};

use crate::{
    fake::Fault,
    harness::{Router, Shard, prompt, rows, tokens_of},
};

type Spoil = fn(&mut NewSequence);

/// What is wrong with a sequence, and the reason that its client is told.
fn spoils() -> Vec<(Spoil, &'static str)> {
    vec![
        (|new| new.tokens[3] = 96, "token 96 is out of range, limit 96"),
        (|new| new.tokens[0] = u32::MAX, "token 4294967295 is out of range, limit 96"),
        (|new| new.tokens[19] = 1 << 31, "token 2147483648 is out of range, limit 96"),
        // Of what was generated before it was preempted.
        (|new| (new.prompt_len, new.tokens[15]) = (10, 97), "token 97 is out of range, limit 96"),
        (|new| new.sampling.logit_bias = vec![(5, 1.0), (96, 1.0)], "token 96 is out of range, limit 96"),
        (|new| new.sampling.logit_bias = vec![(5, f32::NAN)], "the logit bias of token 5 is NaN"),
        (
            |new| new.sampling.logit_bias = vec![(1, 0.5); 1537],
            "seat: number of biases 1537 is out of range, limit 1537",
        ),
        (|new| new.sampling.num_top = 129, "seat: number of reported tokens 129 is out of range, limit 129"),
        (
            |new| new.sampling.num_top = u32::MAX,
            "seat: number of reported tokens 4294967295 is out of range, limit 129",
        ),
        (|new| new.sampling.temperature = f32::NAN, "temperature must be non-negative and finite"),
        (|new| new.sampling.temperature = -0.5, "temperature must be non-negative and finite"),
        (|new| new.sampling.top_p = f32::INFINITY, "top_p must be > 0.0 and <= 1.0"),
        (|new| new.sampling.min_p = -1.0, "min_p must be >= 0.0 and <= 1.0"),
        (|new| new.sampling.typical_p = f32::NAN, "typical_p must be > 0.0 and <= 1.0"),
        (|new| new.sampling.repetition_penalty = 0.0, "repetition_penalty must be >= 0.01 and <= 100.0"),
        (
            |new| new.sampling.frequency_penalty = f32::NEG_INFINITY,
            "frequency_penalty must be >= -2.0 and <= 2.0",
        ),
        (|new| new.sampling.presence_penalty = f32::NAN, "presence_penalty must be >= -2.0 and <= 2.0"),
        (|new| new.prompt_len = 0, "a prompt of 0 tokens of 20"),
        (|new| new.prompt_len = 21, "a prompt of 21 tokens of 20"),
        (|new| new.tokens.clear(), "a prompt of 20 tokens of 0"),
        (|new| (new.tokens, new.prompt_len) = (Vec::new(), 0), "a prompt of 0 tokens of 0"),
        (|new| new.tokens = vec![1; 257], "257 tokens, the model has 256 positions"),
    ]
}

/// Tokens of the next result, and who was refused in it.
async fn outcome<B: kernels::Backend>(router: &mut Router<'_, B>) -> (Vec<(u64, u32)>, Vec<Refusal>) {
    let result = router.result().await;
    (tokens_of(&result), result.refused)
}

#[tokio::test]
async fn a_sequence_that_cannot_be_taken_fails_alone() {
    let shard = Shard::start();
    let expected = shard.generate(None, 20, false).await;
    let mut router = shard.attach().await;
    for (i, (spoil, reason)) in spoils().into_iter().enumerate() {
        let (good, bad) = (2 * i as u64, 2 * i as u64 + 1);
        let mut spoilt = prompt(bad);
        spoilt.sampling = SamplingParams::default();
        spoil(&mut spoilt);
        // The bad one first, so that a seat that it had taken would be missed.
        router
            .send(Step {
                added: vec![spoilt, prompt(good)],
                rows: vec![rows(bad, 0, 9, &[1], false), rows(good, 0, 20, &[3, 9], true)],
                ..Step::default()
            })
            .await;
        let refusal = Refusal { sequence: bad, reason: reason.into() };
        assert_eq!(outcome(&mut router).await, (vec![(good, expected[0])], vec![refusal]));
        // Its rows are passed over for as long as the router has not read of it.
        let both = vec![rows(good, 20, 1, &[], true), rows(bad, 9, 12, &[2], true)];
        router.send(Step { rows: both, ..Step::default() }).await;
        assert_eq!(outcome(&mut router).await, (vec![(good, expected[1])], vec![]), "{reason}");
        router.send(Step { dropped: vec![bad, good], ..Step::default() }).await;
        assert_eq!(outcome(&mut router).await, (vec![], vec![]));
    }
    // All seats are free: as many run at once as may.
    let all: Vec<u64> = (100..104).collect();
    router
        .send(Step {
            added: all
                .iter()
                .map(|&id| NewSequence { tokens: vec![7; 8], prompt_len: 8, ..prompt(id) })
                .collect(),
            rows: all.iter().zip(0..).map(|(&id, block)| rows(id, 0, 8, &[block], true)).collect(),
            ..Step::default()
        })
        .await;
    assert_eq!(outcome(&mut router).await.0.len(), 4);
    router.send(Step { dropped: vec![1], ..Step::default() }).await;
    assert_eq!(router.events.error().await, "sequence 1 does not run", "it was dropped before");
}

#[tokio::test]
async fn a_sequence_beyond_the_models_positions_is_refused_when_it_gets_there() {
    let shard = Shard::start();
    let expected = shard.generate(None, 20, false).await;
    let mut router = shard.attach().await;
    let short = |sequence, position, count| rows(sequence, position, count, &[sequence as u32], true);
    router
        .send(Step {
            added: vec![prompt(1), prompt(5)],
            rows: vec![short(1, 250, 7), rows(5, 0, 20, &[3, 9], true)],
            ..Step::default()
        })
        .await;
    let refusal = Refusal { sequence: 1, reason: "position 256 is beyond the model's 256".into() };
    assert_eq!(outcome(&mut router).await, (vec![(5, expected[0])], vec![refusal]));
    router
        .send(Step { rows: vec![short(1, usize::MAX, 9), rows(5, 20, 1, &[], true)], ..Step::default() })
        .await;
    assert_eq!(outcome(&mut router).await, (vec![(5, expected[1])], vec![]));
}

#[tokio::test]
async fn a_device_that_fails_when_a_sequence_is_seated_is_nobodys_request() {
    for fault in [Fault::Device, Fault::OutOfMemory] {
        let (shard, script) = Shard::scripted();
        script.fail("seat", fault);
        let mut router = shard.attach().await;
        router.send(Step { added: vec![prompt(5)], ..Step::default() }).await;
        assert!(router.events.next().await.is_none(), "no refusal, no error of the router's");
        let ended = tokio::time::timeout(crate::harness::PATIENCE, shard.ended).await.unwrap().unwrap();
        assert!(!ended.unwrap_err().is_argument());
    }
}

/// A step in which three sequences are sampled, 5 and 7 under a mask.
fn two_of_three_masked() -> Step {
    let short = |id, token| NewSequence { tokens: vec![token; 6], prompt_len: 6, ..prompt(id) };
    let masked = |rows| Rows { masked: true, ..rows };
    let mask =
        |sequence| Mask { sequence, row: 0, allowed: TokenMask::new(&[0xff; 12], 96 + model::ADDED_TOKENS) };
    Step {
        added: vec![short(5, 7), prompt(6), short(7, 8)],
        rows: vec![
            masked(rows(5, 0, 6, &[1], true)),
            rows(6, 0, 20, &[3, 9], true),
            masked(rows(7, 0, 6, &[2], true)),
        ],
        masks: vec![mask(5), mask(7)],
        ..Step::default()
    }
}

#[tokio::test]
async fn a_device_that_cannot_sample_with_masks_refuses_those_sequences_alone() {
    let (shard, script) = Shard::scripted();
    let expected = shard.generate(None, 20, false).await;
    for (fault, reason) in [
        (Fault::Unsupported, "test: this argument of sample_masked is not supported"),
        (Fault::Shape, "sample_masked: a test is 1, expected 2"),
        (Fault::Index, "sample_masked: test 9 is out of range, limit 8"),
    ] {
        script.fail("sample_masked", fault);
        let mut router = shard.attach().await;
        router.send(two_of_three_masked()).await;
        let refused = [5, 7].map(|sequence| Refusal { sequence, reason: reason.into() });
        assert_eq!(outcome(&mut router).await, (vec![(6, expected[0])], refused.to_vec()));
        // Others go on, also beside rows of those that were refused, and their seats are free.
        let all = vec![rows(5, 6, 1, &[], true), rows(6, 20, 1, &[], true), rows(7, 6, 1, &[], true)];
        let added = vec![prompt(8), prompt(9), prompt(10)];
        router.send(Step { added, rows: all, ..Step::default() }).await;
        assert_eq!(outcome(&mut router).await, (vec![(6, expected[1])], vec![]));
        script.mend("sample_masked");
        let mut router = shard.attach().await;
        router.send(two_of_three_masked()).await;
        assert_eq!(outcome(&mut router).await.0.len(), 3);
    }
}

#[tokio::test]
async fn arguments_that_the_device_refuses_are_a_refusal_of_the_sequence() {
    let (shard, script) = Shard::scripted();
    let scored = || NewSequence { prompt_logprobs: true, ..prompt(6) };
    for fault in [Fault::Unsupported, Fault::Shape, Fault::Index] {
        for op in ["seat", "sample", "score"] {
            let mut router = shard.attach().await;
            // Its first token is given, so that the sampler is told of it when the next is sampled.
            router
                .send(Step {
                    added: vec![prompt(5), scored()],
                    rows: vec![rows(5, 0, 20, &[3, 9], false)],
                    ..Step::default()
                })
                .await;
            assert_eq!(outcome(&mut router).await, (vec![], vec![]));
            script.fail(op, fault);
            let given = Rows { tokens: vec![4], ..rows(5, 20, 1, &[], true) };
            router.send(Step { rows: vec![given, rows(6, 0, 20, &[1, 2], true)], ..Step::default() }).await;
            let (tokens, refused) = outcome(&mut router).await;
            let refused: Vec<u64> = refused.iter().map(|refusal| refusal.sequence).collect();
            let expected: (&[u64], &[u64]) = match op {
                "seat" => (&[6], &[5]),
                "score" => (&[5], &[6]),
                _ => (&[], &[5, 6]),
            };
            let sampled: Vec<u64> = tokens.iter().map(|token| token.0).collect();
            assert_eq!((&sampled[..], &refused[..]), expected, "{op} {fault:?}");
            script.mend(op);
        }
    }
}

#[tokio::test]
async fn a_device_that_fails_while_it_samples_ends_the_loop() {
    for fault in [Fault::Device, Fault::OutOfMemory] {
        for op in ["sample_masked", "sample", "score"] {
            let (shard, script) = Shard::scripted();
            script.fail(op, fault);
            let mut router = shard.attach().await;
            let step = two_of_three_masked();
            let step = match op {
                "sample_masked" => step,
                _ => Step {
                    added: vec![NewSequence { prompt_logprobs: true, ..prompt(6) }],
                    rows: vec![rows(6, 0, 20, &[3, 9], true)],
                    ..Step::default()
                },
            };
            router.send(step).await;
            assert!(router.events.next().await.is_none(), "no refusal, no error of the router's");
            let ended = tokio::time::timeout(crate::harness::PATIENCE, shard.ended).await.unwrap().unwrap();
            assert!(!ended.unwrap_err().is_argument());
        }
    }
}
