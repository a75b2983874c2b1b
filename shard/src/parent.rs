//! The launcher, as seen from here: while it holds its end of our stdin open, this process is wanted.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use tokio::sync::oneshot;

/// Watches stdin. On a thread of its own: a runtime cannot be dropped while one of its threads reads what never ends.
pub(crate) struct Parent(Arc<Mutex<Option<oneshot::Sender<()>>>>);

impl Parent {
    /// From now on this process ends when the launcher does, in the middle of loading, too.
    pub(crate) fn watch() -> io::Result<Parent> {
        let waiting = Arc::new(Mutex::new(None::<oneshot::Sender<()>>));
        let there = waiting.clone();
        thread::Builder::new().name("stdin".into()).spawn(move || {
            // An error is an end, too.
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            let waiting = there.lock().unwrap_or_else(PoisonError::into_inner).take();
            match waiting {
                Some(waiting) => drop(waiting),
                None => std::process::exit(0),
            }
        })?;
        Ok(Parent(waiting))
    }

    /// Leaves the end to the caller: resolves once the launcher has closed its end.
    pub(crate) async fn gone(&self) {
        let (waiting, gone) = oneshot::channel();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
        // Nothing is sent: the sender is dropped.
        let _ = gone.await;
    }
}
