//! The chat templates of a model, which may be in several files.

use std::{collections::BTreeMap, fs, io, path::Path};

use gguf::Gguf;
use serde_json::Value;

use super::{TextFiles, TokenizerError};
use crate::json_file;

/// Sources of templates by name; the one that is used unless another is asked for is called `default`.
pub(super) type Sources = BTreeMap<String, String>;

const DEFAULT: &str = "default";

/// Names that GGUF files have used for further templates without listing them.
const GGUF_NAMES: [&str; 2] = ["tool_use", "rag"];

/// The templates of a folder. Files of their own replace those of tokenizer_config.json, as in transformers;
/// chat_template.json, which is a multimodal processor's, is used if there are no others.
pub(super) fn from_folder(folder: &Path, config: &Value) -> Result<Sources, TokenizerError> {
    let files = files(folder)?;
    if !files.is_empty() {
        return Ok(files);
    }
    let configured = from_config(config);
    if !configured.is_empty() {
        return Ok(configured);
    }
    let processor: Option<Value> = json_file::read_if_exists(&folder.join("chat_template.json"))?;
    Ok(processor.map(|processor| from_config(&processor)).unwrap_or_default())
}

/// The templates among the files of an adapter, by the same rules.
pub(super) fn from_texts(files: &TextFiles, config: &Value) -> Sources {
    let own = |(name, file): (&str, &str)| {
        Some((name.to_owned(), String::from_utf8_lossy(files.get(file)?).into_owned()))
    };
    let paths = [(DEFAULT, "chat_template.jinja"), ("tool_use", "additional_chat_templates/tool_use.jinja")];
    let own: Sources = paths.into_iter().filter_map(own).collect();
    if own.is_empty() { from_config(config) } else { own }
}

/// The templates in a tokenizer_config.json: one, a list of named ones, or a map of them.
pub(super) fn from_config(config: &Value) -> Sources {
    let owned = |name: &str, source: &Value| Some((name.to_owned(), source.as_str()?.to_owned()));
    match &config["chat_template"] {
        Value::Array(named) => {
            named.iter().filter_map(|entry| owned(entry["name"].as_str()?, &entry["template"])).collect()
        }
        Value::Object(named) => named.iter().filter_map(|(name, source)| owned(name, source)).collect(),
        source => owned(DEFAULT, source).into_iter().collect(),
    }
}

/// The templates of a GGUF file.
pub(super) fn from_gguf(file: &Gguf) -> Result<Sources, TokenizerError> {
    let source = |key: &str| -> Result<Option<String>, TokenizerError> {
        Ok(file.get::<&str>(key)?.map(str::to_owned))
    };
    let mut sources: Sources =
        source("tokenizer.chat_template")?.map(|source| (DEFAULT.to_owned(), source)).into_iter().collect();
    let listed: &[String] = file.get("tokenizer.chat_templates")?.unwrap_or_default();
    for name in listed.iter().map(String::as_str).chain(GGUF_NAMES) {
        let named = source(&format!("tokenizer.chat_template.{name}"))?;
        sources.extend(named.map(|source| (name.to_owned(), source)));
    }
    Ok(sources)
}

/// chat_template.jinja and the files of additional_chat_templates.
fn files(folder: &Path) -> Result<Sources, TokenizerError> {
    let mut sources = Sources::new();
    let path = folder.join("chat_template.jinja");
    sources.extend(text_if_exists(&path)?.map(|source| (DEFAULT.to_owned(), source)));
    let more = folder.join("additional_chat_templates");
    let entries = match fs::read_dir(&more) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(sources),
        Err(source) => return Err(TokenizerError::Io { path: more, source }),
    };
    for entry in entries {
        let path = entry.map_err(|source| TokenizerError::Io { path: more.clone(), source })?.path();
        if path.extension().is_none_or(|extension| extension != "jinja") {
            continue;
        }
        let Some(name) = path.file_stem().and_then(|name| name.to_str()) else { continue };
        sources.extend(text_if_exists(&path)?.map(|source| (name.to_owned(), source)));
    }
    Ok(sources)
}

fn text_if_exists(path: &Path) -> Result<Option<String>, TokenizerError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io { path: path.into(), source }),
    }
}
