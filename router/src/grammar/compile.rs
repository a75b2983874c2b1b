//! From what a request asks for to a parser of llguidance.

use std::io;

use llguidance::{JsonCompileOptions, Matcher, TokenParser, api::TopLevelGrammar};
use serde_json::{Map, Value};

use super::{GrammarSource, schema::rewrite, tagged::quoted, vocabulary::Vocabulary};

/// Bytes of a grammar as it is written.
const MAX_BYTES: usize = 512 << 10;
/// Brackets that are open at the same time in a grammar's text. Parsers of Lark and regular expressions are recursive.
const MAX_DEPTH: usize = 200;
/// Characters of an error of llguidance's that are told.
const MAX_PROBLEM: usize = 500;
/// Whitespace between two parts of JSON: a space, or a new line with its indentation. With all that JSON allows, a model
/// could fill its whole answer with whitespace.
const WHITESPACE: &str = r" |\r?\n[ \t]{0,32}";
/// The keyword of a schema that has llguidance's options.
const OPTIONS: &str = "x-guidance";

/// The reason that a grammar cannot be used. The messages go on behind the name of the request's field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GrammarError {
    /// It contradicts itself, or the rules of its language.
    #[error("{0}")]
    Invalid(String),
    /// Keywords of a JSON schema that change its meaning and that llguidance does not know.
    #[error("has the keywords {}, which are not supported", .0.join(", "))]
    Keywords(Vec<String>),
    /// It is larger than what is compiled.
    #[error("is a grammar of more than {MAX_BYTES} bytes")]
    TooLarge,
    /// It is nested too deeply.
    #[error("is nested more than {MAX_DEPTH} levels deep")]
    TooDeep,
    /// The model has no token that ends a text, so that no answer could be complete.
    #[error("needs a token that ends a text, and the model has none")]
    NoEnd,
    /// The vocabulary is not fit for masks.
    #[error("cannot be used with this model's vocabulary: {0}")]
    Vocabulary(String),
}

/// Compiles a grammar, and computes the first mask, which finds out whether there is a token to begin with.
pub(super) fn compile(source: &GrammarSource, vocabulary: &Vocabulary) -> Result<TokenParser, GrammarError> {
    let grammar = match source {
        GrammarSource::JsonSchema(schema) => TopLevelGrammar::from_json_schema(readable(schema)),
        GrammarSource::Regex(regex) => {
            check_depth(regex)?;
            TopLevelGrammar::from_regex(regex)
        }
        GrammarSource::Choice(choices) if choices.is_empty() => {
            return Err(GrammarError::Invalid("has no choices".into()));
        }
        GrammarSource::Choice(choices) => {
            let choices: Vec<_> = choices.iter().map(|choice| quoted(choice)).collect();
            // As a terminal it is one lexeme, however many there are.
            TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {}", choices.join(" | ")))
        }
        GrammarSource::Lark(lark) => {
            check_depth(lark)?;
            TopLevelGrammar::from_lark(lark.clone())
        }
        GrammarSource::Tagged(tagged) => TopLevelGrammar::from_lark(tagged.lark(vocabulary)?),
    };
    let mut parser = vocabulary.factory.create_parser(grammar).map_err(|error| refused(&error))?;
    parser.start_without_prompt();
    // Shares its lexer with the parser, which has this state from now on.
    let mut first = Matcher::new(Ok(parser.clone()));
    first.compute_mask_or_eos().map_err(|error| refused(&error))?;
    Ok(parser)
}

/// The bytes that a grammar is told apart by.
pub(super) fn text(source: &GrammarSource) -> Result<Vec<u8>, GrammarError> {
    let mut text = Bounded(Vec::new());
    let written = match source {
        GrammarSource::JsonSchema(schema) => serde_json::to_writer(&mut text, &("json", &**schema)),
        GrammarSource::Regex(regex) => serde_json::to_writer(&mut text, &("regex", regex)),
        GrammarSource::Choice(choices) => serde_json::to_writer(&mut text, &("choice", choices)),
        GrammarSource::Lark(lark) => serde_json::to_writer(&mut text, &("lark", lark)),
        GrammarSource::Tagged(tagged) => serde_json::to_writer(&mut text, &("tagged", format!("{tagged:?}"))),
    };
    // A string, a list or a value of JSON can always be written, unless there is no room.
    written.map(|()| text.0).map_err(|_| GrammarError::TooLarge)
}

/// Takes no more than the largest grammar.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A schema as llguidance reads it, with a bound on the whitespace between the parts of an answer.
pub(super) fn readable(schema: &Value) -> Value {
    let mut schema = rewrite(schema.clone());
    if schema == Value::Bool(true) {
        schema = Value::Object(Map::new());
    }
    if schema.is_object() && schema.get(OPTIONS).is_none() {
        let options = JsonCompileOptions {
            whitespace_pattern: Some(WHITESPACE.into()),
            ..JsonCompileOptions::default()
        };
        options.apply_to(&mut schema);
    }
    schema
}

fn check_depth(text: &str) -> Result<(), GrammarError> {
    let mut open = 0usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > MAX_DEPTH {
            return Err(GrammarError::TooDeep);
        }
    }
    Ok(())
}

/// What llguidance's error means. It has no types for them.
fn refused(error: &anyhow::Error) -> GrammarError {
    let whole = format!("{error:#}");
    if let Some((_, keys)) = whole.split_once("Unimplemented keys: ")
        && let Some(list) = keys.split_inclusive(']').next()
        && let Ok(keys) = serde_json::from_str(list)
    {
        return GrammarError::Keywords(keys);
    }
    if whole.contains("oneOf constraints are not supported") {
        return GrammarError::Keywords(vec![
            "oneOf (with alternatives that are not plainly disjoint)".into(),
        ]);
    }
    let told = whole.split("<backtrace>").next().unwrap_or_default().replace("<non-verbose/>", "");
    let told = told.trim().replace("NoExtensionBias", "no text is allowed");
    let mut problem: String = told.chars().take(MAX_PROBLEM).collect();
    if problem.len() < told.len() {
        problem.push('…');
    }
    GrammarError::Invalid(format!("cannot be compiled: {problem}"))
}
