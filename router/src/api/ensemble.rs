//! The field `ensemble` of both dialects: adapters whose deltas are added in the batch.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    error::ApiError,
    json::{Rest, refuse},
    merged::MergedAdapters,
};

/// The field's name.
pub(crate) const FIELD: &str = "ensemble";
/// Adapters of one ensemble.
const MAX_IDS: usize = 4;

/// Adapters that run together for a request.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Ensemble {
    ids: Vec<String>,
    weights: Option<Vec<f64>>,
    #[serde(flatten)]
    rest: Rest,
}

impl Ensemble {
    /// The adapters with their weights.
    pub(crate) fn checked(self) -> Result<Vec<(String, f64)>, ApiError> {
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
        // Two ids may be of one adapter, which then has the sum of their weights.
        let sum: f64 = weights.iter().map(|weight| weight.abs()).sum();
        if sum.is_nan() || sum > f64::from(f32::MAX) {
            return invalid("weights", "must have a sum that single precision can hold".into());
        }
        Ok(self.ids.into_iter().zip(weights).collect())
    }
}

/// The fields of a request that name several adapters.
pub(crate) struct Several {
    pub(crate) merged: Option<MergedAdapters>,
    pub(crate) ensemble: Option<Ensemble>,
}
