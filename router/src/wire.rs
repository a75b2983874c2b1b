//! Between messages and our own types: nothing else but `ranks.rs` knows the former.

use config::RouterConfig;
use sampling::SamplingParams;
use scheduler::{Adapter, AdapterKey, Added, Limits, RowsPlan, StepPlan};

use crate::generation::Scored;

/// What the shards serve and what fits.
#[derive(Debug, Clone)]
pub(crate) struct Info {
    pub(crate) dtype: String,
    pub(crate) device: String,
    pub(crate) vocab_size: u32,
    pub(crate) max_positions: u32,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) num_blocks: u32,
    pub(crate) block_size: u32,
    pub(crate) num_slots: u32,
    pub(crate) adapter_bytes: u64,
    pub(crate) max_rows: u32,
    pub(crate) max_sequences: u32,
    pub(crate) max_logit_rows: u32,
}

impl From<proto::InfoResponse> for Info {
    fn from(info: proto::InfoResponse) -> Info {
        Info {
            dtype: info.dtype,
            device: info.device,
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
        }
    }
}

impl Info {
    /// Most tokens of prompt and output together: the model has a position for each, and KV memory for all but the last,
    /// which is never computed with.
    pub(crate) fn max_total_tokens(&self) -> usize {
        let held = u64::from(self.num_blocks) * u64::from(self.block_size);
        u64::from(self.max_positions).min(held + 1) as usize
    }

    /// What the scheduler plans with.
    pub(crate) fn limits(&self, config: &RouterConfig) -> Limits {
        let most = |tokens| u32::try_from(tokens).unwrap_or(u32::MAX).clamp(1, self.max_rows);
        Limits {
            num_blocks: self.num_blocks,
            block_size: self.block_size,
            num_slots: self.num_slots,
            adapter_bytes: self.adapter_bytes,
            max_rows: self.max_rows,
            max_sequences: self.max_sequences,
            max_logit_rows: self.max_logit_rows,
            max_prefill_rows: config.max_batch_prefill_tokens.map(most),
            prefix_caching: config.prefix_caching,
        }
    }
}

/// A step's message. `sampling` gives what an added sequence needs beside its plan.
pub(crate) fn step<'a>(
    plan: StepPlan,
    sampling: impl Fn(&Added) -> Option<(&'a SamplingParams, bool)>,
) -> proto::Step {
    let added = plan.added.into_iter().map(|added| {
        let (params, prompt_logprobs) =
            sampling(&added).map_or((None, false), |(params, flag)| (Some(params), flag));
        proto::NewSequence {
            sequence: added.id.0,
            tokens: added.tokens,
            prompt_len: added.prompt_len,
            slot: added.slot,
            sampling: Some(params.map_or_else(|| message(&SamplingParams::default()), message)),
            prompt_logprobs,
        }
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
        rows: plan.rows.into_iter().map(rows).collect(),
        session: 0,
    }
}

fn rows(rows: RowsPlan) -> proto::SequenceRows {
    proto::SequenceRows {
        sequence: rows.id.0,
        position: rows.position,
        rows: rows.rows,
        new_blocks: rows.new_blocks,
        sample: rows.sample,
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
        }
    };
}

fn message(params: &SamplingParams) -> proto::Sampling {
    sampling::parameters!(sampling_message { params })
}

/// What a shard tells while it executes.
#[derive(Debug)]
pub(crate) enum Event {
    /// A step has run.
    Step(StepResult),
    /// A slot is ready, or why it is not.
    Slot { slot: u32, key: AdapterKey, error: Option<String> },
}

/// The outcome of a step.
#[derive(Debug)]
pub(crate) struct StepResult {
    pub(crate) id: u64,
    /// Sequence, token, most probable tokens.
    pub(crate) tokens: Vec<(u64, Scored, Vec<Scored>)>,
    /// Sequence, position of the first token, tokens.
    pub(crate) prompt: Vec<(u64, u32, Vec<Scored>)>,
}

/// Reads an event; `None` for what a shard of this version does not send.
pub(crate) fn event(event: proto::ExecuteEvent) -> Option<Event> {
    use proto::execute_event::Event::{Slot, Step};
    let scored = |token: proto::Token| Scored { id: token.id, logprob: token.logprob };
    match event.event? {
        Step(result) => Some(Event::Step(StepResult {
            id: result.id,
            tokens: result
                .tokens
                .into_iter()
                .filter_map(|sampled| {
                    Some((
                        sampled.sequence,
                        scored(sampled.token?),
                        sampled.top.into_iter().map(scored).collect(),
                    ))
                })
                .collect(),
            prompt: result
                .prompt
                .into_iter()
                .map(|part| {
                    let tokens = part.tokens.into_iter().filter_map(|scored| scored.token);
                    (part.sequence, part.position, tokens.map(scored).collect())
                })
                .collect(),
        })),
        Slot(slot) => Some(Event::Slot {
            slot: slot.slot,
            key: AdapterKey(slot.content.try_into().ok()?),
            error: (!slot.error.is_empty()).then_some(slot.error),
        }),
    }
}

/// A prepared adapter; `None` if the hash is none.
pub(crate) fn adapter(prepared: proto::PrepareResponse) -> Option<Adapter> {
    Some(Adapter { key: AdapterKey(prepared.content.try_into().ok()?), bytes: prepared.bytes })
}
