//! The process that started this one.

use std::io;

use rustix::process::{Signal, set_parent_process_death_signal};

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

    /// From now on the kernel kills this process when its parent's thread ends that started it. Whatever this process
    /// is doing or waiting for then, even if it is suspended or in a driver that hangs, it gives back its device.
    pub fn never_outlive(&self) -> io::Result<()> {
        Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
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
