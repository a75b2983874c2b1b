//! Prompts that are scored: `echo` with `logprobs`, as evaluation harnesses ask for them.

use serde_json::{Value, json};

use crate::{
    router::{Router, text, tokens, with_bos},
    shard::{Script, logprob},
};

async fn saying(answer: &str) -> Router {
    Router::start(Script::saying(tokens(answer))).await
}

/// The report of consecutive tokens, the first of which nothing predicts; `first` is the position at which it begins.
fn scores(ids: &[u32], num_top: u32) -> (Vec<Value>, Vec<Value>) {
    let numbers = |i: usize| if i == 0 { Value::Null } else { json!(logprob(ids[i])) };
    let top = |i: usize| {
        // The scripted shard's alternatives are the token and those that follow it.
        let ids = ids[i]..ids[i] + num_top.max(1);
        let entries = ids.map(|id| (text(&[id]), json!(logprob(id))));
        if i == 0 { Value::Null } else { Value::Object(entries.collect()) }
    };
    ((0..ids.len()).map(numbers).collect(), (0..ids.len()).map(top).collect())
}

#[tokio::test]
async fn prompts_are_scored() {
    let router = saying("b").await;
    let hello = tokens("Hello");
    for (prompt, ids, num_top, max_tokens) in [
        (json!("Hello"), hello.clone(), 1, 0),
        (json!("Hello"), hello.clone(), 1, 1),
        (json!("Hello"), hello.clone(), 0, 0),
        (json!("Hello"), hello.clone(), 5, 0),
        (json!(hello), hello.clone(), 1, 0),
        (json!(hello), hello.clone(), 2, 1),
        (json!([hello]), hello.clone(), 1, 1),
        (json!("a"), tokens("a"), 1, 0),
        (json!("a"), tokens("a"), 1, 1),
        (json!([7]), vec![7], 3, 0),
        (json!("one two three four"), tokens("one two three four"), 1, 0),
        (json!(vec![40; 300]), vec![40; 300], 1, 0),
        (json!(vec![40; 300]), vec![40; 300], 1, 1),
    ] {
        let body = json!({"prompt": prompt, "echo": true, "logprobs": num_top, "max_tokens": max_tokens});
        let answer = router.ok("/v1/completions", &body).await;
        let choice = &answer["choices"][0];
        let all = if max_tokens == 0 { ids.clone() } else { [ids.clone(), tokens("b")].concat() };
        let (numbers, top) = scores(&all, num_top);
        assert_eq!(choice["logprobs"]["token_logprobs"], json!(numbers), "{body}");
        assert_eq!(choice["logprobs"]["top_logprobs"], json!(top), "{body}");
        assert_eq!(choice["text"], text(&all), "{body}");
        assert_eq!(choice["finish_reason"], "length", "{body}");
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens, "{body}");
        assert_eq!(answer["usage"]["prompt_tokens"], ids.len(), "{body}");
    }
}

/// lm-eval's `local-completions` sums the numbers between the context and the last token, which is a generated one, and
/// takes the continuation for greedy if each of them is its position's best.
#[tokio::test]
async fn a_harness_finds_the_continuation_of_each_prompt_of_a_batch() {
    let router = saying("b").await;
    let cases =
        [("The", " cat"), ("a", "b"), ("one two", " three"), ("🙂", "é"), ("Hello", "!"), ("x", "y z")];
    let prompts: Vec<Vec<u32>> =
        cases.iter().map(|(context, rest)| [tokens(context), tokens(rest)].concat()).collect();
    for (end, answer) in [(json!(["\n"]), "b"), (Value::Null, "b")] {
        let body = json!({"model": "the/base-model", "prompt": prompts, "temperature": 0, "max_tokens": 1,
            "logprobs": 1, "seed": 1234, "echo": true, "stop": end});
        let body = router.ok("/v1/completions", &body).await;
        let choices = body["choices"].as_array().unwrap();
        assert_eq!(choices.len(), cases.len());
        for ((choice, prompt), (context, rest)) in choices.iter().zip(&prompts).zip(cases) {
            let context_len = tokens(context).len();
            let numbers = choice["logprobs"]["token_logprobs"].as_array().unwrap();
            let numbers = &numbers[context_len..numbers.len() - 1];
            assert_eq!(json!(numbers), json!(tokens(rest).iter().map(|id| logprob(*id)).collect::<Vec<_>>()));
            let top = choice["logprobs"]["top_logprobs"].as_array().unwrap();
            for (number, top) in numbers.iter().zip(&top[context_len..top.len() - 1]) {
                let best = top.as_object().unwrap().values().map(|value| value.as_f64().unwrap());
                assert_eq!(number.as_f64().unwrap(), best.fold(f64::NEG_INFINITY, f64::max));
            }
            assert_eq!(choice["text"], text(prompt) + answer);
        }
    }
}

#[tokio::test]
async fn the_end_of_a_sequence_is_the_generated_token_that_a_harness_drops() {
    // The model says that the text ends here.
    let router = saying("").await;
    let body = json!({"prompt": tokens("ab"), "max_tokens": 1, "logprobs": 1, "echo": true});
    let choice = router.ok("/v1/completions", &body).await["choices"][0].clone();
    assert_eq!(choice["logprobs"]["tokens"], json!(["a", "b", "</s>"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
    assert_eq!(choice["text"], "ab");
}

#[tokio::test]
async fn nothing_is_generated_when_nothing_is_asked_for() {
    let router = saying("b").await;
    for (fields, text, lists) in [
        (json!({}), "", Value::Null),
        (json!({"echo": true}), "Hi", Value::Null),
        (json!({"logprobs": 1}), "", json!([])),
        (json!({"echo": true, "logprobs": 1}), "Hi", json!(["H", "i"])),
        (json!({"stop": "x"}), "", Value::Null),
        (json!({"ignore_eos": true}), "", Value::Null),
        (json!({"echo": false, "logprobs": 0}), "", json!([])),
        (json!({"model": "sql"}), "", Value::Null),
        (json!({"model": "sql", "echo": true, "logprobs": 0}), "Hi", json!(["H", "i"])),
        (json!({"temperature": 0, "echo": true}), "Hi", Value::Null),
    ] {
        let mut body = json!({"prompt": "Hi", "max_tokens": 0});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let answer = router.ok("/v1/completions", &body).await;
        let choice = &answer["choices"][0];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("length")), "{fields}");
        assert_eq!(choice["logprobs"]["tokens"], lists, "{fields}");
        assert_eq!(answer["usage"]["completion_tokens"], 0, "{fields}");
        body["stream"] = json!(true);
        let events = router.events("/v1/completions", &body).await;
        let texts = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
        assert_eq!(texts.collect::<String>(), text, "streamed, {fields}");
    }
    let sampled = router.shard.saw(|seen| {
        let rows = seen.steps.iter().flat_map(|step| &step.rows);
        Some(rows.filter(|rows| rows.sample > 0).count())
    });
    assert_eq!(sampled.await, 0, "no token was sampled for any of them");
}

#[tokio::test]
async fn offsets_point_into_the_returned_text() {
    let folder = with_bos();
    let path = folder.path().to_owned();
    let router = Router::start_with(Script::saying(tokens("b🙂")), |config| config.model.path = path).await;
    for (prompt, echoed, first) in [
        (json!("ab"), "ab", [0, 0, 1]),
        (json!(" ab"), " ab", [0, 0, 2]),
        (json!("é!"), "é!", [0, 0, 0]),
        (json!("<s>ab"), "<s>ab", [0, 3, 3]),
        (json!("<|user|>ab"), "<|user|>ab", [0, 0, 8]),
        (json!("\n\na"), "\n\na", [0, 0, 1]),
        (json!([0, 67, 68]), "<s>", [0, 3, 4]),
        (json!([67, 68]), "", [0, 1, 2]),
        (json!([2, 0, 67]), "<|user|><s>", [0, 8, 11]),
        (json!([67, 2, 67]), "", [0, 1, 9]),
    ] {
        for echo in [true, false] {
            let body = json!({"prompt": prompt, "echo": echo, "logprobs": 1, "max_tokens": 5});
            let choice = router.ok("/v1/completions", &body).await["choices"][0].clone();
            let text = choice["text"].as_str().unwrap();
            let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
            let names = choice["logprobs"]["tokens"].as_array().unwrap();
            assert_eq!(offsets.len(), names.len());
            let answer = text.strip_suffix("b🙂").unwrap();
            if echo {
                assert!(answer.starts_with(echoed), "{body} {choice}");
                assert_eq!(offsets[..3], first.map(Value::from), "{body} {choice}");
            } else {
                assert_eq!(offsets[..2], [json!(0), json!(1)], "{body}");
            }
            let answer = answer.chars().count();
            let behind = offsets[offsets.len() - 5..].to_vec();
            assert_eq!(
                json!(behind),
                json!([answer, answer + 1, answer + 1, answer + 1, answer + 1]),
                "{body}"
            );
        }
    }
}
