//! Files in safetensors' format, as an adapter's and as a model's.

use std::{fs, path::Path};

use model::{
    Model,
    adapter::{self, CONFIG_FILE, WEIGHTS_FILES},
};

use crate::{
    Outcome, must,
    scratch::{adapter_with, model_with, scratch},
};

/// Most bytes of data that are put behind a header. They are zeros, and take no room on most file systems.
const MAX_DATA: u64 = 1 << 20;

/// Reads the file as an adapter's tensors and as those of a model. An input that begins as JSON does is the header
/// alone: it gets its length in front, and as many bytes behind as it says that there are.
pub fn run(bytes: &[u8]) -> Outcome {
    let scratch = scratch();
    let of_adapter = adapter_with(CONFIG_FILE);
    write(bytes, &of_adapter.path().join(WEIGHTS_FILES[0]));
    let of_model = model_with("config.json");
    write(bytes, &of_model.path().join("model.safetensors"));
    let as_model = Model::load(&scratch.backend, of_model.path(), &mut |_| {});
    match Outcome::of(adapter::read(of_adapter.path(), &scratch.base)) {
        Outcome::Refused(_) if as_model.is_ok() => Outcome::Read,
        as_adapter => as_adapter,
    }
}

fn write(bytes: &[u8], path: &Path) {
    if !bytes.starts_with(b"{") {
        return must(fs::write(path, bytes));
    }
    let content = [&(bytes.len() as u64).to_le_bytes(), bytes].concat();
    must(fs::write(path, &content));
    let file = must(fs::OpenOptions::new().write(true).open(path));
    must(file.set_len(content.len() as u64 + data_of(bytes).min(MAX_DATA)));
}

/// The bytes of data that a header speaks of; none if it cannot be read.
fn data_of(header: &[u8]) -> u64 {
    let header: serde_json::Value = serde_json::from_slice(header).unwrap_or_default();
    let tensors = header.as_object().into_iter().flat_map(|tensors| tensors.values());
    tensors.filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max().unwrap_or(0)
}
