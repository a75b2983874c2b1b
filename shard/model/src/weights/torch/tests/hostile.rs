//! Pickles that would run something, or take all memory, and files with bytes changed.

use std::{fs, os::unix::fs::FileExt};

use proptest::{collection::vec, prelude::*};

use super::{
    super::pickle::{Machine, Object},
    *,
};

/// What a pickle ends in.
fn end(pickle: Pickle) -> Result<(), TorchError> {
    Machine::new(&pickle.0).run().map(drop)
}

#[test]
fn names_that_are_not_needed_for_tensors_are_refused() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch", "FloatStorage.from_file"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("collections", "namedtuple"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("collections.OrderedDict", ""),
        ("", ""),
    ] {
        // The first of two is named.
        let pickle =
            Pickle::default().dictionary().global(module, name).text("ls").op(b"\x85R").global("os", "abort");
        let refused = end(pickle.op(b".")).unwrap_err();
        let expected = format!("{module}.{name}");
        assert!(matches!(&refused, TorchError::Global(name) if *name == expected), "{refused}");
        assert!(refused.to_string().contains(&format!("a pickle names {expected}, which is not allowed")));
    }
}

#[test]
fn instructions_that_torch_does_not_write_are_refused() {
    // Objects of classes, extensions, names from the stack, text and byte strings of other protocols.
    for opcode in *b"io\x81\x82\x83\x84\x92\x93\x8c\x8d\x8e\x90\x94\x95\x96\x98BCPSVFILgpld12" {
        let refused = end(Pickle::default().op(b"((").op(&[opcode]).op(b"os\nsystem\n...")).unwrap_err();
        assert!(
            matches!(refused, TorchError::Opcode { opcode: named, at: 2 } if named == opcode),
            "{refused}"
        );
    }
}

#[test]
fn malformed_pickles_are_refused() {
    let new = Pickle::default;
    let cases: [(Pickle, &str); 19] = [
        (new(), "cut short at byte 0"),
        (new().op(b"]"), "cut short at byte 1"),
        (new().op(b"."), "nothing on the stack"),
        (new().op(b"]("), "cut short"),
        (new().op(b"](."), "nothing on the stack"),
        (new().op(b"t."), "no mark"),
        (new().op(b"0"), "nothing on the stack"),
        (new().op(b"h\x01."), "nothing was kept"),
        (new().op(b"q\x01."), "nothing on the stack"),
        (new().op(b"X\xff\xff\xff\xff."), "cut short"),
        (new().op(b"\x8a\xff."), "cut short"),
        (new().op(b"X\x01\0\0\0\xff."), "a text that is not UTF-8"),
        (new().op(b"]]R."), "no tuple"),
        (new().op(b"])R."), "a call of something that is no function"),
        (new().global("torch", "Size").op(b")R."), "other arguments"),
        (new().global("torch._utils", "_rebuild_tensor_v2").op(b"(NNNNNNtR."), "no storage"),
        (new().op(b")Q."), "no storage"),
        (new().op(b")Na."), "items for something that has none"),
        (new().op(b"}(Nu."), "items for something that has none"),
    ];
    for (pickle, cause) in cases {
        let bytes = pickle.0.clone();
        let refused = end(pickle).expect_err(cause).to_string();
        assert!(refused.contains(cause), "{}: {refused}", bytes.escape_ascii());
    }
}

/// Pickles of a few megabytes that would become large or deep.
#[test]
fn pickles_that_grow_are_refused_or_bounded() {
    let new = Pickle::default;
    let steps = |pickle: Pickle| assert!(matches!(end(pickle), Err(TorchError::TooManySteps { .. })));
    steps(new().op(&[b')'; 5 << 20]));
    steps(new().op(&[b'('; 5 << 20]));
    steps(new().op(b"]q\x01").op(&b"h\x010".repeat(3 << 20)));
    // One list of a million pairs, made into a dictionary again and again.
    let pairs = new().op(b"](").op(&b")NN\x86"
        .repeat(1 << 19)
        .into_iter()
        .filter(|op| *op != b')')
        .collect::<Vec<_>>());
    let copy = new().global("collections", "OrderedDict").op(b"h\x01\x85R0").0;
    steps(pairs.op(b"eq\x01").op(&copy.repeat(1000)).op(b"."));
    // Tuples in tuples, a million deep, and a dictionary that holds itself.
    end(new().op(b")").op(&[0x85; 1 << 20]).op(b".")).unwrap();
    end(new().op(b"}q\x01").text("x").op(b"h\x01s.")).unwrap();
    let mut deep = new().op(b"}q\x01").text("x");
    deep = deep.op(b"]").op(&b"]q\x02h\x02\x85".repeat(1000)).op(b".");
    end(deep).unwrap();
    // A tuple of many axes for many tensors.
    let axes = new().op(b"(").op(&b"K\x01".repeat(1 << 20)).op(b"tq\x01").dictionary().text("x");
    let tensor = axes.global("torch._utils", "_rebuild_tensor_v2").op(b"(").storage("FloatStorage", "0", 1);
    let refused = end(tensor.op(b"K\0h\x01h\x01NNtRs.")).unwrap_err().to_string();
    assert!(refused.contains("a tensor of too many axes"), "{refused}");
}

#[test]
fn integers_have_all_their_lengths() {
    for int in [0, 1, -1, 127, 128, -128, -129, 1 << 40, -(1 << 40), i64::MAX, i64::MIN] {
        for len in 0..=8 {
            let bytes = &int.to_le_bytes()[..len];
            let pickle = Pickle::default().op(&[0x8a, len as u8]).op(bytes).op(b".");
            let mut machine = Machine::new(&pickle.0);
            let id = machine.run().unwrap();
            let shift = 64 - 8 * len as u32;
            let expected = if len == 0 { 0 } else { int << shift >> shift };
            assert!(matches!(machine.object(id), Object::Int(read) if *read == expected), "{int}, {len}");
        }
    }
}

/// Reads whatever a file has.
fn read_all(file: &TensorFile) -> usize {
    let read = |name: &str| {
        let [rows, cols] = file.matrix_shape(name).ok()?;
        file.part(name, 0..rows, 0..cols).ok().map(|part| part.data.len())
    };
    file.names().filter_map(read).max().unwrap_or(0)
}

/// No byte of a file makes the reader panic, or take more memory than the file can stand for.
#[test]
fn bytes_changed_anywhere_do_no_harm() {
    for name in ["zip.bin", "legacy.bin"] {
        let whole = fs::read(fixture(name)).unwrap();
        let file = tempfile::NamedTempFile::with_suffix(".bin").unwrap();
        fs::write(file.path(), &whole).unwrap();
        let mut read = 0;
        for at in 0..whole.len() {
            let value = [0, 1, whole[at] ^ 0x10, whole[at].wrapping_add(1), 0x7f, 0xff][at % 6];
            file.as_file().write_all_at(&[value], at as u64).unwrap();
            if let Ok(opened) = open_file(file.path()) {
                read += 1;
                assert!(read_all(&opened) <= whole.len(), "{name}: {value} at {at}");
            }
            file.as_file().write_all_at(&[whole[at]], at as u64).unwrap();
        }
        assert!(read > whole.len() / 6, "many of the bytes are of numbers");
        for len in (0..whole.len()).rev().step_by(7) {
            file.as_file().set_len(len as u64).unwrap();
            assert!(open_file(file.path()).is_err(), "{name}: cut at {len}");
        }
    }
}

/// An instruction with operands that are right more often than not.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    let new = Pickle::default;
    let fixed = [
        new().op(b"("),
        new().op(b"t"),
        new().op(b"R"),
        new().op(b"Q"),
        new().op(b"}"),
        new().op(b"]"),
        new().op(b")"),
        new().op(b"u"),
        new().op(b"e"),
        new().op(b"s"),
        new().op(b"a"),
        new().op(b"b"),
        new().op(b"0"),
        new().op(b"N"),
        new().op(b"\x85"),
        new().op(b"\x86"),
        new().op(b"\x87"),
        new().op(b"."),
        new().op(b"q\x01"),
        new().op(b"h\x01"),
        new().op(b"q\x02"),
        new().op(b"h\x02"),
        new().text("storage"),
        new().text("0"),
        new().int(0),
        new().int(3),
        new().int(-1),
        new().int(i64::MAX),
        new().ints(&[2, 3]),
        new().ints(&[3, 1]),
        new().dictionary(),
        new().storage("FloatStorage", "0", 24),
        new().storage("LongStorage", "1", 2),
        new().tensor(("0", 24), 0, &[2, 3], &[3, 1]),
        new().global("torch._utils", "_rebuild_tensor_v2"),
        new().global("torch._utils", "_rebuild_parameter"),
        new().global("torch", "Size"),
        new().global("collections", "OrderedDict"),
    ];
    let fixed: Vec<Vec<u8>> = fixed.into_iter().map(|pickle| pickle.0).collect();
    prop_oneof![12 => prop::sample::select(fixed), 1 => vec(any::<u8>(), 1..4)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// No sequence of instructions makes the machine panic.
    #[test]
    fn any_instructions_are_run_or_refused(instructions in vec(instruction(), 0..60)) {
        let bytes = instructions.concat();
        let mut machine = Machine::new(&bytes);
        if let Ok(id) = machine.run() {
            let _ = machine.tensors(id);
            let _ = machine.texts(id);
        }
    }
}
