//! What a merge has to know of a configuration.

use super::{AdapterConfig, file::refuse};
use crate::{adapter::AdapterError, decoder::Module};

impl AdapterConfig {
    /// Refuses what PEFT cannot merge: everything but low-rank deltas, which it refuses as well, or takes from the model
    /// or from the first adapter instead.
    pub(in crate::adapter) fn check_merge(&self) -> Result<(), AdapterError> {
        let file = &self.file;
        let has = |field, is_set: bool| {
            if is_set { refuse(field, "anything but its default, in a merge,") } else { Ok(()) }
        };
        has("use_dora", file.use_dora == Some(true))?;
        has("lora_bias", file.lora_bias == Some(true))?;
        has("init_lora_weights", file.initial()?.is_some())?;
        self.check_acts_always()?;
        file.check_deltas_alone(has)
    }

    /// The largest rank of a module.
    pub(in crate::adapter) fn largest_rank(&self) -> usize {
        self.file.rank_pattern.0.iter().map(|(_, rank)| *rank).fold(self.file.r, usize::max)
    }

    /// Whether scales are those of rsLoRA.
    pub(in crate::adapter) fn uses_rslora(&self) -> bool {
        self.file.use_rslora == Some(true)
    }

    /// The field that excludes a module, whatever the names of the targets are.
    pub(in crate::adapter) fn leaves_out(
        &self,
        module: &Module,
    ) -> Result<Option<&'static str>, AdapterError> {
        let is_linear = module.kind == crate::decoder::Kind::Linear;
        let (mut is_excluded, mut is_allowed) = (false, false);
        for path in module.paths() {
            if let Some(excluded) = &self.excluded {
                is_excluded |= excluded.matches(path, is_linear)?;
            }
            is_allowed |= self.layers.allows(path)?;
        }
        Ok(match (is_excluded, is_allowed) {
            (true, _) => Some("exclude_modules"),
            (false, false) => Some("layers_to_transform"),
            (false, true) => None,
        })
    }
}
