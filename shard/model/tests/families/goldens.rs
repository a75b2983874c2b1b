//! The goldens of a family's fixture; see `integration-tests/fixtures/families/README.md`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
pub(crate) struct Goldens {
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) cases: Vec<Case>,
    #[serde(default)]
    pub(crate) crossing: Vec<Crossing>,
    pub(crate) sensitivity: Vec<Sensitivity>,
}

/// One prompt under one adapter.
#[derive(Deserialize)]
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
}

#[derive(Deserialize)]
pub(crate) struct Top {
    pub(crate) position: usize,
    pub(crate) ids: Vec<u32>,
    pub(crate) logprobs: Vec<f32>,
}

/// A prompt within the original context, and greedy tokens that lead beyond it.
#[derive(Deserialize)]
pub(crate) struct Crossing {
    pub(crate) ids: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) token_logprobs: Vec<f32>,
}

/// By how much the reference differs with a feature switched off.
#[derive(Deserialize)]
pub(crate) struct Sensitivity {
    pub(crate) feature: String,
    pub(crate) change: Value,
    pub(crate) most: f32,
}

/// The folder of the fixture of that name.
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/families").join(name)
}

impl Goldens {
    pub(crate) fn read(name: &str) -> Goldens {
        serde_json::from_slice(&fs::read(folder(name).join("goldens.json")).unwrap()).unwrap()
    }
}
