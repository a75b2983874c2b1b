//! Bounds on bytes, calls and times.

use std::time::Duration;

/// How many calls of one kind run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// At one source, beside the first one of each tenant. As many again may run that have become slow.
    pub source: u32,
    /// Of these, those of one tenant.
    pub tenant: u32,
    /// Time after which a call fails.
    pub deadline: Duration,
}

/// The bounds of an exchange. Budgets must be at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the cache on the disk.
    pub disk_bytes: u64,
    /// Bytes of adapters in host memory, on the rank that has the least.
    pub host_bytes: u64,
    /// Bytes of one adapter's files. Best a quarter of `host_bytes` or less: while host memory is leased, everybody waits for
    /// the room of a large one in the end.
    pub adapter_bytes: u64,
    /// Questions to sources: who may read what, and which version a reference names.
    pub lookups: Budget,
    /// Downloads to the disk, and hashing of folders that are read in place.
    pub fetches: Budget,
    /// Copies into host memory.
    pub stages: Budget,
    /// Calls of one tenant, of all kinds and at all sources, slow ones included.
    pub tenant_calls: u32,
    /// Time after which a call no longer counts against those that are not slow.
    pub slow_after: Duration,
    /// Time for which a first failure is remembered. It doubles with every further one.
    pub first_backoff: Duration,
    /// The longest time for which a failure is remembered.
    pub longest_backoff: Duration,
    /// Grants, failures, versions and sizes of contents that are remembered, each.
    pub remembered: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let budget =
            |source, deadline| Budget { source, tenant: source / 2, deadline: Duration::from_secs(deadline) };
        Self {
            disk_bytes: 64 << 30,
            host_bytes: 16 << 30,
            adapter_bytes: 4 << 30,
            lookups: budget(32, 30),
            fetches: budget(16, 600),
            stages: budget(8, 60),
            tenant_calls: 64,
            slow_after: Duration::from_secs(5),
            first_backoff: Duration::from_secs(1),
            longest_backoff: Duration::from_secs(60),
            remembered: 1 << 16,
        }
    }
}

impl Limits {
    /// Panics unless every kind of call can be made.
    pub(crate) fn assert_positive(&self) {
        let budgets = [self.lookups, self.fetches, self.stages];
        let positive = budgets.iter().all(|budget| budget.source > 0 && budget.tenant > 0);
        assert!(positive && self.tenant_calls > 0 && self.remembered > 0, "a limit is zero: {self:?}");
    }
}
