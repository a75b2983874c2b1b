//! Answers of models in the forms of their chat templates: content, reasoning, calls.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lorax_router::chat::answer::{AnswerEvent, AnswerFormat, AnswerParser, CallFormat, Tool, Tools};
use serde_json::{Value, json};

/// An answer as a whole.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    content: String,
    reasoning: String,
    calls: Vec<(String, String)>,
}

impl Answer {
    fn add(&mut self, event: AnswerEvent, source: &str) {
        match event {
            AnswerEvent::Content { at, text } => {
                assert_eq!(
                    source.get(at..at + text.len()),
                    Some(&*text),
                    "content is where it is said to be"
                );
                self.content += &text;
            }
            AnswerEvent::Reasoning(text) => self.reasoning += &text,
            AnswerEvent::Begin { name } => self.calls.push((name, String::new())),
            AnswerEvent::Arguments(text) => self.calls.last_mut().unwrap().1 += &text,
            AnswerEvent::End => {
                let arguments: Value = serde_json::from_str(&self.calls.last().unwrap().1).unwrap();
                assert!(arguments.is_object(), "{source}");
            }
            AnswerEvent::Broken { at, text } => {
                assert_eq!(source.get(at..at + text.len()), Some(&*text));
                self.calls.pop();
                self.content += &text;
            }
        }
    }
}

fn tools() -> Tools {
    let weather = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"},
        "deep": {"type": "object"}, "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "size": {"enum": ["1", "2"]}, "level": {"enum": [1, 2]}, "list": {"type": ["array", "null"]}}});
    let tool = |name: &str, parameters: Value| Tool { name: name.into(), parameters };
    Tools::new(vec![tool("weather", weather), tool("now", json!({"type": "object"}))])
}

/// The events of an answer that comes in pieces.
fn read(format: &AnswerFormat, prompt: &str, pieces: &[&str], cut_off: bool) -> (Answer, usize) {
    let (source, mut answer, mut deltas) = (pieces.concat(), Answer::default(), 0);
    let mut parser = AnswerParser::new(format, tools(), prompt);
    for piece in pieces {
        for event in parser.push(piece) {
            deltas += usize::from(matches!(event, AnswerEvent::Arguments(_)));
            answer.add(event, &source);
        }
        assert!(parser.decided() <= source.len());
    }
    parser.finish(cut_off).into_iter().for_each(|event| answer.add(event, &source));
    (answer, deltas)
}

/// Reads a text in one piece, split at every character, and in pieces of one to seven characters: the answer is always
/// the same.
fn answer_to(format: &AnswerFormat, prompt: &str, text: &str, cut_off: bool) -> Answer {
    let (whole, _) = read(format, prompt, &[text], cut_off);
    for at in (0..text.len()).filter(|at| text.is_char_boundary(*at)) {
        let (left, right) = text.split_at(at);
        assert_eq!(read(format, prompt, &[left, right], cut_off).0, whole, "{text:?} split at {at}");
    }
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    for size in 1..8 {
        let bounds: Vec<usize> = starts.iter().copied().step_by(size).chain([text.len()]).collect();
        let pieces: Vec<&str> = bounds.windows(2).map(|bound| &text[bound[0]..bound[1]]).collect();
        assert_eq!(read(format, prompt, &pieces, cut_off).0, whole, "{text:?} in pieces of {size}");
    }
    whole
}

fn format(calls: CallFormat) -> AnswerFormat {
    AnswerFormat { calls, thinking: None, knows_tools: true }
}

/// A text, what it says beside its calls, and the calls.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, Value)]);

/// Checks what answers say beside their calls, and the calls with their arguments as JSON.
fn check(format: &AnswerFormat, cases: &[Case]) {
    for (text, content, calls) in cases {
        let answer = answer_to(format, "", text, false);
        let got: Vec<(&str, Value)> = answer
            .calls
            .iter()
            .map(|(name, arguments)| (name.as_str(), serde_json::from_str(arguments).unwrap()))
            .collect();
        assert_eq!((answer.content.as_str(), &got[..]), (*content, *calls), "{text:?}");
    }
}

/// Texts that are none of the calls that they look like: they are content as they are.
fn check_content(format: &AnswerFormat, texts: &[&str]) {
    for text in texts {
        let expected = Answer { content: (*text).into(), ..Answer::default() };
        assert_eq!(answer_to(format, "", text, false), expected, "{text:?}");
    }
}

fn oslo() -> (&'static str, Value) {
    ("weather", json!({"city": "Oslo"}))
}

#[test]
fn llama_calls() {
    let hard = r#"{"name": "weather", "parameters": {"city": "a;{\"}]\\ \u00e9🙂<|python_tag|>", "deep": {"a": [1, -2.5e3, true, null, {}, []]}}}"#;
    let hard_value =
        json!({"city": "a;{\"}]\\ é🙂<|python_tag|>", "deep": {"a": [1, -2.5e3, true, null, {}, []]}});
    check(
        &format(CallFormat::Llama),
        &[
            (r#"{"name": "weather", "parameters": {"city": "Oslo"}}"#, "", &[oslo()]),
            (r#"<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}"#, "", &[oslo()]),
            (r#"{"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}"#, "", &[oslo()]),
            (r#"{"parameters": {"city": "Oslo"}, "name": "weather"}"#, "", &[oslo()]),
            ("\n\n{\"name\":\"weather\",\n\"parameters\":{\"city\":\"Oslo\"}\n}\n", "", &[oslo()]),
            (
                r#"Let me see. <|python_tag|>{"name": "now", "parameters": {}}"#,
                "Let me see.",
                &[("now", json!({}))],
            ),
            (
                r#"{"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "now", "parameters": {}}"#,
                "",
                &[oslo(), ("now", json!({}))],
            ),
            (
                r#"<|python_tag|>{"name": "now", "parameters": {}};{"name": "weather", "parameters": {"city": "Oslo"}}"#,
                "",
                &[("now", json!({})), oslo()],
            ),
            (r#"{"name": "weather", "parameters": "{\"city\": \"Oslo\"}"}"#, "", &[oslo()]),
            (r#"{"name": "now", "parameters": null}"#, "", &[("now", json!({}))]),
            (hard, "", &[("weather", hard_value)]),
            (r#"{"name": "now", "parameters": {}} Done."#, "Done.", &[("now", json!({}))]),
        ],
    );
}

#[test]
fn what_is_no_call_of_llama() {
    check_content(
        &format(CallFormat::Llama),
        &[
            "",
            "  \n",
            "Hello {\"name\": \"now\", \"parameters\": {}}",
            "{\"city\": \"Oslo\"}",
            "{\"name\": \"unknown\", \"parameters\": {}}",
            "{\"name\": \"now\"}",
            "{\"name\": \"now\", \"parameters\": [1]}",
            "{\"name\": \"now\", \"parameters\": {\"a\": }} more",
            "{\"name\": \"now\", \"parameters\": {\"a\": 01}}",
            "{\"name\": \"now\", \"parameters\": {\"a\": tru}}",
            "{\"name\": \"now\", \"parameters\": {\"a\" 1}}",
            "{\"name\": \"now\", \"parameters\": {'a': 1}}",
            "{\"name\": \"now\", \"parameters\": {\"a\": \"\n\"}}",
            "{\"name\": \"now\", \"parameters\": {\"a\": \"\\x\"}}",
            "{\"name\": \"now\", \"parameters\": {\"a\": [1}}",
            "{\"name\": \"now\", \"parameters\": {\"a\": 1",
            "{\"name\": \"now\", \"parameters\": \"no\"}",
            "{\"name\": \"now\", \"parameters\": {}, \"parameters\": {}}",
            "{\"name\": 5, \"parameters\": {}}",
            "<|python_tag|>print(1)",
            "<|python_tag|>",
            "a < b <|python",
            "{",
            "{}",
        ],
    );
}

#[test]
fn mistral_calls() {
    let both = &[oslo(), ("now", json!({}))];
    check(
        &format(CallFormat::Mistral),
        &[
            (r#"[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]"#, "", &[oslo()]),
            (r#"[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]"#, "", &[oslo()]),
            (
                r#"[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}]"#,
                "",
                both,
            ),
            (
                r#"[TOOL_CALLS][{"arguments": {"city": "Oslo"}, "name": "weather", "id": "abcdefghi"}]"#,
                "",
                &[oslo()],
            ),
            (r#"[TOOL_CALLS]{"name": "weather", "arguments": {"city": "Oslo"}}"#, "", &[oslo()]),
            (r#"[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}"#, "", &[oslo()]),
            (r#"[TOOL_CALLS]weather{"city": "Oslo"}"#, "", &[oslo()]),
            (r#"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Oslo"}"#, "", &[oslo()]),
            (r#"[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}"#, "", both),
            (r#"One moment. [TOOL_CALLS]weather[ARGS]{"city": "Oslo"}"#, "One moment.", &[oslo()]),
            (r#"[TOOL_CALLS][{"name": "now"}]"#, "", &[("now", json!({}))]),
            (
                r#"[TOOL_CALLS][{"name": "now", "arguments": {}}] Then: [TOOL_CALLS] 5"#,
                "Then: [TOOL_CALLS] 5",
                &[("now", json!({}))],
            ),
        ],
    );
    check_content(
        &format(CallFormat::Mistral),
        &[
            "[TOOL_CALLS]",
            "[TOOL_CALLS] nothing",
            "[TOOL_CALLS][]",
            "[TOOL_CALLS][{\"name\": \"unknown\", \"arguments\": {}}]",
            "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {,}}]",
            "[TOOL_CALLS]unknown[ARGS]{}",
            "[TOOL_CALLS]now[ARGS]{\"a\"",
            "[TOOL_CALLS]now[ARGS]",
            "[TOOL_CALLS]now[ARGS]{]",
            "[TOOL_CALLS][[",
            "[TOOL",
            "{\"name\": \"now\", \"arguments\": {}}",
        ],
    );
}

#[test]
fn tagged_calls() {
    let call = |text: &str| format!("<tool_call>\n{text}\n</tool_call>");
    let both = format!(
        "{}\n{}",
        call(r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#),
        call(r#"{"name": "now", "arguments": {}}"#)
    );
    let xml = |arguments: &str| call(&format!("<function=weather>\n{arguments}\n</function>"));
    let typed = xml(
        "<parameter=city>\n5\n</parameter>\n<parameter=days>\n2\n</parameter>\n<parameter=deep>\n{\"a\": [1]}\n</parameter>\n<parameter=maybe>\nnull\n</parameter>\n<parameter=size>\n1\n</parameter>\n<parameter=level>\n1\n</parameter>\n<parameter=list>\n[\"a\"]\n</parameter>",
    );
    let lines = xml("<parameter=city>\n<b>two\n\nlines</b>\n</parameter>");
    check(
        &format(CallFormat::Tagged),
        &[
            (&call(r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#), "", &[oslo()]),
            (r#"<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>"#, "", &[oslo()]),
            (&call(r#"{"arguments": {"city": "Oslo"}, "name": "weather"}"#), "", &[oslo()]),
            (&both, "", &[oslo(), ("now", json!({}))]),
            (&format!("I look.\n\n{both}"), "I look.", &[oslo(), ("now", json!({}))]),
            (&format!("{both}\nDone."), "Done.", &[oslo(), ("now", json!({}))]),
            ("<tool_call>\n{\"name\": \"now\", \"arguments\": {}}", "", &[("now", json!({}))]),
            (&call(r#"{"name": "now"}"#), "", &[("now", json!({}))]),
            (&call(r#"{"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}"#), "", &[oslo()]),
            (
                &call(r#"{"name": "weather", "arguments": {"city": "</tool_call>"}}"#),
                "",
                &[("weather", json!({"city": "</tool_call>"}))],
            ),
            (&xml("<parameter=city>\nOslo\n</parameter>"), "", &[oslo()]),
            (&xml(""), "", &[("weather", json!({}))]),
            (
                &typed,
                "",
                &[(
                    "weather",
                    json!({"city": "5", "days": 2, "deep": {"a": [1]}, "maybe": null, "size": "1", "level": 1, "list": ["a"]}),
                )],
            ),
            (&lines, "", &[("weather", json!({"city": "<b>two\n\nlines</b>"}))]),
            (&xml("<parameter=unknown>\n5\n</parameter>"), "", &[("weather", json!({"unknown": "5"}))]),
        ],
    );
    check_content(
        &format(CallFormat::Tagged),
        &[
            "The tag <tool_call> begins a call.",
            "<tool_call>",
            "<tool_call>\n{\"name\": \"unknown\", \"arguments\": {}}\n</tool_call>",
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": nope}}\n</tool_call>",
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {}]\n</tool_call>",
            "<tool_call>\nnow()\n</tool_call>",
            "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
            "<tool_call>\n<function=weather>\nCity\n</function>\n</tool_call>",
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo",
            "a </tool_call> b",
            "a <tool_cal",
            "{\"name\": \"now\", \"arguments\": {}}",
        ],
    );
}

#[test]
fn harmony_calls() {
    let call = |name: &str, text: &str| {
        format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}<|call|>")
    };
    let weather = call("weather", r#"{"city": "Oslo"}"#);
    let thinks = "<|channel|>analysis<|message|>Hm <b>.<|end|><|start|>assistant";
    let formats = format(CallFormat::Harmony);
    check(
        &formats,
        &[
            (&weather, "", &[oslo()]),
            (weather.trim_end_matches("<|call|>"), "", &[oslo()]),
            (&format!("{thinks}{weather}"), "", &[oslo()]),
            (&format!("{thinks}<|channel|>final<|message|>Cold.<|return|>"), "Cold.", &[]),
            ("<|channel|>final<|message|> a <| b", " a <| b", &[]),
            (
                &format!("{thinks}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{weather}"),
                "I look.",
                &[oslo()],
            ),
            (
                " to=functions.weather<|channel|>commentary json<|message|>{\"city\": \"Oslo\"}<|call|>",
                "",
                &[oslo()],
            ),
            (
                &format!("{weather}<|start|>assistant{}", call("now", "{ }\n")),
                "",
                &[oslo(), ("now", json!({}))],
            ),
            ("<|start|>assistant<|channel|>final<|message|>Hi", "Hi", &[]),
            ("No channel at all.", "No channel at all.", &[]),
        ],
    );
}

#[test]
fn malformed_harmony_is_content() {
    let call = |name: &str, text: &str| {
        format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}<|call|>")
    };
    let formats = format(CallFormat::Harmony);
    for (text, content) in [
        (
            call("weather", "{\"city\"}"),
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\"}",
        ),
        (
            call("weather", "Oslo"),
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>Oslo",
        ),
        (
            call("weather", "{} {}"),
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{} {}",
        ),
        (
            call("weather", "{\"city\": "),
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": ",
        ),
        (call("unknown", "{}"), "{}"),
    ] {
        let expected = Answer { content: content.into(), ..Answer::default() };
        assert_eq!(answer_to(&formats, "", &text, false), expected, "{text:?}");
    }
}

#[test]
fn harmony_has_channels() {
    let formats = format(CallFormat::Harmony);
    let answer = answer_to(&formats, "", "<|channel|>analysis<|message|>Hm <b>.<|end|>", false);
    assert_eq!(answer.reasoning, "Hm <b>.");
    for (prompt, expected) in [
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant", ("ab", "")),
        ("<|start|>assistant<|channel|>final<|message|>Yes, ", ("ab", "")),
        ("<|start|>assistant<|channel|>analysis<|message|>Hm, ", ("", "ab")),
    ] {
        let answer = answer_to(&formats, prompt, "ab", false);
        assert_eq!((answer.content.as_str(), answer.reasoning.as_str()), expected, "{prompt}");
    }
}

#[test]
fn calls_without_a_form_of_the_models_own() {
    let both = &[oslo(), ("now", json!({}))];
    check(
        &format(CallFormat::Json),
        &[
            (r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#, "", &[oslo()]),
            (r#"{"name": "weather", "parameters": {"city": "Oslo"}}"#, "", &[oslo()]),
            (
                r#"[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}]"#,
                "",
                both,
            ),
            (
                "{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n{\"name\": \"now\", \"arguments\": {}}",
                "",
                both,
            ),
            ("```json\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n```", "", &[oslo()]),
            ("```\n[{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}]\n```\n", "", &[oslo()]),
            (" {\"name\":\"now\",\"arguments\":{}}", "", &[("now", json!({}))]),
            ("{\"id\": 1, \"name\":\"now\",\"arguments\":{}}", "", &[("now", json!({}))]),
            ("{\"id\": [2.5, {}] , \"name\":\"now\",\"arguments\":{}}", "", &[("now", json!({}))]),
            ("{\"name\": \"\\u006eow\", \"arguments\": {}}", "", &[("now", json!({}))]),
        ],
    );
    check_content(
        &format(CallFormat::Json),
        &[
            "Hello",
            "[1, 2]",
            "[]",
            "[{\"a\": 1}]",
            "{\"answer\": {\"name\": \"now\"}}",
            "{\"name\": \"Ann\", \"age\": 5}",
            "```json\n{\"a\": 1}\n```",
            "```python\nprint(1)\n```",
            "``",
            "[{\"name\": \"now\", \"arguments\": {} ",
            " {\"name\": \"now\", \"arguments\": {\"a\": .5}}",
            "{\"name\": \"now\", \"arguments\": {\"a\": \"\\ud8\"}}",
        ],
    );
}

#[test]
fn an_answer_that_is_cut_off_may_end_within_arguments() {
    for (calls, text, arguments) in [
        (CallFormat::Llama, r#"{"name": "weather", "parameters": {"city": "Os"#, r#"{"city": "Os"#),
        (CallFormat::Mistral, r#"[TOOL_CALLS]weather[ARGS]{"city": "Os"#, r#"{"city": "Os"#),
        (CallFormat::Mistral, r#"[TOOL_CALLS][{"name": "weather", "arguments": {"#, "{"),
        (
            CallFormat::Tagged,
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": ",
            "{\"city\": ",
        ),
        (CallFormat::Json, r#"[{"name": "weather", "arguments": {"city"#, r#"{"city"#),
        (CallFormat::Harmony, "<|channel|>commentary to=functions.weather<|message|>{\"a\"", "{\"a\""),
    ] {
        let expected = Answer { calls: vec![("weather".into(), arguments.into())], ..Answer::default() };
        assert_eq!(answer_to(&format(calls), "", text, true), expected, "{text:?}");
        let answer = answer_to(&format(calls), "", text, false);
        assert_eq!((answer.content.as_str(), answer.calls.len()), (text, 0));
    }
}

#[test]
fn arguments_come_as_they_are_written() {
    let arguments = r#"{"city": "a long name of a city", "days": 3}"#;
    for (calls, text) in [
        (CallFormat::Llama, format!(r#"{{"name": "weather", "parameters": {arguments}}}"#)),
        (CallFormat::Mistral, format!(r#"[TOOL_CALLS][{{"name": "weather", "arguments": {arguments}}}]"#)),
        (CallFormat::Mistral, format!("[TOOL_CALLS]weather[ARGS]{arguments}")),
        (
            CallFormat::Tagged,
            format!("<tool_call>{{\"name\": \"weather\", \"arguments\": {arguments}}}</tool_call>"),
        ),
        (
            CallFormat::Harmony,
            format!("<|channel|>commentary to=functions.weather<|message|>{arguments}<|call|>"),
        ),
        (CallFormat::Json, format!(r#"{{"name": "weather", "arguments": {arguments}}}"#)),
    ] {
        let pieces: Vec<&str> = text.split_inclusive(|_| true).collect();
        let (answer, deltas) = read(&format(calls), "", &pieces, false);
        assert_eq!(answer.calls, [("weather".to_owned(), arguments.to_owned())]);
        assert_eq!(deltas, arguments.len(), "a delta for each piece of {text}");
    }
}

#[test]
fn thinking_is_no_content() {
    let thinks = |calls, marks| AnswerFormat { calls, thinking: Some(marks), knows_tools: true };
    let tags = ("<think>", "</think>");
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    for (marks, prompt, text, content, reasoning, calls) in [
        (tags, "", "<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm.", 0),
        (tags, "", "\n<think>Hm.</think>Yes. ", "Yes. ", "Hm.", 0),
        (tags, "<think>\n", "Hm.\n\n</think>\n\nYes.", "Yes.", "Hm.", 0),
        (tags, "<think>\n\n</think>\n\n", "Yes.", "Yes.", "", 0),
        (tags, "", "Yes.", "Yes.", "", 0),
        (tags, "", "A <think> b </think> c", "A <think> b </think> c", "", 0),
        (tags, "<think>", "no end", "", "no end", 0),
        (tags, "", "<think>a < /think> </thin", "", "a < /think> </thin", 0),
        (tags, "", "<think></think>", "", "", 0),
        (tags, "", "<think>a\n\nb</think> <think>c</think>", "<think>c</think>", "a\n\nb", 0),
        (tags, "", &format!("<think>{call}</think>{call}"), "", call, 1),
        (tags, "", &format!("<think>x</think>\nWait.\n{call}"), "Wait.", "x", 1),
        (("[THINK]", "[/THINK]"), "", "[THINK]é🙂[/THINK]ü", "ü", "é🙂", 0),
        (("<thought>", "</thought>"), "", "<thought>a</thought>b", "b", "a", 0),
    ] {
        let answer = answer_to(&thinks(CallFormat::Tagged, marks), prompt, text, false);
        let got = (answer.content.as_str(), answer.reasoning.as_str(), answer.calls.len());
        assert_eq!(got, (content, reasoning, calls), "{prompt:?} {text:?}");
    }
    let answer = answer_to(
        &thinks(CallFormat::Json, tags),
        "",
        "<think>a</think>\n{\"name\": \"now\", \"arguments\": {}}",
        false,
    );
    assert_eq!((answer.calls.len(), answer.content.as_str()), (1, ""));
}

#[test]
fn without_tools_nothing_is_a_call() {
    for (calls, text) in [
        (CallFormat::Llama, r#"<|python_tag|>{"name": "now", "parameters": {}}"#),
        (CallFormat::Mistral, "[TOOL_CALLS]now[ARGS]{}"),
        (CallFormat::Tagged, "<tool_call>{\"name\": \"now\"}</tool_call>"),
        (CallFormat::Json, "```json\n{\"name\": \"now\", \"arguments\": {}}\n```"),
    ] {
        let mut parser = AnswerParser::new(&format(calls), Tools::default(), "");
        let events: Vec<AnswerEvent> = parser.push(text).into_iter().chain(parser.finish(false)).collect();
        assert_eq!(events, [AnswerEvent::Content { at: 0, text: text.into() }]);
    }
}
