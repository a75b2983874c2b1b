//! A group of ranks: four scripted shards that act as one model, and one of them that does not.

use std::{collections::BTreeMap, time::Duration};

use config::Config;
use proto::{
    InfoResponse, PromptLogprobs, Sampled, ScoredToken, SlotEvent, StepResult, execute_event::Event,
};
use serde_json::{Value, json};
use tokio::time::timeout;
use tonic::Status;

use crate::{
    router::{PATIENCE, Router, content, tokens},
    shard::{Gate, Script, Seen, name_of},
};

const WORLD: usize = 4;

/// Four ranks that answer with "a" thirty times.
fn scripts() -> Vec<Script> {
    let script = |rank| {
        let mut script = Script::saying(tokens("a").repeat(30));
        (script.info.rank, script.info.world) = (rank, WORLD as u32);
        script
    };
    (0..WORLD as u32).map(script).collect()
}

async fn start(scripts: Vec<Script>) -> Router {
    start_with(scripts, |_| {}).await
}

async fn start_with(scripts: Vec<Script>, change: impl FnOnce(&mut Config)) -> Router {
    let router = Router::launch_ranks(scripts, change).await;
    timeout(PATIENCE, router.app.ready()).await.unwrap();
    router
}

fn ask(adapter: Option<&str>) -> Value {
    json!({"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 30}})
}

#[tokio::test]
async fn every_rank_is_told_the_same() {
    let router = start(scripts()).await;
    for adapter in [None, Some("sql"), Some("law")] {
        assert_eq!(router.ok("/generate", &ask(adapter)).await["generated_text"], "a".repeat(30));
    }
    let steps = router.shard.saw(|seen| Some(seen.steps.clone())).await;
    for rank in &router.ranks {
        let told = rank.saw(|seen| (seen.steps.len() >= steps.len()).then(|| seen.steps.clone())).await;
        assert_eq!(told[..steps.len()], steps);
        let (sessions, staged) = rank.saw(|seen| Some((seen.sessions.clone(), seen.staged.len()))).await;
        assert_eq!((sessions, staged), (vec![steps[0].session], 2));
    }
}

#[tokio::test]
async fn an_adapter_is_used_when_the_slowest_rank_has_it() {
    let router = start(scripts()).await;
    let gate = Gate::Load("sql".into());
    router.ranks[2].hold(gate.clone());
    let slow = async { router.ok("/generate", &ask(Some("sql"))).await };
    let others = async {
        router.ranks[2].saw(|seen| seen.steps.iter().any(|step| !step.load.is_empty()).then_some(())).await;
        router.ok("/generate", &ask(None)).await;
        router.ok("/generate", &ask(Some("law"))).await;
        let slots: Vec<_> = router.ranks.iter().map(|rank| rank.slots().len()).collect();
        assert_eq!(slots, [2, 2, 1, 2]);
        let used = |step: &proto::Step| {
            step.added.iter().any(|new| new.members.iter().any(|member| member.slot == 0))
        };
        assert!(!router.shard.saw(|seen| Some(seen.steps.iter().any(used))).await);
        router.ranks[2].release(&gate);
    };
    tokio::join!(slow, others);
}

#[tokio::test]
async fn a_load_that_fails_on_one_rank_is_undone_on_all() {
    let mut scripts = scripts();
    scripts[1].lost.insert("bad");
    let router = start(scripts).await;
    // The others have not even ended when it fails.
    router.ranks[3].hold(Gate::Load("bad".into()));
    let bad = ask(Some("bad"));
    let failing = async {
        let (status, body) = timeout(PATIENCE, router.post("/generate", &bad)).await.unwrap();
        assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
    };
    let release = async {
        router.ranks[1].saw(|seen| seen.steps.iter().any(|step| !step.load.is_empty()).then_some(())).await;
        router.ok("/generate", &ask(None)).await;
        router.ranks[3].release(&Gate::Load("bad".into()));
    };
    tokio::join!(failing, release);
    router.ok("/generate", &ask(None)).await;
    for rank in &router.ranks {
        rank.saw(|seen| seen.steps.iter().any(|step| step.unload == [0]).then_some(())).await;
        assert_eq!(rank.slots(), BTreeMap::new());
    }
    router.ok("/generate", &ask(Some("good"))).await;
    for rank in &router.ranks {
        assert_eq!(rank.slots().into_values().collect::<Vec<_>>(), ["good"]);
    }
}

#[tokio::test]
async fn the_end_of_any_rank_is_the_end_of_the_session() {
    for dying in 0..WORLD {
        let router = start(scripts()).await;
        router.shard.hold(Gate::Steps);
        let asked = ask(None);
        let request = router.post("/generate", &asked);
        let dies = async {
            router.shard.saw(|seen| seen.steps.first().map(|_| ())).await;
            router.ranks[dying].break_stream();
        };
        let ((status, body), ()) = timeout(PATIENCE, async { tokio::join!(request, dies) }).await.unwrap();
        assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{dying}: {body}");
        router.shard.release(&Gate::Steps);
        let mut sessions = Vec::new();
        for rank in &router.ranks {
            sessions.push(rank.saw(|seen| (seen.sessions.len() == 2).then(|| seen.sessions.clone())).await);
        }
        assert!(sessions.iter().all(|numbers| *numbers == sessions[0] && numbers[0] < numbers[1]));
        router.health(200, "").await;
        router.ok("/generate", &ask(Some("sql"))).await;
    }
}

#[tokio::test]
async fn events_of_an_older_session_change_nothing() {
    let mut scripts = scripts();
    scripts.iter_mut().for_each(|script| script.echoes = true);
    let router = start(scripts).await;
    for adapter in [None, Some("sql"), Some("law"), Some("sql")] {
        assert_eq!(router.ok("/generate", &ask(adapter)).await["generated_text"], "a".repeat(30));
    }
    for rank in &router.ranks {
        assert_eq!(rank.saw(|seen| Some(seen.sessions.len())).await, 1);
    }
}

#[tokio::test]
async fn ranks_that_contradict_each_other_do_not_serve() {
    type Change = fn(&mut InfoResponse);
    let cases: [(Change, &str); 17] = [
        (|info| info.rank = 1, "the socket of rank 2 says that it is rank 1"),
        (|info| info.rank = 77, "the socket of rank 2 says that it is rank 77"),
        (|info| info.world = 1, "rank 2 is one of 1, but the configuration names 4"),
        (|info| info.world = 8, "rank 2 is one of 8, but the configuration names 4"),
        (|info| info.vocab_size = 321, "`vocab_size` is 320 on rank 0 and 321 on rank 2"),
        (|info| info.eos_token_ids = vec![1], "`eos_token_ids` is [1, 3] on rank 0 and [1] on rank 2"),
        (|info| info.dtype = "bfloat16".into(), "`dtype` is \\\"float32\\\" on rank 0 and \\\"bfloat16\\\""),
        (|info| info.block_size = 32, "`block_size` is 16 on rank 0 and 32 on rank 2"),
        (|info| info.max_positions = 8, "`max_positions` is 4096 on rank 0 and 8 on rank 2"),
        (|info| info.kv_window = 128, "`kv_window` is 0 on rank 0 and 128 on rank 2"),
        (|info| info.rope_switch = 4096, "`rope_switch` is 0 on rank 0 and 4096 on rank 2"),
        (|info| info.rope_dynamic = 2048, "`rope_dynamic` is 0 on rank 0 and 2048 on rank 2"),
        (|info| info.num_blocks = 0, "`num_blocks` is 0 on rank 2"),
        (|info| info.max_rows = 0, "`max_rows` is 0 on rank 2"),
        (|info| info.max_sequences = 0, "`max_sequences` is 0 on rank 2"),
        (|info| info.max_logit_rows = 0, "`max_logit_rows` is 0 on rank 2"),
        (|info| info.vocab_size = 0, "`vocab_size` is 0 on rank 2"),
    ];
    for (change, words) in cases {
        let mut scripts = scripts();
        change(&mut scripts[2].info);
        let router = Router::launch_ranks(scripts, |_| {}).await;
        router.health(503, words).await;
        let (status, _) = router.post("/generate", &ask(None)).await;
        assert_eq!(status.as_u16(), 503, "{words}");
        assert_eq!(router.shard.saw(|seen| Some(seen.sessions.len())).await, 0, "{words}");
    }
}

#[tokio::test]
async fn a_shard_without_room_is_no_model() {
    type Change = fn(&mut proto::InfoResponse);
    let limits: [(&str, Change); 7] = [
        ("num_blocks", |info| info.num_blocks = 0),
        ("block_size", |info| info.block_size = 0),
        ("max_positions", |info| info.max_positions = 0),
        ("vocab_size", |info| info.vocab_size = 0),
        ("max_rows", |info| info.max_rows = 0),
        ("max_sequences", |info| info.max_sequences = 0),
        ("max_logit_rows", |info| info.max_logit_rows = 0),
    ];
    for (name, change) in limits {
        let mut script = Script::saying(tokens("a"));
        change(&mut script.info);
        let router = Router::launch(script, |_| {}).await;
        router.health(503, &format!("`{name}` is 0 on rank 0")).await;
        assert_eq!(router.get("/info").await.status(), 503);
        assert_eq!(*router.failures.lock().unwrap(), []);
    }
}

#[tokio::test]
async fn of_each_limit_the_smallest_holds() {
    let mut scripts = scripts();
    scripts[1].info.num_blocks = 100;
    scripts[2].info.num_slots = 3;
    scripts[3].info.max_rows = 8;
    (scripts[1].info.adapter_bytes, scripts[3].info.adapter_bytes) = (5000, 1500);
    scripts[2].adapter_bytes = 1501;
    let router = start(scripts).await;
    let info: Value = router.get("/info").await.json().await.unwrap();
    assert_eq!((&info["max_batch_total_tokens"], &info["max_active_adapters"]), (&json!(1600), &json!(3)));
    router.ok("/generate", &json!({"inputs": "a".repeat(40)})).await;
    let rows = |step: &proto::Step| step.rows.iter().map(|rows| rows.rows).sum::<u32>();
    assert_eq!(router.shard.saw(|seen| seen.steps.iter().map(rows).max()).await, 8);
    // An adapter takes as much room as where it takes the most.
    let (status, body) = router.post("/generate", &ask(Some("large"))).await;
    assert_eq!(status.as_u16(), 422, "{body}");
    assert!(body["error"].as_str().unwrap().contains("takes 1501 bytes"), "{body}");
}

#[tokio::test]
async fn an_adapter_is_on_all_ranks_or_on_none() {
    let mut scripts = scripts();
    scripts[3].unstageable.insert("torn", Status::invalid_argument("it is torn"));
    scripts[2].unstageable.insert("large", Status::unavailable("there is no memory"));
    let router = start(scripts).await;
    for (adapter, status, words) in [("torn", 422, "it is torn"), ("large", 503, "there is no memory")] {
        let (got, body) = router.post("/generate", &ask(Some(adapter))).await;
        assert_eq!(got.as_u16(), status, "{body}");
        assert!(body["error"].as_str().unwrap().contains(words), "{body}");
    }
    router.ok("/generate", &ask(Some("sound"))).await;
    for rank in &router.ranks {
        assert_eq!(rank.host(), ["sound"]);
    }
}

#[tokio::test]
async fn one_rank_that_does_not_stage_in_time_is_too_late() {
    let soon = |config: &mut Config| config.router.prepare_timeout = Duration::from_millis(100);
    let router = start_with(scripts(), soon).await;
    router.ranks[3].hold(Gate::Stage("cold".into()));
    let (status, body) = timeout(PATIENCE, router.post("/generate", &ask(Some("cold")))).await.unwrap();
    assert_eq!(status.as_u16(), 504, "{body}");
    assert!(body["error"].as_str().unwrap().contains("was not ready within 0.1 s"), "{body}");
    router.ok("/generate", &ask(None)).await;
}

#[tokio::test]
async fn any_rank_that_hangs_is_the_group_that_hangs() {
    let soon = |config: &mut Config| config.router.step_timeout = Some(Duration::from_millis(300));
    for gate in [Gate::Health, Gate::Attach] {
        let router = start_with(scripts(), soon).await;
        router.ranks[3].hold(gate.clone());
        if gate == Gate::Attach {
            router.ranks[1].break_stream();
        }
        router.health(503, "rank 3 did not answer").await;
        router.ranks[3].release(&gate);
        router.health(200, "").await;
    }
    let router = start_with(scripts(), soon).await;
    router.ranks[1].set_oldest_work(Some(1000));
    router.health(503, "rank 1 has been at one piece of work").await;
}

fn sampled(token: Option<proto::Token>) -> Event {
    let tokens = vec![Sampled { sequence: 0, token, top: Vec::new() }];
    Event::Step(StepResult { id: 1, tokens, ..StepResult::default() })
}

fn slot(slot: u32, content: Vec<u8>) -> Event {
    Event::Slot(SlotEvent { slot, content, error: String::new() })
}

#[tokio::test]
async fn an_event_against_the_protocol_ends_the_session_with_a_word() {
    let step = |id| Event::Step(StepResult { id, ..StepResult::default() });
    let prompt = |tokens| {
        let prompt = vec![PromptLogprobs { sequence: 0, position: 5, tokens }];
        Event::Step(StepResult { id: 1, prompt, ..StepResult::default() })
    };
    let missing = vec![ScoredToken::default()];
    let cases = [
        (0, None, "rank 0 sent an event without content"),
        (3, None, "rank 3 sent an event without content"),
        (0, Some(slot(0, vec![1; 31])), "rank 0 sent a content hash of 31 bytes"),
        (2, Some(slot(0, Vec::new())), "rank 2 sent a content hash of 0 bytes"),
        (0, Some(slot(0, vec![1; 33])), "rank 0 sent a content hash of 33 bytes"),
        (1, Some(slot(0, vec![7; 32])), "rank 1 reported adapter 07070707 in slot 0"),
        (0, Some(slot(9999, vec![7; 32])), "rank 0 reported adapter 07070707 in slot 9999"),
        (0, Some(sampled(None)), "step 1 has no token for sequence 0"),
        (0, Some(prompt(missing)), "step 1 has no token for position 5 of the prompt of sequence 0"),
        (0, Some(step(0)), "rank 0 answered step 0 instead of step 1"),
        (0, Some(step(2)), "rank 0 answered step 2 instead of step 1"),
        (0, Some(step(u64::MAX)), "rank 0 answered step 18446744073709551615 instead of step 1"),
        (1, Some(step(1)), "rank 1 answered a step, which only rank 0 does"),
    ];
    for (rank, event, words) in cases {
        let router = start(scripts()).await;
        router.shard.hold(Gate::Steps);
        let asked = ask(None);
        let running = router.post("/generate", &asked);
        let breaks = async {
            router.shard.saw(|seen| seen.steps.first().map(|_| ())).await;
            router.shard.hold(Gate::Info);
            router.ranks[rank].inject(event.clone()).await;
        };
        let ((status, body), ()) = timeout(PATIENCE, async { tokio::join!(running, breaks) }).await.unwrap();
        assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{words}: {body}");
        router.health(503, words).await;
        router.shard.release(&Gate::Info);
        router.shard.release(&Gate::Steps);
        router.health(200, "").await;
        router.ok("/generate", &ask(None)).await;
    }
}

#[tokio::test]
async fn a_load_reported_twice_ends_the_session() {
    let router = start(scripts()).await;
    router.ok("/generate", &ask(Some("sql"))).await;
    router.shard.hold(Gate::Info);
    let sql = content("sql");
    let shown: String = sql[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    router.ranks[2].inject(Some(slot(0, sql))).await;
    let words = format!("rank 2 reported adapter {shown} in slot 0, which it was not loading");
    router.health(503, &words).await;
}

/// Loads that a rank was told to do so far, by adapter.
async fn loads(router: &Router, rank: usize) -> Vec<String> {
    let loads = |step: &proto::Step| step.load.iter().map(|load| name_of(&load.content)).collect::<Vec<_>>();
    router.ranks[rank].saw(|seen| Some(seen.steps.iter().flat_map(loads).collect())).await
}

#[tokio::test]
async fn a_new_router_finds_the_adapters_where_the_old_one_left_them() {
    let mut router = start(scripts()).await;
    for adapter in ["sql", "law"] {
        router.ok("/generate", &ask(Some(adapter))).await;
    }
    let slots: Vec<_> = router.ranks.iter().map(|rank| rank.slots()).collect();
    assert_eq!(slots[0].len(), 2);
    for life in 2..4 {
        router = router.restart().await;
        for adapter in [Some("law"), None, Some("sql")] {
            router.ok("/generate", &ask(adapter)).await;
        }
        for (rank, slots) in slots.iter().enumerate() {
            assert_eq!(
                loads(&router, rank).await,
                ["sql", "law"],
                "loaded once in {life} lives of the router"
            );
            assert_eq!(router.ranks[rank].slots(), *slots);
            assert_eq!(router.ranks[rank].saw(|seen| Some(seen.sessions.len())).await, life);
        }
    }
    // The new router knows what the slots hold well enough to make room.
    for adapter in ["a", "b", "c", "d", "sql"] {
        router.ok("/generate", &ask(Some(adapter))).await;
    }
}

#[tokio::test]
async fn a_slot_is_kept_if_all_ranks_hold_the_same_in_it() {
    type Change = fn(&mut [Script]);
    // "sql" is in slot 1 everywhere; the others are changed on some rank. Which slots are emptied, and what is loaded
    // when "sql" and "law" are asked for.
    let cases: [(Change, &[u32], &[&str]); 9] = [
        (|_| {}, &[], &[]),
        (|scripts| _ = scripts[3].filled.remove(&2), &[2], &["law"]),
        (|scripts| _ = scripts[0].filled.remove(&2), &[2], &["law"]),
        (|scripts| _ = scripts[1].filled.insert(2, "tax"), &[2], &["law"]),
        (|scripts| _ = scripts[0].filled.insert(2, "tax"), &[2], &["law"]),
        (|scripts| _ = scripts[2].filled.insert(3, "tax"), &[3], &[]),
        (|scripts| scripts.iter_mut().for_each(|script| _ = script.filled.insert(3, "law")), &[3], &[]),
        (|scripts| scripts.iter_mut().for_each(|script| script.filled.clear()), &[], &["law", "sql"]),
        (|scripts| scripts[3].filled.clear(), &[1, 2], &["law", "sql"]),
    ];
    for (case, (change, emptied, loaded)) in cases.into_iter().enumerate() {
        let mut scripts = scripts();
        for script in &mut scripts {
            script.filled = BTreeMap::from([(1, "sql"), (2, "law")]);
        }
        change(&mut scripts);
        let router = start(scripts).await;
        router.ok("/generate", &ask(None)).await;
        for adapter in ["sql", "law"] {
            router.ok("/generate", &ask(Some(adapter))).await;
        }
        for rank in 0..WORLD {
            let unloads = |step: &proto::Step| step.unload.clone();
            let first = router.ranks[rank].saw(|seen| seen.steps.first().map(unloads)).await;
            assert_eq!(first, emptied, "case {case}, rank {rank}");
            let mut loads = loads(&router, rank).await;
            loads.sort_unstable();
            assert_eq!(loads, loaded, "case {case}, rank {rank}");
            assert_eq!(router.ranks[rank].saw(|seen| Some(seen.sessions.len())).await, 1, "case {case}");
        }
    }
}

#[tokio::test]
async fn slots_that_not_all_ranks_have_are_emptied_by_those_that_have_them() {
    // The slots that each rank has, and those of them that hold an adapter.
    type Rank = (u32, &'static [u32]);
    let cases: [[Rank; WORLD]; 4] = [
        [(4, &[1]), (4, &[1]), (4, &[1]), (9, &[1, 8])],
        [(9, &[1, 4, 8]), (4, &[1]), (4, &[1]), (4, &[1])],
        [(5, &[1, 4]), (9, &[1, 4, 5, 8]), (4, &[1, 3]), (5, &[1])],
        [(9, &[1, 8]), (9, &[1, 8]), (9, &[1, 8]), (8, &[1])],
    ];
    for ranks in cases {
        let mut scripts = scripts();
        for (script, (num_slots, filled)) in scripts.iter_mut().zip(ranks) {
            script.info.num_slots = num_slots;
            script.filled =
                filled.iter().map(|slot| (*slot, if *slot == 1 { "sql" } else { "tax" })).collect();
        }
        let router = start(scripts).await;
        for adapter in [None, Some("sql"), Some("law"), Some("tax")] {
            router.ok("/generate", &ask(adapter)).await;
        }
        let common = ranks.iter().map(|(num_slots, _)| *num_slots).min().unwrap();
        // Those of slot 3 are stale on all ranks if one of them holds something there.
        let stale = ranks.iter().any(|(_, filled)| filled.contains(&3)).then_some(3);
        for (rank, (_, filled)) in ranks.into_iter().enumerate() {
            let beyond = filled.iter().copied().filter(|slot| *slot >= common);
            let expected: Vec<u32> = stale.into_iter().chain(beyond).collect();
            let unloads =
                |seen: &Seen| Some(seen.steps.iter().flat_map(|step| step.unload.clone()).collect());
            let unloads: Vec<u32> = router.ranks[rank].saw(unloads).await;
            assert_eq!(unloads, expected, "{ranks:?}, rank {rank}");
            let slots = router.ranks[rank].slots();
            assert!(slots.keys().all(|slot| *slot < common), "{ranks:?}, rank {rank}: {slots:?}");
            assert_eq!(slots.len(), 3, "{ranks:?}, rank {rank}: {slots:?}");
        }
    }
}

#[tokio::test]
async fn adapters_that_do_not_fit_any_more_leave_their_slots() {
    let mut scripts = scripts();
    for script in &mut scripts {
        script.filled = BTreeMap::from([(0, "sql"), (1, "law"), (3, "tax")]);
    }
    // On one rank there is less room, and on another an adapter takes more of it.
    (scripts[2].info.adapter_bytes, scripts[1].adapter_bytes) = (2500, 1200);
    let router = start(scripts).await;
    router.ok("/generate", &ask(None)).await;
    for rank in &router.ranks {
        assert_eq!(rank.saw(|seen| seen.steps.first().map(|step| step.unload.clone())).await, [3]);
        assert_eq!(rank.slots().len(), 2);
    }
}
