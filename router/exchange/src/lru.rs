//! A bounded map that forgets what was used least recently.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    /// Looked up and filtered only, never iterated in an order that shows.
    entries: HashMap<K, (V, u64)>,
    by_use: BTreeMap<u64, K>,
    limit: usize,
    uses: u64,
}

impl<K: Copy + Eq + Hash, V> Lru<K, V> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), by_use: BTreeMap::new(), limit, uses: 0 }
    }

    /// The value of a key, which counts as a use.
    pub(crate) fn get(&mut self, key: K) -> Option<&mut V> {
        let (value, used) = self.entries.get_mut(&key)?;
        self.by_use.remove(used);
        self.uses += 1;
        *used = self.uses;
        self.by_use.insert(self.uses, key);
        Some(value)
    }

    /// The value of a key, as if nobody had looked.
    pub(crate) fn peek(&self, key: K) -> Option<&V> {
        self.entries.get(&key).map(|(value, _)| value)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        self.remove(key);
        self.uses += 1;
        self.entries.insert(key, (value, self.uses));
        self.by_use.insert(self.uses, key);
        while self.entries.len() > self.limit {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.entries.remove(&oldest);
        }
    }

    pub(crate) fn remove(&mut self, key: K) -> Option<V> {
        let (value, used) = self.entries.remove(&key)?;
        self.by_use.remove(&used);
        Some(value)
    }

    /// Forgets the entries whose keys do not pass.
    pub(crate) fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.entries.retain(|key, _| keep(key));
        self.by_use.retain(|_, key| keep(key));
    }

    /// Panics unless both indices agree.
    pub(crate) fn check(&self) {
        assert!(self.entries.len() <= self.limit, "{} entries of {}", self.entries.len(), self.limit);
        assert_eq!(self.entries.len(), self.by_use.len(), "entries and their uses");
        for (used, key) in &self.by_use {
            assert_eq!(self.entries.get(key).map(|(_, used)| used), Some(used), "the use of an entry");
        }
    }
}
