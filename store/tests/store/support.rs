//! Adapters of a few bytes.

use std::{fs, path::Path};

use store::{Fetched, Store, StoreError};

pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
/// Bytes of the configuration in [`publish`].
pub(crate) const CONFIG_BYTES: u64 = 2;

pub(crate) fn version(n: u64) -> [u8; 32] {
    let mut version = [7; 32];
    version[..8].copy_from_slice(&n.to_le_bytes());
    version
}

pub(crate) fn reference(n: u64) -> [u8; 16] {
    let mut reference = [9; 16];
    reference[..8].copy_from_slice(&n.to_le_bytes());
    reference
}

/// Weights of `bytes` bytes that differ for each `n`.
pub(crate) fn weights(n: u64, bytes: usize) -> Vec<u8> {
    n.to_le_bytes().into_iter().cycle().take(bytes).collect()
}

pub(crate) fn write(folder: &Path, n: u64, bytes: usize) {
    fs::write(folder.join(CONFIG), "{}").unwrap();
    fs::write(folder.join(WEIGHTS), weights(n, bytes)).unwrap();
}

/// Publishes adapter `n` with weights of `bytes` bytes, as version and reference `n`.
pub(crate) fn publish(store: &Store, n: u64, bytes: usize) -> Result<Fetched, StoreError> {
    let partial = store.reserve(bytes as u64 + CONFIG_BYTES)?;
    write(partial.folder(), n, bytes);
    partial.publish(version(n), reference(n))
}

/// The contents in a store, the least recently used first.
pub(crate) fn contents(store: &Store) -> Vec<[u8; 32]> {
    store.scan().unwrap().into_iter().map(|found| found.content).collect()
}

/// What is in a folder of a store.
pub(crate) fn names(root: &Path, folder: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(root.join(folder))
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Nothing that is on its way in or out.
pub(crate) fn assert_clean(root: &Path) {
    assert_eq!(names(root, "partial"), Vec::<String>::new());
    assert_eq!(names(root, "removing"), Vec::<String>::new());
    assert!(!root.join("new").exists());
}
