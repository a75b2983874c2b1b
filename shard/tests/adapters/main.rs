//! Adapters in host memory: which files they are read from, and how much memory they take.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/fake.rs"]
mod fake;
mod replacing;
mod staging;
#[path = "../support/tiny.rs"]
mod tiny;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use fake::{Fake, Script};
use lorax_shard::adapters::{Adapters, Properties, StageOrder};

/// The adapters of the small model, and the folder that they are in.
struct World {
    adapters: Arc<Adapters<Fake>>,
    script: Script,
    folder: tempfile::TempDir,
}

/// The session in which tests stage adapters.
const SESSION: u64 = 5;

impl World {
    fn new() -> World {
        let script = Script::default();
        let folder = tempfile::tempdir().unwrap();
        let (_, adapters) = tiny::engine(Fake::new(script.clone()), folder.path());
        adapters.begin_session(SESSION);
        World { adapters, script, folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join("adapters").join(name)
    }

    /// An order to stage the adapter in a folder, which is named by its last part.
    fn order(&self, name: &str) -> StageOrder {
        tiny::order(&self.at(name), SESSION)
    }

    async fn stage(&self, name: &str) -> Arc<Properties> {
        tiny::stage(&self.adapters, &self.at(name), SESSION).await
    }
}

/// Waits until the clocks of file systems have ticked, so that changes from now on show in their times.
async fn ticks() {
    let enough = SystemTime::now() + Duration::from_millis(60);
    while SystemTime::now() < enough {
        tokio::task::yield_now().await;
    }
}
