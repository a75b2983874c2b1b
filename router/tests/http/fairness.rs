//! Adapters that all have requests waiting, and answers of unequal lengths.

use std::{collections::HashMap, ops::Range, time::Duration};

use futures::future::join_all;
use proto::Step;
use serde_json::json;

use crate::{
    router::{Router, tokens},
    shard::{Script, name_of},
};

const ADAPTERS: usize = 240;
/// Sequences that run at the same time.
const SEATS: usize = 32;
/// Lengths of answers, in tokens: of adapters with an odd number, and of those with an even one.
const LENGTHS: [usize; 2] = [12, 48];
/// The time that a step takes. A request is overdue when it has waited for 5 s. The average answer has 30 tokens, so
/// that to serve one request of every adapter takes 240 · 30 / 32 steps, which at this pace is 5.6 s: always some are
/// overdue.
const PACE: Duration = Duration::from_millis(25);
/// Cost of the longest answer: one for the token of its prompt, and two for each generated token.
const ANSWER: u64 = 1 + 2 * LENGTHS[1] as u64;
/// The steps in which every adapter can get as much as the longest answer costs. As all of them begin together, those
/// with long answers are ahead at the same time and wait at the same time: shares are measured over whole rounds.
const ROUND: usize = ADAPTERS * ANSWER as usize / (2 * SEATS);
/// Rounds between the first one, in which adapters are loaded and nobody is overdue, and the last one.
const ROUNDS: usize = 4;
/// The time that all steps get on a machine that is busy with something else.
const LIMIT: Duration = Duration::from_secs(240);

/// Service of each slot's adapter so far, after each step.
fn costs(steps: &[Step]) -> Vec<[u64; ADAPTERS]> {
    let mut added = HashMap::new();
    let mut total = [0; ADAPTERS];
    let after = steps.iter().map(|step| {
        added.extend(step.added.iter().map(|new| (new.sequence, (new.members[0].slot, new.prompt_len))));
        for rows in &step.rows {
            let (slot, prompt) = added[&rows.sequence];
            let of_prompt = prompt.saturating_sub(rows.position).min(rows.rows);
            total[slot as usize] += u64::from(of_prompt) + 2 * u64::from(rows.sample);
        }
        total
    });
    after.collect()
}

/// The number of the adapter in each slot.
fn adapters(steps: &[Step]) -> HashMap<usize, usize> {
    let loads = steps.iter().flat_map(|step| &step.load);
    let number = |content: &[u8]| name_of(content).parse().unwrap();
    loads.map(|load| (load.slot as usize, number(&load.content))).collect()
}

#[tokio::test]
async fn adapters_that_always_wait_get_equal_shares_whatever_the_lengths_of_their_answers() {
    let mut script = Script::saying(tokens("a").repeat(64));
    script.info.num_slots = ADAPTERS as u32;
    script.info.max_sequences = SEATS as u32;
    script.pace = Some(PACE);
    let many = |config: &mut config::Config| config.router.max_concurrent_requests = 4 * ADAPTERS;
    let router = Router::start_with(script, many).await;
    // Each adapter has two requests open, so that one waits while the other is answered.
    let clients = (0..2 * ADAPTERS).map(async |client| {
        let adapter = client / 2;
        let length = LENGTHS[usize::from(adapter.is_multiple_of(2))];
        let body = json!({"inputs": "x", "parameters": {
            "adapter_id": adapter.to_string(), "max_new_tokens": length, "ignore_eos_token": true}});
        loop {
            router.ok("/generate", &body).await;
        }
    });
    let ran = |steps: &[Step]| (steps.len() >= (ROUNDS + 2) * ROUND).then_some(());
    tokio::select! {
        _ = join_all(clients) => {}
        () = router.shard.saw_within(LIMIT, |seen| ran(&seen.steps)) => {}
    }
    let (adapters, costs) = router.shard.saw(|seen| Some((adapters(&seen.steps), costs(&seen.steps)))).await;
    assert_eq!(adapters.len(), ADAPTERS, "each has a slot of its own");
    // From the average of one round to that of another.
    let sum = |steps: Range<usize>, slot: usize| costs[steps].iter().map(|costs| costs[slot]).sum::<u64>();
    let last = (ROUNDS + 1) * ROUND..(ROUNDS + 2) * ROUND;
    let got = |slot: usize| (sum(last.clone(), slot) - sum(ROUND..2 * ROUND, slot)) as f64 / ROUND as f64;
    let got: Vec<f64> = (0..ADAPTERS).map(got).collect();
    let half = |even: bool| -> f64 {
        let of_half = got.iter().enumerate().filter(|(slot, _)| adapters[slot].is_multiple_of(2) == even);
        of_half.map(|(_, got)| got).sum()
    };
    let (short, long) = (half(false), half(true));
    let least = got.iter().copied().fold(f64::INFINITY, f64::min);
    let most = got.iter().copied().fold(0.0, f64::max);
    let told = format!("short answers {short}, long ones {long}; one adapter {least} to {most}");
    println!("{told}");
    assert!((long / short - 1.0).abs() < 0.05, "{told}");
    // An answer that has begun runs to its end, and one may be admitted for its age.
    assert!(most - least <= 2.0 * ANSWER as f64, "{told}");
}
