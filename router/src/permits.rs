//! Permits as handlers hold them: given back when they are dropped, and taken away when their request is shed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};

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
    /// How requests are told that they were shed, and when they may come again.
    notices: HashMap<AdmissionId, oneshot::Sender<Duration>>,
}

/// One slot of `--max-concurrent-requests`, which is given back when this is dropped.
pub(crate) struct Permit {
    shared: Arc<Shared>,
    id: AdmissionId,
}

/// A request's place among the admitted ones.
pub(crate) struct Admissible {
    id: OnceLock<AdmissionId>,
    notice: Mutex<Option<oneshot::Sender<Duration>>>,
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

    /// How many permits are held, now and from now on.
    pub(crate) fn held(&self) -> watch::Receiver<usize> {
        self.shared.held.subscribe()
    }

    /// Takes a permit for each sequence of a request, or none. A request asks once.
    pub(crate) fn take(&self, request: &Admissible, asked: Asked) -> Result<Vec<Permit>, Refusal> {
        let sequences = asked.sequences;
        let id = self.enter(request, asked)?;
        Ok((0..sequences).map(|_| Permit { shared: self.shared.clone(), id }).collect())
    }

    /// The answer to a request begins: if it was not shed before, it is not from here on.
    pub(crate) fn begin(&self, request: &Admissible) {
        if let Some(id) = request.id.get() {
            self.shared.lock().admission.begin(*id);
        }
    }

    /// A meter of the tokens that a caller uses.
    pub(crate) fn meter(&self, principal: &Principal) -> Meter {
        Meter { shared: self.shared.clone(), tenant: principal.tenant.clone() }
    }

    fn enter(&self, request: &Admissible, asked: Asked) -> Result<AdmissionId, Refusal> {
        let now = self.shared.started.elapsed();
        let mut state = self.shared.lock();
        let admitted = state.admission.admit(asked, now)?;
        for (id, retry_after) in admitted.shed {
            if let Some(notice) = state.notices.remove(&id) {
                // A request that has just ended hears nothing.
                let _ = notice.send(retry_after);
            }
        }
        let notice = request.notice.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(notice), Ok(())) = (notice, request.id.set(admitted.id)) {
            state.notices.insert(admitted.id, notice);
        }
        self.shared.publish(&state);
        Ok(admitted.id)
    }
}

impl Admissible {
    /// A request that may ask for permits, and what it hears if it is shed.
    pub(crate) fn new() -> (Admissible, oneshot::Receiver<Duration>) {
        let (notice, shed) = oneshot::channel();
        (Admissible { id: OnceLock::new(), notice: Mutex::new(Some(notice)) }, shed)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts are changed as a whole or not at all.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        self.held.send_replace(state.admission.held());
    }
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
