//! What happens in the device tier, as the exchange of adapters is told.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use exchange::{Content, Slot};
use scheduler::{Adapter, AdapterKey};

use crate::adapters::{Inbox, News};

/// The adapters in slots, and whoever is told of them.
pub(super) struct DeviceNews {
    inbox: Arc<Inbox>,
    /// Those that are on their way have the time since which they are.
    slots: BTreeMap<u32, (AdapterKey, Option<Instant>)>,
}

impl DeviceNews {
    /// Tells of the adapters that are in slots when a session begins.
    pub(super) fn new(inbox: Arc<Inbox>, filled: &[(u32, Adapter)]) -> DeviceNews {
        let mut news = DeviceNews { inbox, slots: BTreeMap::new() };
        filled.iter().for_each(|(slot, adapter)| _ = news.filled(*slot, adapter.key));
        news
    }

    /// A step will empty some slots, and then load some. Must be told before the sequences that wait for a load end,
    /// for they keep the copy in host memory that it reads.
    pub(super) fn planned(&mut self, unload: &[u32], load: &[(u32, AdapterKey)]) {
        unload.iter().for_each(|slot| self.emptied(*slot));
        for &(slot, key) in load {
            self.slots.insert(slot, (key, Some(Instant::now())));
            self.tell(key, Slot::Loading);
        }
    }

    /// A load has ended well. Returns the time that it took, if it was one of this session.
    pub(super) fn filled(&mut self, slot: u32, key: AdapterKey) -> Option<Duration> {
        let before = self.slots.insert(slot, (key, None));
        self.tell(key, Slot::Ready);
        before.and_then(|(_, since)| since).map(|since| since.elapsed())
    }

    /// A slot is empty from now on.
    pub(super) fn emptied(&mut self, slot: u32) {
        if let Some((key, _)) = self.slots.remove(&slot) {
            self.tell(key, Slot::Empty);
        }
    }

    fn tell(&self, key: AdapterKey, slot: Slot) {
        self.inbox.add(News::Slot(Content(key.0), slot));
    }
}
