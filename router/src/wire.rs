//! Converts between messages and our own types. Only this module and the client of the service in `ranks` name
//! messages.
//!
//! A message that does not keep to `shard.proto` is an error: nothing is guessed for a field that is missing.

pub(crate) mod stage;

use std::{sync::Arc, time::Duration};

use config::RouterConfig;
use sampling::{Ban, SamplingParams};
use scheduler::{Adapter, AdapterKey, Limits, RequestId, RopeScaling, RowsPlan, StepPlan, kv_positions};

use self::stage::Staged;
use crate::{
    engine::Mask,
    generation::{Job, PooledRows, Pooling, PromptToken, Scored},
};

/// Tokens of the sequences that are added in one step. A token takes at most 5 bytes, so they are 50 MiB of the 64
/// MiB that a message may have.
const MAX_ADDED_TOKENS: u32 = 10 << 20;

/// A message that contradicts the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    /// An event of a kind that this version does not know.
    #[error("an event without content")]
    EmptyEvent,
    /// An answer to a stage of a kind that this version does not know.
    #[error("an answer to a stage without content")]
    EmptyStage,
    /// An adapter is named by a hash of 32 bytes.
    #[error("a content hash of {0} bytes instead of 32")]
    ContentHash(usize),
    /// A result without the token that was sampled.
    #[error("step {step} has no token for sequence {sequence}")]
    NoToken {
        /// The step.
        step: u64,
        /// The sequence.
        sequence: u64,
    },
    /// A prompt position without its token.
    #[error("step {step} has no token for position {position} of the prompt of sequence {sequence}")]
    NoPromptToken {
        /// The step.
        step: u64,
        /// The sequence.
        sequence: u64,
        /// The position.
        position: u32,
    },
}

/// The model that a rank serves, and its capacity.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Info {
    pub(crate) dtype: String,
    pub(crate) device: String,
    pub(crate) rank: u32,
    pub(crate) world: u32,
    pub(crate) vocab_size: u32,
    pub(crate) max_positions: u32,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) num_blocks: u32,
    pub(crate) block_size: u32,
    pub(crate) num_slots: u32,
    /// Bytes for adapters in slots; 0 for no bound.
    pub(crate) adapter_bytes: u64,
    pub(crate) max_rows: u32,
    pub(crate) max_sequences: u32,
    pub(crate) max_logit_rows: u32,
    /// The longest step of the warm-up; zero if none was run.
    pub(crate) longest_step: Duration,
    /// Positions whose KV blocks a row needs; 0 for all.
    pub(crate) kv_window: u32,
    /// The original context of LongRoPE; 0 without it.
    pub(crate) rope_switch: u32,
    /// The original context of dynamic NTK scaling; 0 without it.
    pub(crate) rope_dynamic: u32,
    /// Elements of a hidden state.
    pub(crate) hidden_size: u32,
    pub(crate) task: Task,
    /// Whether all rows of a sequence must be in one step.
    pub(crate) bidirectional: bool,
}

/// What the model is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Task {
    /// It generates tokens.
    Generate,
    /// It embeds texts.
    Embed,
    /// It classifies tokens, as these labels.
    ClassifyTokens(Vec<String>),
    /// It classifies texts, as these labels.
    ClassifyTexts(Vec<String>),
}

/// Reads what a model is for.
fn task(task: proto::Task, labels: Vec<String>) -> Task {
    match task {
        proto::Task::Generate => Task::Generate,
        proto::Task::Embed => Task::Embed,
        proto::Task::ClassifyTokens => Task::ClassifyTokens(labels),
        proto::Task::ClassifySequences => Task::ClassifyTexts(labels),
    }
}

impl From<proto::InfoResponse> for Info {
    fn from(info: proto::InfoResponse) -> Info {
        Info {
            task: task(info.task(), info.labels),
            hidden_size: info.hidden_size,
            bidirectional: info.bidirectional,
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
            longest_step: Duration::from_micros(info.longest_step_us),
            kv_window: info.kv_window,
            rope_switch: info.rope_switch,
            rope_dynamic: info.rope_dynamic,
        }
    }
}

impl Info {
    /// Most tokens of prompt and output together: the model has a position for each, and KV memory for all but the
    /// last, which is never computed with.
    pub(crate) fn max_total_tokens(&self) -> usize {
        let held = kv_positions(self.num_blocks, self.block_size, self.kv_window);
        u64::from(self.max_positions).min(held.saturating_add(1)) as usize
    }

    fn rope(&self) -> RopeScaling {
        match (self.rope_switch, self.rope_dynamic) {
            (0, 0) => RopeScaling::Fixed,
            (0, context) => RopeScaling::Dynamic { context },
            (context, _) => RopeScaling::Switch { context },
        }
    }

    /// The limits that the scheduler plans with.
    pub(crate) fn limits(&self, config: &RouterConfig) -> Limits {
        let most = |tokens| u32::try_from(tokens).unwrap_or(u32::MAX).clamp(1, self.max_rows);
        Limits {
            num_blocks: self.num_blocks,
            block_size: self.block_size,
            num_slots: self.num_slots,
            adapter_bytes: self.adapter_bytes,
            adapter_cycle_time: config.adapter_cycle_time_s,
            max_rows: self.max_rows,
            max_sequences: self.max_sequences,
            max_logit_rows: self.max_logit_rows,
            max_added_tokens: MAX_ADDED_TOKENS,
            max_prefill_rows: config.max_batch_prefill_tokens.map(most),
            prefix_caching: config.prefix_caching && !self.bidirectional,
            kv_window: self.kv_window,
            rope: self.rope(),
            bidirectional: self.bidirectional,
        }
    }
}

/// A step's message, of no session yet. The rows of constrained sequences have masks, which follow.
pub(crate) fn step(plan: StepPlan<Arc<Job>>, constrained: impl Fn(RequestId) -> bool) -> proto::Step {
    let added = plan.added.into_iter().map(|added| proto::NewSequence {
        sequence: added.id.0,
        tokens: [&added.prompt[..], &added.generated].concat(),
        prompt_len: added.prompt.len() as u32,
        members: members(&added.slots, &added.payload.weights),
        members_from: added.adapters_from,
        sampling: Some(message(&added.payload.sampling)),
        prompt_logprobs: added.payload.prompt_logprobs,
        pooling: added.payload.pooling.map(pooling),
    });
    proto::Step {
        id: plan.id,
        dropped: plan.dropped.into_iter().map(|id| id.0).collect(),
        unload: plan.unload,
        load: plan
            .load
            .into_iter()
            .map(|(slot, key)| proto::SlotLoad { slot, content: key.0.to_vec() })
            .collect(),
        added: added.collect(),
        rows: plan.rows.into_iter().map(|plan| rows(plan, &constrained)).collect(),
        session: 0,
        masks: Vec::new(),
    }
}

fn pooling(wanted: Pooling) -> proto::Pooling {
    use proto::pooling::Kind;
    let (kind, normalize, classes) = match wanted {
        Pooling::Vector { of, normalize } => match of {
            PooledRows::First => (Kind::First, normalize, false),
            PooledRows::Last => (Kind::Last, normalize, false),
            PooledRows::Mean => (Kind::Mean, normalize, false),
        },
        Pooling::ClassesOfTokens => (Kind::None, false, true),
        Pooling::ClassesOfText => (Kind::First, false, true),
    };
    proto::Pooling { kind: kind.into(), normalize, classes }
}

fn members(slots: &[u32], weights: &[f32]) -> Vec<proto::Member> {
    slots.iter().zip(weights).map(|(&slot, &weight)| proto::Member { slot, weight }).collect()
}

/// A step on its way to a rank.
pub(crate) fn request(step: proto::Step) -> proto::ExecuteRequest {
    proto::ExecuteRequest { request: Some(proto::execute_request::Request::Step(step)) }
}

/// The message of a step's masks, of no session yet.
pub(crate) fn masks(step: u64, masks: Vec<Mask>) -> proto::Masks {
    let mask = |mask: Mask| proto::Mask {
        sequence: mask.sequence.0,
        row: 0,
        allowed: mask.allowed.unwrap_or_default(),
    };
    proto::Masks { step, masks: masks.into_iter().map(mask).collect(), session: 0 }
}

/// Masks on their way to a rank.
pub(crate) fn masks_request(masks: proto::Masks) -> proto::ExecuteRequest {
    proto::ExecuteRequest { request: Some(proto::execute_request::Request::Masks(masks)) }
}

/// The loads into slots that a step asks for.
pub(crate) fn loads(step: &proto::Step) -> impl Iterator<Item = (u32, AdapterKey)> {
    step.load
        .iter()
        .filter_map(|load| Some((load.slot, AdapterKey(load.content.as_slice().try_into().ok()?))))
}

fn rows(rows: RowsPlan, constrained: impl Fn(RequestId) -> bool) -> proto::SequenceRows {
    proto::SequenceRows {
        sequence: rows.id.0,
        position: rows.position,
        rows: rows.rows,
        new_blocks: rows.new_blocks,
        sample: rows.sample.into(),
        released_blocks: rows.released_blocks,
        tokens: Vec::new(),
        masked: rows.sample && constrained(rows.id),
    }
}

macro_rules! sampling_message {
    ({ $params:ident } $($(#[$doc:meta])* $name:ident: $type:ty { $($row:tt)* })*) => {
        proto::Sampling {
            $($name: $params.$name,)*
            seed: $params.seed,
            num_top: $params.num_top,
            logit_bias: $params
                .logit_bias
                .iter()
                .map(|&(token, bias)| proto::LogitBias { token, bias })
                .collect(),
            bans: $params.bans.iter().map(|&Ban { token, until }| proto::Ban { token, until }).collect(),
        }
    };
}

fn message(params: &SamplingParams) -> proto::Sampling {
    sampling::parameters!(sampling_message { params })
}

/// An event that a rank reports while it executes.
#[derive(Debug)]
pub(crate) enum Event {
    /// A step has run.
    Step(StepResult),
    /// The load of an adapter into a slot has ended: the slot is ready, or `error` says why not.
    Slot { slot: u32, key: AdapterKey, error: Option<String> },
}

/// The outcome of a step.
#[derive(Debug)]
pub(crate) struct StepResult {
    pub(crate) id: u64,
    /// One for every sampled row, in the order of the step's rows.
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) prompt: Vec<PromptPart>,
    /// The results of sequences that are pooled or classified.
    pub(crate) pooled: Vec<(u64, Vec<f32>)>,
    /// Sequences that the shard cannot take, and why.
    pub(crate) refused: Vec<(u64, String)>,
    /// Duration of the pass.
    pub(crate) duration: Duration,
}

/// A sampled token.
#[derive(Debug)]
pub(crate) struct Sampled {
    pub(crate) sequence: u64,
    pub(crate) token: Scored,
    /// The most probable tokens, most probable first.
    pub(crate) top: Vec<Scored>,
}

/// Log-probabilities of tokens of a prompt at consecutive positions.
#[derive(Debug)]
pub(crate) struct PromptPart {
    pub(crate) sequence: u64,
    /// Position of the first one.
    pub(crate) position: u32,
    pub(crate) tokens: Vec<PromptToken>,
}

/// Reads an event.
pub(crate) fn event(event: proto::ExecuteEvent) -> Result<Event, WireError> {
    use proto::execute_event::Event::{Slot, Step};
    match event.event.ok_or(WireError::EmptyEvent)? {
        Step(result) => Ok(Event::Step(step_result(result)?)),
        Slot(event) => Ok(Event::Slot {
            slot: event.slot,
            key: key(event.content)?,
            error: (!event.error.is_empty()).then_some(event.error),
        }),
    }
}

fn step_result(result: proto::StepResult) -> Result<StepResult, WireError> {
    let step = result.id;
    let sampled = |sampled: proto::Sampled| {
        let sequence = sampled.sequence;
        let token = scored(sampled.token.ok_or(WireError::NoToken { step, sequence })?);
        Ok(Sampled { sequence, token, top: sampled.top.into_iter().map(scored).collect() })
    };
    let part = |part: proto::PromptLogprobs| {
        let (sequence, first) = (part.sequence, part.position);
        let token = |(position, token): (u32, proto::ScoredToken)| {
            let missing = WireError::NoPromptToken { step, sequence, position };
            Ok(PromptToken {
                token: scored(token.token.ok_or(missing)?),
                top: token.top.into_iter().map(scored).collect(),
            })
        };
        let tokens = (first..).zip(part.tokens).map(token).collect::<Result<_, _>>()?;
        Ok(PromptPart { sequence, position: first, tokens })
    };
    let hidden = result.hidden.into_iter().map(|states| (states.sequence, states.values));
    let pooled = result.pooled.into_iter().map(|vector| (vector.sequence, vector.values));
    Ok(StepResult {
        id: step,
        pooled: hidden.chain(pooled).collect(),
        tokens: result.tokens.into_iter().map(sampled).collect::<Result<_, _>>()?,
        prompt: result.prompt.into_iter().map(part).collect::<Result<_, _>>()?,
        refused: result.refused.into_iter().map(|refused| (refused.sequence, refused.reason)).collect(),
        duration: Duration::from_micros(result.duration_us),
    })
}

fn scored(token: proto::Token) -> Scored {
    Scored { id: token.id, logprob: token.logprob }
}

fn key(content: Vec<u8>) -> Result<AdapterKey, WireError> {
    content.try_into().map(AdapterKey).map_err(|content: Vec<u8>| WireError::ContentHash(content.len()))
}

/// The adapters that a rank has kept from earlier sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Adapters in slots, by slot.
    pub(crate) slots: Vec<(u32, Adapter)>,
    /// Adapters in host memory, used last told last.
    pub(crate) host: Vec<(AdapterKey, Staged)>,
}

/// Reads what a rank has kept.
pub(crate) fn held(attached: proto::AttachResponse) -> Result<Held, WireError> {
    let slot =
        |slot: proto::FilledSlot| Ok((slot.slot, Adapter { key: key(slot.content)?, bytes: slot.bytes }));
    Ok(Held {
        slots: attached.slots.into_iter().map(slot).collect::<Result<_, _>>()?,
        host: attached.host.into_iter().map(stage::held).collect::<Result<_, _>>()?,
    })
}

/// The age of the oldest work of a rank's step loop; `None` if the loop waits for work.
pub(crate) fn oldest_work(health: &proto::HealthResponse) -> Option<Duration> {
    health.oldest_ms.map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// The longest tokens, in as many sequences as a step may add, each with all else that can be told of one.
    #[test]
    fn the_largest_step_fits_into_a_message() {
        const SEQUENCES: u32 = 1024;
        let bias = vec![proto::LogitBias { token: u32::MAX, bias: 1.0 }; 1024];
        let bans = vec![proto::Ban { token: u32::MAX, until: u32::MAX }; 512];
        let sampling =
            proto::Sampling { seed: u64::MAX, logit_bias: bias, bans, ..proto::Sampling::default() };
        let added = proto::NewSequence {
            sequence: u64::MAX,
            tokens: vec![u32::MAX; (MAX_ADDED_TOKENS / SEQUENCES) as usize],
            prompt_len: u32::MAX,
            members: vec![proto::Member { slot: u32::MAX, weight: 0.5 }; 4],
            sampling: Some(sampling),
            prompt_logprobs: true,
            ..proto::NewSequence::default()
        };
        let step = proto::Step { added: vec![added; SEQUENCES as usize], ..proto::Step::default() };
        assert!(step.encoded_len() < proto::MAX_MESSAGE, "{} bytes", step.encoded_len());
    }
}
