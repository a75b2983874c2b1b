//! Reading an adapter takes what was said before it was read. One test to a process, whose memory is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use kernels::DType;
use model::{
    Decoder,
    adapter::{AdapterFolder, BaseModel},
    testing,
};

/// What a process takes besides: an allocator does not give everything back at once.
const BESIDES: usize = 4 << 20;

/// A number of bytes that the system tells of this process.
fn status(field: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// The most memory that something takes beside what there is.
fn peak_of(work: impl FnOnce()) -> usize {
    // Begins to count anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    work();
    status("VmHWM:").saturating_sub(before)
}

#[test]
fn reading_takes_what_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let (path, at) = (folder.path().join("model"), folder.path().join("adapter"));
    testing::model().write_model(&path).unwrap();
    let decoder = Decoder::from_folder(&path).unwrap();
    // Of 50 MB in f32.
    let names = ["q_proj", "o_proj", "gate_proj", "down_proj"];
    testing::adapter(&names, 20_000, 1).write_adapter(&at).unwrap();
    for (dtype, megabytes) in [(DType::Bf16, 25), (DType::F32, 50), (DType::F16, 25)] {
        let model = BaseModel { decoder: decoder.clone(), path: path.clone(), dtype };
        let opened = AdapterFolder::open(&at, &model).unwrap();
        let said = opened.read_bytes();
        let peak = peak_of(|| assert_eq!(opened.read().unwrap().max_lora_rank, 20_000));
        assert!(peak <= said + BESIDES, "{dtype:?}: {peak}, {said} were said");
        assert!(peak >= megabytes * 900_000, "{dtype:?}: {peak} are less than the adapter");
        // Hardly more than the adapter itself: a tensor at a time is converted.
        assert!(said <= megabytes * 1_500_000, "{dtype:?}: {said}");
    }
}
