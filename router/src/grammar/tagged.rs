//! Text in which grammars begin behind certain texts. Models call tools so: a marker, then JSON, then another marker.

use std::{fmt::Write, sync::Arc};

use serde_json::Value;

use super::{
    compile::{GrammarError, readable},
    vocabulary::Vocabulary,
};

/// Texts that a grammar follows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tagged {
    /// At least one.
    pub(crate) tags: Vec<Tag>,
    /// Whether any other text may stand before, between and behind the tags.
    pub(crate) free_text: bool,
    /// Tags that there are at least. Without any, the answer may be nothing but text.
    pub(crate) at_least: u32,
    /// Tags that there are at most; `None` for any number.
    pub(crate) at_most: Option<u32>,
    /// Text between two tags where there is no free text.
    pub(crate) separator: String,
}

/// A marker, what must stand behind it, and the marker that ends it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tag {
    /// Once free text has this in it, one of the tags with this trigger must go on. A special token is recognized by its
    /// text.
    pub(crate) trigger: String,
    /// Begins with the trigger.
    pub(crate) begin: String,
    /// Describes the JSON behind `begin`.
    pub(crate) schema: Arc<Value>,
    /// May be empty.
    pub(crate) end: String,
}

/// Free text. A lexeme that ends with a trigger is lazy, so that text ends there.
const TEXT: &str = "TEXT: /(?s:.*)/\n";

impl Tagged {
    /// The grammar in Lark.
    pub(super) fn lark(&self, vocabulary: &Vocabulary) -> Result<String, GrammarError> {
        let mut lark = String::from("%llguidance {}\n");
        let names: Vec<_> = (0..self.tags.len()).map(|index| format!("tag_{index}")).collect();
        if names.is_empty() || self.at_most.is_some_and(|most| most < self.at_least) {
            return Err(GrammarError::Invalid("allows no tags and needs some".into()));
        }
        let any = names.join(" | ");
        let (between, behind) = match self.free_text {
            true => (String::new(), " TEXT"),
            false => (literals(&self.separator, vocabulary), ""),
        };
        let repeated = |least: u32, most: Option<u32>| match most {
            Some(most) => format!("{{{least},{most}}}"),
            None => format!("{{{least},}}"),
        };
        let at_least = self.at_least.saturating_sub(u32::from(!between.is_empty()));
        let tags = match between.is_empty() {
            true => format!("any_tag{}", repeated(at_least, self.at_most)),
            false => {
                // llguidance refuses what is repeated at most 0 times.
                let rest = match self.at_most.map(|most| most.saturating_sub(1)) {
                    Some(0) => String::new(),
                    most => format!(" ({between} any_tag){}", repeated(at_least, most)),
                };
                let optional = if self.at_least == 0 { "?" } else { "" };
                format!("(any_tag{rest}){optional}")
            }
        };
        let _ = write!(lark, "start: {tags}{behind}\nany_tag: {any}\n");
        for (tag, name) in self.tags.iter().zip(&names) {
            tag.write(&mut lark, name, self.free_text, vocabulary)?;
        }
        if self.free_text {
            lark.push_str(TEXT);
        }
        Ok(lark)
    }
}

impl Tag {
    fn write(
        &self,
        lark: &mut String,
        name: &str,
        free_text: bool,
        vocabulary: &Vocabulary,
    ) -> Result<(), GrammarError> {
        let Some(rest) = self.begin.strip_prefix(&self.trigger).filter(|_| !self.trigger.is_empty()) else {
            let problem = format!("has the tag {:?}, which does not begin with its trigger", self.begin);
            return Err(GrammarError::Invalid(problem));
        };
        let head = match (free_text, vocabulary.special_token(&self.trigger)) {
            (true, Some(id)) => format!("TEXT <[{id}]>"),
            (true, None) => {
                let _ = writeln!(lark, "{name}_head[lazy]: TEXT {}", quoted(&self.trigger));
                format!("{name}_head")
            }
            (false, _) => literals(&self.trigger, vocabulary),
        };
        let (rest, end) = (literals(rest, vocabulary), literals(&self.end, vocabulary));
        let _ = writeln!(
            lark,
            "{name}: {head} {rest} {name}_json {end}\n{name}_json: %json {}",
            readable(&self.schema)
        );
        Ok(())
    }
}

/// A text as a sequence of strings and special tokens, which only match themselves.
fn literals(text: &str, vocabulary: &Vocabulary) -> String {
    let parts = vocabulary.split_special(text).into_iter().map(|part| match part {
        (_, Some(id)) => format!("<[{id}]>"),
        (text, None) => quoted(text),
    });
    parts.collect::<Vec<_>>().join(" ")
}

/// A string literal of Lark, which is written like one of JSON.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
