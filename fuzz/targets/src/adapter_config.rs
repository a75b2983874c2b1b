//! `adapter_config.json`, with the tensors of a good adapter beside it.

use std::fs;

use model::adapter::{self, CONFIG_FILE, WEIGHTS_FILES};

use crate::{
    Outcome, must,
    scratch::{adapter_with, scratch},
};

/// Reads the adapter and checks it against the model.
pub fn run(bytes: &[u8]) -> Outcome {
    let scratch = scratch();
    let folder = adapter_with(WEIGHTS_FILES[0]);
    must(fs::write(folder.path().join(CONFIG_FILE), bytes));
    Outcome::of(adapter::read(folder.path(), &scratch.base))
}
