//! Inputs and outputs.

use std::time::Duration;

use crate::{Ask, AskId, CallId, Content, Fault, ReferenceId, StageFault, Tier, Version};

/// The answer to a lookup: the credential may read the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What the reference names now.
    pub version: Version,
    /// Bytes of the files that make up the adapter.
    pub bytes: u64,
    /// Whether it is read where it lies. If not, it is copied to the cache on the disk.
    pub in_place: bool,
    /// How long the same credential may use the answer.
    pub fresh_for: Duration,
}

/// The answer to a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// The hash of the adapter's bytes.
    pub content: Content,
    /// Bytes of the files.
    pub bytes: u64,
}

/// The answer to a stage, from all ranks: the largest of their sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staged {
    /// Bytes in host memory.
    pub host_bytes: u64,
    /// Bytes in a device slot.
    pub slot_bytes: u64,
}

/// An adapter that all ranks have in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The adapter.
    pub content: Content,
    /// Its sizes.
    pub staged: Staged,
}

/// The state of an adapter in the device tier, which the scheduler owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// It is being copied into a slot.
    Loading,
    /// It is in a slot.
    Ready,
    /// It is in no slot any more.
    Empty,
}

/// Where a shard finds the files of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the cache on the disk, under its content.
    Cache,
    /// Where this version lies.
    InPlace(Version),
}

/// Something that has happened.
#[derive(Debug, Clone)]
pub enum Input<P> {
    /// Somebody needs an adapter.
    Ask(Ask<P>),
    /// Somebody needs several adapters at the same time, on the same tier: the parts of a merge on the disk, or the members
    /// of an ensemble in host memory. None of them takes room there before all of them have it. Each ask has its own answer;
    /// the caller releases the others if one fails. Asks of one tenant.
    AskTogether(Vec<Ask<P>>),
    /// An ask is not needed any more: it waits no longer, or its lease ends. One that is not known is ignored.
    Release(AskId),
    /// A lookup has ended.
    LookedUp {
        /// The call. The answer to a call that is not known is ignored; so for all calls.
        call: CallId,
        /// Its result.
        result: Result<Found, Fault>,
    },
    /// A fetch has come so far.
    Progress {
        /// The call.
        call: CallId,
        /// Bytes so far.
        bytes: u64,
    },
    /// A fetch has ended. If it failed, nothing of it is left on the disk.
    Fetched {
        /// The call.
        call: CallId,
        /// Its result.
        result: Result<Fetched, Fault>,
    },
    /// A stage has ended on all ranks. If it failed on any, no rank has the content.
    Staged {
        /// The call.
        call: CallId,
        /// Its result.
        result: Result<Staged, StageFault>,
    },
    /// A copy is gone from the disk.
    Deleted(Content),
    /// A copy is gone from the host memory of all ranks.
    Unstaged(Content),
    /// A copy was found on the disk. Copies that were used last are told last, so that the least recently used one is
    /// evicted first. Meant for the start.
    OnDisk {
        /// The adapter.
        content: Content,
        /// Bytes of its files.
        bytes: u64,
        /// The versions that it came from.
        versions: Vec<Version>,
    },
    /// The scheduler's plan moves an adapter in the device tier, or the ranks have moved it.
    Slot {
        /// The adapter.
        content: Content,
        /// Its state from now on.
        slot: Slot,
    },
    /// A session with the ranks has begun, and all of them have these adapters in host memory, used last told last.
    Attached {
        /// The adapters.
        host: Vec<Held>,
    },
    /// The session has ended. What is in host memory is not known. Its calls to the ranks need no answers, and removals
    /// from host memory that it had under way must not be answered any more.
    Detached,
    /// Whatever is remembered of a reference must be asked again.
    Reload(ReferenceId),
    /// The copies of an adapter are to go from the disk and from host memory, unless there are leases on them.
    Evict(Content),
    /// Time has passed.
    Tick,
}

/// Something to do, or to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output<P> {
    /// Ask the source whether the ask's credential may read its reference, and what that names. Answered by
    /// [`Input::LookedUp`].
    Lookup {
        /// The call.
        call: CallId,
        /// An ask's payload.
        payload: P,
    },
    /// Copy a version to the disk, or hash it if it is read in place. Answered by [`Input::Fetched`].
    Fetch {
        /// The call.
        call: CallId,
        /// The version. If the source has another one by now, the fetch fails.
        version: Version,
        /// Bytes that have been reserved for it. One that needs more fails.
        max_bytes: u64,
        /// An ask's payload.
        payload: P,
    },
    /// Copy an adapter into the host memory of every rank. Answered by [`Input::Staged`].
    Stage {
        /// The call.
        call: CallId,
        /// The adapter.
        content: Content,
        /// Where its files are.
        place: Place,
        /// Bytes that have been reserved for it on each rank.
        max_bytes: u64,
        /// An ask's payload.
        payload: P,
    },
    /// End a call, which is answered nevertheless as soon as nothing of it is left.
    Abort(CallId),
    /// Remove a copy from the disk. Answered by [`Input::Deleted`].
    Delete(Content),
    /// Remove a copy from the host memory of all ranks. Answered by [`Input::Unstaged`].
    Unstage(Content),
    /// An ask has its lease, until it is released.
    Ready {
        /// The ask.
        ask: AskId,
        /// The adapter.
        content: Content,
        /// The tier on which it is leased.
        tier: Tier,
        /// Bytes that it takes in a slot; 0 for a lease on the disk.
        slot_bytes: u64,
    },
    /// An ask has failed. It has ended.
    Failed {
        /// The ask.
        ask: AskId,
        /// The reason.
        fault: Fault,
    },
}
