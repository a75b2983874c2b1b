//! Checks sentencepiece's map of characters, in which the library looks texts up without checks of its own.
//!
//! The map is the size of a trie in bytes, the trie, and the texts that characters are replaced by, each with a zero
//! behind it. The trie is a double array of <https://github.com/s-yata/darts-clone>: a node's child for a byte is the
//! unit at the node's place with the byte's bits flipped, if that has the byte as its label.

/// The most bytes that a map makes of one; `None` if there are texts that cannot be looked up in it.
pub(in super::super) fn growth(map: &[u8]) -> Option<usize> {
    let (size, rest) = map.split_first_chunk()?;
    let size = u32::from_le_bytes(*size) as usize;
    let (trie, texts) = rest.split_at_checked(size)?;
    let units: Vec<Unit> = trie
        .chunks_exact(4)
        .map(|unit| Unit(unit.iter().rev().fold(0, |all, byte| all << 8 | usize::from(*byte))))
        .collect();
    let (Ok(texts), Some(root), 0) = (std::str::from_utf8(texts), units.first(), size % 4) else {
        return None;
    };
    let mut growth = 1;
    let mut seen = vec![false; units.len()];
    let mut open = vec![(root.offset(), 1)];
    while let Some((node, bytes)) = open.pop() {
        // Whatever byte follows is looked up.
        if (node | 0xFF) >= units.len() {
            return None;
        }
        for byte in 1..=0xFF {
            let at = node ^ byte;
            if units[at].label() != byte || std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let child = at ^ units[at].offset();
            if units[at].has_leaf() {
                let text = texts.get(units.get(child)?.value()..)?;
                growth = growth.max(text.find('\0').unwrap_or(text.len()).div_ceil(bytes));
            }
            open.push((child, bytes + 1));
        }
    }
    Some(growth)
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
