//! The check that the build makes of what ptxas reports, on reports of its kind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../build/report.rs"]
mod report;

/// The lines for a function, by its mangled name.
fn function(name: &str, stores: u32, loads: u32) -> String {
    format!(
        "ptxas info    : Compiling entry function '{name}' for 'sm_80'\n\
         ptxas info    : Function properties for {name}\n    \
         16 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n\
         ptxas info    : Used 168 registers, used 1 barriers\n"
    )
}

/// Names as nvcc makes them: two functions of a file, one that is a template in a namespace, and one whose name holds
/// another's.
const SKINNY: &str =
    "_ZN41_GLOBAL__N__99348a9b_9_skinny_cu_33b9be006skinnyI6__halffNS_4FormILi2EEEEEv10LinearArgs";
const EXPAND: &str = "_ZN37_INTERNAL_1f0d24fa_7_lora_cu_67d8e726expandI6__halfS1_Lb1EEEv8LoraArgs";
const EXPAND_ENSEMBLE: &str =
    "_ZN37_INTERNAL_1f0d24fa_7_lora_cu_67d8e7215expand_ensembleI6__halfEEvRK8LoraArgs";
const EXPAND_LONGER: &str = "_ZN37_INTERNAL_1f0d24fa_7_lora_cu_67d8e7216expand_ensembles6expandEv";

#[test]
fn a_spill_fails_the_build_unless_its_function_may_store_as_much() {
    let mark = |bytes: u32, name: &str| format!("// May spill {bytes} bytes: {name}: a reason.\n");
    let skinny = mark(8, "skinny");
    let ensemble = mark(80, "expand_ensemble");
    for (source, functions, refused) in [
        ("", vec![(SKINNY, 0, 0)], None),
        ("", vec![(SKINNY, 8, 8)], Some(SKINNY)),
        ("", vec![(SKINNY, 0, 0), (EXPAND, 4, 4)], Some(EXPAND)),
        ("", vec![(SKINNY, 10, 0)], Some(SKINNY)),
        ("", vec![(SKINNY, 100, 100)], Some(SKINNY)),
        (&*skinny, vec![(SKINNY, 0, 0)], None),
        (&skinny, vec![(SKINNY, 8, 8)], None),
        (&skinny, vec![(SKINNY, 8, 800)], None),
        (&skinny, vec![(SKINNY, 12, 8)], Some(SKINNY)),
        (&skinny, vec![(SKINNY, 80, 8)], Some(SKINNY)),
        (&skinny, vec![(SKINNY, 8, 8), (EXPAND, 4, 4)], Some(EXPAND)),
        (&skinny, vec![(EXPAND, 8, 8), (SKINNY, 8, 8)], Some(EXPAND)),
        (&ensemble, vec![(EXPAND_ENSEMBLE, 80, 588), (EXPAND, 0, 0)], None),
        (&ensemble, vec![(EXPAND_ENSEMBLE, 84, 588)], Some(EXPAND_ENSEMBLE)),
        (&ensemble, vec![(EXPAND_ENSEMBLE, 80, 588), (EXPAND, 8, 8)], Some(EXPAND)),
        (&mark(80, "expand"), vec![(EXPAND, 8, 8), (EXPAND_ENSEMBLE, 80, 588)], Some(EXPAND_ENSEMBLE)),
        (&mark(80, "expand"), vec![(EXPAND_LONGER, 8, 8)], None),
        (&(skinny.clone() + &ensemble), vec![(SKINNY, 8, 8), (EXPAND_ENSEMBLE, 72, 76)], None),
        (&(skinny.clone() + &ensemble), vec![(SKINNY, 72, 76), (EXPAND_ENSEMBLE, 72, 76)], Some(SKINNY)),
    ] {
        let text: String =
            functions.iter().map(|&(name, stores, loads)| function(name, stores, loads)).collect();
        let checked = report::check(source, &text);
        match refused {
            None => assert_eq!(checked, Ok(()), "{source} {functions:?}"),
            Some(name) => {
                let error = checked.unwrap_err();
                assert!(error.starts_with(&format!("{name}: ")), "{source} {functions:?}: {error}");
            }
        }
    }
}

#[test]
fn marks_that_say_nothing_fail_the_build() {
    let report = function(SKINNY, 8, 8);
    for mark in [
        "// May spill",
        "// May spill: before Hopper, two registers.",
        "// May spill bytes: skinny: a reason.",
        "// May spill 8: skinny: a reason.",
        "// May spill 8 bytes: skinny",
        "// May spill 8 bytes: skinny: ",
        "// May spill 8 bytes: : a reason.",
        "// May spill -8 bytes: skinny: a reason.",
        "// May spill eight bytes: skinny: a reason.",
        "// May spill 8 bytes: before Hopper: two registers.",
        "  // May spill 8 kernels",
    ] {
        let error = report::check(&format!("int x;\n{mark}\nint y;\n"), &report).unwrap_err();
        assert_eq!(error, format!("cannot be read: {}", mark.trim()), "{mark:?}");
    }
    // A function that is not there: it was renamed, or has gone.
    for name in ["skinn", "skinnyy", "inny", "wide", "Skinny", "halff", "cu", "x", "6skinny", "lora"] {
        let error = report::check(&format!("// May spill 8 bytes: {name}: a reason.\n"), &report);
        assert_eq!(
            error.unwrap_err(),
            format!("{SKINNY}: 16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads")
        );
        let error =
            report::check(&format!("// May spill 8 bytes: {name}: a reason.\n"), &function(SKINNY, 0, 0));
        assert_eq!(error.unwrap_err(), format!("there is no function {name} that could spill"));
    }
}

#[test]
fn lost_instructions_of_hopper_fail_the_build() {
    let mark = "// May spill 8 bytes: skinny: a reason.\n";
    for line in [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum requirements.",
    ] {
        for source in ["", mark] {
            let report = format!("{}{line}\n", function(SKINNY, 0, 0));
            assert_eq!(report::check(source, &report).unwrap_err(), line);
        }
    }
}
