//! The adapters in host memory. The router decides which these are; nothing is evicted here.

use std::{collections::HashMap, sync::Arc};

use model::adapter::ContentHash;

use super::StageError;

/// The properties of an adapter in host memory.
#[derive(Debug, PartialEq)]
pub struct Properties {
    /// The hash of its content, by which it is known.
    pub content: ContentHash,
    /// Bytes that it takes in host memory.
    pub host_bytes: usize,
    /// Bytes that it takes in a slot.
    pub slot_bytes: usize,
    /// Its largest LoRA rank.
    pub max_lora_rank: usize,
    /// The names of the modules that it changes, distinct and sorted.
    pub sites: Vec<String>,
    /// The number of tokens that it has rows for, including those of the model.
    pub vocab: usize,
    /// What it has beside low-rank deltas and biases, if that is something.
    pub beside_sums: Option<&'static str>,
    /// The tokens at which it begins to act; empty if it acts from the first row on.
    pub invocation: Vec<u32>,
    /// The vector that it adds to hidden states.
    pub hidden_shift: Option<Arc<[f32]>>,
}

/// An adapter in host memory.
pub struct HostCopy<A> {
    /// Its properties.
    pub properties: Arc<Properties>,
    /// Its tensors.
    pub adapter: Arc<A>,
}

impl<A> Clone for HostCopy<A> {
    fn clone(&self) -> HostCopy<A> {
        HostCopy { properties: self.properties.clone(), adapter: self.adapter.clone() }
    }
}

/// All adapters in host memory, and the session that may change them.
pub(super) struct Host<A> {
    session: Option<u64>,
    /// Each with the number of its last use.
    copies: HashMap<ContentHash, (HostCopy<A>, u64)>,
    /// Uses so far.
    uses: u64,
}

impl<A> Default for Host<A> {
    fn default() -> Host<A> {
        Host { session: None, copies: HashMap::new(), uses: 0 }
    }
}

impl<A> Host<A> {
    /// Begins a session. Returns what is held, used last told last.
    pub(super) fn begin_session(&mut self, session: u64) -> Vec<Arc<Properties>> {
        self.session = Some(session);
        let mut held: Vec<_> = self.copies.values().collect();
        held.sort_unstable_by_key(|(_, used)| *used);
        held.into_iter().map(|(copy, _)| copy.properties.clone()).collect()
    }

    /// Refuses a call of another session than the present one.
    pub(super) fn expect(&self, session: u64) -> Result<(), StageError> {
        if self.session == Some(session) {
            return Ok(());
        }
        Err(StageError::OtherSession { got: session, current: self.session.unwrap_or(0) })
    }

    /// A copy that is used now.
    pub(super) fn get(&mut self, content: ContentHash) -> Option<HostCopy<A>> {
        let (copy, used) = self.copies.get_mut(&content)?;
        self.uses += 1;
        *used = self.uses;
        Some(copy.clone())
    }

    /// Adds a copy.
    pub(super) fn insert(&mut self, copy: HostCopy<A>) {
        self.uses += 1;
        self.copies.insert(copy.properties.content, (copy, self.uses));
    }

    /// Removes a copy. The caller must drop it outside of the lock, because freeing its memory may take long.
    pub(super) fn remove(&mut self, content: ContentHash) -> Option<HostCopy<A>> {
        Some(self.copies.remove(&content)?.0)
    }
}
