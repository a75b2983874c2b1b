//! Grammar masks: what they allow is sampled, and only the sampling of their own step waits for them.

use kernels::{SamplingParams, TokenMask};
use lorax_shard::step::{Mask, NewSequence, Output, Rows, Step, StepResult};

use crate::harness::{Shard, prompt, rows, tokens_of, until};

const VOCAB: usize = 96;

fn mask(sequence: u64, allowed: &[u32]) -> Mask {
    let mut bytes = [0; VOCAB / 8];
    allowed.iter().for_each(|token| bytes[*token as usize / 8] |= 1 << (token % 8));
    Mask { sequence, row: 0, allowed: TokenMask::new(&bytes, VOCAB + model::ADDED_TOKENS) }
}

fn masked(rows: Rows) -> Rows {
    Rows { masked: true, ..rows }
}

/// A first step whose sampling has a mask.
fn first(sampling: SamplingParams) -> Step {
    Step {
        added: vec![NewSequence { sampling, ..prompt(5) }],
        rows: vec![masked(rows(5, 0, 20, &[3, 9], true))],
        ..Step::default()
    }
}

fn decode(position: usize) -> Step {
    Step { rows: vec![masked(rows(5, position, 1, &[], true))], ..Step::default() }
}

/// The token of a result, and all tokens by their probability.
fn sampled(result: &StepResult) -> (u32, Vec<u32>) {
    match &result.outputs[..] {
        [Output::Token { sampled, .. }] => (sampled.token, sampled.top.iter().map(|top| top.0).collect()),
        outputs => panic!("one token, not {outputs:?}"),
    }
}

#[tokio::test]
async fn only_allowed_tokens_are_sampled() {
    let greedy = || SamplingParams { num_top: VOCAB as u32, ..SamplingParams::default() };
    let warm = || SamplingParams { temperature: 1.3, seed: 7, ..greedy() };
    let cases = [
        greedy(),
        warm(),
        SamplingParams { temperature: 1e-30, ..warm() },
        SamplingParams { temperature: 100.0, ..warm() },
        SamplingParams { top_k: 1, ..warm() },
        SamplingParams { top_k: 2, ..warm() },
        SamplingParams { top_p: 0.01, ..warm() },
        SamplingParams { min_p: 0.9, ..warm() },
        SamplingParams { typical_p: 0.1, ..warm() },
        SamplingParams { repetition_penalty: 3.0, ..greedy() },
        SamplingParams { frequency_penalty: 2.0, presence_penalty: 2.0, ..warm() },
        // What a bias wants, the grammar does not allow.
        SamplingParams { logit_bias: vec![(50, 1e30), (51, 1e30)], ..greedy() },
        SamplingParams { logit_bias: vec![(50, 1e30), (7, -1e30), (8, -1e30)], ..warm() },
        SamplingParams { top_k: 3, top_p: 0.5, min_p: 0.2, typical_p: 0.5, ..warm() },
    ];
    let shard = Shard::start();
    for params in cases {
        let mut router = shard.attach().await;
        for position in 19..32 {
            let allowed = [7, 8, (position as u32 * 5) % 96, 95];
            let step = if position == 19 { first(params.clone()) } else { decode(position) };
            router.send(Step { masks: vec![mask(5, &allowed)], ..step }).await;
            let (token, by_probability) = sampled(&router.result().await);
            assert!(allowed.contains(&token), "{token} with {params:?}");
            if params == greedy() {
                let best = by_probability.iter().find(|token| allowed.contains(token));
                assert_eq!(Some(&token), best);
            }
        }
    }
}

#[tokio::test]
async fn a_single_allowed_token_is_forced_and_goes_on_as_sampled() {
    let shard = Shard::start();
    for token in [0, 1, 7, 8, 31, 32, 63, 64, 94, 95] {
        let mut router = shard.attach().await;
        router.send(Step { masks: vec![mask(5, &[token])], ..first(SamplingParams::default()) }).await;
        assert_eq!(router.tokens().await, [token]);
        router.send(Step { rows: vec![rows(5, 20, 1, &[], true)], ..Step::default() }).await;
        let next = router.tokens().await;
        let mut other = shard.attach().await;
        let resumed = NewSequence { tokens: [prompt(5).tokens, vec![token]].concat(), ..prompt(5) };
        let step =
            Step { added: vec![resumed], rows: vec![rows(5, 0, 21, &[3, 9], true)], ..Step::default() };
        other.send(step).await;
        assert_eq!(other.tokens().await, next, "after {token}");
    }
}

#[tokio::test]
async fn the_pass_begins_before_its_mask_is_there() {
    let (shard, script) = Shard::scripted();
    let mut router = shard.attach().await;
    let passes = script.count("embed");
    let step = router.send(first(SamplingParams::default())).await;
    until(|| script.count("embed") == passes + 1).await;
    // The next step needs the token.
    let next = router.send(decode(20)).await;
    router.send_masks(step + 7, vec![mask(5, &[4])]).await;
    router.send_masks(step, vec![Mask { row: 1, ..mask(5, &[4]) }, mask(6, &[4])]).await;
    let turns = shard.heartbeat.turns();
    shard.command(lorax_shard::engine::Command::Masks { stream: 99, masks: Default::default() }).await;
    until(|| shard.heartbeat.turns() > turns).await;
    assert!(router.events.is_quiet(), "it is not sampled without its own mask");
    assert_eq!(script.count("embed"), passes + 1);
    // A loop that waits for the router is not at work.
    until(|| shard.heartbeat.oldest().is_none()).await;
    // The mask of the next may come first.
    router.send_masks(next, vec![mask(5, &[11])]).await;
    router.send_masks(step, vec![mask(5, &[12])]).await;
    let results = [router.result().await, router.result().await];
    assert_eq!(results.each_ref().map(|result| result.id), [step, next]);
    assert_eq!(results.each_ref().map(tokens_of), [[(5, 12)], [(5, 11)]]);
}

#[tokio::test]
async fn a_mask_delays_no_other_step() {
    let (shard, script) = Shard::scripted();
    let mut router = shard.attach().await;
    let one = router.send(Step { masks: vec![mask(5, &[4])], ..first(SamplingParams::default()) }).await;
    let passes = script.count("embed");
    router.send(decode(20)).await;
    assert_eq!(router.result().await.id, one, "the step before is answered");
    until(|| script.count("embed") > passes).await;
    // What the step has taken does not count the time that it waited.
    router.send_masks(2, vec![mask(5, &[9])]).await;
    let result = router.result().await;
    assert_eq!((tokens_of(&result), result.duration_us), (vec![(5, 9)], 2000));
    // A session can begin while a mask is missing.
    router.send(decode(21)).await;
    until(|| script.count("embed") > passes + 1).await;
    drop(router);
    let mut router = shard.attach().await;
    router.send(Step { masks: vec![mask(5, &[4])], ..first(SamplingParams::default()) }).await;
    assert_eq!(router.tokens().await, [4]);
}

#[tokio::test]
async fn a_grammar_that_allows_nothing_fails_its_sequence_alone() {
    let shard = Shard::start();
    let step = first(SamplingParams::default());
    let others = vec![rows(6, 0, 20, &[1, 2], true), masked(rows(7, 0, 9, &[4], true))];
    let step = Step {
        added: vec![
            step.added[0].clone(),
            prompt(6),
            NewSequence { tokens: vec![7; 9], prompt_len: 9, ..prompt(7) },
        ],
        rows: [others, step.rows].concat(),
        masks: vec![mask(5, &[]), mask(7, &[42])],
        ..Step::default()
    };
    let plain = shard.generate(None, 20, false).await[0];
    let mut router = shard.attach().await;
    router.send(Step { rows: step.rows[1..].to_vec(), ..step.clone() }).await;
    let result = router.result().await;
    assert_eq!(tokens_of(&result), [(7, 42)]);
    assert_eq!(
        result.refused.iter().map(|r| (r.sequence, &*r.reason)).collect::<Vec<_>>(),
        [(5, "its grammar allows no token")]
    );
    router
        .send(Step {
            rows: vec![rows(6, 0, 20, &[1, 2], true), rows(5, 20, 1, &[], true)],
            ..Step::default()
        })
        .await;
    assert_eq!(
        tokens_of(&router.result().await),
        [(6, plain)],
        "rows of the refused sequence are passed over"
    );
}

#[tokio::test]
async fn masks_of_another_session_end_the_stream() {
    let shard = Shard::start();
    let mut router = shard.attach().await;
    router.session += 3;
    let stream = lorax_shard::step::Masks { session: router.session, step: 1, masks: vec![] };
    shard.command(lorax_shard::engine::Command::Masks { stream: router.session - 3, masks: stream }).await;
    assert_eq!(router.events.error().await, "a step of session 4 in session 1");
}
