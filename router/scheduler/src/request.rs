//! Requests, adapters, tenants and limits: the caller's side of the scheduler.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use crate::RopeScaling;

/// Names one request to the caller and on the wire. Must be unique among the requests that have not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// The hash of an adapter's content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterKey(pub [u8; 32]);

impl fmt::Debug for AdapterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An adapter that the shards have staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adapter {
    /// Its identity.
    pub key: AdapterKey,
    /// Bytes that it takes in a device slot.
    pub bytes: u64,
}

/// The adapters of a request: none for the base model, one, or several whose deltas are added.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Adapters {
    list: Arc<[Adapter]>,
    variant: Option<AdapterKey>,
}

impl Adapters {
    /// Adapters that run together. `variant` names what is made of the model: the adapters, their order and their weights.
    /// An adapter that is in the list twice counts once.
    pub fn ensemble(variant: AdapterKey, members: &[Adapter]) -> Self {
        let first =
            |(i, adapter): &(usize, &Adapter)| members[..*i].iter().all(|other| other.key != adapter.key);
        let list = members.iter().enumerate().filter(first).map(|(_, adapter)| *adapter).collect();
        Self { list, variant: Some(variant) }
    }

    /// The adapters, each once.
    pub fn list(&self) -> &[Adapter] {
        &self.list
    }

    /// Names what they make of the model; `None` for the base model. For an adapter alone, this is its key.
    pub fn variant(&self) -> Option<AdapterKey> {
        self.variant
    }

    /// The keys of the adapters.
    pub fn keys(&self) -> impl Iterator<Item = AdapterKey> + '_ {
        self.list.iter().map(|adapter| adapter.key)
    }

    /// Whether the adapter is one of them.
    pub fn contains(&self, key: AdapterKey) -> bool {
        self.keys().any(|own| own == key)
    }

    /// Bytes that they take in slots.
    pub(crate) fn bytes(&self) -> u64 {
        self.list.iter().fold(0, |sum, adapter| sum.saturating_add(adapter.bytes))
    }
}

impl From<Option<Adapter>> for Adapters {
    fn from(adapter: Option<Adapter>) -> Self {
        Self { list: adapter.into_iter().collect(), variant: adapter.map(|adapter| adapter.key) }
    }
}

/// The party that a request is served for. Tenants share the server in proportion to their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenant {
    /// Its identity.
    pub id: u64,
    /// Its share of the work while others wait, relative to their weights: from 1 to 65,536, and what is outside
    /// counts as the nearest of these. The weight of the tenant's latest request holds.
    pub weight: u32,
}

/// Separates the prefix cache: requests share KV blocks only if their salts are equal, and the adapters that act on these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct CacheSalt(pub u128);

/// Names requests with the same prompt that come together, such as the choices of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u64);

/// One sequence to generate or to score. The scheduler hands `payload` on to the shards' step and never looks at it.
#[derive(Debug, Clone)]
pub struct Request<P> {
    /// Its name.
    pub id: RequestId,
    /// The tenant that it runs for. Together with the list of adapters, this is the flow that it belongs to.
    pub tenant: Tenant,
    /// It runs when all of them are in slots.
    pub adapters: Adapters,
    /// The position from which on the adapters act. What comes before is the base model's, and shares its KV blocks.
    pub adapters_from: u32,
    /// The salt of its prefixes in the prefix cache.
    pub salt: CacheSalt,
    /// At least one token.
    pub prompt: Arc<[u32]>,
    /// Generation ends with [`Finish::Length`](crate::Finish::Length) after this many tokens. 0 computes the prompt's
    /// log-probabilities or its hidden states and generates nothing; one of these must be asked for then.
    pub max_new_tokens: u32,
    /// Generation ends with [`Finish::StopToken`](crate::Finish::StopToken) at any of these. Empty to ignore them.
    pub stop_ids: Arc<[u32]>,
    /// Log-probabilities of the prompt are wanted, so every position must be computed: no prefix of it comes from the
    /// cache, and every row of it counts against [`Limits::max_logit_rows`]. After a preemption they are computed,
    /// and reported, once more.
    pub prompt_logprobs: bool,
    /// The requests of a group have the same prompt, adapter and salt. One of them computes the prompt, and the others
    /// begin when that has been done, with its full KV blocks, whether or not there is
    /// [`Limits::prefix_caching`]. Every request with `prompt_logprobs` computes its own.
    pub group: Option<GroupId>,
    /// Hidden states of the prompt are wanted, also that of its last token, and nothing is generated: `max_new_tokens` must
    /// be 0. Otherwise as for `prompt_logprobs`.
    pub hidden_states: bool,
    /// The caller's own data, which [`Added`](crate::Added) carries. It is cloned every time that the sequence is
    /// added.
    pub payload: P,
}

/// The capacity of the shards, and the switches of the policy. All must be at least 1 unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Blocks of KV memory.
    pub num_blocks: u32,
    /// Token positions in a block.
    pub block_size: u32,
    /// Adapter slots; 0 to refuse adapters.
    pub num_slots: u32,
    /// Bytes that the adapters in slots may take together; 0 for no bound.
    pub adapter_bytes: u64,
    /// An adapter that has used its slot for so long leaves it to others that wait, and one that has waited so long gets a
    /// slot out of turn.
    pub adapter_cycle_time: Duration,
    /// Rows in a step.
    pub max_rows: u32,
    /// Sequences that run at the same time.
    pub max_sequences: u32,
    /// Rows of a step whose logits are computed: sampled ones, and all of a request with `prompt_logprobs`.
    pub max_logit_rows: u32,
    /// Tokens that the sequences added in one step have together, so that its message stays below the size that the
    /// transport allows. One sequence is always added, however long it is.
    pub max_added_tokens: u32,
    /// An upper bound for the prompt rows of a step. The scheduler plans fewer while the load allows, because the time
    /// between two tokens of a running sequence grows with them.
    pub max_prefill_rows: Option<u32>,
    /// Reuse the KV blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Positions whose blocks a row needs, its own included; 0 for all before it.
    pub kv_window: u32,
    /// How rotary frequencies follow the length of a sequence.
    pub rope: RopeScaling,
    /// Whether rows attend to rows behind them. All rows of a sequence are in one step then, and nothing is generated.
    pub bidirectional: bool,
}

impl Limits {
    /// Sequences that may run at the same time: each can have its decode row in every step.
    pub(crate) fn seats(&self) -> usize {
        self.max_sequences.min(self.max_rows).min(self.max_logit_rows) as usize
    }

    /// Rows of a sequence whose rows must all be in one step.
    pub(crate) fn most_rows_at_once(&self) -> usize {
        self.max_rows.min(self.max_logit_rows) as usize
    }

    /// Prompt rows that a step may have at most.
    pub(crate) fn most_prefill_rows(&self) -> usize {
        self.max_prefill_rows.unwrap_or(self.max_rows) as usize
    }

    /// Blocks that hold `positions` token positions.
    pub(crate) fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_size as usize)
    }

    /// Blocks of so many known tokens that can be taken from another sequence. The last token is always computed,
    /// because its row gives the next one.
    pub(crate) fn reusable_blocks(&self, known: usize) -> usize {
        known.saturating_sub(1) / self.block_size as usize
    }

    /// The first block that a row at a position needs, and all rows behind it.
    pub(crate) fn first_block(&self, position: usize) -> usize {
        match self.kv_window {
            0 => 0,
            window => (position + 1).saturating_sub(window as usize) / self.block_size as usize,
        }
    }

    /// Blocks that a sequence holds at once, at most, while its steps have up to so many rows.
    pub(crate) fn most_blocks(&self, rows: usize) -> usize {
        let most = self.num_blocks as usize;
        most_blocks(self.kv_window, self.block_size, rows).map_or(most, |blocks| blocks.min(most))
    }

    /// Panics unless steps can be planned within the limits.
    pub(crate) fn assert_positive(&self) {
        let positive = [
            self.num_blocks,
            self.block_size,
            self.max_rows,
            self.max_sequences,
            self.max_logit_rows,
            self.max_added_tokens,
            self.max_prefill_rows.unwrap_or(1),
        ];
        assert!(positive.iter().all(|&limit| limit > 0), "a limit is zero: {self:?}");
    }
}

/// Positions that one sequence can fill, given the KV memory that there is: any number if its window fits.
pub fn kv_positions(num_blocks: u32, block_size: u32, kv_window: u32) -> u64 {
    match most_blocks(kv_window, block_size, 1) {
        Some(blocks) if blocks <= num_blocks as usize => u64::MAX,
        _ => u64::from(num_blocks) * u64::from(block_size),
    }
}

/// Blocks that hold the window of the first of `rows` rows and the rows themselves, wherever blocks begin; `None`
/// without a window.
fn most_blocks(kv_window: u32, block_size: u32, rows: usize) -> Option<usize> {
    let (window, size) = (kv_window as usize, block_size as usize);
    (window > 0).then(|| (window + rows + size - 3) / size + 1)
}

/// The reason that a request can never run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubmitError {
    /// The prompt has no token.
    EmptyPrompt,
    /// Neither new tokens nor log-probabilities or hidden states of the prompt are asked for.
    NothingToCompute,
    /// Both hidden states and new tokens are asked for.
    TokensAndHiddenStates,
    /// A request of this name has not ended.
    DuplicateId(RequestId),
    /// Prompt and output need more KV memory than there is.
    TooLong {
        /// Token positions that it would fill.
        positions: u64,
        /// Token positions that there are.
        capacity: u64,
    },
    /// All of its rows must be in one step, which has fewer.
    TooManyRows {
        /// Its rows.
        rows: usize,
        /// Rows that a step can have.
        limit: usize,
    },
    /// It names an adapter, and there is no slot for any.
    NoSlots,
    /// It names more adapters than there are slots.
    TooManyAdapters {
        /// The adapters.
        adapters: usize,
        /// The slots.
        slots: u32,
    },
    /// Its adapters are larger than the memory for adapters.
    AdapterTooLarge {
        /// Bytes of the adapters.
        bytes: u64,
        /// Bytes that all adapters may take together.
        limit: u64,
    },
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyPrompt => write!(f, "the prompt has no tokens"),
            Self::NothingToCompute => {
                write!(f, "neither new tokens nor log-probabilities of the prompt are asked for")
            }
            Self::TokensAndHiddenStates => write!(f, "both new tokens and hidden states are asked for"),
            Self::DuplicateId(RequestId(id)) => write!(f, "request {id} has not ended yet"),
            Self::TooLong { positions, capacity } => {
                write!(f, "prompt and output fill {positions} positions of KV memory, which has {capacity}")
            }
            Self::TooManyRows { rows, limit } => {
                write!(f, "the {rows} tokens must be computed in one step, which has {limit} rows")
            }
            Self::NoSlots => write!(f, "this server has no adapter slots"),
            Self::TooManyAdapters { adapters, slots } => {
                write!(
                    f,
                    "{adapters} adapters are to run together, and this server has {slots} adapter slots"
                )
            }
            Self::AdapterTooLarge { bytes, limit } => {
                write!(
                    f,
                    "the request takes {bytes} bytes of adapters, and the memory for adapters has {limit}"
                )
            }
        }
    }
}

impl Error for SubmitError {}
