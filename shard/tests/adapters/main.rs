//! Adapters in host memory: which files they are read from, and how much memory they take.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/fake.rs"]
mod fake;
mod ludwig;
mod memory;
mod replacing;
#[path = "../support/tiny.rs"]
mod tiny;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use fake::{Fake, Script};
use lorax_shard::adapters::Adapters;

/// The adapters of the small model, and the folder that they are in.
struct World {
    adapters: Arc<Adapters<Fake>>,
    script: Script,
    folder: tempfile::TempDir,
}

impl World {
    fn new(host_bytes: usize) -> World {
        let script = Script::default();
        let folder = tempfile::tempdir().unwrap();
        let (_, adapters) = tiny::engine(Fake::new(script.clone()), folder.path(), host_bytes);
        World { adapters, script, folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join("adapters").join(name)
    }

    async fn prepare(&self, name: &str) -> lorax_shard::adapters::Prepared {
        self.adapters.prepare("local", name).await.unwrap()
    }
}

/// Waits until the clocks of file systems have ticked, so that changes from now on show in their times.
async fn ticks() {
    let enough = SystemTime::now() + Duration::from_millis(60);
    while SystemTime::now() < enough {
        tokio::task::yield_now().await;
    }
}
