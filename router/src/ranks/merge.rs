//! One view of all ranks: what they serve together, and which adapters all of them hold.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Debug,
};

use scheduler::{Adapter, AdapterKey};

use super::stage::larger;
use crate::wire::{Held, Info, stage::Staged};

/// The reason that the ranks cannot serve together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InfoError {
    /// A socket leads to another rank than the configuration says.
    #[error("the shard at the socket of rank {expected} says that it is rank {actual}")]
    Rank {
        /// The value by the configuration.
        expected: usize,
        /// The value by the shard.
        actual: u32,
    },
    /// A rank belongs to a group of another size.
    #[error("rank {rank} is one of {actual}, but the configuration names {expected}")]
    World {
        /// The rank.
        rank: usize,
        /// The value by the configuration.
        expected: usize,
        /// The value by the shard.
        actual: u32,
    },
    /// Two ranks contradict each other.
    #[error("`{field}` is {first} on rank 0 and {other} on rank {rank}")]
    Differs {
        /// The value that must be equal.
        field: &'static str,
        /// Its value on rank 0.
        first: String,
        /// The rank with another value.
        rank: usize,
        /// Its value there.
        other: String,
    },
    /// Nothing can be computed within a limit of zero.
    #[error("`{field}` is 0 on rank {rank}")]
    Zero {
        /// The limit.
        field: &'static str,
        /// The rank.
        rank: usize,
    },
}

/// Merges the answers of all ranks: some values must agree, and of each limit the smallest counts. `infos` are in the
/// order of the configuration, and there is at least one.
pub(super) fn merge(infos: Vec<Info>) -> Result<Info, InfoError> {
    let world = infos.len();
    for (rank, info) in infos.iter().enumerate() {
        if info.rank as usize != rank {
            return Err(InfoError::Rank { expected: rank, actual: info.rank });
        }
        if info.world as usize != world {
            return Err(InfoError::World { rank, expected: world, actual: info.world });
        }
        check_positive(rank, info)?;
        check_equal(rank, &infos[0], info)?;
    }
    let least = |of: fn(&Info) -> u32| infos.iter().map(of).min().unwrap_or_default();
    // Zero is no bound, so it is not the smallest one.
    let adapter_bytes = infos.iter().map(|info| info.adapter_bytes).filter(|bytes| *bytes > 0).min();
    let longest = infos.iter().map(|info| info.longest_step).max();
    Ok(Info {
        num_blocks: least(|info| info.num_blocks),
        num_slots: least(|info| info.num_slots),
        adapter_bytes: adapter_bytes.unwrap_or(0),
        max_rows: least(|info| info.max_rows),
        max_sequences: least(|info| info.max_sequences),
        max_logit_rows: least(|info| info.max_logit_rows),
        longest_step: longest.unwrap_or_default(),
        ..infos[0].clone()
    })
}

fn check_positive(rank: usize, info: &Info) -> Result<(), InfoError> {
    let limits = [
        ("vocab_size", info.vocab_size),
        ("max_positions", info.max_positions),
        ("num_blocks", info.num_blocks),
        ("block_size", info.block_size),
        ("max_rows", info.max_rows),
        ("max_sequences", info.max_sequences),
        ("max_logit_rows", info.max_logit_rows),
    ];
    match limits.iter().find(|(_, limit)| *limit == 0) {
        Some((field, _)) => Err(InfoError::Zero { field, rank }),
        None => Ok(()),
    }
}

fn check_equal(rank: usize, first: &Info, other: &Info) -> Result<(), InfoError> {
    fn equal<T: PartialEq + Debug>(
        rank: usize,
        field: &'static str,
        first: &T,
        other: &T,
    ) -> Result<(), InfoError> {
        if first == other {
            return Ok(());
        }
        Err(InfoError::Differs { field, first: format!("{first:?}"), rank, other: format!("{other:?}") })
    }
    equal(rank, "vocab_size", &first.vocab_size, &other.vocab_size)?;
    equal(rank, "eos_token_ids", &first.eos_token_ids, &other.eos_token_ids)?;
    equal(rank, "dtype", &first.dtype, &other.dtype)?;
    equal(rank, "block_size", &first.block_size, &other.block_size)?;
    equal(rank, "kv_window", &first.kv_window, &other.kv_window)?;
    equal(rank, "rope_switch", &first.rope_switch, &other.rope_switch)?;
    equal(rank, "rope_dynamic", &first.rope_dynamic, &other.rope_dynamic)?;
    equal(rank, "hidden_size", &first.hidden_size, &other.hidden_size)?;
    equal(rank, "task", &first.task, &other.task)?;
    equal(rank, "bidirectional", &first.bidirectional, &other.bidirectional)?;
    equal(rank, "max_positions", &first.max_positions, &other.max_positions)
}

/// The adapters in slots and in host memory when a session begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Resident {
    /// Slots that hold the same adapter on all ranks; `bytes` are those of the rank where it takes the most.
    pub(crate) slots: Vec<(u32, Adapter)>,
    /// Slots whose content differs between ranks: they must be emptied.
    pub(crate) stale: Vec<u32>,
    /// For each rank, its filled slots that not all ranks have: nothing of this session goes there, so the rank must
    /// empty them.
    pub(super) beyond: Vec<Vec<u32>>,
    /// Adapters that all ranks have in host memory, with the largest sizes; used last told last.
    pub(crate) host: Vec<(AdapterKey, Staged)>,
    /// For each rank, the adapters in its host memory that not all ranks have there.
    pub(super) strays: Vec<Vec<AdapterKey>>,
}

/// Finds out which of the adapters in slots and in host memory can be kept.
pub(super) fn resident(held: &[Held], num_slots: u32) -> Resident {
    let filled = held.iter().flat_map(|held| held.slots.iter().map(|(slot, _)| *slot));
    let filled: BTreeSet<u32> = filled.filter(|slot| *slot < num_slots).collect();
    let beyond =
        |held: &Held| held.slots.iter().map(|(slot, _)| *slot).filter(|slot| *slot >= num_slots).collect();
    let beyond = held.iter().map(beyond).collect();
    let host = in_host_memory(held);
    let kept: BTreeSet<AdapterKey> = host.iter().map(|(key, _)| *key).collect();
    let stray =
        |held: &Held| held.host.iter().map(|(key, _)| *key).filter(|key| !kept.contains(key)).collect();
    let strays = held.iter().map(stray).collect();
    let mut resident = Resident { beyond, host, strays, ..Resident::default() };
    for slot in filled {
        match agreed(held, slot) {
            Some(adapter) => resident.slots.push((slot, adapter)),
            None => resident.stale.push(slot),
        }
    }
    resident
}

/// The adapter that all ranks hold in a slot.
fn agreed(held: &[Held], slot: u32) -> Option<Adapter> {
    let mut agreed: Option<Adapter> = None;
    for held in held {
        let (_, adapter) = held.slots.iter().find(|(at, _)| *at == slot)?;
        let so_far = agreed.get_or_insert(*adapter);
        if so_far.key != adapter.key {
            return None;
        }
        so_far.bytes = so_far.bytes.max(adapter.bytes);
    }
    agreed
}

/// The adapters that all ranks have in host memory, in the order of rank 0.
fn in_host_memory(held: &[Held]) -> Vec<(AdapterKey, Staged)> {
    let Some((first, others)) = held.split_first() else { return Vec::new() };
    let others: Vec<HashMap<AdapterKey, &Staged>> =
        others.iter().map(|held| held.host.iter().map(|(key, staged)| (*key, staged)).collect()).collect();
    let on_all = |(key, staged): &(AdapterKey, Staged)| {
        let mut all = staged.clone();
        for (rank, other) in (1..).zip(&others) {
            all = larger(all, rank, other.get(key)?).ok()?;
        }
        Some((*key, all))
    };
    first.host.iter().filter_map(on_all).collect()
}
