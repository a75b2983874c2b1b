//! A table that torch has stored column by column is read once, however many rows are compared at a time. One test to a
//! process, whose reading is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use kernels::DType;
use model::{
    Decoder,
    adapter::{self, BaseModel},
    testing::{self, Pickle, Tensor, write_archive},
};

const ROWS: usize = 1 << 15;
const COLS: usize = 32;
/// Rows that the adapter has of its own.
const OWN: [usize; 3] = [0, 777, ROWS - 1];

/// Bytes that this process has read so far.
fn read_so_far() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn a_table_stored_by_columns_is_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let (base, copy) = (folder.path().join("model"), folder.path().join("adapter"));
    let mut files = testing::model();
    let value = |row: usize, col: usize| (row * 31 + col) as f32 / ROWS as f32;
    let data = (0..ROWS).flat_map(|row| (0..COLS).map(move |col| value(row, col))).collect();
    files.config["vocab_size"] = ROWS.into();
    files.tensors.insert("model.embed_tokens.weight".into(), Tensor { shape: vec![ROWS, COLS], data });
    files.write_model(&base).unwrap();
    // An adapter with the same table by columns, but for a few rows.
    let adapter = testing::adapter(&["q_proj"], 4, 1);
    adapter.write_adapter(&copy).unwrap();
    fs::remove_file(copy.join(adapter::WEIGHTS_FILES[0])).unwrap();
    let mut pickle = Pickle::default().op(&[0x80, 2]).dictionary().op(b"(");
    let mut storages: Vec<(String, Vec<u8>)> = Vec::new();
    for (i, (name, tensor)) in adapter.tensors.iter().enumerate() {
        let [rows, cols] = [0, 1].map(|axis| tensor.shape[axis] as i64);
        pickle = pickle.text(name).tensor((&i.to_string(), rows * cols), 0, &[rows, cols], &[cols, 1]);
        storages.push((format!("data/{i}"), tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect()));
    }
    let own = |row: usize| if OWN.contains(&row) { 0.5 } else { 0.0 };
    let by_columns = (0..COLS).flat_map(|col| (0..ROWS).map(move |row| value(row, col) + own(row)));
    let name = "base_model.model.model.embed_tokens.weight";
    let (rows, cols) = (ROWS as i64, COLS as i64);
    let pickle = pickle.text(name).tensor(("table", rows * cols), 0, &[rows, cols], &[1, rows]).op(b"u.");
    storages.push(("data/table".into(), by_columns.flat_map(f32::to_le_bytes).collect()));
    let entries = storages.iter().map(|(name, data)| (name.as_str(), data.as_slice()));
    let all = [("data.pkl", pickle.0.as_slice()), ("byteorder", b"little")].into_iter().chain(entries);
    write_archive(&copy.join(adapter::WEIGHTS_FILES[1]), &all.collect::<Vec<_>>()).unwrap();

    let decoder = Decoder::from_folder(&base).unwrap();
    let model = BaseModel {
        merged: None,
        decoder,
        path: base.clone(),
        dtype: DType::F32,
        share: model::Share::WHOLE,
    };
    let before = read_so_far();
    let adapter = adapter::read(&copy, &model).unwrap();
    let (read, table) = (read_so_far() - before, (4 * ROWS * COLS) as u64);
    let rows = adapter.parts.iter().find_map(|part| part.rows.as_ref()).unwrap();
    assert_eq!(rows.ids, Some(OWN.map(|row| row as u32).to_vec()));
    let expected: Vec<f32> = OWN.iter().flat_map(|row| (0..COLS).map(|col| value(*row, col) + 0.5)).collect();
    assert_eq!(rows.values.to_f32(), expected);
    // The adapter's table and the model's.
    assert!(read < 3 * table, "{read} bytes of tables of {table}");
}
