//! Checks sentencepiece's map of characters, in which the library looks texts up without checks of its own.
//!
//! The map is the size of a trie in bytes, the trie, and the texts that characters are replaced by, each with a zero
//! behind it. The trie is a double array of <https://github.com/s-yata/darts-clone>: a node's child for a byte is the
//! unit at the node's place with the byte's bits flipped, if that has the byte as its label.

/// Returns whether every text can be looked up in a map.
pub(super) fn is_sound(map: &[u8]) -> bool {
    let Some((size, rest)) = map.split_first_chunk() else { return false };
    let size = u32::from_le_bytes(*size) as usize;
    let Some((trie, texts)) = rest.split_at_checked(size) else { return false };
    let units: Vec<Unit> = trie
        .chunks_exact(4)
        .map(|unit| Unit(unit.iter().rev().fold(0, |all, byte| all << 8 | usize::from(*byte))))
        .collect();
    let (Ok(texts), Some(root), 0) = (std::str::from_utf8(texts), units.first(), size % 4) else {
        return false;
    };
    let mut seen = vec![false; units.len()];
    let mut open = vec![root.offset()];
    while let Some(node) = open.pop() {
        // Whatever byte follows is looked up.
        if (node | 0xFF) >= units.len() {
            return false;
        }
        for byte in 1..=0xFF {
            let at = node ^ byte;
            if units[at].label() != byte || std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let child = at ^ units[at].offset();
            if units[at].has_leaf()
                && !units.get(child).is_some_and(|leaf| texts.is_char_boundary(leaf.value()))
            {
                return false;
            }
            open.push(child);
        }
    }
    true
}

/// A unit of the trie, of 32 bits.
struct Unit(usize);

impl Unit {
    /// The byte that leads here; more than a byte has for a leaf.
    fn label(&self) -> usize {
        self.0 & (1 << 31 | 0xFF)
    }

    fn has_leaf(&self) -> bool {
        self.0 >> 8 & 1 == 1
    }

    /// Where a leaf's text begins.
    fn value(&self) -> usize {
        self.0 & ((1 << 31) - 1)
    }

    /// The distance to the node, as bits that are flipped.
    fn offset(&self) -> usize {
        (self.0 >> 10) << ((self.0 & 1 << 9) >> 6)
    }
}
