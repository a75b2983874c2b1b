//! The modules that a merge changes: those that any of its parts changes.

use kernels::LoraShape;

use super::{MergeError, Opened, Recipe, Strategy, svd};
use crate::{
    Decoder,
    decoder::{Module, Modules},
};

/// A module that some part changes.
pub(super) struct MergedModule {
    /// The module as the served model has it.
    pub(super) module: Module,
    /// Its index in the table of modules, in whose order the changes of every adapter are.
    pub(super) index: usize,
    /// Its site and slice.
    place: (usize, usize),
    /// The rank of the result.
    pub(super) lora_rank: usize,
    /// The sum of the parts' ranks.
    pub(super) rank_sum: usize,
}

impl MergedModule {
    /// Its place and size in the result.
    pub(super) fn shape(&self) -> LoraShape {
        let ((site, slice), lora_rank) = (self.place, self.lora_rank);
        LoraShape { site, slice, lora_rank, has_magnitude: false, has_bias: false, rows: 0 }
    }

    /// Elements of A and B of the result.
    pub(super) fn elements(&self) -> usize {
        self.lora_rank * (self.module.inputs + self.module.outputs)
    }

    /// Elements of the delta.
    pub(super) fn elements_whole(&self) -> usize {
        self.module.inputs * self.module.outputs
    }

    /// Elements of A and B of all parts.
    pub(super) fn elements_read(&self) -> usize {
        self.rank_sum * (self.module.inputs + self.module.outputs)
    }
}

/// The modules that the parts change, in the order of the table. `lora_rank` is the rank of the result as a whole.
pub(super) fn merged(
    parts: &[Opened<'_>],
    recipe: &Recipe,
    lora_rank: usize,
    decoder: &Decoder,
) -> Result<Vec<MergedModule>, MergeError> {
    let mut found = Vec::new();
    for (index, module) in Modules::of(decoder).iter().enumerate() {
        let ranks = parts.iter().filter_map(|part| Some(part.delta(index)?.lora_rank));
        let Some(place) = module.place.filter(|_| ranks.clone().next().is_some()) else { continue };
        check_first(parts, index)?;
        let rank_sum: usize = ranks.clone().sum();
        let lora_rank = match recipe.strategy {
            // There are no more singular values.
            Strategy::Svd => lora_rank.min(rank_sum).min(module.inputs).min(module.outputs),
            // Pruning leaves a matrix of any rank.
            Strategy::Dense(_) => lora_rank.min(module.inputs).min(module.outputs),
            Strategy::Elementwise(_) | Strategy::Cat => recipe.lora_rank(ranks, &module.path)?,
        };
        found.push(MergedModule { module: module.clone(), index, place, lora_rank, rank_sum });
    }
    match recipe.strategy {
        Strategy::Svd => svd::check_work(&found)?,
        Strategy::Dense(_) => svd::check_whole_work(&found, recipe.strategy)?,
        Strategy::Elementwise(_) | Strategy::Cat => {}
    }
    Ok(found)
}

/// Refuses a module that the first part does not change and that PEFT would leave out: there, the first configuration's
/// filters hold for all parts.
fn check_first(parts: &[Opened<'_>], index: usize) -> Result<(), MergeError> {
    let Some((first, others)) = parts.split_first() else { return Ok(()) };
    let other = others.iter().find(|other| first.delta(index).is_none() && other.delta(index).is_some());
    let Some(other) = other else { return Ok(()) };
    let module = &first.folder.changes[index].module;
    let left_out = first.config.leaves_out(module).map_err(|source| MergeError::of(&first.name, source))?;
    let Some(field) = left_out else { return Ok(()) };
    let (first, other) = (first.name.clone(), other.name.clone());
    Err(MergeError::LeftOut { first, field, other, module: module.path.clone() })
}
