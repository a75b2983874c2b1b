//! Log-probabilities of answers: which tokens are reported, and as what.

use serde_json::{Value, json};

use crate::{
    router::{Router, text, tokens},
    shard::{Script, logprob},
};

/// Answers that begin with a letter, among them parts of characters and special tokens.
fn answers() -> Vec<Vec<u32>> {
    let smile = tokens("🙂");
    let mut answers: Vec<Vec<u32>> =
        ["a", "ab", " the License", "é", "a🙂b", "🙂🙂", "<|user|>a", "x\n\ny", "1 2 3"].map(tokens).into();
    answers.extend([smile[..2].to_vec(), vec![smile[1]; 5], [tokens("a"), smile[..3].to_vec()].concat()]);
    answers
}

#[tokio::test]
async fn the_sampled_token_is_among_the_top() {
    for answer in answers() {
        let mut script = Script::saying(answer.clone());
        // The sampled token is not one of the most probable ones.
        script.alternatives = |id, num_top| (0..num_top).map(|i| 100 + (id + 7 * (i + 1)) % 50).collect();
        let router = Router::start(script).await;
        for num_top in [0, 1, 2, 5] {
            let mut body = json!({"prompt": "x", "logprobs": num_top, "max_tokens": answer.len()});
            let choice = router.ok("/v1/completions", &body).await["choices"][0].clone();
            let list = |name: &str| choice["logprobs"][name].as_array().unwrap().clone();
            let numbers: Vec<Value> = answer.iter().map(|id| json!(logprob(*id))).collect();
            assert_eq!(list("token_logprobs"), numbers);
            for ((token, number), top) in list("tokens").iter().zip(&numbers).zip(list("top_logprobs")) {
                let told = &top[token.as_str().unwrap()];
                // Others may have the same text, if it is that of no character.
                let shared = token == "\u{fffd}" && told.as_f64() > number.as_f64();
                assert!(told == number || shared, "{token} in {top}");
                assert!(top.as_object().unwrap().len() <= num_top + 1, "{top}");
            }
            body["stream"] = json!(true);
            let events = router.events("/v1/completions", &body).await;
            let streamed =
                events.iter().filter_map(|event| event["choices"][0]["logprobs"]["top_logprobs"].as_array());
            assert_eq!(streamed.flatten().cloned().collect::<Vec<_>>(), list("top_logprobs"));
        }
    }
}

#[tokio::test]
async fn of_alternatives_with_the_same_text_the_best_is_reported() {
    let router = |answer: Vec<u32>| {
        let mut script = Script::saying(answer);
        // Bytes that are no characters by themselves; the first ones have the best numbers.
        script.alternatives = |_, num_top| (160..160 + num_top).collect();
        Router::start(script)
    };
    for answer in answers() {
        let router = router(answer.clone()).await;
        let body = json!({"prompt": "x", "logprobs": 4, "max_tokens": answer.len()});
        let choice = router.ok("/v1/completions", &body).await["choices"][0].clone();
        let top = choice["logprobs"]["top_logprobs"].as_array().unwrap();
        for (token, top) in answer.iter().zip(top) {
            let same = (160..164).filter(|id| text(&[*id]) == "\u{fffd}" && id != token);
            let best = same.map(logprob).fold(f32::NEG_INFINITY, f32::max);
            assert!(best.is_finite(), "there are some");
            assert!(top["\u{fffd}"].as_f64().unwrap() >= f64::from(best), "{token}: {top}");
        }
    }
}

#[tokio::test]
async fn the_tokens_of_a_chat_are_its_content() {
    for answer in answers() {
        let router = Router::start(Script::saying(answer.clone())).await;
        for (stop, ignore_eos) in [
            (json!(null), false),
            (json!(null), true),
            (json!(["b", "🙂"]), false),
            (json!("<|user|>"), true),
        ] {
            let body = json!({"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 2,
                "stop": stop, "ignore_eos": ignore_eos, "max_tokens": answer.len() + 2});
            let choice = router.ok("/v1/chat/completions", &body).await["choices"][0].clone();
            let content = choice["message"]["content"].as_str().unwrap();
            let tokens = choice["logprobs"]["content"].as_array().unwrap();
            let joined: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
            assert_eq!(joined, content);
            for token in tokens {
                let (top, name) = (token["top_logprobs"].as_array().unwrap(), &token["token"]);
                assert_eq!(top.len(), 2);
                assert!(
                    top.iter().any(|top| top["token"] == *name && top["logprob"] == token["logprob"]),
                    "{token}"
                );
            }
        }
    }
}

#[tokio::test]
async fn parts_of_characters_have_their_own_bytes() {
    let smile = tokens("🙂");
    let bytes = "🙂".as_bytes();
    let router = Router::start(Script::saying([tokens("a"), smile, tokens("b")].concat())).await;
    let body = json!({"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 2});
    let choice = router.ok("/v1/chat/completions", &body).await["choices"][0].clone();
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    let told: Vec<(&Value, &Value)> = tokens.iter().map(|token| (&token["token"], &token["bytes"])).collect();
    let expected: Vec<(Value, Value)> = [
        (json!("a"), json!([97])),
        (json!(""), json!([bytes[0]])),
        (json!(""), json!([bytes[1]])),
        (json!(""), json!([bytes[2]])),
        (json!("🙂"), json!([bytes[3]])),
        (json!("b"), json!([98])),
    ]
    .into();
    assert_eq!(told, expected.iter().map(|(token, bytes)| (token, bytes)).collect::<Vec<_>>());
    for token in tokens {
        assert_eq!(token["top_logprobs"][0]["bytes"], token["bytes"], "an alternative that is the token");
        let other = &token["top_logprobs"][1];
        assert_eq!(other["bytes"].as_array().unwrap().len(), 1, "every token here is a byte: {other}");
    }
}

#[tokio::test]
async fn alternatives_without_log_probabilities_are_refused_unless_they_are_none() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for (logprobs, top, status) in [
        (json!(null), json!(0), 200),
        (json!(false), json!(0), 200),
        (json!(false), json!(null), 200),
        (json!(true), json!(0), 200),
        (json!(true), json!(20), 200),
        (json!(null), json!(1), 400),
        (json!(false), json!(1), 400),
        (json!(false), json!(20), 400),
        (json!(true), json!(21), 400),
        (json!(null), json!(21), 400),
    ] {
        let messages = json!([{"role": "user", "content": "x"}]);
        let body = json!({"messages": messages, "logprobs": logprobs, "top_logprobs": top, "max_tokens": 1});
        let (got, answer) = router.post("/v1/chat/completions", &body).await;
        assert_eq!(got, status, "{answer}");
        match answer["error"]["param"].as_str() {
            Some(param) => assert_eq!(param, "top_logprobs"),
            None => assert_eq!(answer["choices"][0]["logprobs"].is_object(), logprobs == true, "{answer}"),
        }
    }
}
