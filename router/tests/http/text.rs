//! Text from tokens: characters and stop strings that lie across their borders.

use lorax_router::tokenizer::ModelTokenizer;
use serde_json::{Map, Value, json};

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

#[tokio::test]
async fn stop_strings_may_contain_special_tokens() {
    let router = saying(&["a", "<|user|>", "b", "</s>", "c", "<|assistant|>", "<|user|>", "d"]).await;
    // The stop strings, the text before them, and their own visible text.
    for (stop, text, own) in [
        (json!(["<|user|>"]), "a", ""),
        (json!(["</s>"]), "ab", ""),
        (json!(["a<|user|>"]), "", "a"),
        (json!(["<|user|>b"]), "a", "b"),
        (json!(["a<|user|>b"]), "", "ab"),
        (json!(["b</s>"]), "a", "b"),
        (json!(["</s>c"]), "ab", "c"),
        (json!(["<|user|>b</s>c<|assistant|>"]), "a", "bc"),
        (json!(["<|assistant|><|user|>"]), "abc", ""),
        (json!(["<|assistant|><|user|>d"]), "abc", "d"),
        (json!(["<|user|><|user|>", "</s>"]), "ab", ""),
        (json!(["ab"]), "", "ab"),
        (json!(["bcd"]), "a", "bcd"),
        (json!(["user"]), "abcd", "none"),
        (json!(["<"]), "abcd", "none"),
        (json!(["|>b"]), "abcd", "none"),
        (json!(["a</s>"]), "abcd", "none"),
    ] {
        let (reason, own) = if own == "none" { ("length", "") } else { ("stop", own) };
        let body = json!({"prompt": "x", "stop": stop, "ignore_eos": true, "max_tokens": 8});
        let choice = router.ok("/v1/completions", &body).await["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!(reason)), "{stop}");
        let body = json!({"messages": [{"role": "user", "content": "x"}], "stop": stop, "ignore_eos": true,
            "max_tokens": 8, "stream": true});
        let events = router.events("/v1/chat/completions", &body).await;
        let streamed = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!(streamed.collect::<String>(), text, "streamed, {stop}");
        let parameters =
            json!({"stop": stop, "ignore_eos_token": true, "max_new_tokens": 8, "details": true});
        let body = json!({"inputs": "x", "parameters": parameters});
        let answer = router.ok("/generate", &body).await;
        assert_eq!(answer["generated_text"], format!("{text}{own}"), "{stop}");
        let reason = if reason == "stop" { "stop_sequence" } else { "length" };
        assert_eq!(answer["details"]["finish_reason"], reason, "{stop}");
        let events = router.events("/generate_stream", &body).await;
        let visible = events.iter().filter(|event| event["token"]["special"] == false);
        let joined: String = visible.map(|event| event["token"]["text"].as_str().unwrap()).collect();
        assert_eq!(joined, format!("{text}{own}"), "streamed, {stop}");
    }
}

#[tokio::test]
async fn an_end_token_ends_a_text_as_such_whatever_stop_strings_name_it() {
    let router = saying(&["a", "b"]).await;
    for (stop, text, native, reason) in [
        (json!([]), "ab", "ab", "eos_token"),
        (json!(["</s>"]), "ab", "ab", "eos_token"),
        (json!(["x</s>"]), "ab", "ab", "eos_token"),
        (json!(["b</s>"]), "a", "ab", "stop_sequence"),
        (json!(["ab</s>"]), "", "ab", "stop_sequence"),
        (json!(["<"]), "ab", "ab", "eos_token"),
    ] {
        let body = json!({"prompt": "x", "stop": stop});
        let choice = router.ok("/v1/completions", &body).await["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("stop")), "{stop}");
        let body = json!({"inputs": "x", "parameters": {"stop": stop, "details": true}});
        let answer = router.ok("/generate", &body).await;
        assert_eq!(
            (&answer["generated_text"], &answer["details"]["finish_reason"]),
            (&json!(native), &json!(reason))
        );
    }
}

#[tokio::test]
async fn joined_tokens_are_the_text_also_with_a_stop_string_inside_of_one() {
    let router = Router::start(Script::saying(tokens("a the License or not"))).await;
    for stop in ["the", "h", "e", " th", "Lic", " ", "c", "cense o", "r n", "ot", "License", "a t"] {
        let body = json!({"inputs": "x", "parameters": {"stop": [stop], "details": true}});
        let events = router.events("/generate_stream", &body).await;
        let visible = events.iter().filter(|event| event["token"]["special"] == false);
        let joined: String = visible.map(|event| event["token"]["text"].as_str().unwrap()).collect();
        let whole = router.ok("/generate", &body).await;
        assert_eq!(whole["generated_text"], joined, "{stop:?}");
        assert!(joined.ends_with(stop), "{joined:?} ends with {stop:?}");
    }
}

/// A folder with a tokenizer as Llama 2's: words that begin with a space, bytes, and a decoder that leaves out the
/// space that a text begins with.
fn sentencepiece() -> (tempfile::TempDir, ModelTokenizer) {
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let words = ["▁", "▁is", "▁Paris", "."].map(str::to_owned);
    let vocab: Map<String, Value> = special
        .iter()
        .cloned()
        .chain(bytes)
        .chain(words)
        .zip(0..)
        .map(|(token, id)| (token, id.into()))
        .collect();
    let added = special.iter().zip(0..).map(|(content, id)| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    });
    let definition = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), definition.to_string()).unwrap();
    let tokenizer = ModelTokenizer::load(folder.path(), None).unwrap();
    (folder, tokenizer)
}

#[tokio::test]
async fn an_answer_keeps_the_space_that_it_begins_with() {
    let (folder, tokenizer) = sentencepiece();
    let ids = |tokens: &[&str]| -> Vec<u32> {
        tokens.iter().map(|token| tokenizer.tokenizer.token_to_id(token).unwrap()).collect()
    };
    let smile = ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"];
    for (prompt, answer, text) in [
        (ids(&["▁is"]), ids(&["▁Paris", "."]), " Paris."),
        (ids(&["▁is", "▁"]), ids(&["▁Paris"]), " Paris"),
        (ids(&["<s>"]), ids(&["▁Paris", "▁is"]), "Paris is"),
        (ids(&["▁is", "<unk>", "<s>"]), ids(&["▁Paris"]), " Paris"),
        (ids(&["▁is"]), [ids(&["<unk>"]), ids(&["▁Paris"])].concat(), " Paris"),
        (ids(&[&["▁is"], &smile[..], &smile[..]].concat()), ids(&smile), "🙂"),
        (ids(&[&["▁is"], &smile[..2]].concat()), ids(&[&smile[2..], &["▁is"]].concat()), "🙂 is"),
    ] {
        let (path, tokens) = (folder.path().to_owned(), answer.len());
        let router = Router::start_with(Script::saying(answer), |config| config.model.path = path).await;
        let mut body = json!({"prompt": prompt, "max_tokens": tokens});
        assert_eq!(router.ok("/v1/completions", &body).await["choices"][0]["text"], text, "{prompt:?}");
        body["stream"] = true.into();
        let events = router.events("/v1/completions", &body).await;
        let texts = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
        assert_eq!(texts.collect::<String>(), text, "streamed, {prompt:?}");
    }
}

#[tokio::test]
async fn texts_of_tokens_have_the_space_that_they_begin_with() {
    let (folder, tokenizer) = sentencepiece();
    let answer = ["▁Paris", "▁is", "."].map(|token| tokenizer.tokenizer.token_to_id(token).unwrap());
    let path = folder.path().to_owned();
    let router = Router::start_with(Script::saying(answer.into()), |config| config.model.path = path).await;
    let parameters = json!({"max_new_tokens": 3, "details": true, "return_k_alternatives": 1});
    let answer = router.ok("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
    assert_eq!(answer["generated_text"], " Paris is.");
    let tokens = answer["details"]["tokens"].as_array().unwrap();
    for (token, text) in tokens.iter().zip([" Paris", " is", "."]) {
        assert_eq!((&token["text"], &token["alternative_tokens"][0]["text"]), (&json!(text), &json!(text)));
    }
    let parameters = json!({"max_new_tokens": 3, "stop": [" Paris i"]});
    let answer = router.ok("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
    assert_eq!(answer["generated_text"], " Paris i");
}
