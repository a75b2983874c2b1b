//! A tokenizer that knows other tokens than the model: ids without a row in the model, and tokens that end a text.

use std::{fs, path::Path};

use futures::future::join_all;
use serde_json::{Value, json};

use crate::{
    router::{Router, model, text, tokens},
    shard::{Gate, Script},
};

/// Rows of the model. The tokens that `folder` adds have ids from here on.
const ROWS: u32 = 320;

/// The fixture model's folder with more tokens, and another tokenizer_config.json if one is given.
fn folder(added: &[(&str, u32)], config: Option<&Value>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let read = |file: &str| fs::read(model().join(file)).unwrap();
    let write = |file: &str, bytes: Vec<u8>| fs::write(folder.path().join(file), bytes).unwrap();
    let mut definition: Value = serde_json::from_slice(&read("tokenizer.json")).unwrap();
    for (content, id) in added {
        definition["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": id, "content": content, "special": content.starts_with("<|"), "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false,
        }));
    }
    write("tokenizer.json", definition.to_string().into_bytes());
    let config = config.map(|config| config.to_string().into_bytes());
    write("tokenizer_config.json", config.unwrap_or_else(|| read("tokenizer_config.json")));
    write("chat_template.jinja", read("chat_template.jinja"));
    folder
}

async fn router(script: Script, folder: &Path) -> Router {
    Router::start_with(script, |config| config.model.path = folder.to_owned()).await
}

#[tokio::test]
async fn a_token_without_a_row_is_refused_alone_and_on_every_route() {
    let folder = folder(&[("<pad>", ROWS), ("<|mask|>", ROWS + 1), ("wörd", ROWS + 2)], None);
    let router = router(Script::saying(tokens("a")), folder.path()).await;
    router.shard.hold(Gate::Steps);
    let others = ["one", "two", "three"].map(|prompt| json!({"inputs": prompt}));
    let others = join_all(others.iter().map(|body| router.ok("/generate", body)));
    let refused = async {
        router.shard.saw(|seen| (!seen.steps.is_empty()).then_some(())).await;
        let native = |inputs: &str, parameters: Value| json!({"inputs": inputs, "parameters": parameters});
        let chat = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
        let (pad, mask, word) = ("320 (\"<pad>\")", "321 (\"<|mask|>\")", "322 (\"wörd\")");
        for (path, body, token) in [
            ("/generate", native("hello <pad> world", json!({})), pad),
            ("/generate", native("<pad>", json!({"return_full_text": true})), pad),
            ("/generate", native("<|mask|>", json!({"decoder_input_details": true})), mask),
            ("/generate", native("a wörd <pad>", json!({"truncate": 2})), word),
            ("/generate", native("wörd", json!({"adapter_id": "some"})), word),
            ("/generate_stream", native("hello <pad> world", json!({})), pad),
            ("/", native("hello<|mask|>", json!({})), mask),
            ("/", json!({"inputs": "hello<|mask|>", "stream": true}), mask),
            ("/v1/completions", json!({"prompt": "hello <pad> world"}), pad),
            ("/v1/completions", json!({"prompt": ["fine", "wörd"], "echo": true, "logprobs": 1}), word),
            ("/v1/completions", json!({"prompt": "<|mask|>", "stream": true}), mask),
            ("/v1/chat/completions", chat("<pad>".into()), pad),
            ("/v1/chat/completions", chat(json!([{"type": "text", "text": "x <|mask|>"}])), mask),
        ] {
            let (status, answer) = router.post(path, &body).await;
            let openai = path.starts_with("/v1");
            assert_eq!(status, if openai { 400 } else { 422 }, "{path} {body} {answer}");
            let message = if openai { &answer["error"]["message"] } else { &answer["error"] };
            assert!(message.as_str().unwrap().contains(token), "{path} {body} {answer}");
        }
        for ids in [json!([5, ROWS]), json!([[5], [ROWS + 7, 6]]), json!([u32::MAX])] {
            let (status, answer) = router.post("/v1/completions", &json!({"prompt": ids})).await;
            assert_eq!(status, 400, "{answer}");
        }
        let bias = json!({"prompt": "hello", "logit_bias": {"320": 1}});
        assert_eq!(router.post("/v1/completions", &bias).await.0, 400);
        router.shard.release(&Gate::Steps);
    };
    for answer in tokio::join!(others, refused).0 {
        assert_eq!(answer["generated_text"], "a");
    }
    // A stop string is compared with text, not with ids.
    let stop = json!({"inputs": "hello", "parameters": {"stop": ["<pad>"]}});
    assert_eq!(router.ok("/generate", &stop).await["generated_text"], "a");
    let sent = router.shard.saw(|seen| Some(seen.added().map(|new| new.tokens.clone()).collect::<Vec<_>>()));
    assert!(sent.await.iter().flatten().all(|id| *id < ROWS));
}

#[tokio::test]
async fn a_text_ends_at_the_token_that_the_tokenizer_configuration_names() {
    // The scripted model says that 1 and 3 end a text; each configuration names another token.
    let script = || Script::saying([tokens("a"), vec![2], tokens("b")].concat());
    let user = text(&[2]);
    let cases = [
        (json!({"eos_token": user}), "eos_token"),
        (json!({"eos_token": {"content": user, "__type": "AddedToken"}}), "eos_token"),
        (json!({"eos_token": "</s>"}), "length"),
        (json!({"eos_token": null}), "length"),
        (json!({}), "length"),
    ];
    for (config, reason) in cases {
        let folder = folder(&[], Some(&config));
        let router = router(script(), folder.path()).await;
        let parameters = json!({"details": true, "max_new_tokens": 3});
        let answer = router.ok("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        assert_eq!(answer["details"]["finish_reason"], reason, "{config} {answer}");
        let parameters = json!({"details": true, "max_new_tokens": 3, "ignore_eos_token": true});
        let answer = router.ok("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        assert_eq!(answer["details"]["finish_reason"], "length", "{config} {answer}");
    }
}
