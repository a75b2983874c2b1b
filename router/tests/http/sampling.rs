//! Every parameter of sampling travels from the bodies of both dialects to the message.

use serde_json::{Value, json};

use crate::{
    router::{Router, tokens},
    shard::Script,
};

/// The sampling parameters that reach the shard with the last of these requests.
async fn told(router: &Router, path: &str, body: &Value) -> proto::Sampling {
    router.ok(path, body).await;
    router.shard.saw(|seen| seen.added().last()?.sampling.clone()).await
}

async fn native(router: &Router, name: &str, value: Value) -> proto::Sampling {
    told(router, "/generate", &json!({"inputs": "x", "parameters": {name: value}})).await
}

async fn completion(router: &Router, name: &str, value: Value) -> proto::Sampling {
    told(router, "/v1/completions", &json!({"prompt": "x", name: value})).await
}

async fn chat(router: &Router, name: &str, value: Value) -> proto::Sampling {
    let messages = json!([{"role": "user", "content": "x"}]);
    told(router, "/v1/chat/completions", &json!({"messages": messages, name: value})).await
}

macro_rules! check_each {
    ({ $router:ident } $(
        $(#[$doc:meta])*
        $name:ident: $type:ty { off: $off:expr, default: $default:expr, draws: $draws:expr, range: $range:ident($($bound:expr),*), example: $example:expr }
    )*) => { $({
        let name = stringify!($name);
        let (example, off, default): ($type, $type, $type) = ($example, $off, $default);
        assert_eq!(native(&$router, name, json!(example)).await.$name, example, "{name}");
        assert_eq!(completion(&$router, name, json!(example)).await.$name, example, "{name}");
        assert_eq!(chat(&$router, name, json!(example)).await.$name, example, "{name}");
        // A null is the same as nothing; LoRAX's requests take the most probable token, and OpenAI's draw.
        assert_eq!(native(&$router, name, Value::Null).await.$name, off, "{name}");
        assert_eq!(completion(&$router, name, Value::Null).await.$name, default, "{name}");
        let drawn = native(&$router, "do_sample", json!(true)).await;
        assert_eq!(drawn.$name, default, "{name}");
        let warm = native(&$router, name, json!(example)).await.temperature > 0.0;
        assert_eq!(warm, $draws, "naming {name} asks for a draw");
    })* };
}

#[tokio::test]
async fn every_parameter_reaches_the_shard() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    sampling::parameters!(check_each { router });
}

#[tokio::test]
async fn seeds_are_taken_or_drawn() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    assert_eq!(native(&router, "seed", json!(7)).await.seed, 7);
    assert_eq!(completion(&router, "seed", json!(-1)).await.seed, u64::MAX);
    let (one, other) = (chat(&router, "seed", Value::Null).await, chat(&router, "seed", Value::Null).await);
    assert_ne!(one.seed, other.seed);
}

#[tokio::test]
async fn a_seed_is_told_if_something_was_drawn() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for (parameters, seed) in [
        (json!({}), Value::Null),
        (json!({"seed": 7}), Value::Null),
        (json!({"seed": 7, "temperature": 0}), Value::Null),
        (json!({"seed": 7, "repetition_penalty": 1.5}), Value::Null),
        (json!({"seed": 7, "do_sample": false}), Value::Null),
        (json!({"seed": 7, "do_sample": true}), json!(7)),
        (json!({"seed": 7, "temperature": 0.5}), json!(7)),
        (json!({"seed": 7, "top_k": 5}), json!(7)),
        (json!({"seed": 7, "top_p": 0.5}), json!(7)),
        (json!({"seed": 7, "typical_p": 0.5}), json!(7)),
        (json!({"seed": 7, "min_p": 0.5}), json!(7)),
    ] {
        let mut parameters = parameters.clone();
        parameters["details"] = json!(true);
        let body = json!({"inputs": "x", "parameters": parameters});
        assert_eq!(router.ok("/generate", &body).await["details"]["seed"], seed, "{parameters}");
        let events = router.events("/generate_stream", &body).await;
        assert_eq!(events.last().unwrap()["details"]["seed"], seed, "streamed, {parameters}");
    }
    let body = json!({"inputs": "x", "parameters": {"details": true, "do_sample": true}});
    assert!(router.ok("/generate", &body).await["details"]["seed"].is_u64());
}
