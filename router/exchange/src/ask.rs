//! Asks, and the names of what they are about.

use std::{fmt, time::Duration};

/// Names one ask. Must be unique among the asks that have not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AskId(pub u64);

/// Names one call that the exchange has told the caller to make. Never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// A place that adapters come from and that can fail as one: a hub's endpoint, a bucket, a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub u64);

/// A digest of a source, an adapter's name in it, and the revision that is asked for. Nobody must be able to choose two
/// references with the same digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReferenceId(pub u128);

/// A digest of the secret that is shown to a source, with a key that nobody knows; one value stands for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CredentialId(pub u128);

/// The party that an ask is for. Tenants share calls and host memory by their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenant {
    /// Its identity.
    pub id: u64,
    /// Its share while others wait, relative to their weights; 0 counts as 1.
    pub weight: u32,
}

/// Names bytes at a source that never change: a digest of a reference's name and a commit, or of the stamps of files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub [u8; 32]);

/// The hash of an adapter's bytes, which identifies it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Content(pub [u8; 32]);

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A tier that the exchange owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// The cache on the server's disk. An adapter that is read in place needs no copy there.
    Disk,
    /// The memory of every rank's host.
    Host,
}

/// The wish for a lease on an adapter. `payload` is what the caller needs to make calls for it, secrets included; the
/// exchange hands it on and never looks at it.
#[derive(Debug, Clone)]
pub struct Ask<P> {
    /// Its name.
    pub id: AskId,
    /// The tenant that it is for.
    pub tenant: Tenant,
    /// The source of the adapter.
    pub source: SourceId,
    /// The adapter's name.
    pub reference: ReferenceId,
    /// The secret that is shown to the source.
    pub credential: CredentialId,
    /// The tier on which it needs the adapter.
    pub tier: Tier,
    /// Whether the lease outlives sessions with the ranks. Pins may take half of a tier.
    pub pin: bool,
    /// Time at which it fails if it has no lease by then.
    pub deadline: Duration,
    /// The caller's own data.
    pub payload: P,
}
