//! Answers that follow a grammar, and requests whose grammars make no sense. The shard refuses to sample a token that
//! its mask does not allow.

use std::collections::BTreeSet;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::{
    refusals::{assert_native, assert_openai},
    router::{Router, poll, tokens},
    shard::{EOS, Gate, Script, Seen, allows},
};

const NATIVE: [&str; 2] = ["/generate", "/generate_stream"];
const OPENAI: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

/// A schema that one text alone keeps to, apart from whitespace.
fn schema() -> Value {
    json!({"type": "object", "properties": {"b": {"const": 1}, "a": {"type": "boolean"}}, "required": ["b", "a"],
        "additionalProperties": false})
}

const JSON: &str = r#"{"b": 1, "a": true}"#;

fn body(path: &str, fields: &Value) -> Value {
    let mut body = match path {
        "/v1/completions" => json!({"prompt": "x", "max_tokens": 60}),
        "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "x"}]}),
        _ => json!({"inputs": "x", "parameters": {"max_new_tokens": 60}}),
    };
    let target = if NATIVE.contains(&path) { &mut body["parameters"] } else { &mut body };
    for (name, value) in fields.as_object().unwrap() {
        target[name] = value.clone();
    }
    body
}

fn text_of(answer: &Value) -> &str {
    let choice = &answer["choices"][0];
    let texts = [&answer["generated_text"], &choice["text"], &choice["message"]["content"]];
    texts.into_iter().find_map(Value::as_str).unwrap_or_else(|| panic!("{answer}"))
}

/// Fields that ask for a grammar, and an answer that it allows.
fn asked() -> Vec<(Value, &'static str)> {
    let named = |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
    let outputs = |name: &str, value: Value| json!({"structured_outputs": {name: value}});
    let tag = json!({"type": "structural_tag", "triggers": ["<f"],
        "structures": [{"begin": "<f>", "schema": schema(), "end": "</f>"}]});
    vec![
        (json!({"response_format": {"type": "json_object"}}), r#"{"x": [1, null]}"#),
        (json!({"response_format": named(schema())}), JSON),
        (json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}), "{}"),
        (json!({"response_format": {"type": "json_object", "schema": schema()}}), JSON),
        (json!({"response_format": {"type": "json_object", "value": schema()}}), JSON),
        (json!({"response_format": {"type": "json", "value": schema()}}), JSON),
        (
            json!({"response_format": {"type": "json_schema", "value": {"name": "n", "schema": schema()}}}),
            JSON,
        ),
        (json!({"response_format": {"type": "regex", "value": "a+b"}}), "aaab"),
        (json!({"grammar": {"type": "json", "value": schema()}}), JSON),
        (json!({"grammar": {"type": "regex", "value": "[0-9]{3}-[a-f]"}}), "012-c"),
        (json!({"guided_json": schema()}), JSON),
        (json!({"guided_json": schema().to_string()}), JSON),
        (
            json!({"guided_json": schema(), "guided_whitespace_pattern": " {2}"}),
            "{  \"b\"  :  1  ,  \"a\"  :  false  }",
        ),
        (json!({"guided_regex": "a+b", "guided_decoding_backend": "xgrammar"}), "aab"),
        (json!({"guided_choice": ["yes", "no \"really\"", "no"]}), "no \"really\""),
        (json!({"guided_grammar": "start: \"a\" inner \"b\"\ninner: \"x\"+ | inner \"y\""}), "axxyb"),
        (outputs("json", schema()), JSON),
        (outputs("regex", json!("(ab)*")), "abab"),
        (outputs("choice", json!(["red", "green"])), "green"),
        (outputs("grammar", json!("start: /[a-c]+/ \"!\"")), "abc!"),
        (outputs("json_object", json!(true)), "{}"),
        (
            json!({"structured_outputs": {"json": schema(), "disable_any_whitespace": true}}),
            r#"{"b":1,"a":true}"#,
        ),
        (json!({"response_format": tag}), "Hello <f>{\"b\": 1, \"a\": true}</f> more"),
        (json!({"response_format": json!({"type": "text"}), "guided_regex": "x"}), "x"),
    ]
}

#[tokio::test]
async fn every_way_to_ask_for_a_grammar() {
    for (fields, answer) in asked() {
        let router = Router::start(Script::saying(tokens(answer))).await;
        for path in ["/generate", "/v1/completions", "/v1/chat/completions"] {
            let reply = router.ok(path, &body(path, &fields)).await;
            assert_eq!(text_of(&reply), answer, "{path} {fields}");
        }
        let mut streamed = body("/v1/completions", &fields);
        streamed["stream"] = json!(true);
        let events = router.events("/v1/completions", &streamed).await;
        let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, answer, "{fields}");
    }
}

/// The same grammars do not allow other answers. The shard that is told to give one ends its session with an error.
#[tokio::test]
async fn masks_leave_out_what_a_grammar_does_not_allow() {
    for (fields, answer) in asked() {
        let router = Router::start(Script::saying(tokens(answer))).await;
        router.ok("/generate", &body("/generate", &fields)).await;
        let masks = router.shard.saw(|seen| Some(seen.masks.clone())).await;
        let real = |(_, masks): &&(u64, Vec<proto::Mask>)| !masks[0].allowed.is_empty();
        let used: Vec<_> = masks.iter().filter(real).collect();
        let said = tokens(answer);
        assert_eq!(used.len(), said.len() + 1, "{fields}");
        for ((_, mask), token) in used.iter().zip(said.iter().chain(&[EOS])) {
            assert_eq!(mask.len(), 1);
            assert_eq!(mask[0].allowed.len(), 40, "a bit for each token");
            assert!(allows(&mask[0], *token), "{fields}");
        }
        let special: BTreeSet<u32> = [0, 2].into();
        assert!(used.iter().all(|(_, mask)| special.iter().all(|id| !allows(&mask[0], *id))), "{fields}");
        // A byte that is no character by itself.
        let byte = (0..320).find(|id| !allows(&used[0].1[0], *id)).unwrap();
        assert!(byte < 320, "{fields}");
    }
}

#[tokio::test]
async fn grammars_that_make_no_sense() {
    let large = |config: &mut config::Config| config.router.max_body_size = 2 << 20;
    let router = Router::start_with(Script::saying(tokens("a")), large).await;
    let format = |value: Value| json!({ "response_format": value });
    let outputs = |value: Value| json!({ "structured_outputs": value });
    let object = |keyword: &str, value: Value| json!({"guided_json": {"type": "object", keyword: value}});
    let same = json!([{"type": "string"}, {"type": "string", "minLength": 3}]);
    for (fields, words) in [
        (format(json!({})), "missing field `response_format.type`"),
        (format(json!("json")), "`response_format` must be an object"),
        (format(json!({"type": "yaml"})), "`response_format.type` is \"yaml\""),
        (format(json!({"type": 3})), "`response_format.type` must be a string"),
        (format(json!({"type": "json_schema"})), "missing field `response_format.json_schema`"),
        (format(json!({"type": "json_schema", "json_schema": {"schema": 5}})), "must be a JSON schema"),
        (format(json!({"type": "json_object", "schemas": {}})), "`response_format.schemas` is not supported"),
        (format(json!({"type": "regex"})), "missing field `response_format.value`"),
        (format(json!({"type": "structural_tag"})), "missing field `response_format.structures`"),
        (json!({"guided_json": "{"}), "`guided_json` is not JSON"),
        (json!({"guided_json": {"type": "strin"}}), "`guided_json` cannot be compiled"),
        (json!({"guided_json": {"type": "string", "pattern": "(a"}}), "`guided_json` cannot be compiled"),
        (json!({"guided_json": {"$ref": "#/$defs/a"}}), "`guided_json` cannot be compiled"),
        (json!({"guided_json": {"$ref": "http://example.com/a.json"}}), "example.com"),
        (json!({"guided_json": false}), "Unsatisfiable"),
        (json!({"guided_json": {"type": "array", "uniqueItems": true}}), "the keywords uniqueItems"),
        (object("if", json!({})), "the keywords if"),
        (object("propertyNames", json!({"maxLength": 3})), "the keywords propertyNames"),
        (json!({"guided_json": {"oneOf": same}}), "the keywords oneOf"),
        (json!({"guided_json": {"not": {"minLength": 3}}}), "the keywords not"),
        (json!({"guided_regex": "(a"}), "`guided_regex` cannot be compiled"),
        (json!({"guided_regex": "(".repeat(500)}), "nested more than"),
        (json!({"guided_regex": "a".repeat(600 << 10)}), "a grammar of more than"),
        (json!({"guided_regex": "a(?=b)"}), "`guided_regex` cannot be compiled"),
        (json!({"guided_regex": ["a"]}), "`guided_regex` must be a string"),
        (json!({"guided_choice": "a"}), "`guided_choice` must be a list of strings"),
        (json!({"guided_choice": ["a", 1]}), "`guided_choice[1]` must be a string"),
        (json!({"guided_grammar": "root ::= \"a\""}), "`guided_grammar` cannot be compiled"),
        (json!({"guided_grammar": "start: missing"}), "unknown name"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "cannot be used together with `guided_regex`"),
        (outputs(json!({"json": {}, "regex": "a"})), "`structured_outputs` must have one grammar"),
        (outputs(json!({"json_object": 1})), "`structured_outputs.json_object` must be true or false"),
        (outputs(json!({"jsn": {}})), "`structured_outputs.jsn` is not supported"),
    ] {
        for path in NATIVE {
            let (status, answer) = router.post(path, &body(path, &fields)).await;
            assert_eq!(status, 422, "{path} {answer}");
            assert_native(&answer, "validation", words);
        }
        for path in OPENAI {
            let (status, answer) = router.post(path, &body(path, &fields)).await;
            assert_eq!(status, 400, "{path} {answer}");
            let code = answer["error"]["code"].as_str().unwrap();
            assert_openai(&answer, code, words);
        }
    }
    assert_eq!(router.shard.saw(|seen| Some(seen.added().count())).await, 0, "nothing was computed");
    router.ok("/generate", &body("/generate", &json!({"guided_choice": ["a"]}))).await;
}

#[tokio::test]
async fn a_text_may_end_before_its_grammar() {
    let router = Router::start(Script::saying(tokens(JSON))).await;
    let fields = |more: Value| {
        let mut fields = json!({"guided_json": schema()});
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fields
    };
    let length = tokens(JSON).len();
    for (more, text, reason) in [
        (json!({"max_tokens": 1}), "{", "length"),
        (json!({"max_tokens": 4}), "", "length"),
        (json!({"max_tokens": length}), JSON, "length"),
        (json!({"max_tokens": length + 1}), JSON, "stop"),
        (json!({"stop": "1"}), "{\"b\": ", "stop"),
        (json!({"stop": ["\"a\""]}), "{\"b\": 1, ", "stop"),
        (json!({"stop": ["nothing"]}), JSON, "stop"),
        (json!({"ignore_eos": true}), JSON, "stop"),
        (json!({"min_tokens": 50}), JSON, "stop"),
        (json!({"min_tokens": 2}), JSON, "stop"),
        (json!({"temperature": 1.0, "seed": 5, "frequency_penalty": 1.5}), JSON, "stop"),
        (json!({"logprobs": 2}), JSON, "stop"),
    ] {
        let reply = router.ok("/v1/completions", &body("/v1/completions", &fields(more.clone()))).await;
        let choice = &reply["choices"][0];
        assert!(choice["text"].as_str().unwrap().starts_with(text), "{more} {reply}");
        assert!(JSON.starts_with(choice["text"].as_str().unwrap()), "{more} {reply}");
        assert_eq!(choice["finish_reason"], reason, "{more} {reply}");
    }
}

/// Without the bound the answer "ab" would be complete, and the model's end is its most probable token.
#[tokio::test]
async fn ends_are_left_out_while_the_grammar_can_go_on() {
    for (fields, answer) in [
        (json!({"guided_regex": "ab*", "ignore_eos": true, "max_tokens": 6}), "abbbbb"),
        (json!({"guided_regex": "ab*", "min_tokens": 6, "max_tokens": 6}), "abbbbb"),
        (json!({"guided_regex": "ab*", "min_tokens": 4}), "abbb"),
        (json!({"guided_regex": "ab{3}", "min_tokens": 40}), "abbb"),
    ] {
        let router = Router::start(Script::saying(tokens(answer))).await;
        let reply = router.ok("/v1/completions", &body("/v1/completions", &fields)).await;
        assert_eq!(text_of(&reply), answer);
        let masks = router.shard.saw(|seen| Some(seen.masks.clone())).await;
        let may_end = |index: usize| allows(&masks[index].1[0], EOS);
        let all = answer.len().min(masks.len() - 1);
        assert!((0..all).all(|index| !may_end(index)), "{fields}");
    }
}

#[tokio::test]
async fn a_grammar_that_goes_on_only_with_banned_tokens_fails_its_request_alone() {
    let router = Router::start(Script::saying(tokens("ab"))).await;
    let fields = json!({"guided_regex": "ab", "stop_token_ids": tokens("b"), "min_tokens": 9});
    let (status, answer) = router.post("/v1/completions", &body("/v1/completions", &fields)).await;
    assert_eq!(status, 424, "{answer}");
    assert!(
        answer["error"]["message"].as_str().unwrap().contains("tokens that the request bans"),
        "{answer}"
    );
    let reply = router.ok("/v1/completions", &body("/v1/completions", &json!({"guided_regex": "ab"}))).await;
    assert_eq!(text_of(&reply), "ab");
}

/// Constrained and free sequences in one batch, each with an answer of its own.
#[tokio::test]
async fn constrained_sequences_run_beside_others() {
    let say = |prompt: &[u32]| tokens(if prompt.len() > 1 { "abab" } else { "free text" });
    let router = Router::start(Script::answering(say)).await;
    router.shard.hold(Gate::Steps);
    let constrained = json!({"prompt": "long prompt", "max_tokens": 9, "guided_regex": "(ab)+"});
    let free = json!({"prompt": "x", "max_tokens": 9});
    let asked = (0..12).map(|index| if index % 3 == 0 { &constrained } else { &free });
    let replies: Vec<_> = asked.map(|body| router.begin("/v1/completions", body)).collect();
    router.shard.saw(|seen| (!seen.steps.is_empty()).then_some(())).await;
    router.shard.release(&Gate::Steps);
    for (index, reply) in join_all(replies).await.into_iter().enumerate() {
        let reply: Value = reply.unwrap().json().await.unwrap();
        assert_eq!(text_of(&reply), if index % 3 == 0 { "abab" } else { "free text" }, "{index}");
    }
    let masked = |seen: &Seen| {
        let rows: Vec<_> = seen.steps.iter().flat_map(|step| &step.rows).collect();
        let free =
            seen.added().filter(|new| new.prompt_len == 1).map(|new| new.sequence).collect::<BTreeSet<_>>();
        assert!(rows.iter().all(|rows| rows.masked != free.contains(&rows.sequence) || rows.sample == 0));
        Some(rows.iter().filter(|rows| rows.masked).count())
    };
    assert!(router.shard.saw(masked).await >= 4 * 5);
}

/// Their blocks run out, so that they are computed again; the states of their grammars stay.
#[tokio::test]
async fn preempted_sequences_go_on_in_their_grammars() {
    let answer = "0123456789".repeat(6);
    let mut script = Script::saying(tokens(&answer));
    (script.info.num_blocks, script.info.block_size) = (24, 4);
    let router = Router::start(script).await;
    let body = json!({"prompt": "x", "max_tokens": 80, "guided_regex": "(0123456789)+"});
    let replies = join_all((0..6).map(|_| router.begin("/v1/completions", &body))).await;
    for reply in replies {
        let reply: Value = reply.unwrap().json().await.unwrap();
        assert_eq!(text_of(&reply), answer, "{reply}");
    }
    let added = router.shard.saw(|seen| Some(seen.added().count())).await;
    assert!(added > 6, "{added}: nobody was preempted");
}

/// Rows in flight of a sequence whose client has left get a mask, or their step would wait for ever.
#[tokio::test]
async fn a_client_that_leaves_holds_up_nobody() {
    let router = Router::start(Script::saying(tokens(&"ab".repeat(40)))).await;
    let body = json!({"prompt": "x", "max_tokens": 60, "guided_regex": "(ab)+"});
    for step in [3, 5, 8] {
        let known = router.shard.saw(|seen| Some(seen.steps.len() as u64)).await;
        router.shard.hold(Gate::Step(known + step));
        let (left, stays) = (router.begin("/v1/completions", &body), router.begin("/v1/completions", &body));
        router.shard.saw(|seen| (seen.steps.len() as u64 >= known + step).then_some(())).await;
        left.abort();
        assert!(left.await.is_err());
        router.holds(1).await;
        router.shard.release(&Gate::Step(known + step));
        let reply: Value = stays.await.unwrap().json().await.unwrap();
        assert_eq!(text_of(&reply), "ab".repeat(30));
    }
    let reply = router.ok("/v1/completions", &body).await;
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn siblings_have_states_of_their_own() {
    fn drawn(seed: u64) -> Vec<u32> {
        tokens(if seed.is_multiple_of(2) { "aab" } else { "ab" })
    }
    let script = Script { drawing: Some(drawn), ..Script::saying(tokens("b")) };
    let router = Router::start(script).await;
    let body = json!({"prompt": "x", "n": 6, "seed": 4, "temperature": 1, "guided_regex": "a+b"});
    let reply = router.ok("/v1/completions", &body).await;
    let texts: Vec<_> =
        reply["choices"].as_array().unwrap().iter().map(|one| one["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 6);
    assert!(texts.iter().all(|text| ["aab", "ab"].contains(text)), "{texts:?}");
}

/// Every rank samples, so that every rank needs the masks.
#[tokio::test]
async fn all_ranks_get_the_same_masks() {
    let script = |rank| {
        let mut script = Script::saying(tokens("aab"));
        (script.info.rank, script.info.world) = (rank, 2);
        script
    };
    let router = Router::launch_ranks(vec![script(0), script(1)], |_| {}).await;
    router.app.ready().await;
    let reply = router.ok("/v1/completions", &body("/v1/completions", &json!({"guided_regex": "a+b"}))).await;
    assert_eq!(text_of(&reply), "aab");
    let mut seen = Vec::new();
    for rank in &router.ranks {
        seen.push(
            poll(async || rank.saw(|seen| Some(seen.masks.clone())).await.get(..4).map(<[_]>::to_vec)).await,
        );
    }
    assert_eq!(seen[0], seen[1]);
}

/// A grammar is compiled once, whoever asks for it at the same time.
#[tokio::test]
async fn many_requests_with_one_grammar() {
    let router = Router::start(Script::saying(tokens(JSON))).await;
    for schema in [schema(), json!({"type": "object", "title": "any"})] {
        let body = body("/generate", &json!({ "guided_json": schema }));
        for reply in join_all((0..24).map(|_| router.begin("/generate", &body))).await {
            let reply: Value = reply.unwrap().json().await.unwrap();
            assert_eq!(text_of(&reply), JSON);
        }
    }
}
