//! Models in several files.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use gguf::{Error, Gguf};
use tempfile::TempDir;

const MODEL: &str = "m-00001-of-00003.gguf";

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

/// A file with integers as metadata, and vectors of two numbers as tensors.
fn file(metadata: &[(&str, u32)], tensors: &[(&str, [f32; 2])]) -> Vec<u8> {
    let mut out = [&b"GGUF"[..], &3_u32.to_le_bytes()].concat();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        out.extend([&text(key)[..], &4_u32.to_le_bytes(), &value.to_le_bytes()].concat());
    }
    for (index, (name, _)) in tensors.iter().enumerate() {
        out.extend(
            [&text(name)[..], &1_u32.to_le_bytes(), &2_u64.to_le_bytes(), &0_u32.to_le_bytes()].concat(),
        );
        out.extend((index as u64 * 32).to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32), 0);
    for (_, [x, y]) in tensors {
        out.extend([&x.to_le_bytes()[..], &y.to_le_bytes(), &[0; 24]].concat());
    }
    out
}

/// A model in three parts. The second has nothing but a tensor, as the first has nothing but metadata.
struct Parts(TempDir);

impl Parts {
    fn new() -> Parts {
        let parts = Parts(tempfile::tempdir().unwrap());
        let all = [("split.no", 0), ("split.count", 3), ("split.tensors.count", 3), ("answer", 42)];
        parts.write(MODEL, &file(&all, &[]));
        parts.write("m-00002-of-00003.gguf", &part(1, 3, &[("a", [1., 2.])]));
        parts.write("m-00003-of-00003.gguf", &part(2, 3, &[("b", [3., 4.]), ("c", [5., 6.])]));
        parts
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn open(&self) -> Result<Gguf, Error> {
        Gguf::open(self.path(MODEL))
    }
}

fn part(index: u32, count: u32, tensors: &[(&str, [f32; 2])]) -> Vec<u8> {
    file(&[("split.no", index), ("split.count", count), ("split.tensors.count", 3)], tensors)
}

/// Written by ggml's own package (`data/make_split.py`).
#[test]
fn what_others_have_split_is_read() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let model = Gguf::open(data.join("split-00001-of-00003.gguf")).unwrap();
    assert_eq!(model.require::<u32>("llama.block_count").unwrap(), 7);
    for (name, first) in [("one", 0.), ("two", 1.), ("three", 2.), ("four", 3.)] {
        assert_eq!((model.tensor(name).unwrap().rows(), model.tensor(name).unwrap().cols()), (2, 3));
        assert_eq!(model.dequantize(name).unwrap(), [0., 1., 2., 3., 4., 5.].map(|x| x + first), "{name}");
    }
    let second = Gguf::open(data.join("split-00002-of-00003.gguf")).unwrap_err();
    assert!(matches!(second, Error::NotTheFirst { part: 2, count: 3 }), "{second}");
}

#[test]
fn the_parts_are_one_file() {
    let parts = Parts::new();
    let model = parts.open().unwrap();
    let names: Vec<_> = model.tensors().iter().map(|tensor| &*tensor.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    for (name, values) in [("a", [1., 2.]), ("b", [3., 4.]), ("c", [5., 6.])] {
        assert_eq!(model.dequantize(name).unwrap(), values);
    }
    assert_eq!(model.require::<u32>("answer").unwrap(), 42);
    for name in [MODEL, "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"] {
        fs::copy(parts.path(name), parts.path(&name.replace(".gguf", ".GGUF"))).unwrap();
    }
    assert_eq!(Gguf::open(parts.path("m-00001-of-00003.GGUF")).unwrap().dequantize("c").unwrap(), [5., 6.]);
    // As in the cache of the hub's clients, where names are links to contents.
    let links = tempfile::tempdir().unwrap();
    for (number, name) in [MODEL, "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"].iter().enumerate() {
        fs::rename(parts.path(name), parts.path(&format!("blob-{number}"))).unwrap();
        std::os::unix::fs::symlink(parts.path(&format!("blob-{number}")), links.path().join(name)).unwrap();
    }
    assert_eq!(Gguf::open(links.path().join(MODEL)).unwrap().dequantize("c").unwrap(), [5., 6.]);
}

#[test]
fn a_part_that_is_alone_is_whole() {
    let parts = Parts::new();
    for (name, metadata) in [
        ("m-00001-of-00001.gguf", &[("split.no", 0), ("split.count", 1)][..]),
        ("m-00001-of-00002.gguf", &[]),
        ("any name", &[("split.count", 1)]),
        ("m.gguf", &[("split.no", 0), ("split.count", 0)]),
    ] {
        parts.write(name, &file(metadata, &[("a", [7., 8.])]));
        assert_eq!(Gguf::open(parts.path(name)).unwrap().dequantize("a").unwrap(), [7., 8.], "{name}");
    }
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    type Case = (fn(&Parts), &'static str);
    let cases: [Case; 13] = [
        (
            |parts| fs::remove_file(parts.path("m-00002-of-00003.gguf")).unwrap(),
            "m-00002-of-00003.gguf: No such file",
        ),
        (
            |parts| fs::remove_file(parts.path("m-00003-of-00003.gguf")).unwrap(),
            "m-00003-of-00003.gguf: No such file",
        ),
        (|parts| parts.write("m-00002-of-00003.gguf", b"nonsense"), "m-00002-of-00003.gguf: not a GGUF file"),
        (|parts| parts.write("m-00002-of-00003.gguf", &[]), "m-00002-of-00003.gguf: truncated"),
        (|parts| parts.write("m-00003-of-00003.gguf", &part(1, 3, &[("b", [3., 4.])])), "part 2 of 3"),
        (|parts| parts.write("m-00003-of-00003.gguf", &part(2, 4, &[("b", [3., 4.])])), "part 3 of 4"),
        (|parts| parts.write("m-00003-of-00003.gguf", &file(&[], &[("b", [3., 4.])])), "part 1 of 1"),
        (
            |parts| parts.write("m-00003-of-00003.gguf", &part(2, 3, &[("b", [3., 4.])])),
            "2 tensors together, expected 3",
        ),
        (
            |parts| parts.write("m-00003-of-00003.gguf", &part(2, 3, &[("a", [3., 4.]), ("c", [5., 6.])])),
            "tensor \"a\" appears twice",
        ),
        (|parts| parts.write(MODEL, &part(1, 3, &[])), "this is part 2 of 3"),
        (|parts| parts.write(MODEL, &part(u32::MAX, 3, &[])), "of 3: the first part must be named"),
        (|parts| parts.write(MODEL, &part(0, 4, &[])), "does not end in -00001-of-00004.gguf"),
        (|parts| parts.write(MODEL, &part(0, u32::MAX, &[])), "does not end in -00001-of-4294967295.gguf"),
    ];
    for (spoil, cause) in cases {
        let parts = Parts::new();
        spoil(&parts);
        let error = parts.open().unwrap_err().to_string();
        assert!(error.contains(cause), "{error}, not {cause}");
    }
    let parts = Parts::new();
    for name in ["renamed.gguf", "m-00001-of-00003.bin", "m-1-of-3.gguf"] {
        fs::copy(parts.path(MODEL), parts.path(name)).unwrap();
        let error = Gguf::open(parts.path(name)).unwrap_err();
        assert!(matches!(error, Error::PartName { count: 3, .. }), "{name}: {error}");
    }
    for name in ["m-00002-of-00003.gguf", "m-00003-of-00003.gguf"] {
        let error = Gguf::open(parts.path(name)).unwrap_err();
        assert!(matches!(error, Error::NotTheFirst { count: 3, .. }), "{name}: {error}");
    }
}
