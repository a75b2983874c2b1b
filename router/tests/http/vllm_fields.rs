//! Fields of OpenAI's routes that vLLM has named: how an answer ends, what of it is shown, and how a chat is rendered.

use serde_json::{Value, json};

use crate::{
    refusals::assert_openai,
    router::{Router, model, tokens, with_bos},
    shard::{EOS, Script},
};

/// `<|user|>`, a special token that does not end a text.
const USER: u32 = 2;
const ROUTES: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

fn body(path: &str, fields: &Value) -> Value {
    let mut body = match path {
        "/v1/completions" => json!({"prompt": "x"}),
        _ => json!({"messages": [{"role": "user", "content": "x"}]}),
    };
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// The text of an answer, and why it ended. A stream says the same, and so do the tokens.
async fn answer(router: &Router, path: &str, fields: &Value) -> (String, String) {
    let chat = path.contains("chat");
    let mut body = body(path, fields);
    body["logprobs"] = if chat { json!(true) } else { json!(0) };
    let choice = router.ok(path, &body).await["choices"][0].clone();
    let text = if chat { &choice["message"]["content"] } else { &choice["text"] };
    let text = text.as_str().unwrap().to_owned();
    if chat {
        let tokens = choice["logprobs"]["content"].as_array().unwrap().iter();
        let joined: String = tokens.map(|token| token["token"].as_str().unwrap()).collect();
        assert_eq!(joined, text, "{fields}");
    }
    body["stream"] = json!(true);
    let events = router.events(path, &body).await;
    let parts = events.iter().filter_map(|event| event["choices"].get(0));
    let part = |choice: &Value| {
        choice.get("text").unwrap_or(&choice["delta"]["content"]).as_str().map(str::to_owned)
    };
    assert_eq!(parts.filter_map(part).collect::<String>(), text, "{fields}");
    (text, choice["finish_reason"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn an_answer_ends_where_it_is_told_to() {
    let [a, b, c] = tokens("abc")[..] else { panic!("a token a letter") };
    let router = Router::start(Script::saying(vec![a, USER, b, c, b])).await;
    for (fields, text, reason) in [
        (json!({}), "abcb", "stop"),
        (json!({"stop_token_ids": [c]}), "ab", "stop"),
        (json!({"stop_token_ids": [c], "include_stop_str_in_output": true}), "abc", "stop"),
        (json!({"stop_token_ids": [USER]}), "a", "stop"),
        (json!({"stop_token_ids": [USER], "skip_special_tokens": false}), "a", "stop"),
        (
            json!({"stop_token_ids": [USER], "skip_special_tokens": false, "include_stop_str_in_output": true}),
            "a<|user|>",
            "stop",
        ),
        (json!({"stop_token_ids": [b, c], "ignore_eos": true}), "a", "stop"),
        (json!({"stop_token_ids": []}), "abcb", "stop"),
        (json!({"stop_token_ids": [a], "max_tokens": 3}), "", "stop"),
        (json!({"skip_special_tokens": false}), "a<|user|>bcb", "stop"),
        (json!({"skip_special_tokens": false, "stop": "user"}), "a<|", "stop"),
        (json!({"skip_special_tokens": true, "stop": "user"}), "abcb", "stop"),
        (json!({"stop": "bc"}), "a", "stop"),
        (json!({"stop": "bc", "include_stop_str_in_output": true}), "abc", "stop"),
        (json!({"stop": ["c"], "include_stop_str_in_output": true}), "abc", "stop"),
        (json!({"stop": "b", "min_tokens": 3}), "abc", "stop"),
        (json!({"stop": "b", "min_tokens": 2}), "a", "stop"),
        (json!({"stop": "bc", "min_tokens": 3}), "abcb", "stop"),
        (json!({"stop": "a", "min_tokens": 1}), "abcb", "stop"),
        (
            json!({"ignore_eos": true, "max_tokens": 7, "skip_special_tokens": false}),
            "a<|user|>bcb</s></s>",
            "length",
        ),
        (json!({"spaces_between_special_tokens": false}), "abcb", "stop"),
    ] {
        for path in ROUTES {
            let (got, why) = answer(&router, path, &fields).await;
            assert_eq!((&*got, &*why), (text, reason), "{path} {fields}");
        }
    }
}

#[tokio::test]
async fn what_could_end_an_answer_too_early_is_not_chosen() {
    let router = Router::start(Script::saying(tokens("abcdef"))).await;
    for (number, (fields, until, banned)) in [
        (json!({}), 0, vec![]),
        (json!({"min_tokens": 0}), 0, vec![]),
        (json!({"min_tokens": 4}), 4, vec![EOS, 3]),
        (json!({"min_tokens": 1, "stop_token_ids": [9, 8]}), 1, vec![EOS, 3, 9, 8]),
        (json!({"min_tokens": 5, "ignore_eos": true}), 5, vec![EOS, 3]),
    ]
    .into_iter()
    .enumerate()
    {
        router.ok("/v1/completions", &body("/v1/completions", &fields)).await;
        let bans = router.shard.saw(|seen| Some(seen.added().nth(number)?.sampling.clone()?.bans)).await;
        let mut tokens: Vec<_> = bans.iter().map(|ban| ban.token).collect();
        tokens.dedup();
        assert!(bans.iter().all(|ban| ban.until == until), "{bans:?}");
        assert_eq!(tokens.iter().filter(|token| !banned.contains(token)).count(), 0, "{bans:?}");
        assert!(banned.iter().all(|token| tokens.contains(token)), "{bans:?}");
    }
}

#[tokio::test]
async fn endings_that_make_no_sense() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for (fields, param, cause) in [
        (
            json!({"min_tokens": 17, "max_tokens": 16}),
            "min_tokens",
            "must be at most `max_tokens`, which is 16",
        ),
        (json!({"min_tokens": 5000}), "min_tokens", "must be at most"),
        (json!({"min_tokens": -1}), "min_tokens", "expected an integer from 0"),
        (json!({"stop_token_ids": [320]}), "stop_token_ids", "must be less than 320"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids[0]", "expected an integer from 0"),
        (json!({"stop_token_ids": vec![5; 129]}), "stop_token_ids", "up to 128"),
        (json!({"stop_token_ids": 5}), "stop_token_ids", "expected a list"),
        (json!({"skip_special_tokens": "no"}), "skip_special_tokens", "expected a boolean"),
        (json!({"include_stop_str_in_output": 1}), "include_stop_str_in_output", "expected a boolean"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens", "strictly positive"),
        (json!({"bad_words": ["x"]}), "bad_words", "is not supported"),
        (json!({"prompt_logprobs": 1}), "prompt_logprobs", "is not supported"),
        (json!({"allowed_token_ids": [1]}), "allowed_token_ids", "is not supported"),
        (json!({"use_beam_search": true}), "use_beam_search", "is not supported"),
        (json!({"priority": 1}), "priority", "is not supported"),
        (json!({"length_penalty": 2.0}), "length_penalty", "is not supported"),
    ] {
        for path in ROUTES {
            let (status, answer) = router.post(path, &body(path, &fields)).await;
            assert_eq!(status, 400, "{path} {fields} {answer}");
            assert_openai(&answer, answer["error"]["code"].as_str().unwrap(), cause);
            assert_eq!(answer["error"]["param"], param, "{answer}");
        }
    }
}

/// The prompt that the shard was given last.
async fn prompt(router: &Router) -> String {
    let tokens = router.shard.saw(|seen| {
        let new = seen.added().last()?;
        Some(new.tokens[..new.prompt_len as usize].to_vec())
    });
    crate::router::text(&tokens.await)
}

#[tokio::test]
async fn tokens_around_a_prompt_are_added_as_wanted() {
    let folder = with_bos();
    let template = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let path = folder.path().to_owned();
    let router = Router::start_with(Script::saying(tokens("a")), |config| config.model.path = path).await;
    for (path, fields, expected) in [
        ("/v1/completions", json!({}), "<s>x"),
        ("/v1/completions", json!({"add_special_tokens": true}), "<s>x"),
        ("/v1/completions", json!({"add_special_tokens": false}), "x"),
        ("/v1/completions", json!({"prompt": "abcdef", "truncate_prompt_tokens": 3}), "<s>ef"),
        ("/v1/completions", json!({"prompt": "ab", "truncate_prompt_tokens": 30}), "<s>ab"),
        (
            "/v1/completions",
            json!({"prompt": [4, 5, 6, 7], "truncate_prompt_tokens": 2}),
            &*crate::router::text(&[6, 7]),
        ),
        ("/v1/chat/completions", json!({}), "[x]"),
        ("/v1/chat/completions", json!({"add_special_tokens": false}), "[x]"),
        ("/v1/chat/completions", json!({"add_special_tokens": true}), "<s>[x]"),
        ("/v1/chat/completions", json!({"truncate_prompt_tokens": 2}), "x]"),
    ] {
        router.ok(path, &body(path, &fields)).await;
        assert_eq!(prompt(&router).await, expected, "{fields}");
    }
}

async fn with_template(source: &str) -> Router {
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model().join(file), folder.path().join(file)).unwrap();
    }
    std::fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
    Router::start_with(Script::saying(tokens("b")), |config| config.model.path = folder.path().to_owned())
        .await
}

#[tokio::test]
async fn a_chat_is_rendered_as_it_asks_for() {
    let template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}\
                    {% for d in documents or [] %}d:{{ d.text }};{% endfor %}\
                    {% if think %}think={{ think }};{% endif %}\
                    {% if reasoning_effort %}effort={{ reasoning_effort }};{% endif %}\
                    {% if add_generation_prompt %}a:{% endif %}";
    let router = with_template(template).await;
    let said = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "One"}]);
    for (fields, expected) in [
        (json!({}), "u:x;a:"),
        (json!({"add_generation_prompt": true}), "u:x;a:"),
        (json!({"add_generation_prompt": false}), "u:x;"),
        (json!({"messages": said}), "u:x;a:One;a:"),
        (json!({"messages": said, "continue_final_message": true}), "u:x;a:One"),
        (
            json!({"messages": said, "continue_final_message": true, "add_generation_prompt": false}),
            "u:x;a:One",
        ),
        (json!({"chat_template_kwargs": {"think": 7}}), "u:x;think=7;a:"),
        (json!({"chat_template_kwargs": {"think": ["a"]}}), "u:x;think=['a'];a:"),
        (json!({"chat_template_kwargs": {}}), "u:x;a:"),
        (json!({"documents": [{"text": "one"}, {"text": "two"}]}), "u:x;d:one;d:two;a:"),
        (json!({"documents": []}), "u:x;a:"),
        (json!({"reasoning_effort": "low"}), "u:x;effort=low;a:"),
        (
            json!({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}),
            "u:x;effort=high;a:",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
            "u:ab;a:",
        ),
    ] {
        router.ok("/v1/chat/completions", &body("/v1/chat/completions", &fields)).await;
        assert_eq!(prompt(&router).await, expected, "{fields}");
    }
    let both = json!({"messages": said, "continue_final_message": true, "add_generation_prompt": true});
    let (status, answer) = router.post("/v1/chat/completions", &both).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("continue_final_message")));
    let unknown = with_template("{{ messages[0].content }}").await;
    let effort = body("/v1/chat/completions", &json!({"reasoning_effort": "low"}));
    let (_, answer) = unknown.post("/v1/chat/completions", &effort).await;
    assert_openai(&answer, "unsupported_parameter", "`reasoning_effort` is not supported");
}

#[tokio::test]
async fn an_echo_of_a_chat_is_the_message_that_is_continued() {
    let router = with_template("{% for m in messages %}{{ m.content }}{% endfor %}").await;
    let said = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "One"}]);
    for (fields, text) in [
        (json!({"messages": said, "echo": true, "continue_final_message": true}), "Oneb"),
        (json!({"messages": said, "echo": true}), "Oneb"),
        (json!({"messages": said, "echo": false}), "b"),
        (json!({"messages": said}), "b"),
        (json!({"echo": true}), "b"),
    ] {
        let request = body("/v1/chat/completions", &fields);
        let whole = router.ok("/v1/chat/completions", &request).await;
        assert_eq!(whole["choices"][0]["message"]["content"], text, "{fields}");
        let mut request = request;
        (request["stream"], request["n"]) = (json!(true), json!(2));
        let events = router.events("/v1/chat/completions", &request).await;
        let parts = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!(parts.map(str::len).sum::<usize>(), 2 * text.len(), "{fields}");
    }
}

#[tokio::test]
async fn a_fingerprint_names_the_model_and_how_it_is_computed() {
    let mut seen = std::collections::BTreeSet::new();
    for change in [
        |_: &mut config::Config| {},
        |config: &mut config::Config| config.model.id = "another/model".into(),
        |config: &mut config::Config| config.model.sha = Some("0123".into()),
        |config: &mut config::Config| config.shard.dtype = Some(config::Dtype::Bfloat16),
    ] {
        let router = Router::start_with(Script::saying(tokens("a")), change).await;
        let mut of_router = std::collections::BTreeSet::new();
        for path in ROUTES {
            let whole = router.ok(path, &body(path, &json!({}))).await;
            let events = router.events(path, &body(path, &json!({"stream": true}))).await;
            let parts = events.iter().filter(|event| event.is_object()).chain([&whole]);
            of_router.extend(parts.map(|part| part["system_fingerprint"].as_str().unwrap().to_owned()));
        }
        assert_eq!(of_router.len(), 1, "{of_router:?}");
        seen.append(&mut of_router);
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
}
