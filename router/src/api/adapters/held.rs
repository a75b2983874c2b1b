//! The adapters that metrics tell of by name.

use std::collections::HashSet;

use exchange::Slot;

use super::Places;
use crate::{metrics::Held, server::App};

impl App {
    /// The adapters that are registered and those that requests have named, the ones used last first. Several names of one
    /// adapter are told each. `None` if the server stops.
    pub(crate) async fn held(&self) -> Option<Vec<Held>> {
        let places = Places::of(self).await.ok()?;
        let (book, registered) = (self.adapters.book(), self.registry.all());
        let ids = registered.iter().map(|(id, entry)| (id.clone(), &entry.reference));
        let known: HashSet<_> = registered.iter().map(|(_, entry)| &entry.reference).collect();
        let named = book.references();
        let named =
            named.iter().filter(|named| !known.contains(named)).map(|named| (named.to_string(), named));
        let mut seen = HashSet::new();
        let held = ids.chain(named).filter_map(|(name, reference)| {
            let used = book.of(reference)?;
            // Whatever does not exist has no content.
            let content = used.content?;
            let host = places.host.get(&content);
            seen.insert(name.clone()).then(|| Held {
                in_slot: places.device.get(&content) == Some(&Slot::Ready),
                in_host: host.is_some(),
                pinned: host.is_some_and(|host| host.pins > 0),
                max_lora_rank: book.facts(content).staged.map(|staged| staged.max_lora_rank),
                running: used.counts.running(),
                name,
            })
        });
        Some(held.collect())
    }
}
