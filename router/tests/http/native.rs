//! LoRAX's interface beside texts and streams: the best of several answers, templates, tokens, `/info`, headers.

use std::{collections::BTreeSet, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    refusals::assert_native,
    router::{Router, text, tokens, with_bos},
    shard::{Script, logprob},
};

/// A token that depends on the seed, three times.
fn drawn(seed: u64) -> Vec<u32> {
    vec![68 + (seed % 26) as u32; 3]
}

fn drawing() -> Script {
    Script { drawing: Some(drawn), ..Script::saying(tokens("ab")) }
}

async fn of_several(most: usize) -> Router {
    Router::start_with(drawing(), |config| config.router.max_best_of = most).await
}

#[tokio::test]
async fn the_best_of_several_answers_is_told_with_the_others() {
    let wishes = [
        json!({"do_sample": true}),
        json!({"temperature": 0.7}),
        json!({"top_k": 5}),
        json!({"top_p": 0.5}),
        json!({"typical_p": 0.5}),
    ];
    for (path, best_of) in [("/generate", 2), ("/", 3), ("/invocations", 5), ("/generate", 8), ("/", 1)] {
        for wish in &wishes {
            let router = of_several(8).await;
            let mut parameters = json!({"best_of": best_of, "max_new_tokens": 3, "details": true,
                "return_full_text": true, "decoder_input_details": true});
            parameters.as_object_mut().unwrap().extend(wish.as_object().unwrap().clone());
            let answer = router.ok(path, &json!({"inputs": "Hi", "parameters": parameters})).await;
            let answer = answer.get(0).unwrap_or(&answer).clone();
            let details = &answer["details"];
            let others = details["best_of_sequences"].as_array().cloned().unwrap_or_default();
            assert_eq!(others.len(), best_of - 1, "{answer}");
            let seeds = || others.iter().chain([details]).map(|one| one["seed"].as_u64().unwrap());
            assert_eq!(seeds().collect::<BTreeSet<_>>().len(), best_of, "each has a seed of its own");
            let mean = |seed: u64| logprob(drawn(seed)[0]);
            let best = seeds().map(mean).max_by(f32::total_cmp).unwrap();
            assert_eq!(mean(details["seed"].as_u64().unwrap()), best);
            for one in others.iter().chain([&answer]) {
                let about = one.get("details").unwrap_or(one);
                let said = text(&drawn(about["seed"].as_u64().unwrap()));
                assert_eq!(one["generated_text"], format!("Hi{said}"));
                assert_eq!(about["tokens"].as_array().unwrap().len(), 3);
                assert_eq!(about["prefill"].as_array().unwrap().len(), tokens("Hi").len());
                assert_eq!(
                    (&about["finish_reason"], &about["generated_tokens"]),
                    (&json!("length"), &json!(3))
                );
            }
        }
    }
    // Without details there is the best alone.
    let router = of_several(2).await;
    let body = json!({"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": true, "max_new_tokens": 3}});
    let answer = router.ok("/generate", &body).await;
    assert_eq!(answer.as_object().unwrap().len(), 1, "{answer}");
}

#[tokio::test]
async fn several_answers_are_refused_in_lorax_s_words() {
    let router = of_several(2).await;
    let message = "`best_of` must be > 0 and <= 2. Given: ";
    for (parameters, words) in [
        (json!({"best_of": 0, "do_sample": true}), format!("{message}0")),
        (json!({"best_of": 3, "do_sample": true}), format!("{message}3")),
        (json!({"best_of": 200}), format!("{message}200")),
        (json!({"best_of": 2}), "you must use sampling when `best_of` is > 1".into()),
        (json!({"best_of": 2, "temperature": 0}), "you must use sampling when `best_of` is > 1".into()),
        (
            json!({"best_of": 2, "do_sample": true, "seed": 1}),
            "`seed` must not be set when `best_of` > 1".into(),
        ),
        (json!({"truncate": 0}), "`truncate` must be strictly positive and at most 4095. Given: 0".into()),
        (
            json!({"truncate": 4096}),
            "`truncate` must be strictly positive and at most 4095. Given: 4096".into(),
        ),
    ] {
        for path in ["/", "/generate", "/invocations"] {
            let (status, answer) = router.post(path, &json!({"inputs": "x", "parameters": parameters})).await;
            assert_eq!(status, 422, "{path} {parameters}");
            assert_native(&answer, "validation", &format!("Input validation error: {words}"));
        }
    }
    for (path, parameters, words) in [
        (
            "/generate_stream",
            json!({"best_of": 2, "do_sample": true}),
            "`best_of` != 1 is not supported when streaming",
        ),
        (
            "/",
            json!({"best_of": 2, "do_sample": true}),
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            "/invocations",
            json!({"decoder_input_details": true}),
            "`decoder_input_details` == true is not supported",
        ),
    ] {
        let body = json!({"inputs": "x", "parameters": parameters, "stream": true});
        let (status, answer) = router.post(path, &body).await;
        assert_eq!(status, 422, "{path}");
        assert_native(&answer, "validation", words);
    }
    let one = json!({"best_of": 1, "seed": 1});
    router.events("/generate_stream", &json!({"inputs": "x", "parameters": one})).await;
}

#[tokio::test]
async fn inputs_can_be_said_by_a_user() {
    let router = Router::start(Script::answering(<[u32]>::to_vec)).await;
    for inputs in ["Hello", "x", "two words", " ", "<s>", "a\nb", "{{ x }}", "ä", "\"", "no end"] {
        let chat =
            json!({"messages": [{"role": "user", "content": inputs}], "temperature": 0, "max_tokens": 200});
        let expected = router.ok("/v1/chat/completions", &chat).await["usage"]["prompt_tokens"].clone();
        let asked = async |wish: bool| {
            let parameters =
                json!({"apply_chat_template": wish, "decoder_input_details": true, "return_full_text": true});
            let answer = router.ok("/generate", &json!({"inputs": inputs, "parameters": parameters})).await;
            assert!(
                answer["generated_text"].as_str().unwrap().starts_with(inputs),
                "the text is what was sent"
            );
            let prefill = answer["details"]["prefill"].as_array().unwrap().clone();
            prefill.iter().map(|token| token["id"].as_u64().unwrap() as u32).collect::<Vec<_>>()
        };
        let (said, plain) = (asked(true).await, asked(false).await);
        assert_eq!(json!(said.len()), expected, "{inputs:?}");
        assert!(said.len() > plain.len(), "{inputs:?}");
        let text = text(&said);
        assert!(text.starts_with("<|user|>") && text.ends_with("<|assistant|>"), "{text}");
    }
    let streamed =
        json!({"inputs": "Hello", "parameters": {"apply_chat_template": true, "max_new_tokens": 200}});
    let events = router.events("/generate_stream", &streamed).await;
    let whole = router.ok("/generate", &streamed).await;
    assert_eq!(events.last().unwrap()["generated_text"], whole["generated_text"]);
    let folder = with_bos();
    let without =
        Router::start_with(Script::saying(tokens("a")), |config| config.model.path = folder.path().into())
            .await;
    let (status, answer) = without.post("/generate", &streamed).await;
    assert_eq!(status, 422);
    assert_native(&answer, "template_error", "no chat template");
}

/// The characters of a text from one on, and before another.
fn characters(text: &str, token: &Value) -> String {
    let place = |name: &str| token[name].as_u64().unwrap() as usize;
    text.chars().skip(place("start")).take(place("stop") - place("start")).collect()
}

#[tokio::test]
async fn texts_are_told_as_tokens() {
    let folder = with_bos();
    let plain = Router::start(Script::saying(tokens("a"))).await;
    let router =
        Router::start_with(Script::saying(tokens("a")), |config| config.model.path = folder.path().into())
            .await;
    for inputs in
        ["Hello world", "x", " two  spaces", "ä ö", "a\nb", "42", "don't", "…", "ABC abc", "a.b,c", ""]
    {
        let list = plain.ok("/tokenize", &json!({"inputs": inputs})).await;
        let list = list.as_array().unwrap();
        let ids: Vec<u64> = list.iter().map(|token| token["id"].as_u64().unwrap()).collect();
        assert_eq!(ids, tokens(inputs).into_iter().map(u64::from).collect::<Vec<_>>());
        let ascii = list.iter().map(|token| characters(inputs, token)).collect::<String>();
        if inputs.is_ascii() {
            assert_eq!(ascii, inputs, "the places of all tokens make up the text");
        }
        for (wish, begins) in [(json!(null), true), (json!(true), true), (json!(false), false)] {
            let body = json!({"inputs": inputs, "add_special_tokens": wish});
            let list = router.ok("/tokenize", &body).await;
            assert_eq!(list[0]["id"] == 0, begins, "{list}");
            if begins {
                assert_eq!(list[0], json!({"id": 0, "text": "<s>", "start": 0, "stop": 0}));
            }
            let body = json!({"prompt": inputs, "add_special_tokens": wish, "model": "x", "return_token_strs": begins});
            let there = router.ok("/tokenize", &body).await;
            let both =
                |name| list.as_array().unwrap().iter().map(|token| token[name].clone()).collect::<Value>();
            let ids = if list == json!([]) { json!([]) } else { both("id") };
            let texts = if begins { both("text") } else { json!(null) };
            let count = ids.as_array().unwrap().len();
            assert_eq!(
                there,
                json!({"count": count, "max_model_len": 4096, "tokens": ids, "token_strs": texts})
            );
            if !begins {
                let back = router.ok("/detokenize", &json!({"tokens": ids, "model": "x"})).await;
                assert_eq!(back, json!({"prompt": inputs}));
            }
        }
    }
}

#[tokio::test]
async fn what_cannot_be_tokenized_is_refused_by_name() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for (path, body, words) in [
        ("/tokenize", json!({}), "missing field `inputs`"),
        ("/tokenize", json!({"inputs": 7}), "`inputs`: invalid type"),
        ("/tokenize", json!({"prompt": ["a"]}), "`prompt`: invalid type"),
        ("/tokenize", json!({"inputs": "a", "prompt": "a"}), "`prompt` cannot be given beside `inputs`"),
        (
            "/tokenize",
            json!({"inputs": "a", "return_token_strs": true}),
            "`return_token_strs` needs `prompt`",
        ),
        ("/tokenize", json!({"inputs": "a", "truncate": 3}), "`truncate` is not supported"),
        (
            "/tokenize",
            json!({"inputs": "a", "add_special_tokens": "no"}),
            "`add_special_tokens`: invalid type",
        ),
        ("/detokenize", json!({}), "missing field `tokens`"),
        ("/detokenize", json!({"tokens": "a"}), "`tokens`: invalid type"),
        ("/detokenize", json!({"tokens": [5, 400_000]}), "`tokens[1]` is 400000, which is no token"),
        ("/detokenize", json!({"tokens": [-1]}), "`tokens[0]`: invalid value"),
        ("/detokenize", json!({"tokens": [], "skip": 1}), "`skip` is not supported"),
    ] {
        let (status, answer) = router.post(path, &body).await;
        assert_eq!(status, 422, "{body}");
        assert_native(&answer, "validation", words);
    }
}

#[tokio::test]
async fn info_has_every_field_of_lorax_s() {
    let router = of_several(5).await;
    let info: Value = router.get("/info").await.json().await.unwrap();
    for (field, value) in [
        ("model_dtype", json!("torch.float32")),
        ("model_device_type", json!("cpu")),
        ("model_pipeline_tag", json!(null)),
        ("max_concurrent_requests", json!(64)),
        ("max_best_of", json!(5)),
        ("max_stop_sequences", json!(4)),
        ("max_input_length", json!(4095)),
        ("max_total_tokens", json!(4096)),
        ("waiting_served_ratio", json!(0.0)),
        ("max_batch_total_tokens", json!(65536)),
        ("max_waiting_tokens", json!(0)),
        ("validation_workers", json!(1)),
        ("eager_prefill", json!(true)),
        ("request_logger_url", json!(null)),
    ] {
        assert_eq!(info.get(field), Some(&value), "{field}");
    }
    for field in ["model_id", "model_sha", "version", "sha", "docker_label"] {
        assert!(info.get(field).is_some(), "{field}");
    }
}

/// Routes that a platform asks without a key.
#[tokio::test]
async fn platforms_ask_for_health_by_names_of_their_own() {
    let script = Script::saying(tokens("a"));
    let router = Router::start_with(script, |config| config.router.api_keys = vec!["abc".into()]).await;
    for path in ["/ping", "/startup", "/health", "/"] {
        assert_eq!(router.get(path).await.status(), 200, "{path}");
    }
    let (status, _) = router.post("/invocations", &json!({"inputs": "x"})).await;
    assert_eq!(status, 401);
    let key = [("authorization", "Bearer abc")];
    let answer = router.send_with(Method::POST, "/invocations", &key, &json!({"inputs": "x"})).await;
    assert_eq!(answer.json::<Value>().await.unwrap(), json!([{"generated_text": "a"}]));
}

#[tokio::test]
async fn headers_tell_true_times() {
    const STEP: u64 = 40;
    let script = Script { pace: Some(Duration::from_millis(STEP)), ..Script::saying(tokens("abcdef")) };
    let router = Router::start(script).await;
    for path in ["/", "/generate", "/invocations"] {
        let body = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 5}});
        let answer = router.send(path, &body).await;
        let header = |name: &str| answer.headers()[name].to_str().unwrap().parse::<u64>().unwrap();
        let (first, inference) = (header("x-time-to-first-token"), header("x-inference-time"));
        assert!(first >= STEP - 1 && inference >= 5 * STEP - 1, "{first} {inference}");
        let rest = inference - first;
        assert!(header("x-time-per-output-token").abs_diff(rest / 4) <= 1);
        assert_eq!(header("x-time-per-token"), inference / 5);
        let parts = header("x-validation-time") + header("x-queue-time") + inference;
        assert!(header("x-total-time") >= parts.saturating_sub(3), "{:?}", answer.headers());
        assert_eq!(header("x-compute-time"), header("x-total-time"));
        assert_eq!((header("x-generated-tokens"), header("x-skipped-tokens")), (5, 0));
        assert_eq!(header("x-total-tokens"), header("x-prompt-tokens") + 5);
        assert_eq!(header("x-compute-characters"), 5);
        assert_eq!(answer.headers()["x-compute-type"], "cpu+optimized");
    }
    let streamed = router.send("/generate_stream", &json!({"inputs": "Hello"})).await;
    for (name, value) in
        [("x-compute-type", "cpu+optimized"), ("x-compute-characters", "5"), ("x-accel-buffering", "no")]
    {
        assert_eq!(streamed.headers()[name], value);
    }
}
