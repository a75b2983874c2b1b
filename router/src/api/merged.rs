//! The field `merged_adapters` of both dialects: LoRAX's, with what PEFT has besides.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    error::ApiError,
    json::{Rest, refuse},
};
use crate::{
    adapter,
    adapters::{MajoritySign, Recipe, Strategy},
};

/// The field's name.
pub(crate) const FIELD: &str = "merged_adapters";
/// Adapters of one merge.
const MAX_IDS: usize = 32;
/// The largest rank of a result that may be asked for.
const MAX_RANK: u32 = 1 << 16;

/// Adapters that are merged for a request.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct MergedAdapters {
    ids: Vec<String>,
    weights: Option<Vec<f64>>,
    merge_strategy: Option<Strategy>,
    density: Option<f64>,
    majority_sign_method: Option<MajoritySign>,
    // Beyond LoRAX's:
    svd_rank: Option<u32>,
    seed: Option<u64>,
    #[serde(flatten)]
    rest: Rest,
}

/// Refuses a request that names an adapter besides those that are to be merged, or to run together.
pub(crate) fn check_alone(own: &'static str, field: &'static str, id: Option<&str>) -> Result<(), ApiError> {
    match id.filter(|id| !adapter::is_base_model(id)) {
        None => Ok(()),
        Some(_) => Err(ApiError::invalid(own, format!("cannot be given beside an adapter in `{field}`"))),
    }
}

impl MergedAdapters {
    /// The adapters with their weights, and how they are merged.
    pub(crate) fn checked(self) -> Result<(Vec<(String, f64)>, Recipe), ApiError> {
        refuse(&self.rest, FIELD, |_, _| false)?;
        let invalid =
            |field: &str, problem: String| Err(ApiError::invalid(format!("{FIELD}.{field}"), problem));
        let ids = self.ids.len();
        if ids == 0 || ids > MAX_IDS {
            return invalid("ids", format!("must have 1 to {MAX_IDS} elements. Given: {ids}"));
        }
        let weights = self.weights.unwrap_or_else(|| vec![1.0; ids]);
        if weights.len() != ids {
            let given = weights.len();
            return invalid("weights", format!("must have as many elements as `ids`, {ids}. Given: {given}"));
        }
        let strategy = self.merge_strategy.unwrap_or_default();
        // Clients of LoRAX send a density, and be it 0, whether or not the strategy has a use for one.
        let is_density =
            |density: f64| (0.0..=1.0).contains(&density) && (density > 0.0 || !strategy.prunes());
        match self.density {
            Some(density) if !is_density(density) => {
                return invalid("density", format!("must be above 0 and at most 1. Given: {density}"));
            }
            None if strategy.prunes() => {
                return invalid("density", "must be given for this `merge_strategy`".into());
            }
            _ => {}
        }
        if let Some(rank) = self.svd_rank.filter(|rank| !(1..=MAX_RANK).contains(rank)) {
            return invalid("svd_rank", format!("must be at least 1 and at most {MAX_RANK}. Given: {rank}"));
        }
        let recipe = Recipe {
            strategy,
            density: self.density,
            majority_sign: self.majority_sign_method.unwrap_or_default(),
            svd_rank: self.svd_rank,
            seed: self.seed.unwrap_or_default(),
        };
        Ok((self.ids.into_iter().zip(weights).collect(), recipe))
    }
}
