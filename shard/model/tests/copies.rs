//! Copies of a model's tables in an adapter are compared with the tables a few rows at a time. One test to a process,
//! whose memory is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use kernels::DType;
use model::{
    Decoder,
    adapter::{self, BaseModel},
    testing,
};
use serde_json::{Value, json};

/// Rows of a table of 64 MiB.
const ROWS: u64 = 1 << 19;
const COLS: u64 = 32;

/// Adds a table to a file, all of it a hole.
fn add_table(file: &Path, name: &str) {
    let all = fs::read(file).unwrap();
    let (len, rest) = all.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    let (begin, end) = (data.len() as u64, data.len() as u64 + 4 * ROWS * COLS);
    header[name] = json!({"dtype": "F32", "shape": [ROWS, COLS], "data_offsets": [begin, end]});
    let header = header.to_string();
    let len = header.len() as u64;
    fs::write(file, [&len.to_le_bytes(), header.as_bytes(), data].concat()).unwrap();
    fs::OpenOptions::new().append(true).open(file).unwrap().set_len(8 + len + end).unwrap();
}

/// The most memory that this process has had, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn a_large_table_is_not_held_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (base, copy) = (folder.path().join("model"), folder.path().join("adapter"));
    let mut files = testing::model();
    files.tensors.remove("model.embed_tokens.weight");
    files.config["vocab_size"] = ROWS.into();
    files.write_model(&base).unwrap();
    add_table(&base.join("model.safetensors"), "model.embed_tokens.weight");
    testing::adapter(&["q_proj"], 4, 1).write_adapter(&copy).unwrap();
    let weights = copy.join(adapter::WEIGHTS_FILES[0]);
    add_table(&weights, "base_model.model.model.embed_tokens.weight");
    let model = BaseModel {
        merged: None,
        decoder: Decoder::from_folder(&base).unwrap(),
        path: base.clone(),
        dtype: DType::Bf16,
        share: model::Share::WHOLE,
    };
    let before = peak();
    adapter::read(&copy, &model).unwrap();
    assert!(peak() - before < 16 << 20, "{} MiB for two tables of 64", (peak() - before) >> 20);
    // Its last row is compared, too, and is all that is kept.
    let last = fs::metadata(&weights).unwrap().len() - 4;
    let file = fs::File::options().write(true).open(&weights).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &1.0_f32.to_le_bytes(), last).unwrap();
    let adapter = adapter::read(&copy, &model).unwrap();
    let rows = adapter.parts.iter().find_map(|part| part.rows.as_ref()).unwrap();
    assert_eq!(rows.ids, Some(vec![ROWS as u32 - 1]));
    assert!(peak() - before < 16 << 20, "{} MiB for a row of two tables of 64", (peak() - before) >> 20);
}
