//! Bodies of answers.

use serde::Serialize;
use sources::Reference;

/// An adapter, as it is listed. Times are seconds, dates are seconds since 1970.
#[derive(Debug, Serialize)]
pub(super) struct Adapter {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) adapter_id: String,
    pub(super) adapter_source: &'static str,
    pub(super) registered: bool,
    pub(super) created: Option<u64>,
    /// The hash of its bytes, once they have been read.
    pub(super) content: Option<String>,
    /// The nearest place where it is: `device`, `host`, `disk` or `source`.
    pub(super) tier: &'static str,
    pub(super) lora_rank: Option<u32>,
    pub(super) sites: Vec<String>,
    /// What it has of a tokenizer, once a request has needed to know.
    pub(super) text: Option<Text>,
    /// The tokens at which it begins to act; none if it acts on all of a prompt.
    pub(super) invocation: Vec<u32>,
    pub(super) bytes: Bytes,
    pub(super) pinned: bool,
    /// Pins of its content, whatever name they have.
    pub(super) pins: u32,
    pub(super) last_used: Option<u64>,
    pub(super) requests: u64,
    pub(super) running: usize,
    pub(super) tokens: u64,
    pub(super) load_seconds: LoadSeconds,
    pub(super) last_error: Option<LastError>,
    #[serde(skip)]
    pub(super) reference: Reference,
}

impl Default for Adapter {
    fn default() -> Adapter {
        Adapter {
            id: String::new(),
            object: "adapter",
            adapter_id: String::new(),
            adapter_source: "local",
            registered: false,
            created: None,
            content: None,
            tier: "source",
            lora_rank: None,
            sites: Vec::new(),
            text: None,
            invocation: Vec::new(),
            bytes: Bytes::default(),
            pinned: false,
            pins: 0,
            last_used: None,
            requests: 0,
            running: 0,
            tokens: 0,
            load_seconds: LoadSeconds::default(),
            last_error: None,
            reference: Reference { kind: sources::SourceKind::Local, id: String::new(), revision: None },
        }
    }
}

/// What an adapter has of a tokenizer.
#[derive(Debug, Default, Serialize)]
pub(super) struct Text {
    /// Whether its chats are rendered with a template of its own.
    pub(super) chat_template: bool,
    /// Tokens that the model does not have, or has by another name.
    pub(super) added_tokens: usize,
    /// Why its requests are refused.
    pub(super) error: Option<String>,
}

/// Bytes on each tier; 0 where it is not.
#[derive(Debug, Default, Serialize)]
pub(super) struct Bytes {
    pub(super) files: u64,
    pub(super) disk: u64,
    pub(super) host: u64,
    /// What it takes in a slot, whether it is in one or not.
    pub(super) slot: u64,
}

/// How long it took last.
#[derive(Debug, Default, Serialize)]
pub(super) struct LoadSeconds {
    pub(super) fetch: Option<f64>,
    pub(super) stage: Option<f64>,
    /// From the last ask until it was in host memory.
    pub(super) last_wait: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct LastError {
    pub(super) message: String,
    pub(super) at: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct List {
    pub(super) object: &'static str,
    pub(super) data: Vec<Adapter>,
}

#[derive(Debug, Serialize)]
pub(super) struct Unloaded {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) deleted: bool,
    /// Whether its copies are being removed; not while requests use them.
    pub(super) unloaded: bool,
    pub(super) running: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct Capacity {
    pub(super) device: DeviceTier,
    pub(super) host: TierUse,
    pub(super) disk: TierUse,
    pub(super) max_adapter_bytes: u64,
    pub(super) max_lora_rank: Option<u32>,
    /// Asks that wait for an adapter, and those that have one.
    pub(super) waiting: usize,
    pub(super) leased: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct DeviceTier {
    pub(super) slots: Option<u32>,
    pub(super) limit_bytes: Option<u64>,
    pub(super) adapters: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct TierUse {
    pub(super) limit_bytes: u64,
    pub(super) bytes: u64,
    pub(super) pinned_bytes: u64,
    pub(super) reserved_bytes: u64,
    pub(super) leaving_bytes: u64,
    pub(super) adapters: usize,
}
