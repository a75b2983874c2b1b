//! The block table of a sequence.

/// The blocks of a sequence by their place in it. Blocks at its beginning that lie before the attention window are
/// released while it runs; the places of the others stay.
#[derive(Debug, Default)]
pub(crate) struct Table {
    released: usize,
    blocks: Vec<u32>,
}

impl Table {
    /// A table that begins behind so many places whose blocks are not needed.
    pub(crate) fn new(released: usize, blocks: Vec<u32>) -> Self {
        Self { released, blocks }
    }

    /// Places at the beginning whose blocks are not held.
    pub(crate) fn released(&self) -> usize {
        self.released
    }

    /// The blocks that are held, in the order of their places.
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// The first place behind the table.
    pub(crate) fn end(&self) -> usize {
        self.released + self.blocks.len()
    }

    /// The block at a place, if it is held.
    pub(crate) fn get(&self, place: usize) -> Option<u32> {
        self.blocks.get(place.checked_sub(self.released)?).copied()
    }

    /// The blocks that are held from a place on.
    pub(crate) fn from(&self, place: usize) -> &[u32] {
        &self.blocks[place.saturating_sub(self.released).min(self.blocks.len())..]
    }

    pub(crate) fn push(&mut self, block: u32) {
        self.blocks.push(block);
    }

    /// Gives up the blocks before a place, and returns them.
    pub(crate) fn release_before(&mut self, place: usize) -> Vec<u32> {
        let count = place.saturating_sub(self.released).min(self.blocks.len());
        self.released += count;
        self.blocks.drain(..count).collect()
    }
}
