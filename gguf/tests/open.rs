//! Metadata and tensors of well-formed files, and the error of every kind of malformed one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, fs, path::Path};

use gguf::{Error, Gguf, TensorType};

/// A GGUF file being put together.
struct Writer {
    version: u32,
    tensors: u64,
    pairs: u64,
    metadata: Vec<u8>,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl Writer {
    fn new() -> Self {
        Self { version: 3, tensors: 0, pairs: 0, metadata: vec![], infos: vec![], data: vec![] }
    }

    fn text(to: &mut Vec<u8>, s: &str) {
        to.extend((s.len() as u64).to_le_bytes());
        to.extend(s.as_bytes());
    }

    /// A pair with the value's bytes as they are in the file.
    fn pair(mut self, key: &str, code: u32, value: &[u8]) -> Self {
        Self::text(&mut self.metadata, key);
        self.metadata.extend(code.to_le_bytes());
        self.metadata.extend(value);
        self.pairs += 1;
        self
    }

    /// An array of elements with the bytes that they have in the file.
    fn array(self, key: &str, code: u32, elements: &[&[u8]]) -> Self {
        let mut value = code.to_le_bytes().to_vec();
        value.extend((elements.len() as u64).to_le_bytes());
        elements.iter().for_each(|e| value.extend(*e));
        self.pair(key, 9, &value)
    }

    fn info(mut self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Self {
        Self::text(&mut self.infos, name);
        self.infos.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| self.infos.extend(d.to_le_bytes()));
        self.infos.extend(ty.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self.tensors += 1;
        self
    }

    fn data(mut self, data: &[u8]) -> Self {
        self.data.extend(data);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.pairs.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.infos);
        if !self.data.is_empty() {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&self.data);
        }
        out
    }
}

fn open(bytes: &[u8]) -> Result<Gguf, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path())
}

fn text(s: &str) -> Vec<u8> {
    let mut out = vec![];
    Writer::text(&mut out, s);
    out
}

/// A file with a value of every kind and two tensors.
fn sample() -> Writer {
    Writer::new()
        .pair("arch", 8, &text("llama"))
        .pair("u8", 0, &[200])
        .pair("i16", 3, &(-5i16).to_le_bytes())
        .pair("u32", 4, &7u32.to_le_bytes())
        .pair("u64", 10, &u64::MAX.to_le_bytes())
        .pair("f32", 6, &1.5f32.to_le_bytes())
        .pair("f64", 12, &0.25f64.to_le_bytes())
        .pair("bool", 7, &[1])
        .array("tokens", 8, &[&text("a"), &text("é"), &text("")])
        .array("types", 5, &[&3i32.to_le_bytes(), &(-1i32).to_le_bytes()])
        .array("scores", 6, &[&0.5f32.to_le_bytes()])
        .info("one", &[2, 3], 0, 0)
        .info("two", &[2], 1, 32)
        .data(&[0f32, 1., 2., 3., 4., 5.].map(f32::to_le_bytes).concat())
        .data(&[0; 8])
        .data(&[0x00, 0x3c, 0x00, 0xc0])
}

#[test]
fn metadata_is_read_by_type() {
    let g = open(&sample().bytes()).unwrap();
    assert_eq!(g.require::<&str>("arch").unwrap(), "llama");
    assert_eq!(g.require::<u32>("u8").unwrap(), 200);
    assert_eq!(g.require::<u32>("u32").unwrap(), 7);
    assert_eq!(g.require::<f32>("f32").unwrap(), 1.5);
    assert_eq!(g.require::<f32>("f64").unwrap(), 0.25);
    assert!(g.require::<bool>("bool").unwrap());
    assert_eq!(g.require::<&[String]>("tokens").unwrap(), ["a", "é", ""]);
    assert_eq!(g.require::<Vec<i32>>("types").unwrap(), [3, -1]);
    assert_eq!(g.require::<&[f32]>("scores").unwrap(), [0.5]);
    assert_eq!(g.get::<u32>("absent").unwrap(), None);
}

#[test]
fn metadata_of_another_type_or_absent_is_named() {
    let g = open(&sample().bytes()).unwrap();
    let message = |e: Error| e.to_string();
    assert_eq!(message(g.require::<u32>("absent").unwrap_err()), "metadata \"absent\" is missing");
    assert_eq!(
        message(g.get::<u32>("i16").unwrap_err()),
        "metadata \"i16\" is the integer -5, expected an integer of 32 bits, not negative"
    );
    assert_eq!(
        message(g.get::<bool>("arch").unwrap_err()),
        "metadata \"arch\" is the text \"llama\", expected a boolean"
    );
    assert!(g.get::<u32>("u64").is_err());
    assert!(g.get::<&[f32]>("types").is_err());
}

#[test]
fn tensors_are_found_and_read() {
    let g = open(&sample().bytes()).unwrap();
    let one = g.tensor("one").unwrap();
    assert_eq!((one.dims.as_slice(), one.ty, one.elements()), (&[2, 3][..], TensorType::F32, 6));
    assert_eq!(g.dequantize("one").unwrap(), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(g.dequantize("two").unwrap(), [1., -2.]);
    assert_eq!(g.tensors().len(), 2);
    assert!(matches!(g.dequantize("three"), Err(Error::MissingTensor { .. })));
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let whole = sample().bytes();
    for len in 0..whole.len() {
        let error = open(&whole[..len]).expect_err("a cut file");
        assert!(matches!(error, Error::Truncated { .. } | Error::TensorBounds { .. }), "at {len}: {error}");
    }
}

#[test]
fn a_byte_changed_anywhere_never_panics() {
    let whole = sample().bytes();
    for at in 0..whole.len() {
        for value in [0, 0x7f, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            if let Ok(g) = open(&bytes) {
                for t in g.tensors() {
                    assert_eq!(g.dequantize(&t.name).unwrap().len(), t.elements());
                }
            }
        }
    }
}

#[test]
fn malformed_files_are_refused_with_the_cause() {
    let huge = |count: u64| [4u32.to_le_bytes().as_slice(), &count.to_le_bytes()].concat();
    let tensor = |dims: &[u64], ty, offset| Writer::new().info("t", dims, ty, offset).data(&[0; 64]);
    let cases: Vec<(&str, Writer)> = vec![
        ("version 50331648 is not", Writer { version: 3u32.swap_bytes(), ..Writer::new() }),
        ("version 1 is not", Writer { version: 1, ..Writer::new() }),
        ("the number of tensors at byte 16", Writer { tensors: u64::MAX, ..Writer::new() }),
        ("the number of metadata pairs at byte 24", Writer { pairs: 1 << 40, ..Writer::new() }),
        ("an array at byte", Writer::new().pair("k", 9, &huge(u64::MAX))),
        ("an array at byte", Writer::new().pair("k", 9, &huge(1 << 60))),
        ("a metadata value at byte", Writer::new().pair("k", 8, &(1u64 << 62).to_le_bytes())),
        ("\"k\": value type 13", Writer::new().pair("k", 13, &[0; 8])),
        ("\"k\": value type 9", Writer::new().array("k", 9, &[&huge(0)])),
        ("\"k\": 2 is not a boolean", Writer::new().pair("k", 7, &[2])),
        ("\"k\" appears twice", Writer::new().pair("k", 0, &[1]).pair("k", 0, &[1])),
        ("is not UTF-8", Writer::new().pair("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])),
        ("alignment 48", Writer::new().pair("general.alignment", 4, &48u32.to_le_bytes())),
        ("alignment 0", Writer::new().pair("general.alignment", 4, &0u32.to_le_bytes())),
        ("\"t\": type 99", tensor(&[4], 99, 0)),
        ("\"t\" has 0 axes", tensor(&[], 0, 0)),
        ("\"t\" has 5 axes", tensor(&[1; 5], 0, 0)),
        ("shape [0]", tensor(&[0], 0, 0)),
        ("shape [33] is not valid for Q8_0", tensor(&[33], 8, 0)),
        ("shape [4294967296, 4294967296, 2]", tensor(&[1 << 32, 1 << 32, 2], 0, 0)),
        ("68 bytes at offset 0 of 64", tensor(&[17], 0, 0)),
        ("64 bytes at offset 32 of 64", tensor(&[16], 0, 32)),
        ("4 bytes at offset 4 of 64", tensor(&[1], 0, 4)),
        ("offset 18446744073709551584", tensor(&[1], 0, u64::MAX - 31)),
        ("\"t\" appears twice", Writer::new().info("t", &[1], 0, 0).info("t", &[1], 0, 0).data(&[0; 4])),
    ];
    for (expected, writer) in cases {
        let error = open(&writer.bytes()).expect_err(expected).to_string();
        assert!(error.contains(expected), "expected \"{expected}\" in \"{error}\"");
    }
}

#[test]
fn another_file_or_none_is_refused() {
    assert!(matches!(open(b"PK\x03\x04 a zip"), Err(Error::Magic { found: [0x50, 0x4b, 3, 4] })));
    let error = Gguf::open("/nonexistent/model.gguf").unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/model.gguf: "), "{error}");
}

#[test]
fn every_block_type_dequantizes_as_ggml_does() {
    let g = Gguf::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantized.gguf")).unwrap();
    let names = g.tensors().iter().filter(|t| !t.name.ends_with(".f32"));
    let mut count = 0;
    for tensor in names {
        let expected = g.dequantize(&format!("{}.f32", tensor.name)).unwrap();
        assert_eq!(g.dequantize(&tensor.name).unwrap(), expected, "{:?}", tensor.ty);
        count += 1;
    }
    assert_eq!(count, 12);
}

/// Parts of every type are the slices of the whole: blocks and their elements.
#[test]
fn parts_are_slices_of_the_whole() {
    let g = Gguf::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantized.gguf")).unwrap();
    let mut types = BTreeSet::new();
    for tensor in g.tensors() {
        let (name, ty, rows, cols) = (&tensor.name, tensor.ty, tensor.rows(), tensor.cols());
        types.insert(format!("{ty:?}"));
        let (block, bytes) = (ty.block_elements(), ty.block_bytes());
        let blocks = g.blocks(name, 0..rows, 0..cols).unwrap();
        let whole = g.dequantize(name).unwrap();
        assert_eq!((blocks.len(), whole.len()), (tensor.bytes(), rows * cols));
        let row_ranges = [0..rows, 0..1, 1..2, 1..1, rows..rows];
        let col_ranges = [0..cols, 0..block, block..cols, cols - block..cols, block..block, cols..cols];
        for (r, c) in row_ranges.iter().flat_map(|r| col_ranges.iter().map(move |c| (r.clone(), c.clone()))) {
            let part = g.blocks(name, r.clone(), c.clone()).unwrap();
            let in_row = c.start / block * bytes..c.end / block * bytes;
            let stored = blocks.chunks_exact(cols / block * bytes).skip(r.start).take(r.len());
            assert_eq!(
                part,
                stored.flat_map(|row| &row[in_row.clone()]).copied().collect::<Vec<_>>(),
                "{ty:?}"
            );
            let elements = whole.chunks_exact(cols).skip(r.start).take(r.len());
            let elements: Vec<f32> = elements.flat_map(|row| &row[c.clone()]).copied().collect();
            assert_eq!(ty.dequantize(&part), elements, "{ty:?}, rows {r:?}, columns {c:?}");
        }
    }
    assert_eq!(types.len(), 13, "{types:?}");
}

#[test]
fn parts_that_are_not_there_or_cut_blocks_are_refused() {
    let g = Gguf::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantized.gguf")).unwrap();
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let missing =
        [(0..3, 0..512), (2..3, 0..512), (3..3, 0..512), (2..1, 0..512), (0..2, 0..544), (0..2, 513..513)];
    for tensor in g.tensors() {
        for (rows, cols) in &missing {
            let error = g.blocks(&tensor.name, rows.clone(), cols.clone()).unwrap_err();
            let expected = format!("has no rows {rows:?} and columns {cols:?} of [2, 512]");
            assert!(
                matches!(error, Error::NoSuchPart { .. }) && error.to_string().ends_with(&expected),
                "{error}"
            );
        }
        for cols in [0..1, 1..512, 0..511, 16..32, 31..33, 255..256, 1..1] {
            let part = g.blocks(&tensor.name, 0..2, cols.clone());
            match tensor.ty.block_elements() {
                1 => assert_eq!(part.unwrap().len(), 2 * cols.len() * tensor.ty.block_bytes()),
                _ => assert!(matches!(part, Err(Error::CutBlocks { .. })), "{:?}, {cols:?}", tensor.ty),
            }
        }
    }
    assert!(matches!(g.blocks("none", 0..1, 0..1), Err(Error::MissingTensor { .. })));
    let error = g.blocks("Q4_K", 0..2, 0..32).unwrap_err().to_string();
    assert_eq!(
        error,
        "tensor \"Q4_K\": rows 0..2 and columns 0..32 of [2, 512] are not whole blocks of 256 columns of Q4_K"
    );
}
