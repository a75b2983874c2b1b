//! Being told to stop.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// Knows when this process should end: with SIGTERM, with SIGINT, or when its stdin ends.
pub(crate) struct Stop(Arc<Mutex<Option<oneshot::Sender<()>>>>);

impl Stop {
    /// From now on the process ends when stdin does, in the middle of loading, too.
    ///
    /// Stdin is read on a thread of its own: a runtime cannot be dropped while one of its threads reads what never
    /// ends.
    pub(crate) fn watch() -> io::Result<Stop> {
        let waiting = Arc::new(Mutex::new(None::<oneshot::Sender<()>>));
        let stop = Stop(waiting.clone());
        thread::Builder::new().name("stdin".into()).spawn(move || {
            // An error is an end, too.
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
            match waiting {
                // To drop the sender is to tell the receiver.
                Some(waiting) => drop(waiting),
                None => crate::exit(0),
            }
        })?;
        Ok(stop)
    }

    /// See [`Parent::told_to_stop`](crate::Parent::told_to_stop).
    pub(crate) fn told(&self) -> io::Result<impl Future<Output = ()> + Send + 'static> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (waiting, parent_gone) = oneshot::channel();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
        Ok(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = parent_gone => {}
            }
        })
    }
}
