//! Converts messages of the wire to and from the shard's own types, and its errors to gRPC statuses.

mod stage;

use kernels::{Ban, Sampled, SamplingParams, TokenMask};
use model::adapter::ContentHash;
use proto as wire;
use proto::ScoredToken;
use tonic::Status;

use crate::{
    engine::{Heartbeat, Held, StepError},
    step::{
        self, Event, Info, Mask, Member, NewSequence, Output, Pooling, PoolingKind, Refusal, Request, Rows,
        SessionEvent, Step, StepResult, Task,
    },
};
pub(crate) use stage::{stage_order, stage_response, stage_status, unstage_content};

pub(crate) fn info(info: Info) -> wire::InfoResponse {
    let (task, labels) = match info.task {
        Task::Generate => (wire::Task::Generate, Vec::new()),
        Task::Embed => (wire::Task::Embed, Vec::new()),
        Task::Classify { sequences: true, labels } => (wire::Task::ClassifySequences, labels),
        Task::Classify { sequences: false, labels } => (wire::Task::ClassifyTokens, labels),
    };
    wire::InfoResponse {
        dtype: info.dtype,
        device: info.device,
        rank: info.rank,
        world: info.world,
        vocab_size: info.vocab_size,
        max_positions: info.max_positions,
        eos_token_ids: info.eos_token_ids,
        num_blocks: info.num_blocks,
        block_size: info.block_size,
        num_slots: info.num_slots,
        adapter_bytes: info.adapter_bytes,
        max_rows: info.max_rows,
        max_sequences: info.max_sequences,
        max_logit_rows: info.max_logit_rows,
        longest_step_us: info.longest_step_us,
        kv_window: info.kv_window,
        rope_switch: info.rope_switch,
        rope_dynamic: info.rope_dynamic,
        hidden_size: info.hidden_size,
        task: task.into(),
        labels,
        bidirectional: info.bidirectional,
    }
}

/// Converts a message of the Execute stream. `vocab` is the number of tokens that a mask covers.
pub(crate) fn request(request: wire::ExecuteRequest, vocab: u32) -> Result<Request, StepError> {
    use wire::execute_request::Request::{Masks, Step};
    match request.request {
        Some(Step(message)) => Ok(Request::Step(Box::new(step(message, vocab)?))),
        Some(Masks(message)) => Ok(Request::Masks(step::Masks {
            session: message.session,
            step: message.step,
            masks: masks(message.masks, vocab)?,
        })),
        None => Err(StepError::Unreadable("a request of an unknown kind".into())),
    }
}

fn step(step: wire::Step, vocab: u32) -> Result<Step, StepError> {
    Ok(Step {
        session: step.session,
        id: step.id,
        dropped: step.dropped,
        unload: step.unload,
        load: step
            .load
            .into_iter()
            .map(|load| Ok((load.slot, content(&load.content)?)))
            .collect::<Result<_, StepError>>()?,
        added: step.added.into_iter().map(new_sequence).collect(),
        rows: step.rows.into_iter().map(rows).collect(),
        masks: masks(step.masks, vocab)?,
    })
}

fn masks(masks: Vec<wire::Mask>, vocab: u32) -> Result<Vec<Mask>, StepError> {
    let (vocab, expected) = (vocab as usize, vocab.div_ceil(8) as usize);
    let mask = |mut mask: wire::Mask| match mask.allowed.len() {
        got if got > 0 && got != expected => Err(StepError::Mask { got, expected }),
        got => {
            if got == 0 {
                mask.allowed.resize(expected, u8::MAX);
            }
            // Tokens that only an adapter has are not allowed either.
            if let Some(last) = mask.allowed.last_mut().filter(|_| !vocab.is_multiple_of(8)) {
                *last &= (1 << (vocab % 8)) - 1;
            }
            let allowed = TokenMask::new(&mask.allowed, vocab + model::ADDED_TOKENS);
            Ok(Mask { sequence: mask.sequence, row: mask.row as usize, allowed })
        }
    };
    masks.into_iter().map(mask).collect()
}

fn content(bytes: &[u8]) -> Result<ContentHash, StepError> {
    bytes.try_into().map(ContentHash).map_err(|_| StepError::ContentHash(bytes.len()))
}

fn new_sequence(new: wire::NewSequence) -> NewSequence {
    NewSequence {
        sequence: new.sequence,
        tokens: new.tokens,
        prompt_len: new.prompt_len as usize,
        members: new
            .members
            .into_iter()
            .map(|member| Member { slot: member.slot, weight: member.weight })
            .collect(),
        members_from: new.members_from as usize,
        sampling: new.sampling.map(sampling_params).unwrap_or_default(),
        prompt_logprobs: new.prompt_logprobs,
        pooling: new.pooling.map(pooling),
    }
}

fn pooling(message: wire::Pooling) -> Pooling {
    let kind = match message.kind() {
        wire::pooling::Kind::None => PoolingKind::None,
        wire::pooling::Kind::First => PoolingKind::First,
        wire::pooling::Kind::Last => PoolingKind::Last,
        wire::pooling::Kind::Mean => PoolingKind::Mean,
    };
    Pooling { kind, normalize: message.normalize, classes: message.classes }
}

macro_rules! sampling_params {
    ({ $message:ident } $($(#[$doc:meta])* $name:ident: $type:ty { $($row:tt)* })*) => {
        SamplingParams {
            $($name: $message.$name,)*
            seed: $message.seed,
            num_top: $message.num_top,
            logit_bias: $message.logit_bias.into_iter().map(|bias| (bias.token, bias.bias)).collect(),
            bans: $message.bans.into_iter().map(|ban| Ban { token: ban.token, until: ban.until }).collect(),
        }
    };
}

fn sampling_params(message: wire::Sampling) -> SamplingParams {
    sampling::parameters!(sampling_params { message })
}

fn rows(rows: wire::SequenceRows) -> Rows {
    Rows {
        sequence: rows.sequence,
        position: rows.position as usize,
        rows: rows.rows as usize,
        new_blocks: rows.new_blocks,
        sample: rows.sample as usize,
        released_blocks: rows.released_blocks as usize,
        tokens: rows.tokens,
        masked: rows.masked,
    }
}

pub(crate) fn event(SessionEvent { session, event }: SessionEvent) -> wire::ExecuteEvent {
    use wire::execute_event::Event::{Slot, Step};
    let event = match event {
        Event::Step(result) => Step(step_result(result)),
        Event::Slot { slot, content, error } => {
            Slot(wire::SlotEvent { slot, content: content.0.to_vec(), error: error.unwrap_or_default() })
        }
    };
    wire::ExecuteEvent { event: Some(event), session }
}

pub(crate) fn held(held: Held) -> wire::AttachResponse {
    let slots = held.slots.into_iter().map(|(slot, content, bytes)| wire::FilledSlot {
        slot,
        content: content.0.to_vec(),
        bytes: bytes as u64,
    });
    let host = held.host.iter().map(|held| wire::HeldAdapter {
        content: held.content.0.to_vec(),
        bytes: held.host_bytes as u64,
        slot_bytes: held.slot_bytes as u64,
        max_lora_rank: held.max_lora_rank as u32,
        sites: held.sites.clone(),
        invocation: held.invocation.clone(),
    });
    wire::AttachResponse { slots: slots.collect(), host: host.collect() }
}

pub(crate) fn health(heartbeat: &Heartbeat) -> wire::HealthResponse {
    let oldest_ms = heartbeat.oldest().map(|age| age.as_millis() as u64);
    wire::HealthResponse { turns: heartbeat.turns(), oldest_ms }
}

fn step_result(result: StepResult) -> wire::StepResult {
    let mut message = wire::StepResult {
        id: result.id,
        duration_us: result.duration_us,
        refused: result.refused.into_iter().map(refused).collect(),
        ..wire::StepResult::default()
    };
    for output in result.outputs {
        match output {
            Output::Token { sequence, sampled } => {
                let ScoredToken { token, top } = scored_token(sampled);
                message.tokens.push(wire::Sampled { sequence, token, top });
            }
            Output::PromptScores { sequence, position, tokens } => {
                let tokens = tokens.into_iter().map(scored_token).collect();
                message.prompt.push(wire::PromptLogprobs { sequence, position: position as u32, tokens });
            }
            Output::HiddenStates { sequence, position, values } => {
                message.hidden.push(wire::HiddenStates { sequence, position: position as u32, values });
            }
            Output::Pooled { sequence, values } => {
                message.pooled.push(wire::PooledVector { sequence, values });
            }
        }
    }
    message
}

fn scored_token(sampled: Sampled) -> ScoredToken {
    let token = |(id, logprob)| wire::Token { id, logprob };
    ScoredToken {
        token: Some(token((sampled.token, sampled.logprob))),
        top: sampled.top.into_iter().map(token).collect(),
    }
}

fn refused(refusal: Refusal) -> wire::Refused {
    wire::Refused { sequence: refusal.sequence, reason: refusal.reason }
}

pub(crate) fn step_status(error: &StepError) -> Status {
    let message = error.to_string();
    match error {
        StepError::NoSession
        | StepError::SecondStream(_)
        | StepError::OtherSession { .. }
        | StepError::NotConsecutive { .. } => Status::failed_precondition(message),
        StepError::UnknownSequence(_)
        | StepError::DuplicateSequence(_)
        | StepError::OutOfRange { .. }
        | StepError::NoBlock { .. }
        | StepError::ReleasedBlock { .. }
        | StepError::GivenPrompt { .. }
        | StepError::UnknownToken { .. }
        | StepError::Mask { .. }
        | StepError::Partial { .. }
        | StepError::SlotNotReady(_)
        | StepError::ContentHash(_)
        | StepError::Unreadable(_)
        | StepError::Rows(_) => Status::invalid_argument(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets one parameter of a message at a time to its example, and checks that it is read as that.
    macro_rules! check_each {
        ({} $(
            $(#[$doc:meta])*
            $name:ident: $type:ty { off: $off:expr, default: $default:expr, draws: $draws:expr, range: $range:ident($($bound:expr),*), example: $example:expr }
        )*) => { $({
            let message = wire::Sampling { $name: $example, ..wire::Sampling::default() };
            let params = sampling_params(message);
            assert_eq!(params.$name, $example, "{}", stringify!($name));
        })* };
    }

    #[test]
    fn every_sampling_parameter_reaches_the_kernels() {
        sampling::parameters!(check_each {});
        let bias = wire::LogitBias { token: 7, bias: 2.5 };
        let bans = vec![wire::Ban { token: 8, until: 5 }];
        let message =
            wire::Sampling { seed: 3, num_top: 2, logit_bias: vec![bias], bans, ..wire::Sampling::default() };
        let params = sampling_params(message);
        assert_eq!((params.seed, params.num_top, params.logit_bias), (3, 2, vec![(7, 2.5)]));
        assert_eq!(params.bans, [Ban { token: 8, until: 5 }]);
    }
}
