//! The committed code is what the .proto file generates. `UPDATE_GENERATED=1` writes it anew.

use std::{fs, path::Path};

#[test]
fn generated_code_matches_the_proto_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let descriptors = protox::compile(["shard/v1/shard.proto"], [root]).unwrap();
    tonic_prost_build::configure().out_dir(out.path()).compile_fds(descriptors).unwrap();
    let fresh = fs::read_to_string(out.path().join("shard.v1.rs")).unwrap();
    let committed = root.join("src/gen/shard.v1.rs");
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        fs::write(&committed, &fresh).unwrap();
    }
    let current = fs::read_to_string(&committed).unwrap_or_default();
    assert!(current == fresh, "src/gen/shard.v1.rs is stale: run `make proto`");
}
