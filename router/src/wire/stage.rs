//! Adapters on their way into host memory.

use std::path::PathBuf;

use scheduler::AdapterKey;
use sources::Stamp;

use super::{WireError, key};
use crate::adapters::{MajoritySign, Recipe, Strategy};

/// An adapter that the ranks are to copy into host memory.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StageOrder {
    /// The hash of its content, by which it is known from here on.
    pub(crate) content: AdapterKey,
    /// Its name, for messages.
    pub(crate) name: String,
    /// Where its files are.
    pub(crate) parts: Vec<AdapterPart>,
    /// How its parts are merged. `None`: there is one part, which is the adapter as it is.
    pub(crate) merge: Option<Recipe>,
    /// Bytes that are reserved for it on each rank. If it takes more, it is not read.
    pub(crate) max_bytes: u64,
}

/// A folder with the files of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdapterPart {
    /// Its name in a merge, for messages.
    pub(crate) name: String,
    /// Its absolute path.
    pub(crate) folder: PathBuf,
    /// The configuration and the file with the tensors.
    pub(crate) files: Vec<AdapterFile>,
    /// Its weight in a merge.
    pub(crate) weight: f64,
}

impl AdapterPart {
    /// The part of an adapter that is not merged.
    pub(crate) fn new(folder: PathBuf, files: Vec<AdapterFile>) -> AdapterPart {
        AdapterPart { name: String::new(), folder, files, weight: 1.0 }
    }
}

/// A file of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AdapterFile {
    /// Its path in the folder.
    pub(crate) name: String,
    /// What it was when its content was hashed; `None` for files that never change.
    pub(crate) stamp: Option<Stamp>,
}

/// The answer to a [`StageOrder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StageAnswer {
    /// The adapter is in host memory.
    Staged(Staged),
    /// It takes so many bytes, which are more than the order's bound. Nothing was read but its headers.
    NeedsRoom {
        /// Bytes in host memory.
        bytes: u64,
    },
    /// A file is not there any more, or has changed since its content was hashed.
    Gone,
}

/// The properties of an adapter in host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Staged {
    /// Bytes that it takes in host memory.
    pub(crate) host_bytes: u64,
    /// Bytes that it takes in a slot.
    pub(crate) slot_bytes: u64,
    /// Its largest LoRA rank.
    pub(crate) max_lora_rank: u32,
    /// Names of the modules that it changes, distinct and sorted.
    pub(crate) sites: Vec<String>,
    /// The tokens at which it begins to act; empty if it acts from the first row on.
    pub(crate) invocation: Vec<u32>,
}

/// An order's message in a session.
pub(crate) fn request(session: u64, order: &StageOrder) -> proto::StageRequest {
    let file = |file: &AdapterFile| proto::AdapterFile {
        name: file.name.clone(),
        stamp: file.stamp.map(|stamp| proto::Stamp {
            device: stamp.device,
            inode: stamp.inode,
            size: stamp.size,
            modified_s: stamp.modified.0,
            modified_ns: stamp.modified.1,
            changed_s: stamp.changed.0,
            changed_ns: stamp.changed.1,
        }),
    };
    let part = |part: &AdapterPart| proto::AdapterPart {
        folder: part.folder.to_string_lossy().into_owned(),
        files: part.files.iter().map(file).collect(),
        weight: part.weight,
        name: part.name.clone(),
    };
    proto::StageRequest {
        session,
        content: order.content.0.to_vec(),
        name: order.name.clone(),
        parts: order.parts.iter().map(part).collect(),
        merge: order.merge.map(merge),
        max_bytes: order.max_bytes,
    }
}

fn merge(recipe: Recipe) -> proto::Merge {
    use proto::merge::{MajoritySign as Sign, Strategy as Way};
    let Recipe { strategy, density, majority_sign, svd_rank, seed } = recipe;
    let way = match strategy {
        Strategy::Linear => Way::Linear,
        Strategy::Ties => Way::Ties,
        Strategy::DareLinear => Way::DareLinear,
        Strategy::DareTies => Way::DareTies,
        Strategy::MagnitudePrune => Way::MagnitudePrune,
        Strategy::Cat => Way::Cat,
        Strategy::Svd => Way::Svd,
        Strategy::TiesSvd => Way::TiesSvd,
        Strategy::DareLinearSvd => Way::DareLinearSvd,
        Strategy::DareTiesSvd => Way::DareTiesSvd,
        Strategy::MagnitudePruneSvd => Way::MagnitudePruneSvd,
    };
    let sign = match majority_sign {
        MajoritySign::Total => Sign::Total,
        MajoritySign::Frequency => Sign::Frequency,
    };
    proto::Merge {
        strategy: way.into(),
        density,
        majority_sign: sign.into(),
        svd_rank: svd_rank.unwrap_or(0),
        seed,
    }
}

/// The message that takes an adapter out of host memory.
pub(crate) fn unstage(session: u64, content: AdapterKey) -> proto::UnstageRequest {
    proto::UnstageRequest { session, content: content.0.to_vec() }
}

/// Reads the answer of a rank.
pub(crate) fn answer(response: proto::StageResponse) -> Result<StageAnswer, WireError> {
    use proto::stage_response::Answer;
    Ok(match response.answer.ok_or(WireError::EmptyStage)? {
        Answer::Staged(staged) => StageAnswer::Staged(Staged {
            host_bytes: staged.host_bytes,
            slot_bytes: staged.slot_bytes,
            max_lora_rank: staged.max_lora_rank,
            sites: staged.sites,
            invocation: staged.invocation,
        }),
        Answer::NeedsRoom(needs) => StageAnswer::NeedsRoom { bytes: needs.host_bytes },
        Answer::Gone(_) => StageAnswer::Gone,
    })
}

/// Reads what a rank has in host memory when a session begins.
pub(super) fn held(held: proto::HeldAdapter) -> Result<(AdapterKey, Staged), WireError> {
    let staged = Staged {
        host_bytes: held.bytes,
        slot_bytes: held.slot_bytes,
        max_lora_rank: held.max_lora_rank,
        sites: held.sites,
        invocation: held.invocation,
    };
    Ok((key(held.content)?, staged))
}
