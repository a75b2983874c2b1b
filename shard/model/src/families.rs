//! The families of decoders: a page for each, which fills a [`Decoder`] from a `config.json` as transformers reads it
//! (`models/*/configuration_*.py`, `configuration_utils.py`, `generation/configuration_utils.py`), and how a folder's
//! family is found out. `docs/howto/architecture.md` shows how a page is written.

mod bert;
mod distilbert;
mod fields;
mod frequencies;
mod gemma;
mod gemma2;
mod gemma3;
mod gguf;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod outline;
mod phi;
mod phi3;
mod qwen2;
mod qwen3;
mod rope;
mod spans;
mod task;
mod wrappers;
mod xlm_roberta;

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    Decoder, LoadError, Result,
    decoder::{Head, Task},
};
use fields::{Aliases, Fields};

/// A family: its `model_type`, the names of its architectures, its own names of common fields, and its page.
struct Family {
    model_type: &'static str,
    architectures: &'static [&'static str],
    aliases: Aliases,
    page: fn(&Fields) -> Result<Decoder>,
}

/// The file by which sentence-transformers knows its models: texts are embedded, and no token is generated.
const SENTENCE_TRANSFORMER: &str = "modules.json";

/// All families.
const FAMILIES: [Family; 15] = [
    llama::FAMILY,
    mistral::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    gemma::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    phi::FAMILY,
    phi3::FAMILY,
    gpt2::FAMILY,
    gpt_neox::FAMILY,
    bert::FAMILY,
    distilbert::FAMILY,
    xlm_roberta::FAMILY,
    xlm_roberta::ROBERTA,
];

impl Family {
    /// As transformers' `AutoModelForCausalLM`: by `model_type`. Only a folder without one is asked for its architecture.
    fn of(json: &Value) -> Result<&'static Family> {
        if let Some(kind) = json.get("model_type").filter(|kind| !kind.is_null()) {
            let found = FAMILIES.iter().find(|family| *kind == family.model_type);
            let known = FAMILIES.iter().map(|family| family.model_type).chain(wrappers::model_types());
            let known = known.collect::<Vec<_>>().join(", ");
            return found.ok_or_else(|| fields::unsupported("model_type", kind, known));
        }
        let architecture = &json["architectures"][0];
        let is = |family: &&Family| family.architectures.iter().any(|name| *architecture == *name);
        let known = FAMILIES.map(|family| family.architectures[0]).join(", ");
        FAMILIES.iter().find(is).ok_or_else(|| fields::unsupported("architectures", architecture, known))
    }
}

impl Decoder {
    /// Reads a folder's `config.json`, and the tokens that end a sequence from its `generation_config.json`. Only
    /// [`Model::load`](crate::Model::load) finds out that a model said to be tied has an output projection after all.
    pub fn from_folder(folder: &Path) -> Result<Decoder> {
        let path = folder.join("config.json");
        let text = fs::read(&path).map_err(|source| LoadError::Io { path: path.clone(), source })?;
        let json = serde_json::from_slice(&text).map_err(|source| LoadError::Json { path, source })?;
        let inside = wrappers::text_config(&json)?;
        let is_wrapped = inside.is_some();
        let fields_of = inside.unwrap_or(json);
        let family = Family::of(&fields_of)?;
        let fields = Fields::new(fields_of, family.aliases);
        let mut decoder = (family.page)(&fields)?;
        if is_wrapped {
            wrappers::check(&decoder, fields.json())?;
            decoder.names.is_wrapped = true;
        }
        if decoder.task == Task::Generate && folder.join(SENTENCE_TRANSFORMER).is_file() {
            decoder.task = Task::Embed;
        }
        if decoder.task != Task::Generate {
            decoder.head = Head::plain(false);
        }
        decoder.eos = ends(&fields, generation(folder).as_ref(), decoder.eos)?;
        fields.check_others(&decoder)?;
        decoder.check()
    }
}

/// `generation_config.json`. One that is missing or no JSON counts for nothing: transformers then makes one from
/// `config.json`.
fn generation(folder: &Path) -> Option<Value> {
    let text = fs::read(folder.join("generation_config.json")).ok()?;
    serde_json::from_slice::<Value>(&text).ok().filter(Value::is_object)
}

/// The tokens that end a sequence: those of either file, each an id or a list of ids, or the family's if no file has a say.
/// There may be none.
fn ends(fields: &Fields, generation: Option<&Value>, family: Vec<u32>) -> Result<Vec<u32>> {
    let field = "eos_token_id";
    let mut ends = match fields.json().get(field) {
        Some(value) => {
            let expected = "a token id or a list of token ids";
            ids(value).ok_or(LoadError::Field { field, expected })?
        }
        None if generation.is_none() => family,
        None => Vec::new(),
    };
    ends.extend(generation.and_then(|generation| ids(generation.get(field)?)).unwrap_or_default());
    Ok(ends)
}

/// The ids of a value that is null, an id, or a list of ids. An id that no token can have is left out.
fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_i64().map(|id| u32::try_from(id).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(values) => {
            let ids: Option<Vec<_>> = values.iter().map(id).collect();
            Some(ids?.into_iter().flatten().collect())
        }
        value => Some(id(value)?.into_iter().collect()),
    }
}
