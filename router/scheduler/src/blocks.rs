//! Blocks of KV memory: who holds them, and which prefix each cached block has.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, RandomState},
};

use crate::{AdapterKey, CacheSalt, GroupId, rope::Regime, table::Table};

/// What a block follows: the start of a sequence, or another full block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Prefix {
    /// Nothing. KV blocks are never shared between different salts or rotary frequencies, and outside of a `group` if there
    /// is one.
    Start { salt: CacheSalt, regime: Regime, group: Option<GroupId> },
    /// The block with this digest.
    Block(Digest),
}

/// What the adapters make of the model on a block's positions, and the position from which on they act; `None` where they
/// do not. KV blocks are never shared between different ones.
type Acting = Option<(AdapterKey, u32)>;

/// What a full block holds: all that its keys and values depend on beside the blocks before it.
#[derive(Debug)]
pub(crate) struct Content<'a> {
    pub(crate) acting: Acting,
    pub(crate) tokens: Cow<'a, [u32]>,
}

/// Stands for all tokens of a sequence up to the end of a block, and for its start. It is taken with keys that nobody
/// outside the process knows, and it is long enough to be taken for what it stands for: a block may be found though the
/// blocks before it are gone.
type Digest = u128;

/// The identity of a published block, together with its tokens.
#[derive(Debug)]
struct Published {
    prefix: Prefix,
    acting: Acting,
    /// Its key in the index.
    digest: Digest,
}

#[derive(Debug, Default)]
struct Block {
    /// Sequences that have it in their block table.
    holders: u32,
    published: Option<Published>,
    /// Time at which its last holder released it, which is its key in `idle`.
    idle_since: u64,
}

/// The beginning of a sequence that need not be computed.
#[derive(Debug)]
pub(crate) struct Cached {
    /// The blocks of it that are needed.
    pub(crate) table: Table,
    /// What the next block follows.
    pub(crate) prefix: Prefix,
}

/// All blocks. Each is free, or held by sequences, or idle: published and held by none.
#[derive(Debug)]
pub(crate) struct Blocks {
    size: usize,
    blocks: Vec<Block>,
    /// The tokens of published blocks, `size` to a block.
    tokens: Vec<u32>,
    free: Vec<u32>,
    /// Least recently used first. Blocks are let go last position first, so a block leaves before its prefix does,
    /// except where the front of a sequence was released before its end.
    idle: BTreeMap<u64, u32>,
    /// Published blocks by their digest. Looked up only, never iterated.
    index: HashMap<Digest, u32>,
    /// The keys of the two halves of digests.
    keys: [RandomState; 2],
    /// Counts releases: the clock of `idle_since`.
    ticks: u64,
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
            keys: Default::default(),
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

    fn digest(&self, prefix: Prefix, acting: Acting, tokens: &[u32]) -> Digest {
        let ([high, low], block) = (&self.keys, (prefix, acting, tokens));
        Digest::from(high.hash_one(block)) << 64 | Digest::from(low.hash_one(block))
    }

    /// The longest beginning of a sequence whose needed blocks are published. `full` has its blocks;
    /// after so many of them, the blocks before the place that `first` tells are not needed any more.
    pub(crate) fn find<'a>(
        &self,
        start: Prefix,
        full: impl ExactSizeIterator<Item = Content<'a>>,
        first: impl Fn(usize) -> usize,
    ) -> Cached {
        let most = first(full.len());
        let (mut prefix, mut found) = (start, Vec::new());
        // The place behind the last block that is missing.
        let mut after_gap = 0;
        let mut best = (0, start);
        for (end, content) in (1..).zip(full) {
            let digest = self.digest(prefix, content.acting, &content.tokens);
            let block = self.known(digest, prefix, &content);
            prefix = Prefix::Block(digest);
            found.push(block);
            if block.is_none() {
                after_gap = end;
            }
            if after_gap <= first(end) {
                best = (end, prefix);
            }
            if after_gap > most {
                break;
            }
        }
        let (end, prefix) = best;
        let released = first(end);
        let blocks = found[released..end].iter().copied().flatten().collect();
        Cached { table: Table::new(released, blocks), prefix }
    }

    /// The block published as `content` after `prefix`.
    fn known(&self, digest: Digest, prefix: Prefix, content: &Content) -> Option<u32> {
        let &block = self.index.get(&digest)?;
        let published = self.blocks[block as usize].published.as_ref();
        let same = published.is_some_and(|p| (p.prefix, p.acting) == (prefix, content.acting));
        (same && *self.tokens_of(block) == *content.tokens).then_some(block)
    }

    fn tokens_of(&self, block: u32) -> &[u32] {
        &self.tokens[block as usize * self.size..][..self.size]
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
            self.index.remove(&published.digest);
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

    /// Publishes a full, computed block as `content` after `prefix`, unless such a block is published already: then
    /// `block` stays private to its holder. Returns the prefix of the next block.
    pub(crate) fn publish(&mut self, prefix: Prefix, content: &Content, block: Option<u32>) -> Prefix {
        let Content { acting, tokens } = content;
        let digest = self.digest(prefix, *acting, tokens);
        if let Some(block) = block.filter(|_| !self.index.contains_key(&digest)) {
            self.index.insert(digest, block);
            self.blocks[block as usize].published = Some(Published { prefix, acting: *acting, digest });
            self.tokens[block as usize * self.size..][..self.size].copy_from_slice(tokens);
        }
        Prefix::Block(digest)
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
                assert_eq!(self.index.get(&p.digest), Some(&number), "the index knows block {number}");
                let digest = self.digest(p.prefix, p.acting, self.tokens_of(number));
                assert_eq!(p.digest, digest, "digest of block {number}");
            }
        }
        assert_eq!(self.index.len(), published, "the index holds published blocks only");
        assert_eq!(self.free.len() + self.idle.len(), self.blocks.iter().filter(|b| b.holders == 0).count());
    }
}
