//! Tools: what models are told of them, and what their answers become.

use serde_json::{Value, json};

use crate::{
    router::{Router, model, text, tokens},
    shard::Script,
};

const CHAT: &str = "/v1/chat/completions";

/// A template that shows all that it is told, and that knows a form of calls by these marks.
fn showing(marks: &str) -> String {
    format!(
        "{{{{ messages | tojson }}}}{{% if tools %}}TOOLS{{{{ tools | tojson }}}}{{% endif %}}{{# {marks} #}}\
         {{% if add_generation_prompt %}}{{% endif %}}"
    )
}

/// A router whose model has this template and says this. One of its special tokens is renamed.
async fn saying(template: &str, answer: &str, special: &str) -> Router {
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let content = std::fs::read_to_string(model().join(file)).unwrap();
        std::fs::write(folder.path().join(file), content.replace("<|user|>", special)).unwrap();
    }
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let (before, behind) = answer.split_once(special).unwrap_or((answer, ""));
    let marked = if answer.contains(special) { vec![2] } else { Vec::new() };
    let answer = [tokens(before), marked, tokens(behind)].concat();
    Router::start_with(Script::saying(answer), |config| config.model.path = folder.path().to_owned()).await
}

fn weather() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": false});
    json!({"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": parameters}})
}

fn now() -> Value {
    json!({"type": "function", "function": {"name": "now"}})
}

fn chat(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "tools": [weather(), now()],
        "max_tokens": 1000});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// The message that the deltas of a stream add up to, and the reason of its end.
fn folded(events: &[Value]) -> (Value, Value) {
    let mut message = json!({"content": ""});
    let mut reason = Value::Null;
    let append = |to: &mut Value, more: &Value| {
        *to = format!("{}{}", to.as_str().unwrap_or_default(), more.as_str().unwrap_or_default()).into();
    };
    for event in &events[..events.len() - 1] {
        let choice = &event["choices"][0];
        for (field, value) in choice["delta"].as_object().unwrap() {
            match field.as_str() {
                "role" => message["role"] = value.clone(),
                "content" | "reasoning_content" => append(&mut message[field], value),
                "tool_calls" => {
                    let call = &value[0];
                    let at = call["index"].as_u64().unwrap() as usize;
                    if message["tool_calls"].is_null() {
                        message["tool_calls"] = json!([]);
                    }
                    let calls = message["tool_calls"].as_array_mut().unwrap();
                    if call["id"].is_string() {
                        assert_eq!(calls.len(), at);
                        calls.push(json!({"id": call["id"], "type": call["type"],
                            "function": {"name": call["function"]["name"], "arguments": ""}}));
                    }
                    append(&mut calls[at]["function"]["arguments"], &call["function"]["arguments"]);
                }
                other => panic!("{other}"),
            }
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    if message["content"] == "" && !message["tool_calls"].is_null() {
        message["content"] = Value::Null;
    }
    (message, reason)
}

/// The same message without the ids of its calls, which are checked.
fn without_ids(mut message: Value) -> Value {
    for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
        let id = call.as_object_mut().unwrap().remove("id").unwrap();
        let id = id.as_str().unwrap();
        let random = id.strip_prefix("call_").unwrap_or(id);
        assert!(random.len() == if random == id { 9 } else { 24 }, "{id}");
        assert!(random.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{id}");
    }
    if message["tool_calls"].is_null() {
        message.as_object_mut().unwrap().remove("tool_calls");
    }
    message
}

/// The answer as a whole, which a stream adds up to.
async fn answer(router: &Router, fields: Value) -> (Value, Value) {
    let body = chat(fields);
    let whole = router.ok(CHAT, &body).await;
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let (message, reason) = folded(&router.events(CHAT, &streamed).await);
    let choice = &whole["choices"][0];
    let whole = (without_ids(choice["message"].clone()), choice["finish_reason"].clone());
    assert_eq!((without_ids(message), reason), whole);
    whole
}

fn calls(list: &[(&str, &str)]) -> Value {
    let call = |(name, arguments): &(&str, &str)| {
        json!({"type": "function",
            "function": {"name": name, "arguments": arguments}})
    };
    list.iter().map(call).collect()
}

const OSLO: (&str, &str) = ("weather", "{\"city\": \"Oslo\"}");

#[tokio::test]
async fn calls_are_found_in_the_form_of_the_template() {
    let llama = showing("<|python_tag|>");
    let (old, new) = (showing("[TOOL_CALLS]"), showing("[TOOL_CALLS] [ARGS]"));
    let (hermes, harmony) = (showing("<tool_call>"), showing("<|channel|> <|message|>"));
    let generic = "{{ messages | tojson }}";
    for (template, text, content, expected) in [
        (&*llama, "{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}", None, &[OSLO][..]),
        (&*llama, "<|python_tag|>{\"name\": \"now\", \"parameters\": {}}", None, &[("now", "{}")]),
        (&*old, "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}]", None, &[OSLO]),
        (&*new, "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}", None, &[("now", "{}"), ("now", "{}")]),
        (
            &*hermes,
            "Wait.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>",
            Some("Wait."),
            &[OSLO],
        ),
        (
            &*hermes,
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
            None,
            &[OSLO],
        ),
        (
            &*harmony,
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"Oslo\"}<|call|>",
            None,
            &[OSLO],
        ),
        (generic, "{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}", None, &[OSLO]),
        (generic, "[{\"name\": \"now\", \"arguments\": {}}]", None, &[("now", "{}")]),
    ] {
        // As ordinary text, and with the mark that may be a special token as one.
        for special in ["<|user|>", "<|python_tag|>", "[TOOL_CALLS]", "<tool_call>", "<|channel|>"] {
            let router = saying(template, text, special).await;
            let message = json!({"role": "assistant", "content": content, "tool_calls": calls(expected)});
            assert_eq!(answer(&router, json!({})).await, (message, json!("tool_calls")), "{text} {special}");
        }
    }
}

#[tokio::test]
async fn what_is_no_call_is_content() {
    let hermes = showing("<tool_call>");
    for text in [
        "Hello",
        "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": }}\n</tool_call>",
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": \"b",
        "<tool_call>",
        "{\"name\": \"now\", \"arguments\": {}}",
    ] {
        let router = saying(&hermes, text, "<|user|>").await;
        let whole = router.ok(CHAT, &chat(json!({}))).await;
        let message = json!({"role": "assistant", "content": text});
        assert_eq!(whole["choices"][0]["message"], message);
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        let events = router.events(CHAT, &chat(json!({"stream": true}))).await;
        assert_eq!(folded(&events).0["content"], text, "a stream loses nothing");
    }
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let router = saying(&hermes, call, "<|user|>").await;
    for fields in [json!({"tool_choice": "none"}), json!({"tools": null}), json!({"tools": []})] {
        let (message, reason) = answer(&router, fields).await;
        assert_eq!((message["content"].as_str(), reason), (Some(call), json!("stop")));
    }
    // An answer that is cut off has a part of the arguments.
    let begun = &call[..call.len() - 15];
    let router = saying(&hermes, begun, "<|user|>").await;
    let (message, reason) = answer(&router, json!({"max_tokens": tokens(begun).len()})).await;
    assert_eq!((&message["tool_calls"], reason), (&calls(&[("now", "{")]), json!("length")));
}

#[tokio::test]
async fn there_is_one_call_if_there_may_be_no_more() {
    let call =
        |name: &str| format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{}}}}\n</tool_call>\n");
    let router =
        saying(&showing("<tool_call>"), &format!("{}{}", call("now"), call("now")), "<|user|>").await;
    let expected =
        |list: &[(&str, &str)]| json!({"role": "assistant", "content": null, "tool_calls": calls(list)});
    let both = [("now", "{}"), ("now", "{}")];
    for (fields, list) in [
        (json!({}), &both[..]),
        (json!({"parallel_tool_calls": true}), &both),
        (json!({"parallel_tool_calls": null}), &both),
        (json!({"parallel_tool_calls": false}), &both[..1]),
    ] {
        assert_eq!(answer(&router, fields.clone()).await, (expected(list), json!("tool_calls")), "{fields}");
    }
}

/// The prompt of the last request.
async fn prompt(router: &Router) -> String {
    router.shard.saw(|seen| seen.added().last().map(|added| text(&added.tokens))).await
}

#[tokio::test]
async fn templates_are_told_of_tools_calls_and_results() {
    let call = |id: &str, arguments: Value| {
        json!({"id": id, "type": "function",
            "function": {"name": "weather", "arguments": arguments}})
    };
    let messages = |id: &str, arguments: Value| {
        json!([{"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "refusal": null, "annotations": [],
                "tool_calls": [call(id, arguments)]},
            {"role": "tool", "tool_call_id": id, "content": [{"type": "text", "text": "cold"}]}])
    };
    let router = saying(&showing("<tool_call>"), "a", "<|user|>").await;
    for arguments in [json!("{\"city\": \"Oslo\"}"), json!({"city": "Oslo"})] {
        router.ok(CHAT, &chat(json!({"messages": messages("call_1", arguments)}))).await;
        let prompt = prompt(&router).await;
        let (told, tools) = prompt.split_once("TOOLS").unwrap();
        let told: Value = serde_json::from_str(told).unwrap();
        let expected = json!([{"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call("call_1", json!({"city": "Oslo"}))]},
            {"role": "tool", "content": "cold", "tool_call_id": "call_1"}]);
        assert_eq!(told, expected);
        assert_eq!(serde_json::from_str::<Value>(tools).unwrap(), json!([weather(), now()]));
    }
    // A template may want the text of arguments, and Mistral's want ids of nine characters.
    let source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }} {{ 'args: ' + c.function.arguments }}\
                  {% endfor %}{{ m.tool_call_id }}{% endfor %}{# tools [TOOL_CALLS] #}";
    let router = saying(source, "a", "<|user|>").await;
    let body = chat(json!({"messages": messages("call_1", json!("{\"city\": \"Oslo\"}"))}));
    router.ok(CHAT, &body).await;
    let told = prompt(&router).await;
    let (id, rest) = told.split_at(9);
    assert_eq!(rest, format!(" args: {{\"city\": \"Oslo\"}}{id}"));
    assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    router.ok(CHAT, &chat(json!({"messages": messages("abcdefgh1", json!("{}"))}))).await;
    assert_eq!(prompt(&router).await, "abcdefgh1 args: {}abcdefgh1");
}

#[tokio::test]
async fn a_template_without_tools_is_told_in_words() {
    let router =
        saying("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "a", "<|user|>").await;
    let call = json!({"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}});
    for (first, begin) in [
        (json!({"role": "system", "content": "Be kind."}), "<system>Be kind.\n\nYou can call"),
        (json!({"role": "user", "content": "Hi"}), "<user>You can call"),
        (json!({"role": "assistant", "content": "Hi"}), "<user>You can call"),
    ] {
        let messages = json!([first, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "noon"}]);
        router.ok(CHAT, &chat(json!({"messages": messages}))).await;
        let prompt = prompt(&router).await;
        assert!(prompt.starts_with(begin), "{prompt}");
        assert!(prompt.contains(&weather()["function"].to_string()), "{prompt}");
        let end = "<assistant>{\"name\":\"now\",\"arguments\":{}}<user>Result:\nnoon";
        assert!(prompt.ends_with(end), "{prompt}");
    }
    router.ok(CHAT, &chat(json!({"tool_choice": "none"}))).await;
    assert_eq!(prompt(&router).await, "<user>Hi");
}

#[tokio::test]
async fn tools_that_make_no_sense_are_refused_by_name() {
    let router = saying(&showing("<tool_call>"), "a", "<|user|>").await;
    let function = |fields: Value| json!({"tools": [{"type": "function", "function": fields}]});
    let message = |fields: Value| json!({"messages": [{"role": "user", "content": "a"}, fields]});
    let call = |fields: Value| message(json!({"role": "assistant", "tool_calls": [fields]}));
    for (fields, param) in [
        (json!({"tools": {}}), "tools"),
        (json!({"tools": [{}]}), "tools[0].type"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (function(json!({})), "tools[0].function.name"),
        (function(json!({"name": ""})), "tools[0].function.name"),
        (function(json!({"name": "a b"})), "tools[0].function.name"),
        (function(json!({"name": 5})), "tools[0].function.name"),
        (function(json!({"name": "a", "parameters": []})), "tools[0].function.parameters"),
        (function(json!({"name": "a", "strict": "yes"})), "tools[0].function.strict"),
        (json!({"tools": [now(), now()]}), "tools[1].function.name"),
        (json!({"tools": vec![now(); 129]}), "tools"),
        (json!({"tool_choice": "maybe"}), "tool_choice"),
        (json!({"tool_choice": 5}), "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "other"}}}), "tool_choice"),
        (json!({"tool_choice": "required", "tools": []}), "tool_choice"),
        (json!({"tool_choice": "required", "response_format": {"type": "json_object"}}), "response_format"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (message(json!({"role": "tool", "content": "a"})), "messages[1].tool_call_id"),
        (message(json!({"role": "function", "name": "f", "content": "a"})), "messages[1].role"),
        (message(json!({"role": "user", "content": "a", "tool_call_id": "1"})), "messages[1].tool_call_id"),
        (
            message(json!({"role": "user", "content": "a", "tool_calls": [{"function": {"name": "a"}}]})),
            "messages[1].tool_calls",
        ),
        (call(json!({})), "messages[1].tool_calls[0].function"),
        (call(json!({"function": {}})), "messages[1].tool_calls[0].function.name"),
        (call(json!({"type": "custom", "function": {"name": "a"}})), "messages[1].tool_calls[0].type"),
        (
            call(json!({"function": {"name": "a", "arguments": 5}})),
            "messages[1].tool_calls[0].function.arguments",
        ),
    ] {
        let (status, body) = router.post(CHAT, &chat(fields.clone())).await;
        assert_eq!((status.as_u16(), &body["error"]["param"]), (400, &json!(param)), "{fields} {body}");
    }
}

#[tokio::test]
async fn a_call_can_be_required() {
    let call = "{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}";
    let tagged = format!("<tool_call>\n{call}\n</tool_call>");
    let llama = call.replace("arguments", "parameters");
    let new = "[TOOL_CALLS]weather[ARGS]{\"city\": \"Oslo\"}".to_owned();
    let old = format!("[TOOL_CALLS][{call}]");
    let harmony =
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"Oslo\"}";
    let named = json!({"type": "function", "function": {"name": "weather"}});
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}});
    for (template, answers) in [
        (showing("<tool_call>"), tagged.as_str()),
        (showing("<|python_tag|>"), &llama),
        (showing("[TOOL_CALLS] [ARGS]"), &new),
        (showing("[TOOL_CALLS]"), &old),
        (showing("<|channel|> <|message|>"), harmony),
        ("{{ messages | tojson }}".to_owned(), call),
    ] {
        let router = saying(&template, answers, "<|user|>").await;
        for choice in [json!("required"), named.clone(), allowed.clone()] {
            for parallel in [json!(null), json!(true), json!(false)] {
                let fields = json!({"tool_choice": choice, "parallel_tool_calls": parallel});
                let (message, reason) = answer(&router, fields).await;
                assert_eq!(message["tool_calls"], calls(&[OSLO]), "{template} {choice} {parallel}");
                assert_eq!(reason, "tool_calls");
            }
        }
    }
}

#[tokio::test]
async fn thoughts_are_told_apart() {
    let thinking = "{{ messages | tojson }}{# <think> </think> <tool_call> #}";
    let begun = "{{ messages | tojson }}{# </think> <tool_call> #}<think>\n";
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    for (template, text, expected) in [
        (thinking, "<think>\nHm.\n</think>\n\nYes.", json!({"content": "Yes.", "reasoning_content": "Hm."})),
        (thinking, "Yes.", json!({"content": "Yes."})),
        (begun, "Hm.\n</think>\n\nYes.", json!({"content": "Yes.", "reasoning_content": "Hm."})),
        (begun, "Hm.", json!({"content": "", "reasoning_content": "Hm."})),
        (
            "{# [THINK] [/THINK] #}x",
            "[THINK]Hm.[/THINK]Yes.",
            json!({"content": "Yes.", "reasoning_content": "Hm."}),
        ),
        (
            "{# <|channel|> <|message|> #}<|start|>assistant",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            json!({"content": "Yes.", "reasoning_content": "Hm."}),
        ),
        ("x", "<think>Hm.</think>Yes.", json!({"content": "<think>Hm.</think>Yes."})),
        (
            begun,
            &format!("Hm.</think>{call}"),
            json!({"content": null, "reasoning_content": "Hm.", "tool_calls": calls(&[("now", "{}")])}),
        ),
    ] {
        let router = saying(template, text, "<|user|>").await;
        let (mut message, _) = answer(&router, json!({})).await;
        message.as_object_mut().unwrap().remove("role");
        assert_eq!(message, expected, "{text}");
        let (mut message, _) = answer(&router, json!({"include_reasoning": false})).await;
        message.as_object_mut().unwrap().remove("role");
        let mut hidden = expected.clone();
        hidden.as_object_mut().unwrap().remove("reasoning_content");
        assert_eq!(message, hidden, "{text}");
        // The tokens that are reported are those of the content, to the last byte.
        let body = chat(json!({"logprobs": true, "top_logprobs": 1}));
        let choice = &router.ok(CHAT, &body).await["choices"][0];
        let tokens = choice["logprobs"]["content"].as_array().unwrap();
        let joined: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
        assert_eq!(joined, choice["message"]["content"].as_str().unwrap_or_default(), "{text}");
        let bytes: Vec<u64> = tokens
            .iter()
            .flat_map(|token| token["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap())
            .collect();
        assert_eq!(bytes, joined.bytes().map(u64::from).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn templates_are_told_how_to_think() {
    for (source, effort, prompt_end) in [
        ("x{{ reasoning_effort }}", "high", "xhigh"),
        ("x{{ enable_thinking }}", "none", "xFalse"),
        ("x{{ enable_thinking }}", "low", "xTrue"),
    ] {
        let router = saying(source, "a", "<|user|>").await;
        router.ok(CHAT, &chat(json!({"reasoning_effort": effort, "tools": null}))).await;
        assert_eq!(prompt(&router).await, prompt_end);
    }
    let router = saying("x", "a", "<|user|>").await;
    let (status, body) = router.post(CHAT, &chat(json!({"reasoning_effort": "low"}))).await;
    assert_eq!((status.as_u16(), &body["error"]["param"]), (400, &json!("reasoning_effort")));
}
