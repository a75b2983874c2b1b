//! The reasons for which adapters cannot be merged.

use kernels::DType;

use crate::adapter::AdapterError;

/// Why adapters cannot be merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There are no parts.
    #[error("a merge needs at least one adapter")]
    NoPart,
    /// A part cannot be read, or has changes that cannot be merged.
    #[error("adapter {name}, which is to be merged: {source}")]
    Part {
        /// The name of the part.
        name: String,
        /// The cause.
        source: Box<AdapterError>,
    },
    /// A weight is not finite.
    #[error("the weight of adapter {name} is {weight}")]
    Weight {
        /// The name of the part.
        name: String,
        /// Its weight.
        weight: f64,
    },
    /// The strategy needs a density.
    #[error("{0} needs a density")]
    NoDensity(&'static str),
    /// The density is out of range.
    #[error("density = {0} is not above 0 and at most 1")]
    Density(f64),
    /// The strategy cannot merge adapters of different ranks.
    #[error("{strategy} merges equal ranks only; those of {of} are {ranks:?}")]
    Ranks {
        /// The strategy.
        strategy: &'static str,
        /// What has these ranks: a module, or "all".
        of: String,
        /// The ranks of the parts, in order.
        ranks: Vec<usize>,
    },
    /// PEFT leaves a module out of the result, because the first configuration's filters hold for all parts.
    #[error("{field} of adapter {first} would leave {module} of adapter {other} out of the merge")]
    LeftOut {
        /// The name of the first part.
        first: String,
        /// The field of its configuration.
        field: &'static str,
        /// The name of a part that changes the module.
        other: String,
        /// The module.
        module: String,
    },
    /// SVD at these ranks takes too long.
    #[error("svd of ranks that add up to {ranks} takes too long; cat gives the exact sum")]
    TooMuchWork {
        /// The largest sum of the ranks of a module.
        ranks: usize,
    },
    /// SVD of whole deltas takes too long.
    #[error(
        "{strategy} decomposes whole matrices, which takes too long for this model; {of} merges A and B instead"
    )]
    TooMuchWhole {
        /// The strategy.
        strategy: &'static str,
        /// The strategy that merges A and B in the same way.
        of: &'static str,
    },
    /// The SVD of a module does not converge.
    #[error("the SVD of {0} does not converge")]
    NoSvd(String),
    /// The result is too large for the type that kernels compute with.
    #[error("the merge of {module} has values that are too large for {dtype:?}")]
    TooLarge {
        /// The module.
        module: String,
        /// The type.
        dtype: DType,
    },
    /// The result leaves the model as it is.
    #[error("the merge changes nothing: its deltas are all zero")]
    ChangesNothing,
    /// Nobody waits for the result any more.
    #[error("the merge was cancelled")]
    Cancelled,
}

impl MergeError {
    /// An error of one part.
    pub(super) fn of(name: &str, source: AdapterError) -> MergeError {
        MergeError::Part { name: name.into(), source: Box::new(source) }
    }
}
