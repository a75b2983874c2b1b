//! Parts of the tensors of a safetensors file.

use std::{borrow::Cow, fs, os::unix::fs::FileExt, path::Path};

use half::{bf16, f16};
use kernels::{DType, Format};
use safetensors::{Dtype, View, serialize_to_file};
use serde_json::json;

use super::TensorFile;
use crate::{
    LoadError,
    testing::{Pickle, write_archive},
};

const ROWS: usize = 7;
const COLS: usize = 9;

struct Stored(Dtype, Vec<usize>, Vec<u8>);

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.0
    }

    fn shape(&self) -> &[usize] {
        &self.1
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.2.as_slice().into()
    }

    fn data_len(&self) -> usize {
        self.2.len()
    }
}

/// A matrix in every type, its numbers 0, 1, 2 and so on, and a few odd tensors.
fn write(path: &Path) {
    let numbers = || (0..ROWS * COLS).map(|i| i as f32);
    let matrix = |dtype, data: Vec<u8>| Stored(dtype, vec![ROWS, COLS], data);
    let tensors = [
        ("f32", matrix(Dtype::F32, numbers().flat_map(f32::to_le_bytes).collect())),
        ("f16", matrix(Dtype::F16, numbers().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect())),
        ("bf16", matrix(Dtype::BF16, numbers().flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect())),
        ("f64", matrix(Dtype::F64, numbers().flat_map(|x| f64::from(x).to_le_bytes()).collect())),
        ("i64", matrix(Dtype::I64, vec![0; 8 * ROWS * COLS])),
        ("vector", Stored(Dtype::F32, vec![COLS], numbers().take(COLS).flat_map(f32::to_le_bytes).collect())),
        ("cube", Stored(Dtype::F32, vec![2, 2, 2], vec![0; 32])),
        ("number", Stored(Dtype::F32, vec![], vec![0; 4])),
    ];
    serialize_to_file(tensors, None, path).unwrap();
}

fn open() -> TensorFile {
    let file = tempfile::NamedTempFile::with_suffix(".safetensors").unwrap();
    write(file.path());
    TensorFile::open(file.path()).unwrap()
}

#[test]
fn parts_of_every_type_are_slices_of_the_whole() {
    let file = open();
    for (name, dtype) in
        [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::Bf16), ("f64", DType::F32)]
    {
        assert_eq!(file.matrix_shape(name).unwrap(), [ROWS, COLS]);
        for rows in [0..ROWS, 0..1, 2..5, 6..7, 4..4, ROWS..ROWS] {
            for cols in [0..COLS, 0..1, 3..8, 8..9, 5..5, COLS..COLS] {
                let part = file.part(name, rows.clone(), cols.clone()).unwrap();
                assert_eq!(part.format, Format::Dense(dtype));
                assert_eq!((part.rows, part.cols), (rows.len(), cols.len()));
                let expected =
                    rows.clone().flat_map(|row| cols.clone().map(move |col| (row * COLS + col) as f32));
                assert_eq!(
                    part.into_dense().to_f32(),
                    expected.collect::<Vec<_>>(),
                    "{name}, {rows:?}, {cols:?}"
                );
            }
        }
    }
    assert_eq!(file.matrix_shape("vector").unwrap(), [1, COLS]);
    assert_eq!(file.part("vector", 0..1, 2..5).unwrap().into_dense().to_f32(), [2.0, 3.0, 4.0]);
}

#[test]
fn parts_that_are_not_there_are_refused() {
    let file = open();
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let cases = [
        (0..8, 0..9),
        (7..8, 0..9),
        (8..8, 0..9),
        (3..2, 0..9),
        (0..7, 0..10),
        (0..7, 9..10),
        (0..7, 10..10),
        (0..7, 5..4),
        (0..usize::MAX, 0..9),
        (0..7, usize::MAX..usize::MAX),
    ];
    for (rows, cols) in cases {
        let refused = file.part("f32", rows.clone(), cols.clone()).unwrap_err();
        assert!(matches!(refused, LoadError::NoSuchPart { .. }), "{refused}");
        let expected = format!("tensor f32 has no rows {rows:?} and columns {cols:?}, its shape is [7, 9]");
        assert_eq!(refused.to_string(), expected);
    }
    for name in ["cube", "number"] {
        assert!(matches!(file.part(name, 0..1, 0..1), Err(LoadError::NotAMatrix { .. })), "{name}");
    }
    assert!(matches!(file.part("i64", 0..1, 0..1), Err(LoadError::TensorType { .. })));
    assert!(matches!(file.part("none", 0..1, 0..1), Err(LoadError::MissingTensor(_))));
}

/// A tensor of 256 GiB, nearly all of it a hole: whoever read more than was asked for would run out of memory.
#[test]
fn only_what_is_asked_for_is_read() {
    const COLS: u64 = 1 << 34;
    let path = tempfile::NamedTempFile::with_suffix(".safetensors").unwrap();
    let bytes = 4 * 4 * COLS;
    let header =
        json!({"wide": {"dtype": "F32", "shape": [4, COLS], "data_offsets": [0, bytes]}}).to_string();
    let data = 8 + header.len() as u64;
    fs::write(path.path(), [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path.path()).unwrap();
    file.set_len(data + bytes).unwrap();
    for (row, x) in [(1, 1.5f32), (2, 2.5)] {
        file.write_all_at(&x.to_le_bytes(), data + 4 * (row * COLS + COLS - 2)).unwrap();
    }
    let opened = TensorFile::open(path.path()).unwrap();
    let end = COLS as usize;
    let part = opened.part("wide", 1..3, end - 3..end).unwrap();
    assert_eq!(part.into_dense().to_f32(), [0.0, 1.5, 0.0, 0.0, 2.5, 0.0]);
}

/// Views of a storage as torch can save them: whatever the strides, parts are slices of what the view shows.
#[test]
fn parts_of_views_are_what_the_views_show() {
    const ELEMENTS: i64 = 4096;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bin");
    let data: Vec<u8> = (0..ELEMENTS).flat_map(|i| (i as f32).to_le_bytes()).collect();
    for (shape, strides, offset) in [
        ([7, 9], [9, 1], 0),
        ([7, 9], [1, 7], 0),
        ([7, 9], [1, 7], 11),
        ([7, 9], [1, 64], 3),
        ([7, 9], [64, 1], 3),
        ([7, 9], [2, 14], 0),
        ([7, 9], [18, 2], 5),
        ([7, 9], [3, 100], 0),
        ([7, 9], [100, 3], 0),
        ([7, 9], [0, 1], 2),
        ([7, 9], [1, 0], 2),
        ([7, 9], [0, 5], 2),
        ([64, 3], [1, 1000], 0),
        ([3, 64], [1000, 1], 0),
        ([3, 64], [1, 3], 0),
        ([1, 9], [1, 64], 0),
        ([9, 1], [64, 1], 0),
        ([9, 1], [1, 9], 0),
    ] {
        let pickle = Pickle::default().op(&[0x80, 2]).dictionary().op(b"(").text("x");
        let pickle = pickle.tensor(("0", ELEMENTS), offset, &shape, &strides).op(b"u.");
        let entries = [("data.pkl", pickle.0.as_slice()), ("byteorder", b"little"), ("data/0", &data[..])];
        write_archive(&path, &entries).unwrap();
        let file = TensorFile::open(&path).unwrap();
        let [height, width] = shape.map(|axis| axis as usize);
        for rows in [0..height, 0..1, height / 2..height, height - 1..height, 0..0] {
            for cols in [0..width, 0..1, width / 2..width, width - 1..width, 0..0] {
                let got = file.part("x", rows.clone(), cols.clone()).unwrap().into_dense().to_f32();
                let element = |row: usize, col: usize| {
                    (offset + row as i64 * strides[0] + col as i64 * strides[1]) as f32
                };
                let columns = || cols.clone();
                let expected: Vec<f32> =
                    rows.clone().flat_map(|row| columns().map(move |col| element(row, col))).collect();
                assert_eq!(got, expected, "{shape:?} {strides:?} {rows:?} {cols:?}");
            }
        }
    }
}
