//! Adapters that were saved beside a tokenizer: their templates, their tokens, and what is refused of them.

use std::fs;

use config::Config;
use futures::future::join_all;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    router::{Router, model, text, tokens, write_adapter},
    shard::{Script, Seen, allows},
};

/// Rows of the model.
const ROWS: u32 = 320;
/// A template that shows who renders.
const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}";

/// Adapters, each a folder with files beside its weights.
struct Adapters(TempDir);

impl Adapters {
    fn new() -> Adapters {
        Adapters(tempfile::tempdir().unwrap())
    }

    fn with(self, name: &str, files: &[(&str, String)]) -> Adapters {
        write_adapter(self.0.path(), name, 1000);
        self.write(name, files);
        self
    }

    fn write(&self, name: &str, files: &[(&str, String)]) {
        for (file, content) in files {
            let path = self.0.path().join(name).join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
    }

    async fn router(&self, script: Script) -> Router {
        let folder = self.0.path().to_owned();
        let change = move |config: &mut Config| {
            config.shard.adapter_dir = Some(folder);
            config.router.max_stop_sequences = 8;
        };
        Router::start_with(script, change).await
    }
}

fn template(text: &str) -> (&'static str, String) {
    ("chat_template.jinja", text.to_owned())
}

fn token(id: u32, content: &str, flags: &Value) -> Value {
    let mut token = json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false,
    });
    token.as_object_mut().unwrap().extend(flags.as_object().unwrap().clone());
    token
}

/// The model's tokenizer.json after a change.
fn definition(change: impl FnOnce(&mut Value)) -> (&'static str, String) {
    let content = fs::read(model().join("tokenizer.json")).unwrap();
    let mut definition: Value = serde_json::from_slice(&content).unwrap();
    change(&mut definition);
    ("tokenizer.json", definition.to_string())
}

fn adding(tokens: &[Value]) -> (&'static str, String) {
    definition(|definition| definition["added_tokens"].as_array_mut().unwrap().extend(tokens.to_vec()))
}

fn chat(adapter: Option<&str>) -> Value {
    json!({"model": adapter, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
}

/// The prompt of the last sequence.
fn prompt(seen: &Seen) -> Vec<u32> {
    seen.added().last().unwrap().tokens.clone()
}

async fn prompt_of(router: &Router, path: &str, body: &Value) -> Vec<u32> {
    router.ok(path, body).await;
    router.shard.saw(|seen| Some(prompt(seen))).await
}

#[tokio::test]
async fn chats_are_rendered_with_the_template_of_their_adapter() {
    let list = json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools|length }} tools"}]);
    let other = "{% for m in messages %}{{ bos_token }}{{ m.content }}!{% endfor %}";
    let adapters = Adapters::new()
        .with("bare", &[])
        .with("own", &[template(TEMPLATE)])
        .with("config", &[("tokenizer_config.json", json!({"chat_template": other}).to_string())])
        .with("list", &[("tokenizer_config.json", json!({"chat_template": list}).to_string())])
        .with("named", &[template("file"), ("additional_chat_templates/tool_use.jinja", "with tools".into())])
        .with(
            "both",
            &[template("file"), ("tokenizer_config.json", json!({"chat_template": "config"}).to_string())],
        )
        .with(
            "eos",
            &[("tokenizer_config.json", json!({"eos_token": "<|user|>"}).to_string()), template(TEMPLATE)],
        );
    let router = adapters.router(Script::saying(tokens("a"))).await;
    let base = prompt_of(&router, "/v1/chat/completions", &chat(None)).await;
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    for (adapter, without, with) in [
        ("own", "[user] hi</s>", None),
        ("config", "<s>hi!", None),
        ("list", "plain", Some("1 tools")),
        ("named", "file", Some("with tools")),
        ("both", "file", None),
        ("eos", "[user] hi<|user|>", None),
    ] {
        let expected = tokens(without);
        let responses = json!({"model": adapter, "input": "hi", "max_output_tokens": 4});
        let native =
            json!({"inputs": "hi", "parameters": {"adapter_id": adapter, "apply_chat_template": true}});
        for (path, body) in [
            ("/v1/chat/completions", &chat(Some(adapter))),
            ("/v1/responses", &responses),
            ("/generate", &native),
        ] {
            assert_eq!(prompt_of(&router, path, body).await, expected, "{adapter}: {path}");
        }
        let Some(with) = with else { continue };
        let mut body = chat(Some(adapter));
        body["tools"] = tool.clone();
        let told = text(&prompt_of(&router, "/v1/chat/completions", &body).await);
        assert_eq!(told, with, "{adapter}");
    }
    assert_eq!(prompt_of(&router, "/v1/chat/completions", &chat(Some("bare"))).await, base);
    assert_eq!(prompt_of(&router, "/v1/chat/completions", &chat(None)).await, base);
    let listed: Value = router.get("/v1/adapters").await.json().await.unwrap();
    let of = |name: &str| {
        let all = listed["data"].as_array().unwrap();
        all.iter().find(|adapter| adapter["id"] == name).unwrap()["text"].clone()
    };
    assert_eq!(of("own"), json!({"chat_template": true, "added_tokens": 0, "error": null}));
    assert_eq!(of("bare"), json!({"chat_template": false, "added_tokens": 0, "error": null}));
}

#[tokio::test]
async fn calls_of_tools_are_found_as_the_template_of_the_adapter_writes_them() {
    let said = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>";
    let hermes = "{% if tools %}{{ tools|tojson }}<tool_call>{% endif %}{{ messages[0].content }}";
    let adapters = Adapters::new().with("hermes", &[template(hermes)]);
    let router = adapters.router(Script::saying(tokens(said))).await;
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let mut body = chat(Some("hermes"));
    (body["tools"], body["max_tokens"]) = (tool, json!(200));
    let answer = router.ok("/v1/chat/completions", &body).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], "{\"x\": 1}");
}

#[tokio::test]
async fn texts_are_made_of_the_tokens_of_their_adapter() {
    let list = |name: &str, id: u32| ("added_tokens.json", json!({name: id}).to_string());
    let renamed = |definition: &mut Value| definition["added_tokens"][2]["content"] = json!("<|tool|>");
    let config = json!({"added_tokens_decoder": {"325": {"content": "zzz", "special": true}}});
    let adapters = Adapters::new()
        .with("special", &[adding(&[token(320, "<|x|>", &json!({"special": true}))])])
        .with("strip", &[adding(&[token(320, "<y>", &json!({"lstrip": true, "rstrip": true}))])])
        .with("word", &[adding(&[token(320, "qqq", &json!({"single_word": true}))])])
        .with("ids", &[list("<late>", 330)])
        .with("config", &[("tokenizer_config.json", config.to_string())])
        .with("renamed", &[definition(renamed)]);
    let router = adapters.router(Script::saying(tokens("a"))).await;
    let concat = |parts: &[&[u32]]| parts.concat();
    let cases = [
        ("special", "a <|x|>b", concat(&[&tokens("a "), &[320], &tokens("b")])),
        ("strip", "a  <y>  b", concat(&[&tokens("a"), &[320], &tokens("b")])),
        ("word", "qqqa qqq", concat(&[&tokens("qqqa "), &[320]])),
        ("ids", "a<late>", concat(&[&tokens("a"), &[330]])),
        ("config", "azzzz", concat(&[&tokens("a"), &[325], &tokens("z")])),
        ("renamed", "a<|tool|>", concat(&[&tokens("a"), &[2]])),
        ("renamed", "a<|assistant|>", concat(&[&tokens("a"), &[3]])),
    ];
    let ask = |adapter: &str, text: &str| json!({"inputs": text, "parameters": {"adapter_id": adapter}});
    for (adapter, text, expected) in &cases {
        assert_eq!(
            prompt_of(&router, "/generate", &ask(adapter, text)).await,
            *expected,
            "{adapter}: {text}"
        );
        // Others are not touched.
        let bare = json!({"inputs": text});
        assert_eq!(prompt_of(&router, "/generate", &bare).await, tokens(text), "{text}");
        let told = router.ok("/tokenize", &json!({"prompt": text, "model": adapter})).await;
        assert_eq!(told["tokens"], json!(expected), "{adapter}: {text}");
        let back = router.ok("/detokenize", &json!({"tokens": expected, "model": adapter})).await;
        assert!(back["prompt"].as_str().unwrap().starts_with(&text[..1]), "{back}");
    }
    // A name that the adapter has taken away is text.
    let old = prompt_of(&router, "/generate", &ask("renamed", "<|user|>")).await;
    assert!(!old.contains(&2) && old.len() > 1, "{old:?}");
}

#[tokio::test]
async fn answers_are_told_and_ended_by_the_tokens_of_their_adapter() {
    let adapters = Adapters::new()
        .with("word", &[adding(&[token(320, "<word>", &json!({}))])])
        .with("special", &[adding(&[token(320, "<|x|>", &json!({"special": true}))])])
        .with(
            "end",
            &[
                adding(&[token(320, "<|x|>", &json!({"special": true}))]),
                ("tokenizer_config.json", json!({"eos_token": "<|x|>"}).to_string()),
            ],
        )
        .with("ends", &[("generation_config.json", json!({"eos_token_id": [320, 1]}).to_string())])
        .with(
            "renamed",
            &[definition(|definition| definition["added_tokens"][2]["content"] = json!("<|t|>"))],
        );
    let said = [&tokens("a")[..], &[320], &tokens("b"), &[2]].concat();
    let router = adapters.router(Script::saying(said)).await;
    for (adapter, skip, text, scored) in [
        ("word", true, "a<word>b", "<word>"),
        ("special", true, "ab", "<|x|>"),
        ("special", false, "a<|x|>b<|user|>", "<|x|>"),
        ("end", true, "a", "a"),
        ("ends", true, "a", "a"),
        ("renamed", false, "ab<|t|>", "<|t|>"),
    ] {
        let body = json!({
            "model": adapter, "prompt": "x", "max_tokens": 4, "skip_special_tokens": skip, "logprobs": 0,
        });
        let answer = router.ok("/v1/completions", &body).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["text"], text, "{adapter}");
        let told = choice["logprobs"]["tokens"].as_array().unwrap();
        assert!(told.iter().any(|token| token == scored), "{adapter}: {told:?}");
    }
}

#[tokio::test]
async fn what_contradicts_the_model_is_refused_with_its_name() {
    let vocabulary = |change: fn(&mut Value)| definition(change);
    let long = "x".repeat(2000);
    let adapters = Adapters::new()
        .with(
            "entry",
            &[vocabulary(|d| {
                let vocab = d["model"]["vocab"].as_object_mut().unwrap();
                let id = vocab.remove("th").or_else(|| vocab.remove("t")).unwrap();
                vocab.insert("qqq".into(), id);
            })],
        )
        .with(
            "fewer",
            &[vocabulary(|d| {
                d["model"]["vocab"].as_object_mut().unwrap().remove("z").unwrap();
            })],
        )
        .with("more", &[vocabulary(|d| d["model"]["vocab"]["qqq"] = json!(320))])
        .with("merges", &[vocabulary(|d| d["model"]["merges"].as_array_mut().unwrap().swap(0, 1))])
        .with("taken", &[adding(&[token(100, "<x>", &json!({}))])])
        .with("moved", &[adding(&[token(321, "<s>", &json!({}))])])
        .with("twice", &[adding(&[token(321, "<x>", &json!({})), token(322, "<x>", &json!({}))])])
        .with("long", &[adding(&[token(321, &long, &json!({}))])])
        .with(
            "many",
            &[adding(&(0..5000).map(|i| token(320 + i, &format!("<{i}>"), &json!({}))).collect::<Vec<_>>())],
        )
        .with("broken", &[("tokenizer.json", "{".into())])
        .with("config", &[("tokenizer_config.json", "[]".into())]);
    let router = adapters.router(Script::saying(tokens("a"))).await;
    let ask = |adapter: &str, text: &str| json!({"inputs": text, "parameters": {"adapter_id": adapter}});
    for (adapter, parts) in [
        ("entry", &["tokenizer.json: the vocabulary is not that of the model: the entry", "\"qqq\""][..]),
        ("fewer", &["tokenizer.json: the vocabulary is not that of the model", "is none", "\"z\""]),
        ("more", &["the entry 320 is \"qqq\", and the model's is none"]),
        ("merges", &["tokenizer.json: the merges"]),
        ("taken", &["tokenizer.json: the added token 100 is \"<x>\", and the model's entry is"]),
        ("moved", &["tokenizer.json: the added token \"<s>\" is 321, and the model's is 0"]),
        ("twice", &["tokenizer.json: the added tokens 321 and 322 are both \"<x>\""]),
        ("long", &["tokenizer.json: the added token 321", "has more than 1024 bytes"]),
        ("many", &["tokenizer.json: 5000 tokens are added"]),
        ("broken", &["tokenizer.json: EOF"]),
        ("config", &["tokenizer_config.json: invalid type"]),
    ] {
        for _ in 0..2 {
            let (status, body) = router.post("/generate", &ask(adapter, "x")).await;
            let error = body["error"].as_str().unwrap();
            assert_eq!(status, 422, "{adapter}: {body}");
            assert!(error.contains(&format!("adapter \"{adapter}\"")), "{error}");
            assert!(parts.iter().all(|part| error.contains(part)), "{adapter}: {error}");
        }
    }
    let listed: Value = router.get("/v1/adapters").await.json().await.unwrap();
    let merges = listed["data"].as_array().unwrap().iter().find(|adapter| adapter["id"] == "merges").unwrap();
    assert!(merges["text"]["error"].as_str().unwrap().contains("merges"), "{merges}");
}

#[tokio::test]
async fn only_those_who_need_what_is_broken_are_refused() {
    let late = token(ROWS + 300, "<late>", &json!({"special": true}));
    let adapters = Adapters::new().with("late", &[adding(&[late])]).with("template", &[template("{% if %}")]);
    let router = adapters.router(Script::saying(tokens("a"))).await;
    let ask = |adapter: &str, text: &str| json!({"inputs": text, "parameters": {"adapter_id": adapter}});
    let (status, body) = router.post("/generate", &ask("late", "a <late>")).await;
    assert_eq!(status, 422);
    assert!(body["error"].as_str().unwrap().contains("620 (\"<late>\")"), "{body}");
    router.ok("/generate", &ask("late", "a")).await;
    router.ok("/generate", &ask("template", "a")).await;
    let (status, body) = router.post("/v1/chat/completions", &chat(Some("template"))).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (400, &json!("template_error")), "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("does not compile"), "{body}");
    router.ok("/v1/chat/completions", &chat(None)).await;
}

#[tokio::test]
async fn a_changed_template_is_another_adapter() {
    let adapters = Adapters::new().with("own", &[template("one")]);
    let router = adapters.router(Script::saying(tokens("a"))).await;
    let mut keys = Vec::new();
    for text in ["one", "two", "one"] {
        adapters.write("own", &[template(text)]);
        assert_eq!(prompt_of(&router, "/v1/chat/completions", &chat(Some("own"))).await, tokens(text));
        keys.push(router.shard.saw(|seen| Some(seen.staged.last().unwrap().content.clone())).await);
    }
    assert_ne!(keys[0], keys[1]);
    fs::remove_file(adapters.0.path().join("own/chat_template.jinja")).unwrap();
    let base = prompt_of(&router, "/v1/chat/completions", &chat(None)).await;
    assert_eq!(prompt_of(&router, "/v1/chat/completions", &chat(Some("own"))).await, base);
}

#[tokio::test]
async fn many_at_once_ask_for_each_adapter_in_its_own_words() {
    let names: Vec<String> = (0..12).map(|number| format!("adapter {number}")).collect();
    let adapters = names.iter().fold(Adapters::new(), |adapters, name| {
        adapters.with(name, &[template(&format!("{{{{ messages[0].content }}}} of {name}")), adding(&[])])
    });
    let router = adapters.router(Script::saying(tokens("a"))).await;
    let bodies: Vec<Value> = names.iter().cycle().take(48).map(|name| chat(Some(name))).collect();
    join_all(bodies.iter().map(|body| router.ok("/v1/chat/completions", body))).await;
    for name in &names {
        let wanted = tokens(&format!("hi of {name}"));
        let count =
            router.shard.saw(|seen| Some(seen.added().filter(|new| new.tokens == wanted).count())).await;
        assert_eq!(count, 4, "{name}");
    }
}

#[tokio::test]
async fn several_adapters_have_a_template_only_if_it_is_that_of_all() {
    let adapters = Adapters::new()
        .with("one", &[template("own")])
        .with("two", &[template("own")])
        .with("three", &[template("another")])
        .with("bare", &[]);
    let router = adapters.router(Script::saying(tokens("a"))).await;
    let base = prompt_of(&router, "/v1/chat/completions", &chat(None)).await;
    for (ids, is_own) in [(["one", "two"], true), (["one", "three"], false), (["bare", "one"], false)] {
        for field in ["merged_adapters", "ensemble"] {
            let mut body = chat(None);
            body[field] = json!({"ids": ids, "weights": [0.5, 0.5]});
            let found = prompt_of(&router, "/v1/chat/completions", &body).await;
            assert_eq!(found, if is_own { tokens("own") } else { base.clone() }, "{field}: {ids:?}");
        }
    }
}

#[tokio::test]
async fn grammars_are_of_the_tokens_of_the_adapter() {
    // The shard is asked for the mask, in which the renamed token is no text.
    let renamed = |definition: &mut Value| definition["added_tokens"][2]["content"] = json!("yes");
    let plain = |definition: &mut Value| {
        renamed(definition);
        definition["added_tokens"][2]["special"] = json!(false);
    };
    let adapters =
        Adapters::new().with("plain", &[definition(plain)]).with("special", &[definition(renamed)]);
    for (adapter, is_allowed) in [(Some("plain"), true), (Some("special"), false), (None, false)] {
        let router = adapters.router(Script::saying(vec![2])).await;
        let body = json!({"model": adapter, "prompt": "x", "max_tokens": 4, "guided_choice": ["yes", "no"]});
        router.post("/v1/completions", &body).await;
        let first = |seen: &Seen| Some(allows(&seen.masks.first()?.1[0], 2));
        assert_eq!(router.shard.saw(first).await, is_allowed, "{adapter:?}");
    }
}
