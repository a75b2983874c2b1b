//! The post-processor, which puts special tokens around a text.

use serde_json::{Map, Value, json};
use tokenizers::{PostProcessorWrapper, Tokenizer};

use super::TokenizerError;

/// The definition of a post-processor that puts a token before and one behind a text, each with its id.
pub(super) fn around(before: Option<(&str, u32)>, behind: Option<(&str, u32)>) -> Value {
    let sequence = |sequence: &str| -> Vec<Value> {
        let special = |token: Option<(&str, u32)>| {
            token.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": 0}}))
        };
        let text = json!({"Sequence": {"id": sequence, "type_id": 0}});
        special(before).into_iter().chain([text]).chain(special(behind)).collect()
    };
    let special: Map<String, Value> = before
        .into_iter()
        .chain(behind)
        .map(|(text, id)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair = [sequence("A"), sequence("B")].concat();
    json!({"type": "TemplateProcessing", "single": sequence("A"), "pair": pair, "special_tokens": special})
}

/// Lets a tokenizer put these tokens, as far as it has them, around a text.
pub(super) fn put(
    tokenizer: &mut Tokenizer,
    before: Option<&str>,
    behind: Option<&str>,
) -> Result<(), TokenizerError> {
    let id = |text: Option<&str>| text.and_then(|text| tokenizer.token_to_id(text));
    let definition = around(before.zip(id(before)), behind.zip(id(behind)));
    let made: PostProcessorWrapper =
        serde_json::from_value(definition).map_err(|error| TokenizerError::Definition(error.into()))?;
    tokenizer.with_post_processor(Some(made));
    Ok(())
}
