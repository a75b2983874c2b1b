//! The hash of an adapter is that of its names, sizes and bytes, however it is computed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::File,
    io::{ErrorKind, Write},
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use store::content_of;

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Bytes without a period that would hide an exchange of pieces.
fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

/// The same from the whole bytes, in one go.
fn formula(files: &[(&str, &[u8])]) -> [u8; 32] {
    let mut sorted = files.to_vec();
    sorted.sort();
    let mut hasher =
        blake3::Hasher::new_derive_key("lorax 2026-11-30 content of an adapter, files sorted by name");
    hasher.update(&(sorted.len() as u64).to_le_bytes());
    for (name, bytes) in sorted {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(blake3::hash(bytes).as_bytes());
    }
    hasher.finalize().into()
}

#[test]
fn every_size_gives_the_hash_of_the_whole() {
    const PIECE: usize = 256 << 10;
    let mut sizes = vec![0, 1, 63, 64, 1023, 1024, 1025, 2048, 4097];
    for pieces in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33] {
        sizes.extend([pieces * PIECE - 1, pieces * PIECE, pieces * PIECE + 1]);
    }
    sizes.extend([(4 << 20) - 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 12_345]);
    for size in sizes {
        let bytes = bytes(size, size as u64);
        let file = file_of(&bytes);
        assert_eq!(content_of(&[("w", &file)]).unwrap(), formula(&[("w", &bytes)]), "{size} bytes");
    }
}

#[test]
fn many_callers_at_once_get_the_same_hash_with_fewer_threads_each() {
    let bytes = bytes((12 << 20) + 77, 5);
    let (file, expected) = (file_of(&bytes), formula(&[("w", &bytes)]));
    thread::scope(|scope| {
        let callers: Vec<_> = (0..12).map(|_| scope.spawn(|| content_of(&[("w", &file)]).unwrap())).collect();
        for caller in callers {
            assert_eq!(caller.join().unwrap(), expected);
        }
    });
}

#[test]
fn names_sizes_bytes_and_their_borders_all_count_and_the_order_does_not() {
    let [a, b, ab, empty] = [&b"a"[..], b"b", b"ab", b""].map(file_of);
    let of = |files: &[(&str, &File)]| content_of(files).unwrap();
    let base = of(&[("x", &a), ("y", &b)]);
    assert_eq!(base, of(&[("y", &b), ("x", &a)]));
    assert_eq!(base, formula(&[("x", b"a"), ("y", b"b")]));
    let others = [
        of(&[("x", &b), ("y", &a)]),
        of(&[("x", &ab), ("y", &empty)]),
        of(&[("x", &empty), ("y", &ab)]),
        of(&[("x", &a)]),
        of(&[("y", &b)]),
        of(&[("x", &a), ("z", &b)]),
        of(&[("xy", &a), ("", &b)]),
        of(&[("x", &ab)]),
        of(&[("x", &a), ("y", &b), ("z", &empty)]),
        of(&[]),
        of(&[("", &empty)]),
    ];
    for (index, other) in others.iter().enumerate() {
        assert_ne!(*other, base, "{index}");
        assert!(!others[..index].contains(other), "{index}");
    }
}

#[test]
fn every_flipped_bit_is_another_content() {
    let right = bytes((5 << 20) + 3, 9);
    let file = file_of(&right);
    let expected = content_of(&[("w", &file)]).unwrap();
    for position in [0, 1, 1023, 1024, 262_143, 262_144, 1 << 20, 5 << 20, (5 << 20) + 2] {
        file.write_all_at(&[right[position] ^ 4], position as u64).unwrap();
        assert_ne!(content_of(&[("w", &file)]).unwrap(), expected, "{position}");
        file.write_all_at(&[right[position]], position as u64).unwrap();
    }
    assert_eq!(content_of(&[("w", &file)]).unwrap(), expected);
}

#[test]
fn what_cannot_be_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = file_of(b"a");
    let same = content_of(&[("x", &file), ("x", &file)]).unwrap_err();
    assert_eq!(same.kind(), ErrorKind::InvalidInput);
    content_of(&[("x", &File::open(folder.path()).unwrap())]).unwrap_err();
    for size in [10, 6 << 20] {
        let path = folder.path().join("file");
        std::fs::write(&path, vec![0; size]).unwrap();
        content_of(&[("x", &File::options().write(true).open(&path).unwrap())]).unwrap_err();
    }
}

/// A mapped file would end the process here by SIGBUS.
#[test]
fn a_file_that_is_cut_meanwhile_gives_an_error_or_the_hash_of_one_size() {
    const LONG: u64 = 8 << 20;
    let sizes = [LONG, LONG / 2, 3];
    let expected: Vec<[u8; 32]> =
        sizes.iter().map(|size| formula(&[("w", &vec![0; *size as usize])])).collect();
    let file = tempfile::tempfile().unwrap();
    file.set_len(LONG).unwrap();
    let done = AtomicBool::new(false);
    let found = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                sizes.iter().for_each(|size| file.set_len(*size).unwrap());
            }
        });
        let found: Vec<_> = (0..30).map(|_| content_of(&[("w", &file)])).collect();
        done.store(true, Ordering::Relaxed);
        found
    });
    for found in found.into_iter().flatten() {
        assert!(expected.contains(&found));
    }
}
