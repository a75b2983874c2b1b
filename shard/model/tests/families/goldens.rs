//! The goldens of a family's fixture; see `integration-tests/fixtures/families/README.md`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

#[derive(Clone, Deserialize)]
pub(crate) struct Goldens {
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) cases: Vec<Case>,
    #[serde(default)]
    pub(crate) crossing: Vec<Crossing>,
    #[serde(default)]
    pub(crate) sensitivity: Vec<Sensitivity>,
    /// Adapters that are refused.
    #[serde(default)]
    pub(crate) refused: Vec<Refused>,
    #[serde(default)]
    pub(crate) noise: Vec<Noise>,
}

/// One prompt under one adapter.
#[derive(Clone, Deserialize)]
pub(crate) struct Case {
    pub(crate) adapter: Option<String>,
    pub(crate) prompt: usize,
    /// Positions whose next token is scored.
    pub(crate) positions: Vec<usize>,
    pub(crate) logprobs: Vec<f32>,
    /// The likeliest next tokens at a few positions.
    pub(crate) top: Vec<Top>,
    /// What follows the prompt, chosen greedily.
    pub(crate) tokens: Vec<u32>,
    pub(crate) token_logprobs: Vec<f32>,
    /// The most by which the adapter moves a log-probability of the prompt, of a kind of adapters.
    pub(crate) moves: Option<f32>,
    /// How far a reader is off that passes over what the kind is about.
    pub(crate) ignored: Option<f32>,
}

#[derive(Clone, Deserialize)]
pub(crate) struct Top {
    pub(crate) position: usize,
    pub(crate) ids: Vec<u32>,
    pub(crate) logprobs: Vec<f32>,
}

/// A prompt within the original context, and greedy tokens that lead beyond it.
#[derive(Clone, Deserialize)]
pub(crate) struct Crossing {
    pub(crate) ids: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) token_logprobs: Vec<f32>,
}

/// By how much the reference differs with a feature switched off.
#[derive(Clone, Deserialize)]
pub(crate) struct Sensitivity {
    pub(crate) feature: String,
    pub(crate) change: Value,
    pub(crate) most: f32,
}

/// An adapter that is refused, and the word that the refusal names.
#[derive(Clone, Deserialize)]
pub(crate) struct Refused {
    pub(crate) adapter: String,
    pub(crate) reason: String,
}

/// How far transformers in another type is from f32 on the prompt of 300 tokens.
#[derive(Clone, Deserialize)]
pub(crate) struct Noise {
    pub(crate) dtype: String,
    pub(crate) most: f32,
    pub(crate) median: f32,
}

/// The folder of the fixture of that name.
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/families").join(name)
}

impl Goldens {
    pub(crate) fn read(name: &str) -> Goldens {
        Goldens::of(name, "goldens.json")
    }

    /// One of the files of a fixture.
    pub(crate) fn of(name: &str, file: &str) -> Goldens {
        serde_json::from_slice(&fs::read(folder(name).join(file)).unwrap()).unwrap()
    }
}
