//! Chat templates, against what transformers renders.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/input.rs"]
mod input;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use input::Input;
use lorax_router::{
    chat::{ChatTemplates, TemplateInput},
    tokenizer::ModelTokenizer,
};
use minijinja::Value;
use serde::{Deserialize, de::DeserializeOwned};

/// The input of a template. Goldens are made with one more variable: an answer that tells the time would be another one
/// tomorrow.
fn template_input(input: &Input) -> TemplateInput {
    let mut input = TemplateInput::from(input.clone());
    input.kwargs.entry("never".into()).or_insert(Value::from(1));
    input
}

/// Small templates with their output, or null for an error.
#[derive(Deserialize)]
struct Units {
    input: Input,
    units: Vec<(String, Option<String>)>,
}

/// Outputs of whole templates: the template's name, which input, and the text or null.
#[derive(Deserialize)]
struct Cases {
    inputs: Vec<Input>,
    cases: Vec<(String, usize, Option<String>)>,
}

/// Outputs of published templates for the inputs of [`Cases`].
#[derive(Deserialize)]
struct Published {
    cases: Vec<(String, usize, Option<String>)>,
}

/// The folder of published templates.
fn published() -> PathBuf {
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/lib");
    let folder =
        |version: fs::DirEntry| version.path().join("site-packages/axolotl/utils/chat_templates/templates");
    let versions = fs::read_dir(&lib).into_iter().flatten().flatten();
    let found = versions.map(folder).find(|folder| folder.is_dir());
    found.unwrap_or_else(|| panic!("{}: no axolotl: make venv", lib.display()))
}

fn fixtures() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../integration-tests/fixtures"))
}

fn read<T: DeserializeOwned>(file: &str) -> T {
    serde_json::from_slice(&fs::read(fixtures().join(file)).unwrap()).unwrap()
}

/// The tiny model with another template.
fn with_template(source: &str) -> ChatTemplates {
    let mut model = ModelTokenizer::load(&fixtures().join("tiny/model"), None).unwrap();
    model.chat_templates = [("default".to_owned(), source.to_owned())].into();
    ChatTemplates::new(&model)
}

/// Compares all, so that a failure tells every difference at once.
fn assert_all(outcomes: impl Iterator<Item = (String, Option<String>, Result<String, String>)>) {
    let differs =
        |expected: &Option<String>, got: &Result<String, String>| expected.as_ref() != got.as_ref().ok();
    let wrong: Vec<String> = outcomes
        .filter(|(_, expected, got)| differs(expected, got))
        .map(|(what, expected, got)| format!("{what}\n  transformers: {expected:?}\n  here:         {got:?}"))
        .collect();
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn small_templates_render_as_in_transformers() {
    let Units { input, units } = read("chat/units.json");
    assert!(units.len() > 2000, "{}", units.len());
    let input = template_input(&input);
    assert_all(units.into_iter().map(|(source, expected)| {
        let got = with_template(&source).render(&input).map_err(|error| error.to_string());
        (source, expected, got)
    }));
}

#[test]
fn whole_templates_render_as_in_transformers() {
    let Cases { inputs, cases } = read("chat/cases.json");
    assert!(cases.len() > 1200, "{}", cases.len());
    let mut compiled = BTreeMap::new();
    assert_all(cases.into_iter().map(|(name, index, expected)| {
        let templates = compiled.entry(name.clone()).or_insert_with(|| {
            let path = fixtures().join(format!("chat/templates/{name}.jinja"));
            with_template(&fs::read_to_string(path).unwrap())
        });
        let got = templates.render(&template_input(&inputs[index])).map_err(|error| error.to_string());
        (format!("{name} {index}"), expected, got)
    }));
}

/// Templates of published models, which the package axolotl has.
#[test]
fn published_templates_render_as_in_transformers() {
    let Cases { inputs, .. } = read("chat/cases.json");
    let Published { cases } = read("chat/published.json");
    assert!(cases.len() > 500, "{}", cases.len());
    let folder = published();
    let mut compiled = BTreeMap::new();
    assert_all(cases.into_iter().map(|(name, index, expected)| {
        let templates = compiled.entry(name.clone()).or_insert_with(|| {
            with_template(&fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap())
        });
        let got = templates.render(&template_input(&inputs[index])).map_err(|error| error.to_string());
        (format!("{name} {index}"), expected, got)
    }));
}

#[test]
fn templates_can_tell_the_time() {
    let render = |source: &str| {
        let messages = vec![Value::from_pairs([("role", "user")])];
        with_template(source).render(&TemplateInput { messages, ..TemplateInput::default() })
    };
    for format in
        ["%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A", "%j", "%y%m%d", "%e", "%m/%d/%Y", "%a %u %w", "%U %V %G"]
    {
        let today = || jiff::Zoned::now().strftime(format).to_string();
        let (before, told, after) =
            (today(), render(&format!("{{{{ strftime_now('{format}') }}}}")).unwrap(), today());
        assert!(told == before || told == after, "{told}");
    }
    assert_eq!(render("{{ strftime_now('100%% é %%d') }}").unwrap(), "100% é %d");
    // What is local has no zone, and what is no directive stays as it is: so it is in Python.
    assert_eq!(render("{{ strftime_now('[%z%Z]') }}").unwrap(), "[]");
    assert_eq!(render("{{ strftime_now('%!') }}").unwrap(), "%!");
}

#[test]
fn a_template_that_does_not_compile_tells_why() {
    for (source, cause) in [
        ("{% if %}", "unexpected"),
        ("{% for x in y %}", "unexpected end"),
        ("{{ 'x", "unexpected end"),
        ("{% endif %}", "endif"),
        ("{{ a b }}", "unexpected"),
        ("{% unknown_statement %}", "unknown_statement"),
        ("{{ (1 }}", "unexpected"),
        ("{% generation %}x", "unexpected end"),
        ("{% set = 1 %}", "unexpected"),
        ("{{ x | }}", "unexpected"),
        ("{{ {'a': } }}", "unexpected"),
        ("{% macro %}{% endmacro %}", "unexpected"),
    ] {
        let templates = with_template(source);
        let (name, error) = templates.broken().next().unwrap_or_else(|| panic!("{source} compiles"));
        assert_eq!(name, "default");
        assert!(error.to_string().contains(cause), "{source}: {error}");
        assert_eq!(&templates.render(&TemplateInput::default()).unwrap_err(), error);
    }
}

#[test]
fn templates_are_chosen_by_what_the_request_has() {
    let mut model = ModelTokenizer::load(&fixtures().join("tiny/model"), None).unwrap();
    let mut render = |named: &[(&str, &str)], tools: Option<Value>| {
        model.chat_templates =
            named.iter().map(|(name, source)| ((*name).to_owned(), (*source).to_owned())).collect();
        let messages = vec![Value::from_pairs([("role", "user")])];
        ChatTemplates::new(&model)
            .render(&TemplateInput { messages, tools, ..TemplateInput::default() })
            .map_err(|error| error.to_string())
    };
    let tools = || Some(Value::from(vec![Value::from(1)]));
    let both = [("default", "D"), ("tool_use", "T{{ tools | length }}")];
    assert_eq!(render(&both, None).unwrap(), "D");
    assert_eq!(render(&both, tools()).unwrap(), "T1");
    assert_eq!(render(&both, Some(Value::from(Vec::<Value>::new()))).unwrap(), "T0");
    assert_eq!(render(&both[..1], tools()).unwrap(), "D");
    assert_eq!(render(&both[1..], tools()).unwrap(), "T1");
    assert!(
        render(&both[1..], None)
            .unwrap_err()
            .contains("no default chat template; its templates are tool_use")
    );
    assert_eq!(render(&[], None).unwrap_err(), "the model has no chat template");
    // One that is broken harms no requests that need another.
    assert_eq!(render(&[("default", "D"), ("tool_use", "{% if %}")], None).unwrap(), "D");
    assert!(render(&[("default", "D"), ("tool_use", "{% if %}")], tools()).unwrap_err().contains("compile"));
    assert_eq!(render(&[("default", "{{"), ("tool_use", "T")], tools()).unwrap(), "T");
    assert!(render(&[("default", "{{"), ("rag", "R")], None).unwrap_err().contains("compile"));
}

/// Files from Windows, and templates in GGUFs that were made of them, have other line breaks.
#[test]
fn line_breaks_of_a_template_are_all_alike() {
    let render = |source: &str, input: &Input| {
        with_template(source).render(&template_input(input)).map_err(|error| error.to_string())
    };
    let Cases { inputs, cases } = read("chat/cases.json");
    for (name, index, _) in cases {
        let path = fixtures().join(format!("chat/templates/{name}.jinja"));
        let source = fs::read_to_string(path).unwrap();
        // Errors tell the line, which is the same.
        let expected = render(&source, &inputs[index]);
        for line_break in ["\r\n", "\r"] {
            assert_eq!(render(&source.replace('\n', line_break), &inputs[index]), expected, "{name} {index}");
        }
    }
    // As jinja2 3.1.6 renders them.
    for (source, expected) in [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\r\n", "a"),
        ("a\r\r", "a\n"),
        ("a\n\r\n", "a\n"),
        ("\r\na", "\na"),
        ("{% if true %}\r\n a\r\n{% endif %}\r\nb", " a\nb"),
        ("  {% if true %}\r  a\r  {% endif %}\rb", "  a\nb"),
        ("a {%- if true -%}\r\n b\r\n{%- endif %}\r\nc", "abc"),
        ("{# c\r\nd #}\r\nx", "x"),
        ("{% raw %}\r\n{{ a }}\r\n{% endraw %}\r\nx", "\n{{ a }}\nx"),
        ("{{ 'a\r\nb' | length }}{{ 'a\\r\\nb' | length }}", "34"),
        ("{% set x %}\r\n1\r\n{% endset %}[{{ x }}]", "[1\n]"),
    ] {
        assert_eq!(render(source, &inputs[0]).as_deref(), Ok(expected), "{source:?}");
    }
}

/// As many steps as published templates take for a long chat, and no more for a short one.
#[test]
fn steps_are_counted_by_the_size_of_the_chat() {
    let say = |(index, content): (usize, &str)| {
        let role = if index % 2 == 0 { "user" } else { "assistant" };
        Value::from_pairs([("role", role), ("content", content)])
    };
    let render = |source: &str, contents: Vec<&str>| {
        let messages: Vec<Value> = contents.into_iter().enumerate().map(say).collect();
        with_template(source).render(&TemplateInput { messages, ..TemplateInput::default() })
    };
    // For each message, all others; and for each text, all letters.
    let pairs = "{% set ns = namespace(n=0) %}{% for m in messages %}{% for o in messages if o.role == 'tool' %}\
                 {% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}{{ ns.n }}";
    let letters = "{% set ns = namespace(n=0) %}{% for m in messages %}{% for c in m.content %}\
                   {% if c.type == 'image' %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{% endfor %}{{ ns.n }}";
    assert_eq!(render(pairs, vec![""; 2000]).unwrap(), "0");
    let text = "a".repeat(100_000);
    assert_eq!(render(letters, vec![&text; 6]).unwrap(), "0");
    let many = "{% for a in range(3000) %}{% for b in range(3000) %}{{ a }}{% endfor %}{% endfor %}";
    assert!(render(many, vec!["Hi"]).unwrap_err().to_string().contains("fuel"));
}
