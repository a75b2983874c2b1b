//! Permits as handlers hold them: given back when they are dropped, and taken away when their request is shed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::{
    admission::{Admission, AdmissionId, Asked, Refusal},
    principal::{Principal, Tenant},
};

/// All permits of the server.
#[derive(Clone)]
pub(crate) struct Permits {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    started: Instant,
    held: watch::Sender<usize>,
}

struct State {
    admission: Admission,
    /// By request: the channel that tells it that it was shed, and when it may come again.
    notices: HashMap<AdmissionId, watch::Sender<Option<Duration>>>,
}

/// One slot of `--max-concurrent-requests`, which is given back when this is dropped.
pub(crate) struct Permit {
    shared: Arc<Shared>,
    id: AdmissionId,
}

/// A request that may ask for permits.
pub(crate) struct Admissible {
    /// Its last admission: the pool, and its number there.
    admitted: Mutex<Option<(Arc<Shared>, AdmissionId)>>,
    /// Time after which it may come again, once it is shed.
    shed: watch::Sender<Option<Duration>>,
}

/// Counts tokens against the limit of a tenant.
#[derive(Clone)]
pub(crate) struct Meter {
    shared: Arc<Shared>,
    tenant: Arc<Tenant>,
}

impl Permits {
    pub(crate) fn new(bound: usize) -> Permits {
        let state = State { admission: Admission::new(bound), notices: HashMap::new() };
        let shared =
            Shared { state: Mutex::new(state), started: Instant::now(), held: watch::Sender::new(0) };
        Permits { shared: Arc::new(shared) }
    }

    /// The number of permits that are held, now and from now on.
    pub(crate) fn held(&self) -> watch::Receiver<usize> {
        self.shared.held.subscribe()
    }

    /// Returns an error if a request would not be let in.
    pub(crate) fn check(&self, asked: Asked) -> Result<(), Refusal> {
        let now = self.shared.started.elapsed();
        self.shared.lock().admission.check(asked, now)
    }

    /// Takes a permit for each sequence of a request, or none.
    pub(crate) fn take(&self, request: &Admissible, asked: Asked) -> Result<Vec<Permit>, Refusal> {
        let now = self.shared.started.elapsed();
        let mut state = self.shared.lock();
        let admitted = state.admission.admit(asked, now)?;
        for (id, retry_after) in admitted.shed {
            if let Some(notice) = state.notices.remove(&id) {
                notice.send_replace(Some(retry_after));
            }
        }
        *lock(&request.admitted) = Some((self.shared.clone(), admitted.id));
        state.notices.insert(admitted.id, request.shed.clone());
        self.shared.publish(&state);
        Ok((0..asked.sequences).map(|_| Permit { shared: self.shared.clone(), id: admitted.id }).collect())
    }

    /// A meter of the tokens that a caller uses.
    pub(crate) fn meter(&self, principal: &Principal) -> Meter {
        Meter { shared: self.shared.clone(), tenant: principal.tenant.clone() }
    }
}

impl Admissible {
    pub(crate) fn new() -> Admissible {
        Admissible { admitted: Mutex::new(None), shed: watch::Sender::new(None) }
    }

    /// The answer begins: if the request was not shed before, it is not from here on.
    pub(crate) fn begin(&self) {
        if let Some((shared, id)) = &*lock(&self.admitted) {
            shared.lock().admission.begin(*id);
        }
    }

    /// Time after which the request may come again, if it was shed.
    pub(crate) fn was_shed(&self) -> Option<Duration> {
        *self.shed.borrow()
    }

    /// Waits until the request is shed, and returns when it may come again.
    pub(crate) async fn shed(&self) -> Duration {
        let mut shed = self.shed.subscribe();
        loop {
            if let Some(retry_after) = *shed.borrow_and_update() {
                return retry_after;
            }
            if shed.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn publish(&self, state: &State) {
        self.held.send_replace(state.admission.held());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is changed as a whole or not at all.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Permit {
    fn drop(&mut self) {
        let now = self.shared.started.elapsed();
        let mut state = self.shared.lock();
        if state.admission.release(self.id, now) {
            state.notices.remove(&self.id);
        }
        self.shared.publish(&state);
    }
}

impl Meter {
    /// Counts tokens of a prompt or of an answer.
    pub(crate) fn charge(&self, tokens: usize) {
        if self.tenant.limits.tokens_per_minute.is_some() {
            let now = self.shared.started.elapsed();
            self.shared.lock().admission.charge(&self.tenant, tokens, now);
        }
    }
}
