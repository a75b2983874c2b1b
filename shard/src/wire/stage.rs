//! Messages about adapters in host memory.

use model::adapter::{ContentHash, Elementwise, MajoritySign, Recipe, Strategy};
use proto as wire;
use tonic::Status;

use crate::adapters::{AdapterFile, AdapterPart, StageAnswer, StageError, StageOrder, Stamp};

pub(crate) fn stage_order(request: wire::StageRequest) -> Result<StageOrder, StageError> {
    Ok(StageOrder {
        session: request.session,
        content: content(&request.content)?,
        name: request.name,
        parts: request.parts.into_iter().map(part).collect(),
        merge: request.merge.map(recipe).transpose()?,
        max_bytes: request.max_bytes,
    })
}

fn part(part: wire::AdapterPart) -> AdapterPart {
    let file = |file: wire::AdapterFile| AdapterFile { name: file.name.into(), stamp: file.stamp.map(stamp) };
    AdapterPart {
        name: part.name,
        folder: part.folder.into(),
        files: part.files.into_iter().map(file).collect(),
        weight: part.weight,
    }
}

fn recipe(merge: wire::Merge) -> Result<Recipe, StageError> {
    use wire::merge::{MajoritySign as Sign, Strategy as Way};
    let unknown = |field, value| StageError::Recipe { field, value };
    let way = Way::try_from(merge.strategy).map_err(|_| unknown("strategy", merge.strategy))?;
    let sign =
        Sign::try_from(merge.majority_sign).map_err(|_| unknown("majority_sign", merge.majority_sign))?;
    Ok(Recipe {
        strategy: match way {
            Way::Linear => Strategy::Elementwise(Elementwise::Linear),
            Way::Ties => Strategy::Elementwise(Elementwise::Ties),
            Way::DareLinear => Strategy::Elementwise(Elementwise::DareLinear),
            Way::DareTies => Strategy::Elementwise(Elementwise::DareTies),
            Way::MagnitudePrune => Strategy::Elementwise(Elementwise::MagnitudePrune),
            Way::Cat => Strategy::Cat,
            Way::Svd => Strategy::Svd,
            Way::TiesSvd => Strategy::Dense(Elementwise::Ties),
            Way::DareLinearSvd => Strategy::Dense(Elementwise::DareLinear),
            Way::DareTiesSvd => Strategy::Dense(Elementwise::DareTies),
            Way::MagnitudePruneSvd => Strategy::Dense(Elementwise::MagnitudePrune),
        },
        density: merge.density,
        majority_sign: match sign {
            Sign::Total => MajoritySign::Total,
            Sign::Frequency => MajoritySign::Frequency,
        },
        svd_rank: (merge.svd_rank > 0).then_some(merge.svd_rank as usize),
        seed: merge.seed,
    })
}

fn stamp(stamp: wire::Stamp) -> Stamp {
    Stamp {
        device: stamp.device,
        inode: stamp.inode,
        size: stamp.size,
        modified: (stamp.modified_s, stamp.modified_ns),
        changed: (stamp.changed_s, stamp.changed_ns),
    }
}

pub(crate) fn unstage_content(request: &wire::UnstageRequest) -> Result<ContentHash, StageError> {
    content(&request.content)
}

fn content(bytes: &[u8]) -> Result<ContentHash, StageError> {
    bytes.try_into().map(ContentHash).map_err(|_| StageError::ContentHash(bytes.len()))
}

pub(crate) fn stage_response(answer: StageAnswer) -> wire::StageResponse {
    use wire::stage_response::Answer;
    let answer = match answer {
        StageAnswer::Staged(staged) => Answer::Staged(wire::Staged {
            host_bytes: staged.host_bytes as u64,
            slot_bytes: staged.slot_bytes as u64,
            max_lora_rank: staged.max_lora_rank as u32,
            sites: staged.sites.clone(),
            invocation: staged.invocation.clone(),
        }),
        StageAnswer::NeedsRoom(host_bytes) => Answer::NeedsRoom(wire::NeedsRoom { host_bytes }),
        StageAnswer::Gone => Answer::Gone(wire::Gone {}),
    };
    wire::StageResponse { answer: Some(answer) }
}

pub(crate) fn stage_status(error: &StageError) -> Status {
    let message = error.to_string();
    match error {
        StageError::OtherSession { .. } => Status::failed_precondition(message),
        StageError::Slow { .. } => Status::deadline_exceeded(message),
        StageError::Interrupted { .. } => Status::internal(message),
        error if error.is_passing() => Status::unavailable(message),
        _ => Status::invalid_argument(message),
    }
}
