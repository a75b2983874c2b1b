//! The process that started this one.

use std::io;

use crate::{heartbeat::Heartbeat, stop::Stop};

/// The link to the process that started this one. Through our stdin it tells us to stop: by closing it, or by dying.
/// Through our stdout we tell it that we live, and whether we serve.
pub struct Parent {
    stop: Stop,
    heartbeat: Heartbeat,
}

impl Parent {
    /// From now on this process beats, and it ends when its stdin does, in the middle of loading, too.
    pub fn link() -> io::Result<Parent> {
        Ok(Parent { heartbeat: Heartbeat::start()?, stop: Stop::watch()? })
    }

    /// Leaves the end to the caller: the future resolves when the process is told to stop, by its parent, by SIGTERM or
    /// by SIGINT. Signals are caught from this call on, before the future is polled. Must be called within a tokio
    /// runtime.
    pub fn told_to_stop(&self) -> io::Result<impl Future<Output = ()> + Send + 'static> {
        self.stop.told()
    }

    /// Tells the parent that this process serves now.
    pub fn serving(&self) {
        self.heartbeat.serving();
    }
}
