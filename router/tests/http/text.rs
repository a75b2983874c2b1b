//! Text from tokens: characters and stop strings that lie across their borders.

use serde_json::{Value, json};

use crate::{
    router::{Router, events, tokens},
    shard::{Gate, Script},
};

/// A router whose shard answers with these pieces, each tokenized by itself.
async fn saying(pieces: &[&str]) -> Router {
    Router::start(Script::saying(pieces.iter().flat_map(|piece| tokens(piece)).collect())).await
}

/// The texts of a chat's events, and why it ended.
async fn deltas(router: &Router, stop: &Value) -> (Vec<String>, String) {
    let body = json!({"messages": [{"role": "user", "content": "x"}], "stop": stop, "stream": true});
    let events = router.events("/v1/chat/completions", &body).await;
    let choices: Vec<&Value> = events.iter().filter_map(|event| event["choices"].get(0)).collect();
    let text = |choice: &&Value| choice["delta"]["content"].as_str().map(str::to_owned);
    let reason = choices.last().unwrap()["finish_reason"].as_str().unwrap().to_owned();
    (choices.iter().filter_map(text).filter(|text| !text.is_empty()).collect(), reason)
}

#[tokio::test]
async fn stop_strings_end_a_text_wherever_tokens_begin() {
    let router = saying(&["a", "E", "N", "x", "E", "N", "D", "b"]).await;
    for (stop, text, reason) in [
        (json!("END"), "aENx", "stop"),
        (json!(["no", "ENDb"]), "aENx", "stop"),
        (json!("xE"), "aEN", "stop"),
        (json!("a"), "", "stop"),
        (json!(["D", "END"]), "aENx", "stop"),
        (json!("ENDc"), "aENxENDb", "stop"),
        (json!(null), "aENxENDb", "stop"),
    ] {
        let (streamed, streamed_reason) = deltas(&router, &stop).await;
        assert_eq!((&*streamed.concat(), &*streamed_reason), (text, reason), "streamed, {stop}");
        let body = json!({"prompt": "x", "stop": stop});
        let choice = router.ok("/v1/completions", &body).await["choices"][0].clone();
        assert_eq!(
            (choice["text"].as_str(), &choice["finish_reason"]),
            (Some(text), &json!(reason)),
            "{stop}"
        );
    }
}

#[tokio::test]
async fn lorax_keeps_the_stop_string() {
    let router = saying(&["a", "E", "N", "D", "b"]).await;
    let body = json!({"inputs": "x", "parameters": {"stop": ["END"], "details": true}});
    let answer = router.ok("/generate", &body).await;
    assert_eq!(answer["generated_text"], "aEND");
    assert_eq!(answer["details"]["finish_reason"], "stop_sequence");
    assert_eq!(answer["details"]["generated_tokens"], 4);
    let events = router.events("/generate_stream", &body).await;
    assert_eq!(events.len(), 4);
    assert_eq!(events[3]["generated_text"], "aEND");
}

#[tokio::test]
async fn what_may_be_a_stop_string_is_held_back() {
    let router = saying(&["a", "E", "N", "x"]).await;
    assert_eq!(deltas(&router, &json!("END")).await.0, ["a", "ENx"]);
    assert_eq!(deltas(&router, &json!(null)).await.0, ["a", "E", "N", "x"]);
}

#[tokio::test]
async fn characters_are_never_halved() {
    assert_eq!(tokens("🙂").len(), 4, "a token a byte");
    let router = saying(&["a", "🙂", "é", "b"]).await;
    assert_eq!(deltas(&router, &json!(null)).await.0, ["a", "🙂", "é", "b"]);
    assert_eq!(deltas(&router, &json!("é")).await.0, ["a", "🙂"]);
    assert_eq!(deltas(&router, &json!("🙂é")).await.0, ["a"]);
    let events = router.events("/generate_stream", &json!({"inputs": "x"})).await;
    let texts: Vec<_> = events.iter().map(|event| event["token"]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["a", "", "", "", "🙂", "", "é", "b", "</s>"]);
}

#[tokio::test]
async fn a_character_that_stays_incomplete_is_replaced() {
    let smile = tokens("🙂");
    let answer = [tokens("a"), smile[..2].to_vec()].concat();
    let router = Router::start(Script::saying(answer)).await;
    assert_eq!(deltas(&router, &json!(null)).await.0.concat(), "a\u{fffd}");
    let body = json!({"inputs": "x", "parameters": {"max_new_tokens": 2}});
    assert_eq!(router.ok("/generate", &body).await["generated_text"], "a\u{fffd}");
}

#[tokio::test]
async fn bytes_that_are_no_characters_do_not_stop_the_stream() {
    let smile = tokens("🙂");
    // Sixty continuation bytes are no beginning of anything.
    let answer = [vec![smile[1]; 60], tokens("b")].concat();
    let router = Router::start(Script::saying(answer)).await;
    let (texts, _) = deltas(&router, &json!(null)).await;
    assert_eq!(texts.concat(), "\u{fffd}".repeat(60) + "b");
    assert!(texts.len() > 10, "{texts:?}");
}

#[tokio::test]
async fn a_sequence_ends_at_its_stop_string() {
    let answer = |prompt: &[u32]| if *prompt == tokens("short") { tokens("a END") } else { tokens("b") };
    let router = Router::start(Script::answering(answer)).await;
    // Far behind the stop string, far before the last token.
    let held = 20;
    router.shard.hold(Gate::Step(held));
    let body = json!({"prompt": [tokens("short"), tokens("long")], "stop": "END", "max_tokens": 400,
        "ignore_eos": true, "stream": true});
    let mut response = router.send("/v1/completions", &body).await;
    let mut stream = String::new();
    while !stream.contains("\"finish_reason\":\"stop\"") {
        stream += std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap();
    }
    router.shard.release(&Gate::Step(held));
    let short = router.shard.sequence_of(&tokens("short")).await;
    let dropped = router.shard.saw(|seen| seen.drop_of(short).map(|step| step.id)).await;
    assert!(dropped <= held + 2, "it ran on to step {dropped} while the other was generated");
    stream += &response.text().await.unwrap();
    let choices = events(&stream).into_iter().filter_map(|event| event["choices"].get(0).cloned());
    let (ended, went_on): (Vec<_>, Vec<_>) = choices.partition(|choice| choice["index"] == 0);
    let text: String = ended.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(text, "a ");
    assert_eq!(went_on.last().unwrap()["finish_reason"], "length");
}
