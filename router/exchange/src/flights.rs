//! Flights: calls that are to be made or are running, each once for all asks that wait for it.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Ask, AskId, CallId, Content, CredentialId, Place, ReferenceId, SourceId, Tenant, Version};

/// The kinds of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Lookup,
    Fetch,
    Stage,
}

impl Kind {
    pub(crate) const ALL: [Kind; 3] = [Kind::Lookup, Kind::Fetch, Kind::Stage];
}

/// A reference, and the credential that is shown for it.
pub(crate) type Access = (ReferenceId, CredentialId);

/// What makes two calls equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Target {
    Lookup(Access),
    Fetch(Version),
    Stage(Content),
}

impl Target {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Lookup(_) => Kind::Lookup,
            Self::Fetch(_) => Kind::Fetch,
            Self::Stage(_) => Kind::Stage,
        }
    }
}

/// The order in which asks came.
pub(crate) type Arrival = u64;

/// An ask in whose name a call can be made.
#[derive(Debug, Clone)]
pub(crate) struct Owner<P> {
    pub(crate) ask: AskId,
    pub(crate) arrival: Arrival,
    pub(crate) tenant: Tenant,
    pub(crate) source: SourceId,
    pub(crate) credential: CredentialId,
    pub(crate) place: Place,
    pub(crate) payload: P,
}

/// The lane of the queue that an owner waits in: its tenant and its source.
pub(crate) type LaneKey = (u64, SourceId);

impl<P: Clone> Owner<P> {
    pub(crate) fn new(ask: &Ask<P>, arrival: Arrival, place: Place) -> Self {
        Self {
            ask: ask.id,
            arrival,
            tenant: ask.tenant,
            source: ask.source,
            credential: ask.credential,
            place,
            payload: ask.payload.clone(),
        }
    }

    pub(crate) fn lane(&self) -> LaneKey {
        (self.tenant.id, self.source)
    }
}

/// A call that is to be made or is running.
#[derive(Debug)]
pub(crate) struct Flight<P> {
    /// While it is queued, an ask of each tenant that waits for it, so that it begins as soon as any of them has a
    /// permit. While it runs, the one in whose name.
    pub(crate) owners: BTreeMap<LaneKey, Owner<P>>,
    /// Bytes of room that it takes on its tier.
    pub(crate) bytes: u64,
    /// Whether the room for it is promised to somebody who waits for it.
    pub(crate) promised: bool,
    /// Whether there was no room for it when it could have begun.
    pub(crate) short: bool,
    /// Bytes of others that were given room since then.
    pub(crate) overtaken: u64,
    pub(crate) waiters: BTreeSet<AskId>,
    /// The call, while it is running.
    pub(crate) call: Option<CallId>,
}

/// Others may take room ahead of a flight that does not fit until they have had this many times its bytes.
const OVERTAKING: u64 = 4;

impl<P> Flight<P> {
    /// Whether it has been overtaken for long enough.
    pub(crate) fn is_next(&self) -> bool {
        self.short && self.bytes > 0 && self.overtaken >= OVERTAKING.saturating_mul(self.bytes)
    }

    pub(crate) fn owner(&self) -> Option<&Owner<P>> {
        self.owners.values().next()
    }
}
