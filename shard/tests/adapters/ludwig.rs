//! Folders of Ludwig, which has PEFT's files in a subfolder below its own metadata.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use lorax_shard::adapters::{PrepareError, ResolveError};

use crate::{World, ticks, tiny::write_adapter};

/// Writes such a folder; returns the one that has PEFT's files.
fn write_ludwigs(folder: &Path, seed: u64) -> PathBuf {
    let inner = folder.join("model_weights");
    write_adapter(&inner, seed);
    for name in ["model_hyperparameters.json", "training_set_metadata.json", "description.json"] {
        fs::write(folder.join(name), "{}").unwrap();
    }
    inner
}

#[tokio::test]
async fn they_are_the_adapters_that_lie_in_them() {
    let world = World::new(1 << 20);
    for seed in [1, 2, 7] {
        let (name, plain) = (format!("ludwig-{seed}"), format!("plain-{seed}"));
        write_ludwigs(&world.at(&name), seed);
        write_adapter(&world.at(&plain), seed);
        assert_eq!(world.prepare(&name).await.content, world.prepare(&plain).await.content);
    }
    // A folder that has PEFT's files itself is PEFT's.
    let inner = write_ludwigs(&world.at("both"), 3);
    write_adapter(&world.at("both"), 4);
    write_adapter(&world.at("four"), 4);
    assert_eq!(world.prepare("both").await.content, world.prepare("four").await.content);
    fs::remove_file(inner.join("adapter_config.json")).unwrap();
    fs::remove_file(world.at("both").join("adapter_config.json")).unwrap();
    let refused = world.adapters.prepare("local", "both").await.unwrap_err().to_string();
    assert_eq!(refused, "adapter both: adapter_config.json is missing");
}

#[tokio::test]
async fn one_that_was_replaced_is_another() {
    let world = World::new(1 << 20);
    let inner = write_ludwigs(&world.at("ludwig"), 1);
    ticks().await;
    let before = world.prepare("ludwig").await.content;
    for seed in [2, 3] {
        ticks().await;
        write_adapter(&inner, seed);
        write_adapter(&world.at("plain"), seed);
        let now = world.prepare("ludwig").await.content;
        assert_ne!(now, before);
        assert_eq!(now, world.prepare("plain").await.content);
    }
}

#[tokio::test]
async fn a_link_out_of_the_folders_that_may_be_read_is_refused() {
    let world = World::new(1 << 20);
    let outside = world.folder.path().join("secret");
    write_adapter(&outside, 5);
    fs::create_dir_all(world.at("ludwig")).unwrap();
    symlink(&outside, world.at("ludwig").join("model_weights")).unwrap();
    let refused = world.adapters.prepare("local", "ludwig").await.unwrap_err();
    assert!(matches!(refused, PrepareError::Resolve(ResolveError::Forbidden(_))), "{refused}");
}
