//! What ranks have told each other under keys, until all have.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// What the ranks have told, by key.
#[derive(Default)]
pub(super) struct Posts {
    ranks: usize,
    by_key: Mutex<HashMap<u64, Post>>,
}

/// What the ranks have told under one key.
struct Post {
    by_rank: Vec<Option<Vec<u8>>>,
    /// Whether nobody will ask for it.
    is_forgotten: bool,
}

impl Post {
    fn is_complete(&self) -> bool {
        self.by_rank.iter().all(Option::is_some)
    }
}

impl Posts {
    pub(super) fn of(ranks: usize) -> Posts {
        Posts { ranks, by_key: Mutex::default() }
    }

    /// Calls `change` with the entry of a key, and drops an entry that nobody will ask for any more.
    fn change(&self, key: u64, change: impl FnOnce(&mut Post)) {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = || Post { by_rank: vec![None; self.ranks.max(1)], is_forgotten: false };
        let post = by_key.entry(key).or_insert_with(empty);
        change(post);
        if post.is_forgotten && post.is_complete() {
            by_key.remove(&key);
        }
    }

    pub(super) fn put(&self, key: u64, rank: usize, bytes: Vec<u8>) {
        self.change(key, |post| post.by_rank[rank] = Some(bytes));
    }

    /// Marks a key, whose entry stays until all ranks have told something, so that no late one makes a new entry.
    pub(super) fn forget(&self, key: u64) {
        self.change(key, |post| post.is_forgotten = true);
    }

    pub(super) fn take(&self, key: u64) -> Option<Vec<Vec<u8>>> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        by_key.get(&key)?.is_complete().then_some(())?;
        Some(by_key.remove(&key)?.by_rank.into_iter().flatten().collect())
    }
}
