//! Adapters that begin to act at an invocation (aLoRA), against PEFT, and the KV blocks that they share with the base model.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use futures::future::join_all;
use integration_tests::server::{Server, fixtures};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The largest difference of a log-probability.
const BAR: f64 = 2e-3;

/// Writes one of the adapters of `tiny/` with an invocation.
fn write(folder: &Path, adapter: &str, invocation: &Value) {
    let own = fixtures().join("tiny/adapters").join(adapter);
    fs::create_dir(folder).unwrap();
    fs::copy(own.join("adapter_model.safetensors"), folder.join("adapter_model.safetensors")).unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(own.join("adapter_config.json")).unwrap()).unwrap();
    config["alora_invocation_tokens"] = invocation.clone();
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

fn start(adapters: &Path, flags: &[&str]) -> Server {
    let own = ["--kv-memory", "16MiB", "--dtype", "float32"];
    let model = fixtures().join("tiny/model").canonicalize().unwrap();
    Server::start_with(&model, adapters, &[&own[..], flags].concat()).unwrap()
}

/// Tokens with their log-probabilities.
type Scored = Vec<(u64, f64)>;

fn scored(list: &Value) -> Scored {
    let one = |token: &Value| (token["id"].as_u64().unwrap(), token["logprob"].as_f64().unwrap_or_default());
    list.as_array().unwrap().iter().map(one).collect()
}

/// The prompt and 16 greedy tokens.
async fn answer(server: &Server, adapter: Option<&str>, text: &str) -> (Scored, Scored) {
    let mut parameters = json!({"max_new_tokens": 16, "details": true, "decoder_input_details": true});
    parameters["ignore_eos_token"] = json!(true);
    parameters["adapter_id"] = json!(adapter);
    let answer = server.post("/generate", &json!({"inputs": text, "parameters": parameters})).await.unwrap();
    let status = answer.status();
    let body: Value = answer.json().await.unwrap();
    assert_eq!(status, 200, "{adapter:?}: {body}");
    (scored(&body["details"]["prefill"]), scored(&body["details"]["tokens"]))
}

/// All cases, each with the name of the adapter that is written for it.
fn cases(folder: &Path) -> (Value, Vec<(String, Value)>) {
    let goldens = fs::read(fixtures().join("goldens/invocations.json")).unwrap();
    let goldens: Value = serde_json::from_slice(&goldens).unwrap();
    let cases = goldens["cases"].as_array().unwrap().iter().enumerate().map(|(i, case)| {
        let name = format!("case-{i}");
        write(&folder.join(&name), case["adapter"].as_str().unwrap(), &case["invocation"]);
        (name, case.clone())
    });
    let cases = cases.collect();
    (goldens["prompts"].clone(), cases)
}

/// The largest difference from what PEFT says of a case.
fn difference((prefill, tokens): &(Scored, Scored), case: &Value) -> f64 {
    let numbers = |key: &str| case[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap());
    let mut worst: f64 = 0.0;
    for ((_, logprob), expected) in prefill[1..].iter().zip(numbers("prompt_logprobs")) {
        worst = worst.max((logprob - expected).abs());
    }
    let expected = numbers("tokens").zip(numbers("logprobs")).zip(numbers("margins"));
    for (i, ((id, logprob), ((token, expected), margin))) in tokens.iter().zip(expected).enumerate() {
        // Where two tokens are as likely, the texts part.
        if *id as f64 != token && margin < 2.0 * BAR {
            break;
        }
        let (adapter, invocation) = (&case["adapter"], &case["invocation"]);
        assert_eq!(*id as f64, token, "{adapter} {invocation}, prompt {}, token {i}", case["prompt"]);
        worst = worst.max((logprob - expected).abs());
    }
    worst
}

/// Invocations of one token to all of a prompt: at its beginning, in the middle, at its end, several times, nowhere. Prompts
/// are computed at once, in chunks of which some begin or end at the invocation, and on two ranks.
#[tokio::test]
async fn adapters_begin_where_peft_has_them_begin() {
    let folder = TempDir::new().unwrap();
    let (prompts, cases) = cases(folder.path());
    for flags in [&[][..], &["--max-batch-prefill-tokens", "2"], &["--num-shard", "2"]] {
        let server = start(folder.path(), flags);
        let text =
            |case: &Value| prompts[case["prompt"].as_u64().unwrap() as usize]["text"].as_str().unwrap();
        // All at once, so that steps have rows of many adapters, on some of which they act.
        let answers =
            join_all(cases.iter().map(|(name, case)| answer(&server, Some(name), text(case)))).await;
        let differences = answers.iter().zip(&cases).map(|(answer, (_, case))| difference(answer, case));
        let worst = differences.fold(0.0, f64::max);
        assert!(worst > 0.0 && worst <= BAR, "{flags:?}: {worst}");
        for ((name, case), together) in cases.iter().zip(&answers).step_by(7) {
            assert_eq!(answer(&server, Some(name), text(case)).await, *together, "{name}");
        }
    }
}

/// Tokens of a prompt that came from the prefix cache.
async fn cached(server: &Server, model: &str, prompt: &[u32]) -> u64 {
    let body =
        json!({"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    let answer: Value = server.post("/v1/completions", &body).await.unwrap().json().await.unwrap();
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or_else(|| panic!("{answer}"))
}

#[tokio::test]
async fn what_comes_before_an_invocation_is_shared_with_the_base_model() {
    let folder = TempDir::new().unwrap();
    for (name, adapter, invocation) in
        [("one", "r16", [7, 8]), ("other", "r16", [7, 9]), ("third", "r3", [7, 8])]
    {
        write(&folder.path().join(name), adapter, &json!(invocation));
    }
    let server = start(folder.path(), &["--served-model-name", "base"]);
    let context: Vec<u32> = (0..100).map(|i| 20 + i * 13 % 150).collect();
    let ask = |invocation: &[u32]| [&context[..], invocation, &[3, 4, 5]].concat();
    // Blocks have 16 positions, and the last token is always computed.
    assert_eq!(cached(&server, "base", &context).await, 0);
    assert_eq!(cached(&server, "one", &ask(&[7, 8])).await, 96);
    assert_eq!(cached(&server, "other", &ask(&[7, 9])).await, 96);
    assert_eq!(cached(&server, "third", &ask(&[7, 8])).await, 96);
    // Without its invocation it is the base model.
    assert_eq!(cached(&server, "one", &ask(&[7, 9])).await, 96);
    // What follows an invocation is the adapter's own.
    let long = [&ask(&[7, 8])[..], &context].concat();
    assert_eq!(cached(&server, "one", &long).await, 96);
    assert_eq!(cached(&server, "third", &long).await, 96);
    assert_eq!(cached(&server, "one", &long).await, 192);
    assert_eq!(cached(&server, "base", &long).await, 96);
    // Of several, the last counts: everything before it is the base model's.
    let twice = [&long[..], &[7, 8, 1]].concat();
    assert_eq!(cached(&server, "one", &twice).await, 192);
    assert_eq!(cached(&server, "base", &twice).await, 192);
    // From the other side: what an adapter left to the base model serves that.
    let fresh: Vec<u32> = (0..64).map(|i| 60 + i * 7 % 90).collect();
    assert_eq!(cached(&server, "third", &[&fresh[..], &[7, 8, 2]].concat()).await, 0);
    assert_eq!(cached(&server, "base", &[&fresh[..], &[5]].concat()).await, 64);
}

#[tokio::test]
async fn what_peft_does_not_confine_to_the_rows_behind_an_invocation_is_refused() {
    let folder = TempDir::new().unwrap();
    write(&folder.path().join("good"), "r16", &json!([7, 8]));
    write(&folder.path().join("plain"), "r3", &json!([]));
    let wrong = [
        ("text", json!("invoke")),
        ("negative", json!([-1])),
        ("fraction", json!([1.5])),
        ("nested", json!([[1]])),
        ("huge", json!([4_294_967_296_u64])),
        ("long", json!(vec![1; 1025])),
    ];
    for (name, invocation) in &wrong {
        write(&folder.path().join(name), "r16", invocation);
    }
    write(&folder.path().join("dora"), "r16", &json!([7, 8]));
    let path = folder.path().join("dora/adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["use_dora"] = json!(true);
    fs::write(&path, config.to_string()).unwrap();
    let server = start(folder.path(), &[]);
    let generate = async |parameters: Value| {
        let body = json!({"inputs": "The License", "parameters": parameters});
        let answer = server.post("/generate", &body).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    for (name, _) in &wrong {
        let (status, text) = generate(json!({"adapter_id": name, "max_new_tokens": 2})).await;
        assert!(
            (400..500).contains(&status) && text.contains("alora_invocation_tokens"),
            "{name}: {status} {text}"
        );
    }
    let (status, text) = generate(json!({"adapter_id": "dora", "max_new_tokens": 2})).await;
    assert!((400..500).contains(&status) && text.contains("use_dora"), "{status} {text}");
    for several in [
        json!({"merged_adapters": {"ids": ["good", "plain"], "merge_strategy": "cat"}}),
        json!({"ensemble": {"ids": ["plain", "good"]}}),
    ] {
        let (status, text) = generate(several).await;
        let named = text.contains("alora_invocation_tokens") && text.contains("good");
        assert!((400..500).contains(&status) && named, "{status} {text}");
    }
    let (status, text) = generate(json!({"adapter_id": "plain", "max_new_tokens": 2})).await;
    assert_eq!(status, 200, "{text}");
    let list: Value =
        server.client.get(format!("{}/v1/adapters", server.url)).send().await.unwrap().json().await.unwrap();
    let of = |id: &str| list["data"].as_array().unwrap().iter().find(|adapter| adapter["id"] == id).cloned();
    assert_eq!(of("plain").unwrap()["invocation"], json!([]));
}
