//! Grammars: what an answer must look like.
//!
//! A grammar is compiled by llguidance (Lark, regular expressions, JSON schemas) on a worker thread before its request
//! costs anything else, and compiled grammars are kept by content. The tokens that a sequence may go on with are a mask,
//! which threads of their own compute while the device runs ([`mask_workers`]).

mod compile;
mod grammars;
pub(crate) mod mask_workers;
mod matchers;
mod schema;
mod tagged;
mod vocabulary;

use std::sync::Arc;

use serde_json::Value;

pub(crate) use compile::GrammarError;
pub(crate) use grammars::{CompileError, CompiledGrammar, Grammars, Words};
pub(crate) use tagged::{Tag, Tagged};

/// A constraint of one sequence, with the field of the request that asks for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Grammar {
    /// As the request names it, for errors.
    pub(crate) field: &'static str,
    pub(crate) source: GrammarSource,
}

/// What an answer must be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum GrammarSource {
    /// JSON that this schema describes.
    JsonSchema(Arc<Value>),
    /// Text that this regular expression describes as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of a grammar in llguidance's dialect of Lark.
    Lark(String),
    /// Text in which grammars begin behind certain texts, such as calls of tools.
    Tagged(Tagged),
}

impl Grammar {
    pub(crate) fn new(field: &'static str, source: GrammarSource) -> Grammar {
        Grammar { field, source }
    }

    /// Any JSON object.
    pub(crate) fn json_object(field: &'static str) -> Grammar {
        let schema = serde_json::json!({ "type": "object" });
        Grammar::new(field, GrammarSource::JsonSchema(Arc::new(schema)))
    }
}
