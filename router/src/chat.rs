//! Chats to prompts, as transformers' `apply_chat_template` renders them.

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig, value::Serde};
use serde::Serialize;

use crate::tokenizer::ModelTokenizer;

const NAME: &str = "chat_template";

/// A model's chat template.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Compiles a model's template; `None` if it has none.
    pub(crate) fn new(model: &ModelTokenizer) -> Result<Option<ChatTemplate>, Error> {
        let Some(source) = model.chat_template.clone() else { return Ok(None) };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| {
            jiff::fmt::strtime::format(format, &jiff::Zoned::now())
                .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
        });
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source)?;
        Ok(Some(ChatTemplate {
            environment,
            bos_token: model.bos_token.clone(),
            eos_token: model.eos_token.clone(),
        }))
    }

    /// The prompt of a chat, up to where the assistant answers.
    pub(crate) fn render(&self, messages: &impl Serialize) -> Result<String, Error> {
        self.environment.get_template(NAME)?.render(context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => true,
            bos_token => self.bos_token.as_deref(),
            eos_token => self.eos_token.as_deref(),
        })
    }
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it; minijinja's own filter escapes for HTML.
fn to_json(value: &Value, options: minijinja::value::Kwargs) -> Result<String, Error> {
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?
        }
    }
    String::from_utf8(out).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Python's separators: a space behind commas and colons.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use serde::Deserialize;
    use serde_json::Value;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        messages: Vec<Value>,
        add_generation_prompt: bool,
        text: String,
    }

    #[test]
    fn templates_can_tell_the_time() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tiny/model");
        let source =
            "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}never{% endif %}";
        let mut tokenizer = ModelTokenizer::load(&model, None).unwrap();
        let mut render = |source: &str| {
            tokenizer.chat_template = Some(source.to_owned());
            ChatTemplate::new(&tokenizer).unwrap().unwrap().render(&[(); 0])
        };
        let today = || jiff::Zoned::now().strftime("%d %b %Y").to_string();
        let (before, told, after) = (today(), render(source).unwrap(), today());
        assert!(told == before || told == after, "{told}");
        assert_eq!(render("{{ strftime_now('100%%') }}").unwrap(), "100%");
        assert!(render("{{ strftime_now('%!') }}").is_err(), "no such directive");
    }

    #[test]
    fn templates_render_as_in_transformers() {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache");
        let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
        let model = cache.join("lorax/models/SmolLM2-135M-Instruct.Q4_1.gguf");
        let tokenizer = ModelTokenizer::load(&model, None).unwrap();
        let template = ChatTemplate::new(&tokenizer).unwrap().unwrap();
        let cases =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tokenizer/chat.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(cases).unwrap()).unwrap();
        let cases: Vec<Case> = cases.into_iter().filter(|case| case.add_generation_prompt).collect();
        assert_eq!(cases.len(), 10);
        for case in cases {
            assert_eq!(template.render(&case.messages).unwrap(), case.text);
        }
    }
}
