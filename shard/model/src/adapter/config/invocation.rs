//! Activated LoRA (aLoRA, Greenewald et al., 2025, arXiv 2504.12397): an adapter that begins to act at the last occurrence
//! of its invocation in the prompt. What comes before is the base model's.

use serde_json::Value;

use super::{
    AdapterConfig,
    file::{File, refuse},
};
use crate::{Decoder, adapter::AdapterError, decoder::Kind};

/// The longest invocation, which is searched for in every prompt.
const MAX_TOKENS: usize = 1024;

const FIELD: &str = "alora_invocation_tokens";

impl File {
    /// The tokens at which the adapter begins to act; empty if it acts from the first row on.
    pub(super) fn invocation(&self) -> Result<Vec<u32>, AdapterError> {
        let expected = "a list of at most 1024 token ids";
        let wrong = AdapterError::Field { field: FIELD, expected };
        let tokens = match &self.alora_invocation_tokens {
            None => return Ok(Vec::new()),
            Some(Value::Array(tokens)) if tokens.len() <= MAX_TOKENS => tokens,
            Some(_) => return Err(wrong),
        };
        let id = |token: &Value| token.as_u64().and_then(|token| u32::try_from(token).ok());
        tokens.iter().map(id).collect::<Option<_>>().ok_or(wrong)
    }

    /// Refuses what PEFT does not confine to the rows behind the invocation, or does not combine with one.
    pub(super) fn check_invocation(&self, model: &Decoder) -> Result<(), AdapterError> {
        if self.invocation()?.is_empty() {
            return Ok(());
        }
        let has = |field, is_set: bool| {
            if is_set {
                refuse(field, "anything but its default, with alora_invocation_tokens,")
            } else {
                Ok(())
            }
        };
        let is_mica = matches!(&self.init_lora_weights, Some(Value::String(way)) if way == "mica");
        has("use_dora", self.use_dora == Some(true))?;
        has("init_lora_weights", is_mica || self.initial()?.is_some())?;
        self.check_deltas_alone(has)?;
        if model.is_bidirectional() {
            return refuse(FIELD, "a list, for a model whose rows attend to those behind them,");
        }
        Ok(())
    }
}

impl AdapterConfig {
    /// The tokens at which it begins to act; empty if it acts from the first row on.
    pub(in crate::adapter) fn invocation(&self) -> &[u32] {
        &self.invocation
    }

    /// Refuses a kind of module whose deltas PEFT does not confine to the rows behind the invocation.
    pub(super) fn check_invoked(&self, kind: Kind) -> Result<(), AdapterError> {
        if self.invocation.is_empty() || kind != Kind::Lookup {
            return Ok(());
        }
        refuse(FIELD, "a list, with an embedding table among the targets,")
    }

    /// Refuses an adapter that begins at an invocation for what its tensors change beside that.
    pub(in crate::adapter) fn refuse_beside_invocation<T>(&self, other: &str) -> Result<T, AdapterError> {
        refuse(FIELD, format!("a list, of an adapter with {other},"))
    }

    /// Refuses an adapter that begins within a sequence where it is to become part of weights.
    pub(in crate::adapter) fn check_acts_always(&self) -> Result<(), AdapterError> {
        if self.invocation.is_empty() {
            return Ok(());
        }
        refuse(FIELD, "a list, in a merge,")
    }
}
