//! The memory of this process.

use std::fs;

/// What a process takes besides: an allocator does not give everything back at once.
pub(crate) const BESIDES: usize = 4 << 20;

/// A number of bytes that the system tells of this process.
fn status(field: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// The most memory that something takes beside what there is.
pub(crate) fn peak_of(work: impl FnOnce()) -> usize {
    // Begins to count anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    work();
    status("VmHWM:").saturating_sub(before)
}
