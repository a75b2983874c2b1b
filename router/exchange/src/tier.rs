//! One tier: which copies are on it, which of them are leased, and room for more.

use std::collections::{BTreeSet, HashMap};

use crate::{Content, Resident, TierStats};

/// A copy of an adapter.
#[derive(Debug, Clone, Copy)]
struct Entry {
    bytes: u64,
    /// Bytes that it takes in a device slot. 0 on the disk.
    slot_bytes: u64,
    /// Asks that have a lease on it, and loads that read it.
    leases: u32,
    /// Of these, leases of pins.
    pins: u32,
    /// Removals that have been asked for and not been answered. The copy cannot be used any more.
    removals: u32,
    /// The tier's clock when it was used last.
    used: u64,
}

impl Entry {
    fn is_idle(&self) -> bool {
        self.leases == 0 && self.removals == 0
    }
}

/// Whether there is room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Room {
    /// There is.
    Free,
    /// There will be, when copies that are being removed are gone.
    Coming,
    /// There will be, if these are removed. Whether each is wanted.
    Evict(Vec<(Content, bool)>),
    /// There will be none before leases end.
    Full,
}

#[derive(Debug)]
pub(crate) struct Copies {
    limit: u64,
    /// Looked up only, never iterated in an order that shows.
    entries: HashMap<Content, Entry>,
    /// Copies that may be evicted, the least recently used first.
    idle: BTreeSet<(u64, Content)>,
    /// Of all copies, those that are being removed included.
    bytes: u64,
    /// Of the copies that are being removed.
    leaving: u64,
    /// Of the copies that are pinned.
    pinned: u64,
    /// Of copies that are being made.
    reserved: u64,
    clock: u64,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    loads: u64,
    loaded_bytes: u64,
    evictions: u64,
    needed_evictions: u64,
}

impl Copies {
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            limit,
            entries: HashMap::new(),
            idle: BTreeSet::new(),
            bytes: 0,
            leaving: 0,
            pinned: 0,
            reserved: 0,
            clock: 0,
            hits: 0,
            misses: 0,
            loads: 0,
            loaded_bytes: 0,
            evictions: 0,
            needed_evictions: 0,
        }
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that one copy can have while the pins stay.
    pub(crate) fn unpinned(&self) -> u64 {
        self.limit - self.pinned
    }

    /// Whether a copy is there that can be used.
    pub(crate) fn has(&self, content: Content) -> bool {
        self.entries.get(&content).is_some_and(|entry| entry.removals == 0)
    }

    /// Whether a copy is there that nobody has a lease on.
    pub(crate) fn is_idle(&self, content: Content) -> bool {
        self.entries.get(&content).is_some_and(Entry::is_idle)
    }

    /// Whether a copy is being removed.
    pub(crate) fn is_leaving(&self, content: Content) -> bool {
        self.entries.get(&content).is_some_and(|entry| entry.removals > 0)
    }

    /// Bytes of a copy, and those that it takes in a slot.
    pub(crate) fn sizes(&self, content: Content) -> Option<(u64, u64)> {
        self.entries.get(&content).map(|entry| (entry.bytes, entry.slot_bytes))
    }

    /// Leases of asks that are not pins.
    pub(crate) fn requests(&self, content: Content) -> u32 {
        self.entries.get(&content).map_or(0, |entry| entry.leases - entry.pins)
    }

    /// Whether a pin of the copy stays within what pins may have.
    pub(crate) fn can_pin(&self, content: Content) -> bool {
        self.entries.get(&content).is_some_and(|entry| {
            entry.pins > 0 || entry.bytes <= (self.limit / 2).saturating_sub(self.pinned)
        })
    }

    /// Keeps a copy until the lease is released.
    pub(crate) fn lease(&mut self, content: Content, pin: bool) {
        let Some(entry) = self.entries.get_mut(&content) else { return };
        self.idle.remove(&(entry.used, content));
        self.clock += 1;
        entry.used = self.clock;
        entry.leases += 1;
        if pin {
            self.pinned += if entry.pins == 0 { entry.bytes } else { 0 };
            entry.pins += 1;
        }
    }

    pub(crate) fn release(&mut self, content: Content, pin: bool) {
        let Some(entry) = self.entries.get_mut(&content) else { return };
        entry.leases -= 1;
        if pin {
            entry.pins -= 1;
            self.pinned -= if entry.pins == 0 { entry.bytes } else { 0 };
        }
        self.clock += 1;
        entry.used = self.clock;
        if entry.is_idle() {
            self.idle.insert((entry.used, content));
        }
    }

    /// A copy has been used where it lies nearer.
    pub(crate) fn touch(&mut self, content: Content) {
        let Some(entry) = self.entries.get_mut(&content) else { return };
        let listed = self.idle.remove(&(entry.used, content));
        self.clock += 1;
        entry.used = self.clock;
        if listed {
            self.idle.insert((entry.used, content));
        }
    }

    /// Says whether so many bytes more fit, or what must go for them: what is not wanted first, and of this the least
    /// recently used first.
    pub(crate) fn room(&self, bytes: u64, wanted: impl Fn(Content) -> bool) -> Room {
        let needed = u128::from(self.bytes) + u128::from(self.reserved) + u128::from(bytes);
        let Some(excess) = needed.checked_sub(u128::from(self.limit)).filter(|&excess| excess > 0) else {
            return Room::Free;
        };
        let mut freed = u128::from(self.leaving);
        if freed >= excess {
            return Room::Coming;
        }
        let mut victims = Vec::new();
        for want in [false, true] {
            for &(_, content) in &self.idle {
                if wanted(content) == want {
                    freed += u128::from(self.entries.get(&content).map_or(0, |entry| entry.bytes));
                    victims.push((content, want));
                }
                if freed >= excess {
                    return Room::Evict(victims);
                }
            }
        }
        Room::Full
    }

    pub(crate) fn reserve(&mut self, bytes: u64) {
        self.reserved += bytes;
    }

    pub(crate) fn unreserve(&mut self, bytes: u64) {
        self.reserved -= bytes;
    }

    /// A copy has been made, for which there is room.
    pub(crate) fn load(&mut self, content: Content, bytes: u64, slot_bytes: u64) {
        self.loads += 1;
        self.loaded_bytes += bytes;
        self.add(content, bytes, slot_bytes);
    }

    /// Takes over a copy that is there already. Returns false if there is no room for it.
    pub(crate) fn adopt(&mut self, content: Content, bytes: u64, slot_bytes: u64) -> bool {
        let fits = self.room(bytes, |_| false) == Room::Free;
        if fits && !self.entries.contains_key(&content) {
            self.add(content, bytes, slot_bytes);
        }
        fits
    }

    fn add(&mut self, content: Content, bytes: u64, slot_bytes: u64) {
        self.clock += 1;
        let used = self.clock;
        self.bytes += bytes;
        self.entries.insert(content, Entry { bytes, slot_bytes, leases: 0, pins: 0, removals: 0, used });
        self.idle.insert((used, content));
    }

    /// A copy without leases is to be removed.
    pub(crate) fn evict(&mut self, content: Content, wanted: bool) {
        let Some(entry) = self.entries.get_mut(&content) else { return };
        self.idle.remove(&(entry.used, content));
        entry.removals += 1;
        self.leaving += entry.bytes;
        self.evictions += 1;
        self.needed_evictions += u64::from(wanted);
    }

    /// A copy that is not counted is to be removed: there is no room for it, or it was made while it was being removed.
    pub(crate) fn refuse(&mut self, content: Content) {
        let new = || Entry { bytes: 0, slot_bytes: 0, leases: 0, pins: 0, removals: 0, used: 0 };
        self.entries.entry(content).or_insert_with(new).removals += 1;
    }

    /// A removal has been answered.
    pub(crate) fn removed(&mut self, content: Content) {
        let Some(entry) = self.entries.get_mut(&content).filter(|entry| entry.removals > 0) else { return };
        entry.removals -= 1;
        if entry.removals == 0 {
            let bytes = entry.bytes;
            self.leaving -= bytes;
            self.bytes -= bytes;
            self.entries.remove(&content);
        }
    }

    /// A copy turned out to be gone. Its leases are void, and must not be released.
    pub(crate) fn forget(&mut self, content: Content) {
        if !self.has(content) {
            return;
        }
        if let Some(entry) = self.entries.remove(&content) {
            self.idle.remove(&(entry.used, content));
            self.bytes -= entry.bytes;
            self.pinned -= if entry.pins > 0 { entry.bytes } else { 0 };
        }
    }

    /// All copies are gone. Leases and reservations are void, and must not be released.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.idle.clear();
        (self.bytes, self.leaving, self.pinned, self.reserved) = (0, 0, 0, 0);
    }

    pub(crate) fn stats(&self) -> TierStats {
        TierStats {
            copies: self.entries.values().filter(|entry| entry.removals == 0).count(),
            bytes: self.bytes - self.leaving,
            leaving_bytes: self.leaving,
            reserved_bytes: self.reserved,
            pinned_bytes: self.pinned,
            hits: self.hits,
            misses: self.misses,
            loads: self.loads,
            loaded_bytes: self.loaded_bytes,
            evictions: self.evictions,
            needed_evictions: self.needed_evictions,
        }
    }

    /// The copies that can be used, by content.
    pub(crate) fn residents(&self) -> Vec<Resident> {
        let usable = self.entries.iter().filter(|(_, entry)| entry.removals == 0);
        let mut residents: Vec<_> = usable
            .map(|(&content, entry)| Resident {
                content,
                bytes: entry.bytes,
                leases: entry.leases,
                pins: entry.pins,
            })
            .collect();
        residents.sort_unstable_by_key(|resident| resident.content);
        residents
    }

    /// Panics unless every byte is accounted for, and the leases are those given, with how many of them are pins.
    pub(crate) fn check(&self, leases: &HashMap<Content, (u32, u32)>, reserved: u64) {
        let (mut bytes, mut leaving, mut pinned, mut idle) = (0, 0, 0, 0);
        for (content, entry) in &self.entries {
            let counted = leases.get(content).copied().unwrap_or_default();
            assert_eq!((entry.leases, entry.pins), counted, "leases on {content:?}");
            assert!(entry.removals == 0 || entry.leases == 0, "{content:?} is removed under a lease");
            assert_eq!(self.idle.contains(&(entry.used, *content)), entry.is_idle(), "{content:?} is idle");
            bytes += entry.bytes;
            leaving += if entry.removals > 0 { entry.bytes } else { 0 };
            pinned += if entry.pins > 0 { entry.bytes } else { 0 };
            idle += usize::from(entry.is_idle());
        }
        let missing = leases.keys().find(|content| !self.entries.contains_key(content));
        assert_eq!(missing, None, "a lease on a copy that is not there");
        assert_eq!(self.idle.len(), idle, "copies without leases");
        assert_eq!(
            (self.bytes, self.leaving, self.pinned, self.reserved),
            (bytes, leaving, pinned, reserved),
            "bytes"
        );
        assert!(self.bytes + self.reserved <= self.limit, "{bytes} and {reserved} of {}", self.limit);
        assert!(self.pinned <= self.limit / 2, "{} bytes are pinned", self.pinned);
    }
}
