//! `/v1/responses`: items in and out, the events of a stream, and what is refused.

use serde_json::{Value, json};

use crate::{
    router::{MODEL, Router, model, text, tokens},
    shard::Script,
};

const PATH: &str = "/v1/responses";

/// A router whose model thinks, calls tools, and says this.
async fn saying(answer: &str) -> Router {
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model().join(file), folder.path().join(file)).unwrap();
    }
    let template = "{{ messages | tojson }}{{ tools | tojson }}{# <think> </think> <tool_call> #}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let script = Script::saying(tokens(answer));
    Router::start_with(script, |config| config.model.path = folder.path().to_owned()).await
}

fn tool() -> Value {
    json!({"type": "function", "name": "now", "description": "Tells it.", "parameters": {"type": "object"},
        "strict": false})
}

/// The output that the events of a stream add up to, each checked against what has begun.
fn folded(events: &[Value]) -> Value {
    let mut items: Vec<Value> = Vec::new();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number, "{event}");
        let at = event["output_index"].as_u64().unwrap_or_default() as usize;
        let name = event["type"].as_str().unwrap();
        let text = match name {
            "response.output_item.added" => {
                assert_eq!((at, &event["item"]["status"]), (items.len(), &json!("in_progress")));
                items.push(event["item"].clone());
                continue;
            }
            "response.output_item.done" => {
                assert_eq!(items[at]["id"], event["item"]["id"]);
                let mut done = event["item"].clone();
                done["status"] = "in_progress".into();
                assert_eq!(items[at], done, "an item is the sum of its deltas");
                items[at] = event["item"].clone();
                continue;
            }
            "response.content_part.added" => {
                items[at]["content"] = json!([event["part"]]);
                assert_eq!(event["part"]["text"], "");
                continue;
            }
            "response.function_call_arguments.delta" => &mut items[at]["arguments"],
            "response.output_text.delta" | "response.reasoning_text.delta" => {
                &mut items[at]["content"][0]["text"]
            }
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(items[at]["content"][0]["text"], event["text"]);
                continue;
            }
            "response.function_call_arguments.done" => {
                assert_eq!(
                    (&items[at]["arguments"], &items[at]["name"]),
                    (&event["arguments"], &event["name"])
                );
                continue;
            }
            "response.content_part.done" => {
                assert_eq!(items[at]["content"][0], event["part"]);
                continue;
            }
            _ => continue,
        };
        *text = format!("{}{}", text.as_str().unwrap(), event["delta"].as_str().unwrap()).into();
    }
    items.into()
}

/// An output without its ids.
fn without_ids(mut output: Value) -> Value {
    for item in output.as_array_mut().unwrap() {
        for name in ["id", "call_id"] {
            item.as_object_mut().unwrap().remove(name);
        }
    }
    output
}

fn message(text: &str) -> Value {
    json!({"type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]})
}

fn thought(text: &str) -> Value {
    json!({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}],
        "status": "completed"})
}

fn call(arguments: &str) -> Value {
    json!({"type": "function_call", "name": "now", "arguments": arguments, "status": "completed"})
}

#[tokio::test]
async fn a_response_has_items() {
    let calls = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let broken = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": }}\n</tool_call>";
    for (answer, output) in [
        ("Hello", json!([message("Hello")])),
        ("", json!([])),
        ("<think>\nHm.\n</think>\nYes.", json!([thought("Hm."), message("Yes.")])),
        (calls, json!([call("{\"a\": 1}")])),
        (
            &format!("Wait. {calls}\n{calls}"),
            json!([message("Wait."), call("{\"a\": 1}"), call("{\"a\": 1}")]),
        ),
        (
            &format!("<think>x</think>{calls} Done."),
            json!([thought("x"), call("{\"a\": 1}"), message("Done.")]),
        ),
        (broken, json!([message(broken)])),
    ] {
        let router = saying(answer).await;
        let body = json!({"input": "Hi", "tools": [tool()], "metadata": {"a": "b"}, "store": true});
        let whole = router.ok(PATH, &body).await;
        assert_eq!(without_ids(whole["output"].clone()), output, "{answer}");
        assert_eq!((&whole["status"], &whole["object"]), (&json!("completed"), &json!("response")));
        assert_eq!((&whole["tools"], &whole["metadata"]), (&json!([tool()]), &json!({"a": "b"})));
        assert_eq!((&whole["model"], &whole["store"]), (&json!(MODEL), &json!(false)));
        let usage = &whole["usage"];
        assert_eq!(usage["output_tokens"], tokens(answer).len() + 1);
        let total = usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap();
        assert_eq!(usage["total_tokens"], total);
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        let response = router.send(PATH, &streamed).await.text().await.unwrap();
        let mut events = Vec::new();
        for event in response.split("\n\n").filter(|event| !event.is_empty()) {
            let (name, data) = event.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
            events.push(data);
        }
        assert_eq!(
            (&events[0]["type"], &events[1]["type"]),
            (&json!("response.created"), &json!("response.in_progress"))
        );
        let last = events.last().unwrap();
        assert_eq!(last["type"], "response.completed");
        if answer != broken {
            assert_eq!(without_ids(last["response"]["output"].clone()), output);
        }
        assert_eq!(folded(&events), last["response"]["output"]);
        assert_eq!(last["response"]["id"], events[0]["response"]["id"]);
        assert_eq!(last["response"]["usage"]["output_tokens"], usage["output_tokens"]);
    }
}

/// The events of a stream.
async fn streamed(router: &Router, mut body: Value) -> Vec<Value> {
    body["stream"] = true.into();
    let response = router.send(PATH, &body).await.text().await.unwrap();
    let data = response.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

/// A call that turns out to be none has been told of in a stream, and keeps its place: `output_index` counts the items of
/// the response that ends the stream.
#[tokio::test]
async fn items_keep_their_index_when_a_call_breaks() {
    let good = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let bad = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": }}\n</tool_call>";
    let late = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1} x}\n</tool_call>";
    let message = "message";
    let call = "function_call";
    for (answer, kinds, whole) in [
        (bad.to_owned(), vec![call, message], vec![message]),
        (format!("{bad}{good}"), vec![call, message, call], vec![message, call]),
        (format!("{good}{bad}"), vec![call, call, message], vec![call, message]),
        (format!("{bad}{bad}"), vec![call, message, call, message], vec![message, message]),
        (format!("Hm. {bad}"), vec![message, call, message], vec![message, message]),
        (format!("Hm. {bad} Yes."), vec![message, call, message], vec![message, message]),
        (
            format!("<think>x</think>{bad}{good}"),
            vec!["reasoning", call, message, call],
            vec!["reasoning", message, call],
        ),
        (format!("{good}{bad}{good}"), vec![call, call, message, call], vec![call, message, call]),
        (format!("{good} and {bad}"), vec![call, message, call, message], vec![call, message, message]),
        (format!("{bad} and {good}"), vec![call, message, call], vec![message, call]),
        (format!("{late}{good}"), vec![call, message, call], vec![message, call]),
    ] {
        let router = saying(&answer).await;
        let body = json!({"input": "Hi", "tools": [tool()]});
        let events = streamed(&router, body.clone()).await;
        let last = &events.last().unwrap()["response"];
        assert_eq!(folded(&events), last["output"], "{answer}");
        let kind = |item: &Value| item["type"].as_str().unwrap().to_owned();
        let told: Vec<_> = last["output"].as_array().unwrap().iter().map(kind).collect();
        assert_eq!(told, kinds, "{answer}");
        let output = router.ok(PATH, &body).await["output"].clone();
        let kept: Vec<_> = output.as_array().unwrap().iter().map(kind).collect();
        assert_eq!(kept, whole, "{answer}");
    }
}

/// OpenAI's documented events of each kind of item, in their order.
#[tokio::test]
async fn events_come_in_openais_order() {
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let item = |events: &[&str]| {
        let mut all = vec!["output_item.added".to_owned()];
        all.extend(events.iter().map(ToString::to_string));
        all.push("output_item.done".into());
        all
    };
    let text = item(&["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]);
    let thought =
        item(&["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]);
    let called = item(&["function_call_arguments.delta", "function_call_arguments.done"]);
    for (answer, items) in [
        ("Hello".to_owned(), vec![&text]),
        (call.to_owned(), vec![&called]),
        (format!("{call}{call}"), vec![&called, &called]),
        (format!("<think>x</think>{call}"), vec![&thought, &called]),
        ("<think>x</think>Yes".to_owned(), vec![&thought, &text]),
        (format!("Hm.{call}"), vec![&text, &called]),
    ] {
        let router = saying(&answer).await;
        let events = streamed(&router, json!({"input": "Hi", "tools": [tool()]})).await;
        let mut names: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
        names.dedup();
        let mut expected = vec!["created".to_owned(), "in_progress".into()];
        expected.extend(items.into_iter().flatten().cloned());
        expected.push("completed".into());
        let expected: Vec<String> = expected.iter().map(|name| format!("response.{name}")).collect();
        assert_eq!(names, expected, "{answer}");
    }
}

#[tokio::test]
async fn a_response_that_is_cut_off_is_incomplete() {
    let router = saying("abcdef").await;
    let body = json!({"input": "Hi", "max_output_tokens": 3, "include": ["message.output_text.logprobs"],
        "top_logprobs": 1});
    let whole = router.ok(PATH, &body).await;
    assert_eq!(whole["status"], "incomplete");
    assert_eq!(whole["incomplete_details"], json!({"reason": "max_output_tokens"}));
    let part = &whole["output"][0]["content"][0];
    let logprobs = part["logprobs"].as_array().unwrap();
    let joined: String = logprobs.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(joined, part["text"].as_str().unwrap());
    assert!(
        !joined.is_empty()
            && logprobs.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 1)
    );
}

#[tokio::test]
async fn items_become_messages() {
    let router = saying("a").await;
    let call =
        json!({"type": "function_call", "call_id": "call_1", "name": "now", "arguments": "{\"a\": 1}"});
    let input = json!([
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        call, call,
        {"type": "function_call_output", "call_id": "call_1", "output": "noon"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "It is noon.", "annotations": []}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Thanks"}]},
    ]);
    let body = json!({"input": input, "instructions": "Be kind.", "tools": [tool()]});
    router.ok(PATH, &body).await;
    let prompt = router.shard.saw(|seen| seen.added().last().map(|added| text(&added.tokens))).await;
    let mut told = serde_json::Deserializer::from_str(&prompt).into_iter::<Value>();
    let (messages, tools) = (told.next().unwrap().unwrap(), told.next().unwrap().unwrap());
    let called =
        json!({"type": "function", "function": {"name": "now", "arguments": {"a": 1}}, "id": "call_1"});
    let expected = json!([
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "thinking": "Hm.", "reasoning_content": "Hm.",
            "tool_calls": [called, called]},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is noon."},
        {"role": "user", "content": "Thanks"},
    ]);
    assert_eq!(messages, expected);
    let mut function = tool();
    function.as_object_mut().unwrap().remove("type");
    assert_eq!(tools, json!([{"type": "function", "function": function}]));
}

/// Fields that are added to a request, and the one that it is refused for.
fn refused() -> Vec<(Value, &'static str)> {
    let item = |item: Value| json!({"input": [item]});
    vec![
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"background": true}), "background"),
        (json!({"prompt": {"id": "p"}}), "prompt"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"messages": []}), "messages"),
        (json!({"n": 2}), "n"),
        (json!({"include": ["file_search_call.results"]}), "include"),
        (json!({"temprature": 1}), "temprature"),
        (json!({"text": {"unknown": 1}}), "text.unknown"),
        (json!({"reasoning": {"effort": "low"}}), "reasoning.effort"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
        (json!({"tools": [{"type": "function", "name": "f", "parameters": 1}]}), "tools[0].parameters"),
        (json!({"tool_choice": {"type": "function", "name": "f"}}), "tool_choice"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"max_output_tokens": -1}), "max_output_tokens"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"text": {"format": {"type": "yaml"}}}), "text.format.type"),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": 5}}}),
            "text.format.schema",
        ),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nope"}}}}),
            "text.format",
        ),
        (json!({"text": {"format": {"type": "json_object", "x": 1}}}), "text.format.x"),
        (json!({"context_management": [{"type": "compaction"}]}), "context_management"),
        (json!({"input": [{"role": "function", "content": "a"}], "instructions": "b"}), "input[0].role"),
        (item(json!({"role": "tool", "content": "a"})), "input[0].tool_call_id"),
        (item(json!({"role": "user", "content": "a", "unknown": 1})), "input[0].unknown"),
        (item(json!("a")), "input[0]"),
        (item(json!({"role": "user"})), "input[0].content"),
        (item(json!({"type": "item_reference", "id": "a"})), "input[0].type"),
        (item(json!({"role": "user", "content": [{"type": "input_image"}]})), "input[0].content[0].type"),
        (item(json!({"type": "function_call", "name": "a", "arguments": "{}"})), "input[0].call_id"),
        (item(json!({"type": "function_call_output", "call_id": "a"})), "input[0].output"),
    ]
}

#[tokio::test]
async fn responses_that_cannot_be_given_are_refused_by_name() {
    let router = saying("a").await;
    for (fields, param) in refused() {
        let mut body = json!({"input": "Hi"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (status, answer) = router.post(PATH, &body).await;
        assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!(param)), "{fields} {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        for other in ["max_completion_tokens", "response_format", "reasoning_effort", "messages["] {
            assert!(!message.contains(other), "{fields} {answer}");
        }
    }
}

#[tokio::test]
async fn errors_of_responses_name_their_fields_in_words() {
    let router = saying("a").await;
    for (fields, words) in [
        (json!({"max_output_tokens": 1_000_000}), "`input` tokens + `max_output_tokens` must be"),
        (json!({"min_tokens": 5, "max_output_tokens": 2}), "must be at most `max_output_tokens`"),
        (json!({"input": "a".repeat(60_000)}), "`input` must have at most"),
    ] {
        let mut body = json!({"input": "Hi"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (status, answer) = router.post(PATH, &body).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(words), "{answer}");
    }
}

#[tokio::test]
async fn what_has_no_effect_on_a_response_is_taken() {
    let router = saying("a").await;
    for fields in [
        json!({"store": true}),
        json!({"previous_response_id": null}),
        json!({"truncation": "disabled"}),
        json!({"include": ["reasoning.encrypted_content"]}),
        json!({"reasoning": {"summary": "auto"}}),
        json!({"text": {"format": {"type": "text"}, "verbosity": "low"}}),
        json!({"user": "u"}),
        json!({"top_k": 5}),
    ] {
        let mut body = json!({"input": "Hi"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        router.ok(PATH, &body).await;
    }
}
