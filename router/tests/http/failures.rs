//! The shard fails: who is told, and what comes after.

use std::time::{Duration, Instant};

use config::Config;
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    router::{PATIENCE, Router, events, tokens},
    shard::{Gate, IMPROBABLE, Script},
};

async fn unavailable(router: &Router) {
    let (status, body) = router.post("/generate", &json!({"inputs": "x"})).await;
    assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")));
    let (status, body) = router.post("/v1/completions", &json!({"prompt": "x"})).await;
    assert_eq!((status.as_u16(), &body["error"]["type"]), (503, &json!("server_error")));
    assert_eq!(body["error"]["code"], "unavailable");
    for path in ["/health", "/", "/info"] {
        let response = router.get(path).await;
        assert_eq!(response.status(), 503, "{path}");
        assert!(response.json::<Value>().await.unwrap()["error"].is_string(), "{path}");
    }
    assert_eq!(router.get("/v1/models").await.status(), 200);
}

#[tokio::test]
async fn until_the_shard_is_there_requests_are_answered_all_the_same() {
    let mut script = Script::saying(tokens("a"));
    script.held.insert(Gate::Info);
    let router = Router::launch(script, |_| {}).await;
    unavailable(&router).await;
    router.shard.release(&Gate::Info);
    router.app.ready().await;
    router.ok("/generate", &json!({"inputs": "x"})).await;
    assert_eq!(router.get("/health").await.status(), 200);
}

#[tokio::test]
async fn a_broken_stream_fails_what_runs_and_starts_anew() {
    let router = Router::start(Script::saying(tokens("a").repeat(1000))).await;
    router.shard.hold(Gate::Steps);
    let body = json!({"inputs": "A", "parameters": {"max_new_tokens": 900}});
    let native = router.begin("/generate_stream", &body);
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": true});
    let openai = router.begin("/v1/chat/completions", &chat);
    router.holds(2).await;
    router.shard.hold(Gate::Step(20));
    router.shard.release(&Gate::Steps);
    let (native, openai) = (native.await.unwrap(), openai.await.unwrap());
    let third = json!({"inputs": "B", "parameters": {"max_new_tokens": 900}});
    let whole = router.post("/generate", &third);
    let breaks = async {
        router.holds(3).await;
        router.shard.hold(Gate::Info);
        router.shard.break_stream();
        let native = events(&native.text().await.unwrap());
        assert_eq!(native.last().unwrap()["error_type"], "unavailable", "{native:?}");
        let openai = events(&openai.text().await.unwrap());
        let [.., error, done] = &openai[..] else { panic!("{openai:?}") };
        assert_eq!((&error["error"]["code"], done), (&json!("unavailable"), &json!("[DONE]")));
    };
    let ((status, body), ()) = tokio::join!(whole, breaks);
    assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
    unavailable(&router).await;
    router.shard.release(&Gate::Info);
    router.shard.release(&Gate::Step(20));
    router.shard.saw(|seen| (seen.sessions.len() == 2).then_some(())).await;
    // The engine goes on shortly after the shard has seen the new session.
    router.health(200, "").await;
    let answer = router.ok("/generate", &json!({"inputs": "C"})).await;
    assert_eq!(answer["generated_text"].as_str().unwrap().len(), 1000);
    let first = router.shard.saw(|seen| {
        let at = seen.steps.iter().rposition(|step| step.id == 1)?;
        (at > 0).then_some(seen.steps[at].added.len())
    });
    assert_eq!(first.await, 1, "steps count from 1 again, and nothing of before is there");
}

#[tokio::test]
async fn a_request_that_waits_is_told_too() {
    let mut script = Script::saying(tokens("a").repeat(1000));
    script.info.max_sequences = 1;
    let router = Router::start(script).await;
    router.shard.hold(Gate::Step(5));
    let body = |prompt: &str| json!({"inputs": prompt, "parameters": {"max_new_tokens": 900}});
    let running = router.send("/generate_stream", &body("A")).await;
    let waiting = router.begin("/generate_stream", &body("B"));
    router.holds(2).await;
    router.shard.hold(Gate::Info);
    router.shard.break_stream();
    let events = events(&running.text().await.unwrap());
    assert_eq!(events.last().unwrap()["error_type"], "unavailable");
    let waiting = waiting.await.unwrap();
    assert_eq!(waiting.status(), 503, "nothing of its answer was sent");
    assert_eq!(waiting.json::<Value>().await.unwrap()["error_type"], "unavailable");
}

#[tokio::test]
async fn a_list_of_prompts_begins_as_a_whole() {
    const STEPS: usize = 1100;
    let router = Router::start(Script::saying(tokens("a").repeat(2 * STEPS))).await;
    // Leaves the adapter in its slot and no step in flight.
    router.ok("/v1/completions", &json!({"model": "sql", "prompt": "A", "max_tokens": 1})).await;
    let before = router.shard.saw(|seen| Some(seen.steps.len())).await;
    for stream in [false, true] {
        let body = json!({"model": "sql", "prompt": ["A", "A"], "max_tokens": STEPS, "stream": stream});
        let ran = router.shard.saw(|seen| (seen.steps.len() >= before + STEPS).then_some(()));
        let texts: Vec<String> = if stream {
            let (events, ()) = tokio::join!(router.events("/v1/completions", &body), ran);
            let text = |index| {
                let choices = events.iter().filter_map(|event| event["choices"].get(0));
                let own = choices.filter(|choice| choice["index"] == index);
                own.map(|choice| choice["text"].as_str().unwrap()).collect()
            };
            vec![text(0), text(1)]
        } else {
            let (answer, ()) = tokio::join!(router.ok("/v1/completions", &body), ran);
            let choices = answer["choices"].as_array().unwrap().iter();
            choices.map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(texts, ["a".repeat(STEPS), "a".repeat(STEPS)], "stream: {stream}");
    }
}

/// A router that takes a shard to hang soon.
async fn impatient(script: Script) -> Router {
    let router =
        Router::launch(script, |config| config.router.step_timeout = Some(Duration::from_millis(300))).await;
    timeout(PATIENCE, router.app.ready()).await.unwrap();
    router
}

#[tokio::test]
async fn a_shard_that_hangs_in_a_step_fails_what_runs_and_what_waits() {
    let mut script = Script::saying(tokens("a"));
    script.info.max_sequences = 1;
    let router = impatient(script).await;
    router.shard.hold(Gate::Steps);
    let (one, two) = (json!({"inputs": "one"}), json!({"inputs": "two"}));
    let began = Instant::now();
    let answers = async { tokio::join!(router.post("/generate", &one), router.post("/generate", &two)) };
    let (one, two) = timeout(PATIENCE, answers).await.unwrap();
    for (status, body) in [one, two] {
        assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
    }
    assert!(began.elapsed() >= Duration::from_millis(300));
    // The shard is reachable, so the router begins anew, and finds it well once it is.
    router.shard.saw(|seen| (seen.sessions.len() > 1).then_some(())).await;
    router.shard.release(&Gate::Steps);
    router.health(200, "").await;
    router.ok("/generate", &json!({"inputs": "x"})).await;
}

#[tokio::test]
async fn a_shard_that_hangs_is_unhealthy() {
    for (gate, words) in [(Gate::Health, "did not answer Health"), (Gate::Attach, "did not answer Attach")] {
        let router = impatient(Script::saying(tokens("a"))).await;
        router.shard.hold(gate.clone());
        if gate == Gate::Attach {
            router.shard.break_stream();
        }
        let began = Instant::now();
        router.health(503, words).await;
        assert!(began.elapsed() < Duration::from_millis(300) + Duration::from_secs(2), "{gate:?}");
        let (status, body) = router.post("/generate", &json!({"inputs": "x"})).await;
        assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
        assert_eq!(router.get("/").await.status(), 503);
        router.shard.release(&gate);
        router.health(200, "").await;
        router.ok("/generate", &json!({"inputs": "x"})).await;
    }
}

#[tokio::test]
async fn a_step_loop_that_hangs_is_unhealthy_though_its_process_answers() {
    let router = impatient(Script::saying(tokens("a"))).await;
    router.shard.set_oldest_work(Some(299));
    router.shard.saw(|seen| (seen.health > 3).then_some(())).await;
    assert_eq!(router.get("/health").await.status(), 200);
    router.shard.set_oldest_work(Some(301));
    router.health(503, "at one piece of work for 301ms").await;
    router.shard.set_oldest_work(None);
    router.health(200, "").await;
}

#[tokio::test]
async fn a_load_that_never_ends_ends_the_session() {
    let soon = |config: &mut Config| config.router.prepare_timeout = Duration::from_millis(300);
    let router = Router::start_with(Script::saying(tokens("a")), soon).await;
    router.shard.hold(Gate::Load("sql".into()));
    let ask = json!({"inputs": "x", "parameters": {"adapter_id": "sql"}});
    let (status, body) = timeout(PATIENCE, router.post("/generate", &ask)).await.unwrap();
    assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
    router.shard.saw(|seen| (seen.sessions.len() == 2).then_some(())).await;
    router.shard.release(&Gate::Load("sql".into()));
    router.health(200, "").await;
    router.ok("/generate", &ask).await;
}

#[tokio::test]
async fn an_adapter_that_takes_too_long_gives_its_permit_back() {
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.prepare_timeout = Duration::from_millis(100);
        config.router.max_concurrent_requests = 1;
    });
    let router = router.await;
    router.shard.hold(Gate::Stage("cold".into()));
    let ask = json!({"inputs": "x", "parameters": {"adapter_id": "cold"}});
    let (status, body) = timeout(PATIENCE, router.post("/generate", &ask)).await.unwrap();
    assert_eq!(status.as_u16(), 504, "{body}");
    let error = body["error"].as_str().unwrap();
    assert!(error.contains("was not ready within 0.1 s"), "{error}");
    router.ok("/generate", &json!({"inputs": "x"})).await;
    router.shard.release(&Gate::Stage("cold".into()));
    router.ok("/generate", &ask).await;
}

#[tokio::test]
async fn what_a_shard_refuses_fails_alone() {
    let mut script = Script::saying(tokens("a").repeat(30));
    script.untaken.insert(tokens("x")[0]);
    let router = Router::start(script).await;
    router.shard.hold(Gate::Steps);
    let others =
        ["A", "B", "C"].map(|prompt| json!({"inputs": prompt, "parameters": {"max_new_tokens": 20}}));
    let refused = [
        ("/generate", json!({"inputs": "x"}), 422),
        ("/v1/completions", json!({"prompt": "x"}), 400),
        ("/v1/completions", json!({"prompt": tokens("x")}), 400),
        ("/v1/completions", json!({"prompt": ["x"]}), 400),
    ];
    let release = async {
        router.shard.saw(|seen| (!seen.steps.is_empty()).then_some(())).await;
        router.shard.release(&Gate::Steps);
    };
    let good = join_all(others.iter().map(|body| router.ok("/generate", body)));
    let bad = join_all(refused.iter().map(|(path, body, _)| router.post(path, body)));
    let (good, bad, ()) = tokio::join!(good, bad, release);
    for answer in good {
        assert_eq!(answer["generated_text"].as_str().unwrap().len(), 20);
    }
    for ((path, _, expected), (status, body)) in refused.iter().zip(bad) {
        assert_eq!(status.as_u16(), *expected, "{path}: {body}");
        assert!(body.to_string().contains("the shard has no use for token"), "{path}: {body}");
    }
    assert_eq!(router.shard.saw(|seen| Some(seen.sessions.len())).await, 1, "nobody else's step failed");
}

/// Clients that leave all at once leave nothing behind, whether they run, wait, or have only just come.
#[tokio::test]
async fn clients_that_leave_together_are_all_forgotten() {
    let mut script = Script::saying(tokens("a").repeat(2000));
    script.info.max_sequences = 2;
    let router = Router::start_with(script, |config| config.router.max_concurrent_requests = 3000).await;
    router.shard.hold(Gate::Steps);
    let body = |i: usize| json!({"inputs": format!("{i}"), "parameters": {"max_new_tokens": 1500}});
    let all = join_all((0..1500).map(async |i| router.send("/generate_stream", &body(i)).await));
    let mut held = router.app.permits_held();
    tokio::select! {
        _ = all => panic!("no step has run"),
        all = timeout(PATIENCE, held.wait_for(|held| *held == 1500)) => drop(all.unwrap().unwrap()),
    }
    // Their connections are closed by now.
    timeout(PATIENCE, held.wait_for(|held| *held == 0)).await.unwrap().unwrap();
    router.shard.release(&Gate::Steps);
    // Whoever comes now is served at once: none of the others runs even its first token.
    let begun = router.shard.saw(|seen| Some(seen.added().count())).await;
    timeout(PATIENCE, router.ok("/generate", &json!({"inputs": "x", "parameters": {"max_new_tokens": 1}})))
        .await
        .unwrap();
    let after = router.shard.saw(|seen| Some(seen.added().count())).await;
    assert!(after <= begun + 3, "{begun} had begun before, {after} in all");
}

#[tokio::test]
async fn what_is_not_computed_with_numbers_is_not_an_answer() {
    let said = [tokens("a"), vec![IMPROBABLE], tokens("a")].concat();
    let router = Router::start(Script::saying(said)).await;
    let body = json!({"inputs": "x", "parameters": {"max_new_tokens": 3, "ignore_eos_token": true}});
    let (status, answer) = router.post("/generate", &body).await;
    assert_eq!(status.as_u16(), 424);
    let error = "Request failed during generation: the logits are not numbers";
    assert_eq!(answer, json!({"error": error, "error_type": "generation"}));
    assert_eq!(router.get("/health").await.status(), 200);
}
