//! Parts of tensors, as a GGUF file stores them and in the order of the original model.

use std::{fs, ops::Range};

use gguf::{Gguf, TensorType};
use kernels::{Format, WeightPart, testing::Numbers};

use super::{super::Source, GgufSource};
use crate::LoadError;

const COLS: usize = 512;
/// Two query heads and one key head of eight outputs.
const QUERY_HEADS: usize = 2;
const KV_HEADS: usize = 1;
const DIM: usize = 8;
const DOWN_ROWS: usize = 40;

/// Every type with its code in a file.
const TYPES: [(TensorType, u32); 13] = [
    (TensorType::F32, 0),
    (TensorType::F16, 1),
    (TensorType::BF16, 30),
    (TensorType::Q4_0, 2),
    (TensorType::Q4_1, 3),
    (TensorType::Q5_0, 6),
    (TensorType::Q5_1, 7),
    (TensorType::Q8_0, 8),
    (TensorType::Q2_K, 10),
    (TensorType::Q3_K, 11),
    (TensorType::Q4_K, 12),
    (TensorType::Q5_K, 13),
    (TensorType::Q6_K, 14),
];

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const K: &str = "model.layers.0.self_attn.k_proj.weight";
const DOWN: &str = "model.layers.0.mlp.down_proj.weight";
const Q_BIAS: &str = "model.layers.0.self_attn.q_proj.bias";
const NORM: &str = "model.norm.weight";

/// A file with a tensor of each kind in one type, its bytes random; vectors are f32.
fn source((ty, code): (TensorType, u32)) -> GgufSource {
    let tensors = [
        ("blk.0.attn_q.weight", vec![COLS, QUERY_HEADS * DIM], ty, code),
        ("blk.0.attn_k.weight", vec![COLS, KV_HEADS * DIM], ty, code),
        ("blk.0.ffn_down.weight", vec![COLS, DOWN_ROWS], ty, code),
        ("blk.0.attn_q.bias", vec![QUERY_HEADS * DIM], TensorType::F32, 0),
        ("output_norm.weight", vec![COLS], TensorType::F32, 0),
    ];
    let mut numbers = Numbers(code.into());
    let mut header = [&b"GGUF"[..], &3u32.to_le_bytes(), &5u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
    let mut data = Vec::new();
    for (name, dims, ty, code) in &tensors {
        header.extend((name.len() as u64).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| header.extend((*dim as u64).to_le_bytes()));
        header.extend(code.to_le_bytes());
        header.extend((data.len() as u64).to_le_bytes());
        let bytes = dims.iter().product::<usize>() / ty.block_elements() * ty.block_bytes();
        data.extend((0..bytes).map(|_| (numbers.number() * 127.0) as i8 as u8));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    header.resize(header.len().next_multiple_of(32), 0);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), [header, data].concat()).unwrap();
    let names = [
        (Q, "blk.0.attn_q.weight"),
        (K, "blk.0.attn_k.weight"),
        (DOWN, "blk.0.ffn_down.weight"),
        (Q_BIAS, "blk.0.attn_q.bias"),
        (NORM, "output_norm.weight"),
    ];
    let names = names.map(|(name, ggml)| (name.to_owned(), ggml.to_owned())).into();
    GgufSource {
        file: Gguf::open(file.path()).unwrap(),
        names,
        factors: &[],
        interleaved: Some([QUERY_HEADS, KV_HEADS]),
    }
}

/// Rows and columns of a part, both cut from the whole.
fn cut(whole: &WeightPart<'_>, rows: Range<usize>, cols: Range<usize>) -> WeightPart<'static> {
    let (block, bytes) = match whole.format {
        Format::Dense(dtype) => (1, dtype.size()),
        Format::Ggml(ty) => (ty.block_elements(), ty.block_bytes()),
    };
    let in_row = cols.start / block * bytes..cols.end / block * bytes;
    let stored = whole.data.chunks_exact(whole.cols / block * bytes).skip(rows.start).take(rows.len());
    let data: Vec<u8> = stored.flat_map(|row| &row[in_row.clone()]).copied().collect();
    WeightPart { format: whole.format, rows: rows.len(), cols: cols.len(), data: data.into() }
}

#[test]
fn parts_of_every_type_are_slices_of_the_whole() {
    for ty in TYPES {
        let source = source(ty);
        for name in [Q, K, DOWN] {
            let [rows, cols] = source.shape(name).unwrap();
            let whole = source.part(name, 0..rows, 0..cols).unwrap();
            let dense = whole.clone().into_dense();
            let dense = WeightPart {
                format: Format::Dense(dense.dtype),
                rows,
                cols,
                data: dense.data.into_owned().into(),
            };
            assert_eq!((whole.format, whole.cols), (Format::from(ty.0), COLS));
            // Within a head, over the border of two, single rows, none.
            let row_ranges = [0..rows, 0..1, 1..2, 3..6, 2..rows, rows - 1..rows, rows / 2..rows, 5..5];
            for r in row_ranges {
                for c in [0..COLS, 0..256, 256..512, 256..256] {
                    let part = source.part(name, r.clone(), c.clone()).unwrap();
                    assert_eq!(part, cut(&whole, r.clone(), c.clone()), "{name}, {ty:?}, {r:?}, {c:?}");
                    assert_eq!(
                        part.into_dense().data,
                        cut(&dense, r.clone(), c.clone()).data,
                        "{name}, {ty:?}"
                    );
                }
            }
        }
    }
}

/// What the converter interleaved is put back, for blocks of every type.
#[test]
fn heads_are_put_back_in_halves() {
    for ty in TYPES {
        let source = source(ty);
        for (name, ggml) in [(Q, "blk.0.attn_q.weight"), (K, "blk.0.attn_k.weight")] {
            let rows = source.shape(name).unwrap()[0];
            for row in 0..rows {
                // The original's rows 0 1 2 3 | 4 5 6 7 of a head are stored as 0 4 1 5 2 6 3 7.
                let stored = row / DIM * DIM + [0, 2, 4, 6, 1, 3, 5, 7][row % DIM];
                let blocks = source.file.blocks(ggml, stored..stored + 1, 0..COLS).unwrap();
                assert_eq!(*source.part(name, row..row + 1, 0..COLS).unwrap().data, *blocks, "{ty:?}, {row}");
            }
        }
        let whole = source.file.blocks("blk.0.ffn_down.weight", 0..DOWN_ROWS, 0..COLS).unwrap();
        let part = source.part(DOWN, 0..DOWN_ROWS, 0..COLS).unwrap();
        assert_eq!(*part.data, *whole, "others keep their order");
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let values = source.file.dequantize("blk.0.ffn_down.weight").unwrap();
        assert_eq!(bits(part.into_dense().to_f32()), bits(values), "{ty:?}");
    }
}

#[test]
fn vectors_are_one_row_and_biases_follow_their_heads() {
    let source = source(TYPES[0]);
    let stored = source.file.dequantize("blk.0.attn_q.bias").unwrap();
    let expected = |element: usize| stored[element / DIM * DIM + [0, 2, 4, 6, 1, 3, 5, 7][element % DIM]];
    assert_eq!(source.shape(Q_BIAS).unwrap(), [1, 16]);
    for elements in [0..16, 0..1, 3..12, 8..16, 7..7] {
        let part = source.part(Q_BIAS, 0..1, elements.clone()).unwrap().into_dense().to_f32();
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&part), bits(&elements.map(expected).collect::<Vec<_>>()));
    }
    assert_eq!(source.shape(NORM).unwrap(), [1, COLS]);
    let norm = source.file.blocks("output_norm.weight", 0..1, 100..130).unwrap();
    assert_eq!(*source.part(NORM, 0..1, 100..130).unwrap().data, *norm);
}

#[test]
fn parts_that_are_not_there_or_cut_blocks_are_refused() {
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let cases = [(0..17, 0..COLS), (16..17, 0..COLS), (17..17, 0..COLS), (2..1, 0..COLS), (0..1, 0..513)];
    for ty in TYPES {
        let source = source(ty);
        for (rows, cols) in cases.clone() {
            let refused = source.part(Q, rows.clone(), cols.clone()).unwrap_err();
            assert!(matches!(refused, LoadError::NoSuchPart { .. }), "{refused}");
            let expected =
                format!("tensor {Q} has no rows {rows:?} and columns {cols:?}, its shape is [16, 512]");
            assert_eq!(refused.to_string(), expected);
        }
        for name in [Q, DOWN] {
            for cols in [0..16, 16..COLS, 1..33, 0..511] {
                let part = source.part(name, 0..2, cols.clone());
                let is_refused = matches!(part, Err(LoadError::Gguf(gguf::Error::CutBlocks { .. })));
                assert_eq!(is_refused, ty.0.block_elements() > 1, "{ty:?}, {cols:?}");
            }
        }
        assert!(matches!(source.part("none", 0..1, 0..1), Err(LoadError::MissingTensor(_))));
    }
}
