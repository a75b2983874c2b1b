//! Ensembles: several adapters in one batch, against PEFT's exact sums of them, and beside requests of every other kind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use futures::future::join_all;
use integration_tests::server::{Server, fixtures};
use serde_json::{Value, json};

/// The largest difference of a log-probability.
const BAR: f64 = 2e-3;

fn start(flags: &[&str]) -> Server {
    let own = ["--kv-memory", "16MiB", "--dtype", "float32"];
    let tiny = fixtures().join("tiny").canonicalize().unwrap();
    Server::start_with(&tiny.join("model"), &tiny.join("adapters"), &[&own[..], flags].concat()).unwrap()
}

/// Tokens with their log-probabilities.
type Scored = Vec<(u64, f64)>;

fn scored(list: &Value) -> Scored {
    let one = |token: &Value| (token["id"].as_u64().unwrap(), token["logprob"].as_f64().unwrap_or_default());
    list.as_array().unwrap().iter().map(one).collect()
}

/// The prompt and 24 greedy tokens, with whatever names the adapters.
async fn answer(server: &Server, named: &Value, text: &str) -> (Scored, Scored) {
    let mut parameters = json!({"max_new_tokens": 24, "details": true, "decoder_input_details": true});
    parameters["ignore_eos_token"] = json!(true);
    parameters.as_object_mut().unwrap().extend(named.as_object().unwrap().clone());
    let answer = server.post("/generate", &json!({"inputs": text, "parameters": parameters})).await.unwrap();
    let status = answer.status();
    let body: Value = answer.json().await.unwrap();
    assert_eq!(status, 200, "{named}: {body}");
    (scored(&body["details"]["prefill"]), scored(&body["details"]["tokens"]))
}

/// Ensembles of one to four adapters of several ranks, with negative weights, some with rsLoRA.
#[tokio::test]
async fn ensembles_are_pefts_sums() {
    let goldens = std::fs::read(fixtures().join("goldens/ensembles.json")).unwrap();
    let goldens: Value = serde_json::from_slice(&goldens).unwrap();
    for flags in [&[][..], &["--num-shard", "2"]] {
        let server = start(flags);
        let mut worst: f64 = 0.0;
        for case in goldens["cases"].as_array().unwrap() {
            let (prompt, named) = (
                &goldens["prompts"][case["prompt"].as_u64().unwrap() as usize],
                json!({"ensemble": case["ensemble"]}),
            );
            let numbers = |key: &str| case[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap());
            let (prefill, tokens) = answer(&server, &named, prompt["text"].as_str().unwrap()).await;
            let ids: Vec<u64> = prefill.iter().map(|(id, _)| *id).collect();
            assert_eq!(json!(ids), prompt["ids"], "{named}");
            let expected = numbers("prompt_logprobs");
            worst = prefill[1..].iter().zip(expected).map(|((_, a), b)| (a - b).abs()).fold(worst, f64::max);
            let expected = numbers("tokens").zip(numbers("logprobs")).zip(numbers("margins"));
            for (i, ((id, logprob), ((token, expected), margin))) in tokens.iter().zip(expected).enumerate() {
                // Where two tokens are as likely, the texts part.
                if *id as f64 != token && margin < 2.0 * BAR {
                    break;
                }
                assert_eq!(*id as f64, token, "{named}, prompt {}, token {i}", case["prompt"]);
                worst = worst.max((logprob - expected).abs());
            }
        }
        assert!(worst > 0.0 && worst <= BAR, "{flags:?}: {worst}");
    }
}

/// What is beside a request changes no bit of its answer.
#[tokio::test]
async fn ensembles_run_beside_all_others() {
    let server = start(&[]);
    let of = |ids: &[&str], weights: &[f64]| json!({"ensemble": {"ids": ids, "weights": weights}});
    let all = [
        of(&["r16", "r3"], &[1.0, -0.5]),
        of(&["r3", "r16"], &[-0.5, 1.0]),
        of(&["r8", "r64"], &[1.0, 1.0]),
        of(&["r8", "r1", "r64"], &[-0.5, 3.0, 0.25]),
        of(&["r1", "r3", "r8", "r16"], &[1.0, 1.0, 1.0, 1.0]),
        of(&["r64"], &[0.5]),
        of(&["r8", "r8"], &[0.5, -1.0]),
        json!({"adapter_id": "r8"}),
        json!({"adapter_id": "r64"}),
        json!({"adapter_id": "r16"}),
        json!({}),
        json!({"merged_adapters": {"ids": ["r1", "r64"], "merge_strategy": "cat"}}),
    ];
    let texts = ["The License", "You may reproduce and distribute copies of the Work", "12 34"];
    let mut alone = Vec::new();
    for named in &all {
        for text in texts {
            alone.push(answer(&server, named, text).await);
        }
    }
    for (i, one) in alone.iter().enumerate() {
        // The first two are the same sum in another order.
        assert!(
            alone[..i].iter().all(|other| one != other) || i / texts.len() == 1,
            "{}",
            all[i / texts.len()]
        );
    }
    let requests = all.iter().flat_map(|named| texts.map(|text| answer(&server, named, text)));
    assert_eq!(join_all(requests).await, alone);
}

#[tokio::test]
async fn a_sum_with_nothing_is_the_adapter() {
    let server = start(&[]);
    let texts = ["The License", "Licensor Licensor Licensor"];
    for (ids, weights, same) in [
        (json!(["r16"]), json!([1]), json!({"adapter_id": "r16"})),
        (json!(["r8"]), json!([1.0]), json!({"adapter_id": "r8"})),
        (json!(["r3", "r3"]), json!([0.25, 0.75]), json!({"adapter_id": "r3"})),
        (json!(["r64", "r64", "r64"]), json!([2, -2, 1]), json!({"adapter_id": "r64"})),
        (json!(["r16", "r8"]), json!([1, 0]), json!({"adapter_id": "r16"})),
        (json!(["r16", "r8"]), json!([0, 1]), json!({"adapter_id": "r8"})),
        (json!(["r1", "r3", "r64"]), json!([0, 0, 1]), json!({"adapter_id": "r64"})),
        (json!(["r1"]), json!([0]), json!({})),
        (json!(["r16", "r64"]), json!([0, 0]), json!({})),
        (json!(["r16", "r16"]), json!([3, -3]), json!({})),
    ] {
        let ensemble = json!({"ensemble": {"ids": ids, "weights": weights}});
        for text in texts {
            let (sum, adapter) = (answer(&server, &ensemble, text).await, answer(&server, &same, text).await);
            let ids = |scored: &Scored| scored.iter().map(|(id, _)| *id).collect::<Vec<_>>();
            assert_eq!(ids(&sum.1), ids(&adapter.1), "{ensemble}");
            let differences = sum.1.iter().zip(&adapter.1).map(|((_, a), (_, b))| (a - b).abs());
            assert!(differences.fold(0.0, f64::max) < 1e-4, "{ensemble}");
        }
    }
}
