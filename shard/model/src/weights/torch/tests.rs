//! Files of torch: what it wrote itself is read as it reads it, and anything else is refused.

mod hostile;

use std::{fs, path::PathBuf};

use crate::{
    LoadError, TorchError,
    testing::{Pickle, write_archive},
    weights::tensor_file::TensorFile,
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch").join(name)
}

fn numbers(file: &TensorFile, name: &str) -> Vec<f32> {
    let [rows, cols] = file.matrix_shape(name).unwrap();
    file.part(name, 0..rows, 0..cols).unwrap().into_dense().to_f32()
}

/// Opens an archive of a pickle and one storage, "0", of the numbers 0 to 23 in f32.
fn open(pickle: Pickle) -> Result<TensorFile, TorchError> {
    let storage: Vec<u8> = (0..24).flat_map(|x: u8| f32::from(x).to_le_bytes()).collect();
    open_archive(&[("data.pkl", &pickle.0), ("byteorder", b"little"), ("data/0", &storage)])
}

fn open_archive(entries: &[(&str, &[u8])]) -> Result<TensorFile, TorchError> {
    let file = tempfile::NamedTempFile::with_suffix(".bin").unwrap();
    write_archive(file.path(), entries).unwrap();
    open_file(file.path())
}

fn open_file(path: &std::path::Path) -> Result<TensorFile, TorchError> {
    TensorFile::open(path).map_err(|error| match error {
        LoadError::Torch { source, .. } => source,
        other => panic!("{other}"),
    })
}

fn refusal(opened: Result<TensorFile, TorchError>) -> TorchError {
    opened.err().expect("it was read")
}

/// A dictionary of one tensor.
fn of_one(offset: i64, shape: &[i64], strides: &[i64]) -> Pickle {
    Pickle::default().dictionary().text("x").tensor(("0", 24), offset, shape, strides).op(b"s.")
}

#[test]
fn files_of_torch_are_read_as_torch_reads_them() {
    let expected = TensorFile::open(&fixture("expected.safetensors")).unwrap();
    assert_eq!(expected.names().count(), 20);
    for name in ["zip.bin", "legacy.bin"] {
        let file = TensorFile::open(&fixture(name)).unwrap();
        for tensor in expected.names() {
            let shape = expected.shape(tensor).unwrap();
            assert_eq!(file.shape(tensor).unwrap(), shape, "{name}: {tensor}");
            assert_eq!(numbers(&file, tensor), numbers(&expected, tensor), "{name}: {tensor}");
            let [rows, cols] = file.matrix_shape(tensor).unwrap();
            for part in
                [(0..rows / 2, 0..cols), (rows / 2..rows, cols / 2..cols), (0..rows, cols / 3..cols / 2)]
            {
                let of = |file: &TensorFile| file.part(tensor, part.0.clone(), part.1.clone()).unwrap();
                assert_eq!(
                    of(&file).into_dense().to_f32(),
                    of(&expected).into_dense().to_f32(),
                    "{name}: {tensor}, {part:?}"
                );
            }
        }
        // Other tensors are there, and refused if they are asked for.
        for tensor in ["int64", "int32", "uint8", "bool"] {
            let refused = file.part(tensor, 0..1, 0..1).unwrap_err().to_string();
            assert!(refused.contains(&format!("tensor {tensor} has the type {tensor}")), "{refused}");
        }
        for tensor in ["cube", "number"] {
            assert!(matches!(file.matrix_shape(tensor), Err(LoadError::NotAMatrix { .. })), "{tensor}");
        }
        // What is no tensor is passed over.
        assert_eq!(file.names().count(), 26, "{name}: {:?}", file.names().collect::<Vec<_>>());
    }
}

#[test]
fn views_are_read_by_their_strides() {
    type View = (i64, &'static [i64], &'static [i64], &'static [f32]);
    let views: [View; 10] = [
        (0, &[2, 3], &[3, 1], &[0., 1., 2., 3., 4., 5.]),
        (0, &[2, 3], &[1, 2], &[0., 2., 4., 1., 3., 5.]),
        (5, &[2, 2], &[8, 1], &[5., 6., 13., 14.]),
        (5, &[2, 2], &[8, 3], &[5., 8., 13., 16.]),
        (0, &[2, 2], &[0, 1], &[0., 1., 0., 1.]),
        (7, &[2, 2], &[0, 0], &[7., 7., 7., 7.]),
        (0, &[3, 2], &[1, 1], &[0., 1., 1., 2., 2., 3.]),
        (23, &[1, 1], &[1 << 40, 1 << 40], &[23.]),
        (3, &[4], &[5], &[3., 8., 13., 18.]),
        (0, &[0, 1 << 40], &[1 << 40, 1], &[]),
    ];
    for (offset, shape, strides, expected) in views {
        let file = open(of_one(offset, shape, strides)).unwrap();
        assert_eq!(numbers(&file, "x"), expected, "{offset} {shape:?} {strides:?}");
    }
}

#[test]
fn views_beyond_their_storages_are_refused() {
    type View = (i64, &'static [i64], &'static [i64], &'static str);
    let beyond = "tensor x: it reaches beyond its storage";
    let larger = "tensor x: it is larger than the file";
    let views: [View; 12] = [
        (0, &[5, 5], &[5, 1], beyond),
        (1, &[4, 6], &[6, 1], beyond),
        (24, &[1], &[1], beyond),
        (0, &[2, 2], &[1, 23], beyond),
        (0, &[3], &[i64::MAX], beyond),
        (i64::MAX, &[1], &[1], beyond),
        (i64::MAX, &[2, 2], &[i64::MAX, i64::MAX], beyond),
        (0, &[1 << 40], &[0], larger),
        (0, &[1 << 40, 1 << 40], &[0, 0], larger),
        (-1, &[1], &[1], "a negative number"),
        (0, &[-1], &[1], "a negative number"),
        (0, &[2, 2], &[1], "shape and strides are not of one length"),
    ];
    for (offset, shape, strides, cause) in views {
        let refused = refusal(open(of_one(offset, shape, strides))).to_string();
        assert!(refused.contains(cause), "{offset} {shape:?} {strides:?}: {refused}");
    }
    let short = Pickle::default().dictionary().text("x").tensor(("0", 25), 0, &[1], &[1]).op(b"s.");
    assert_eq!(refusal(open(short)).to_string(), "tensor x: its storage is cut short");
    let missing = Pickle::default().dictionary().text("x").tensor(("1", 24), 0, &[1], &[1]).op(b"s.");
    assert_eq!(refusal(open(missing)).to_string(), "data/1 is missing in the archive");
}

#[test]
fn archives_that_torch_does_not_write_are_refused() {
    let pickle = of_one(0, &[1], &[1]).0;
    let of = |entries: &[(&str, &[u8])]| refusal(open_archive(entries));
    assert!(matches!(of(&[("data.pkl", &pickle), ("byteorder", b"big")]), TorchError::BigEndian));
    assert!(matches!(of(&[("other", &pickle)]), TorchError::MissingEntry(name) if name == "data.pkl"));
    let long = vec![0; 1 + super::MAX_PICKLE as usize];
    assert!(matches!(of(&[("data.pkl", &long)]), TorchError::TooLong { .. }));
    let list = Pickle::default().op(b"].").0;
    assert!(matches!(of(&[("data.pkl", &list)]), TorchError::NotADictionary));
    let zip = fs::read(fixture("zip.bin")).unwrap();
    let legacy = fs::read(fixture("legacy.bin")).unwrap();
    let file = tempfile::NamedTempFile::with_suffix(".bin").unwrap();
    let of_bytes = |bytes: &[u8]| {
        fs::write(file.path(), bytes).unwrap();
        refusal(open_file(file.path()))
    };
    for (bytes, at) in [(&zip, zip.len() / 2), (&zip, 10), (&legacy, legacy.len() - 1), (&legacy, 700)] {
        let refused = of_bytes(&bytes[..at]);
        let is_known = matches!(
            refused,
            TorchError::Zip(_) | TorchError::Io(_) | TorchError::Pickle { .. } | TorchError::Truncated { .. }
        );
        assert!(is_known, "{at}: {refused}");
    }
    for other in [&b""[..], b"\x80\x02].", b"version https://git-lfs", b"GGUF", &[0; 100]] {
        assert!(matches!(of_bytes(other), TorchError::OtherFormat), "{other:?}");
    }
    // In a legacy file it is a flag.
    let at = legacy.windows(13).position(|window| window == b"little_endian").unwrap();
    let mut big = legacy.clone();
    let flag = at + big[at..].iter().position(|byte| *byte == 0x88).unwrap();
    big[flag] = 0x89;
    assert!(matches!(of_bytes(&big), TorchError::BigEndian));
}

/// torch before 0.4 wrote storages that are views of others.
#[test]
fn storages_within_storages_are_found() {
    let storage = |pickle: Pickle, view: &dyn Fn(Pickle) -> Pickle| {
        let id = pickle.op(b"(").text("storage").global("torch", "FloatStorage").text("7").text("cpu").int(6);
        view(id).op(b"tQ")
    };
    let tensor = |pickle: Pickle, view: &dyn Fn(Pickle) -> Pickle| {
        let function = pickle.global("torch._utils", "_rebuild_tensor_v2").op(b"(");
        storage(function, view).int(1).ints(&[2]).ints(&[1]).op(b"\x89}tR")
    };
    let magic: [u8; 10] = 0x1950_a86a_20f9_469c_fc6c_u128.to_le_bytes()[..10].try_into().unwrap();
    let state = Pickle::default().op(b"}").text("whole");
    let state = tensor(state, &|id| id.op(b"N")).op(b"s").text("view");
    let state = tensor(state, &|id| id.op(b"(").text("8").int(3).int(3).op(b"t")).op(b"s.");
    let all =
        Pickle::default().op(&[0x80, 2, 0x8a, 10]).op(&magic).op(b".").int(1001).op(b".}.").op(&state.0);
    let all = all.op(b"]").text("7").op(b"a.").op(&6u64.to_le_bytes());
    let data: Vec<u8> = (0..6).flat_map(|x: u8| f32::from(x).to_le_bytes()).collect();
    let file = tempfile::NamedTempFile::with_suffix(".bin").unwrap();
    fs::write(file.path(), all.op(&data).0).unwrap();
    let file = open_file(file.path()).unwrap();
    assert_eq!((numbers(&file, "whole"), numbers(&file, "view")), (vec![1.0, 2.0], vec![4.0, 5.0]));
}
