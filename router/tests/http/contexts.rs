//! Long sequences of models whose attention has a window, or whose rotary frequencies depend on the length.

use proto::Step;
use serde_json::{Value, json};

use crate::{
    router::{Router, text, tokens},
    shard::Script,
};

/// A shard that gives so many tokens to every prompt, and them.
fn saying(count: usize) -> (Script, Vec<u32>) {
    let answer = tokens(" the").into_iter().cycle().take(count).collect::<Vec<_>>();
    (Script::saying(answer.clone()), answer)
}

fn ask(prompt: &str, answer: usize) -> Value {
    json!({"inputs": prompt, "parameters": {"max_new_tokens": answer}})
}

/// Blocks that a sequence holds at once, at most, if it gives back what its steps release.
fn most_held(steps: &[Step]) -> usize {
    let (mut sent, mut most) = (0, 0);
    for rows in steps.iter().flat_map(|step| &step.rows) {
        sent += rows.new_blocks.len();
        most = most.max(sent - rows.released_blocks as usize);
    }
    most
}

#[tokio::test]
async fn memory_of_a_window_is_enough_for_any_length() {
    // Blocks of 16 positions, positions that a row needs, rows of a step, and the tokens that are asked for.
    for (num_blocks, kv_window, max_rows, answer) in
        [(4, 16, 16, 300), (5, 32, 16, 500), (12, 32, 64, 300), (20, 100, 32, 700)]
    {
        let (mut script, said) = saying(answer);
        (script.info.num_blocks, script.info.kv_window) = (num_blocks, kv_window);
        script.info.max_rows = max_rows;
        let router = Router::start(script).await;
        let info: Value = router.get("/info").await.json().await.unwrap();
        assert_eq!(info["max_total_tokens"], 4096, "as many as the model has positions");
        let got = router.ok("/generate", &ask(&"a".repeat(120), answer)).await;
        assert_eq!(got["generated_text"], text(&said));
        let most = router.shard.saw(|seen| Some(most_held(&seen.steps))).await;
        assert!(most <= num_blocks as usize, "{most} of {num_blocks} blocks");
    }
    // Without one, all positions have to fit.
    let (mut script, _) = saying(1);
    script.info.num_blocks = 4;
    let router = Router::start(script).await;
    let info: Value = router.get("/info").await.json().await.unwrap();
    assert_eq!(info["max_total_tokens"], 65);
}

#[tokio::test]
async fn a_sequence_that_grows_past_the_original_context_is_added_again() {
    let prompt = "a".repeat(9);
    let len = tokens(&prompt).len();
    // The original context of LongRoPE or of dynamic scaling, and how often the sequence is added.
    for (switch, dynamic, times) in [
        (len + 6, 0, 2),
        (len, 0, 2),
        (len + 38, 0, 2),
        (len + 39, 0, 1),
        (len - 1, 0, 1),
        (0, len + 6, 1),
        (0, 0, 1),
    ] {
        let (mut script, said) = saying(40);
        (script.info.rope_switch, script.info.rope_dynamic) = (switch as u32, dynamic as u32);
        let router = Router::start(script).await;
        let got = router.ok("/generate", &ask(&prompt, 40)).await;
        assert_eq!(got["generated_text"], text(&said));
        let added =
            router.shard.saw(|seen| Some(seen.added().map(|new| new.tokens.len()).collect::<Vec<_>>()));
        let expected = [len, switch + 1];
        assert_eq!(added.await, expected[..times], "{switch} {dynamic}");
    }
}
