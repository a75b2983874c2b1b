//! Metadata with a few bytes changed: whatever a file says of its tokens, it is refused or read at once.

use std::{
    fs,
    time::{Duration, Instant},
};

use lorax_router::tokenizer::ModelTokenizer;
use proptest::{
    prelude::any,
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::fixture;

/// Files that are tried.
const MUTATIONS: u32 = 500;
/// Time for one of them in a debug build on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

#[test]
fn metadata_with_bytes_changed_is_refused_or_read_at_once() {
    let whole = fs::read(fixture("sentencepiece.gguf")).unwrap();
    let path = tempfile::NamedTempFile::new().unwrap();
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let changes = proptest::collection::vec((4..whole.len(), any::<u8>()), 1..4);
    let mut read = 0;
    for _ in 0..MUTATIONS {
        let changes = changes.new_tree(&mut runner).unwrap().current();
        let mut bytes = whole.clone();
        for (at, byte) in &changes {
            bytes[*at] = *byte;
        }
        fs::write(path.path(), bytes).unwrap();
        let start = Instant::now();
        let loaded = ModelTokenizer::load(path.path(), None).map(drop);
        let took = start.elapsed();
        assert!(took < AT_ONCE, "{changes:?} took {took:?}: {:?}", loaded.err());
        read += u32::from(loaded.is_ok());
    }
    assert!((1..MUTATIONS).contains(&read), "{read} of {MUTATIONS} were read");
}
