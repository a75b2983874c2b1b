//! Blocks of KV memory: who holds them, and which prefix each cached block has.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
};

use crate::{AdapterKey, CacheSalt};

/// The predecessor of a block: the start of a sequence, or a published block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Prefix {
    /// Nothing. KV blocks are never shared between different adapters, nor between different salts.
    Start { adapter: Option<AdapterKey>, salt: CacheSalt },
    /// The published block of this number.
    Block(u64),
}

/// The identity of a published block, together with its tokens. Two blocks with equal prefixes and equal tokens hold
/// the same sequence of tokens from its start, by induction, so hashes need not be collision-free.
#[derive(Debug)]
struct Published {
    /// Never used twice, so that a reused block cannot be taken for its former content.
    number: u64,
    prefix: Prefix,
    /// Its key in the index.
    hash: u64,
}

#[derive(Debug, Default)]
struct Block {
    /// Sequences that have it in their block table.
    holders: u32,
    published: Option<Published>,
    /// Time at which its last holder released it, which is its key in `idle`.
    idle_since: u64,
}

/// All blocks. Each is free, or held by sequences, or idle: published and held by none.
#[derive(Debug)]
pub(crate) struct Blocks {
    size: usize,
    blocks: Vec<Block>,
    /// The tokens of published blocks, `size` to a block.
    tokens: Vec<u32>,
    free: Vec<u32>,
    /// Least recently used first. Blocks are let go last position first, so a block leaves before its prefix does.
    idle: BTreeMap<u64, u32>,
    /// Published blocks by the hash of prefix and tokens. Of several with the same hash, it has the first. Looked up
    /// only, never iterated.
    index: HashMap<u64, u32>,
    /// Counts publications and releases: the clock of `idle_since`, and the source of numbers.
    ticks: u64,
}

fn hash(prefix: Prefix, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (prefix, tokens).hash(&mut hasher);
    hasher.finish()
}

impl Blocks {
    pub(crate) fn new(count: u32, size: u32) -> Self {
        Self {
            size: size as usize,
            blocks: (0..count).map(|_| Block::default()).collect(),
            tokens: vec![0; count as usize * size as usize],
            free: (0..count).rev().collect(),
            idle: BTreeMap::new(),
            index: HashMap::new(),
            ticks: 0,
        }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Blocks that can be taken.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Returns whether only the cache holds `block`, so that holding it takes one from `available`.
    pub(crate) fn is_idle(&self, block: u32) -> bool {
        self.blocks[block as usize].holders == 0
    }

    /// Returns whether one sequence alone holds `block`.
    pub(crate) fn is_exclusive(&self, block: u32) -> bool {
        self.blocks[block as usize].holders == 1
    }

    /// The published blocks that follow `start`, for as long as they hold the given tokens, one item to a block.
    pub(crate) fn find<'a>(
        &self,
        start: Prefix,
        mut tokens: impl Iterator<Item = Cow<'a, [u32]>>,
    ) -> Vec<u32> {
        let mut prefix = Some(start);
        let next = || {
            let block = self.known(prefix?, &tokens.next()?)?;
            prefix = self.prefix_of(block);
            Some(block)
        };
        std::iter::from_fn(next).collect()
    }

    /// The block published as `tokens` after `prefix`.
    fn known(&self, prefix: Prefix, tokens: &[u32]) -> Option<u32> {
        let &block = self.index.get(&hash(prefix, tokens))?;
        let same = self.blocks[block as usize].published.as_ref().is_some_and(|p| p.prefix == prefix);
        (same && self.tokens_of(block) == tokens).then_some(block)
    }

    fn tokens_of(&self, block: u32) -> &[u32] {
        &self.tokens[block as usize * self.size..][..self.size]
    }

    /// `block` as the prefix of the next one; `None` when it is not published.
    pub(crate) fn prefix_of(&self, block: u32) -> Option<Prefix> {
        self.blocks[block as usize].published.as_ref().map(|p| Prefix::Block(p.number))
    }

    /// Adds a holder to a block that `find` gave.
    pub(crate) fn hold(&mut self, block: u32) {
        let entry = &mut self.blocks[block as usize];
        if entry.holders == 0 {
            self.idle.remove(&entry.idle_since);
        }
        entry.holders += 1;
    }

    /// A block for one holder: a free one, else the least recently used of the cache.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.idle.pop_first()?.1,
        };
        let entry = &mut self.blocks[block as usize];
        if let Some(published) = entry.published.take() {
            self.index.remove(&published.hash);
        }
        entry.holders = 1;
        Some(block)
    }

    /// Removes one holder from each of a sequence's blocks, given in the order of their positions.
    pub(crate) fn release(&mut self, blocks: &[u32]) {
        for &block in blocks.iter().rev() {
            let entry = &mut self.blocks[block as usize];
            entry.holders -= 1;
            if entry.holders > 0 {
                continue;
            }
            if entry.published.is_some() {
                self.ticks += 1;
                entry.idle_since = self.ticks;
                self.idle.insert(self.ticks, block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// Publishes a full, computed block as `tokens` after `prefix`, and returns it as the prefix of the next block.
    /// If such a block is published already, that one is returned, and `block` stays private to its holder. Returns
    /// `None` if something else has the same hash: then neither this block nor those that follow it can be published.
    pub(crate) fn publish(&mut self, prefix: Prefix, tokens: &[u32], block: u32) -> Option<Prefix> {
        let hash = hash(prefix, tokens);
        if self.index.contains_key(&hash) {
            return self.prefix_of(self.known(prefix, tokens)?);
        }
        self.ticks += 1;
        let number = self.ticks;
        self.index.insert(hash, block);
        self.blocks[block as usize].published = Some(Published { number, prefix, hash });
        self.tokens[block as usize * self.size..][..self.size].copy_from_slice(tokens);
        Some(Prefix::Block(number))
    }

    /// Panics unless every block is counted exactly once and held by as many as `tables`, all sequences' blocks, say.
    pub(crate) fn check<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) {
        let mut holders = vec![0; self.blocks.len()];
        tables.flatten().for_each(|&block| holders[block as usize] += 1);
        let mut free = vec![false; self.blocks.len()];
        for &block in &self.free {
            assert!(!std::mem::replace(&mut free[block as usize], true), "block {block} is free twice");
        }
        let mut published = 0;
        for (number, entry) in (0..).zip(&self.blocks) {
            let expected = holders[number as usize];
            assert_eq!(entry.holders, expected, "block {number}: holders counted and found");
            let idle = self.idle.get(&entry.idle_since) == Some(&number);
            let places = [free[number as usize], idle, entry.holders > 0].iter().filter(|&&at| at).count();
            assert_eq!(places, 1, "block {number} is in one of free, idle and held");
            assert!(!free[number as usize] || entry.published.is_none(), "free block {number} is published");
            if let Some(p) = &entry.published {
                published += 1;
                assert_eq!(self.index.get(&p.hash), Some(&number), "the index knows block {number}");
                assert_eq!(p.hash, hash(p.prefix, self.tokens_of(number)), "hash of block {number}");
            }
        }
        assert_eq!(self.index.len(), published, "the index holds published blocks only");
        assert_eq!(self.free.len() + self.idle.len(), self.blocks.iter().filter(|b| b.holders == 0).count());
    }
}
