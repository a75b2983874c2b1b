//! Which files of a repository a model is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde::Deserialize;

use super::{Asked, ModelError};
use crate::model_name::{Gguf, GgufModel};

/// Files beside the weights that somebody reads. The first must be there.
const SMALL_FILES: [&str; 13] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
];
/// The configuration of a model that is not a GGUF file.
pub(super) const CONFIG: &str = "config.json";
/// Further chat templates are in this folder.
const TEMPLATES: &str = "additional_chat_templates/";
/// The weights in one file, and the index of weights in several, in the order in which transformers takes them. Where
/// there is one file, an index beside it is left over.
const WEIGHTS: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];

/// How a repository keeps its weights.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Weights<'a> {
    /// In one file.
    Whole(&'static str),
    /// In the files that an index names.
    Sharded(&'static str),
    /// In GGUF files, the first of which has the metadata.
    Gguf(Vec<&'a str>),
}

impl<'a> Weights<'a> {
    /// Chooses among the files of a repository.
    pub(super) fn choose(asked: &Asked<'_>, files: &'a [String]) -> Result<Weights<'a>, ModelError> {
        let id = || asked.id.to_owned();
        let models = GgufModel::all(files);
        let listed = |models: &[GgufModel<'_>]| {
            models.iter().map(|model| model.files[0]).collect::<Vec<_>>().join(", ")
        };
        let Some(gguf) = asked.gguf else {
            let has = |name: &str| files.iter().any(|file| file == name);
            for (whole, index) in WEIGHTS {
                if has(whole) {
                    return Ok(Weights::Whole(whole));
                }
                if has(index) {
                    return Ok(Weights::Sharded(index));
                }
            }
            return match &models[..] {
                [] => Err(ModelError::NoWeights { id: id(), files: files.join(", ") }),
                [model] => whole(asked, model),
                _ => Err(ModelError::SeveralGgufs { id: id(), files: listed(&models) }),
            };
        };
        let named: Vec<_> = models.iter().filter(|model| model.is_named(gguf)).collect();
        if let [model] = named[..] {
            return whole(asked, model);
        }
        let (Gguf::Path(name) | Gguf::Tag(name)) = gguf;
        let (asked, count, files) = (name.into(), named.len(), listed(&models));
        Err(ModelError::NoSuchGguf { id: id(), asked, count, files })
    }
}

/// The files of a model, all of which must be there.
fn whole<'a>(asked: &Asked<'_>, model: &GgufModel<'a>) -> Result<Weights<'a>, ModelError> {
    match model.missing() {
        Some(file) => Err(ModelError::PartOfGguf { id: asked.id.into(), file }),
        None => Ok(Weights::Gguf(model.files.clone())),
    }
}

pub(super) fn is_small(file: &str) -> bool {
    SMALL_FILES.contains(&file) || (file.starts_with(TEMPLATES) && file.ends_with(".jinja"))
}

/// The files that an index names.
pub(super) fn sharded(index: &Path) -> Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read(index).map_err(|error| error.to_string())?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    Ok(index.weight_map.into_values().collect())
}
