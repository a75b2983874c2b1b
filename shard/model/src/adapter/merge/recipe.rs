//! How adapters are merged: the arguments of PEFT's `add_weighted_adapter`.

use super::{MergeError, MergePart};

/// How adapters are merged.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// The strategy. A single adapter is only multiplied by its weight, as by [`Elementwise::Linear`].
    pub strategy: Strategy,
    /// The fraction of elements that pruning keeps, above 0 and at most 1. Strategies that prune nothing ignore it.
    pub density: Option<f64>,
    /// How TIES elects the sign of an element.
    pub majority_sign: MajoritySign,
    /// The rank of the result of SVD. `None`: the largest of the parts' ranks.
    pub svd_rank: Option<usize>,
    /// The seed of the elements that DARE drops.
    pub seed: u64,
}

/// A way to merge adapters. Its name is that of PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// `linear` and others: A and B are merged each for itself, element by element. The product is not the sum of the
    /// parts' deltas.
    Elementwise(Elementwise),
    /// `cat`: the exact sum. The rank is the sum of all ranks.
    Cat,
    /// `svd`: the matrix of a given rank that is closest to the sum.
    Svd,
    /// `ties_svd` and others: whole deltas are merged element by element, and the matrix of a given rank that is closest
    /// to the result is taken.
    Dense(Elementwise),
}

/// A way to merge tensors of equal shapes. All are sums of products with the square roots of weight times scale, whose
/// sign goes to A.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elementwise {
    /// `linear`: nothing else.
    Linear,
    /// `ties`: the smallest elements of each part are dropped, a sign is elected for each element, and the average of
    /// those with this sign is taken (Yadav et al., 2023).
    Ties,
    /// `dare_linear`: random elements of each part are dropped, and the others divided by the density (Yu et al.,
    /// 2023).
    DareLinear,
    /// `dare_ties`: random elements are dropped as in `dare_linear`, and the others merged as in `ties`.
    DareTies,
    /// `magnitude_prune`: the smallest elements of each part are dropped.
    MagnitudePrune,
}

/// Which sign TIES elects. 0 counts as positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// `total`: that of the sum.
    #[default]
    Total,
    /// `frequency`: that of more parts.
    Frequency,
}

impl Strategy {
    /// PEFT's name.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Elementwise(Elementwise::Linear) => "linear",
            Strategy::Elementwise(Elementwise::Ties) => "ties",
            Strategy::Elementwise(Elementwise::DareLinear) => "dare_linear",
            Strategy::Elementwise(Elementwise::DareTies) => "dare_ties",
            Strategy::Elementwise(Elementwise::MagnitudePrune) => "magnitude_prune",
            Strategy::Cat => "cat",
            Strategy::Svd | Strategy::Dense(Elementwise::Linear) => "svd",
            Strategy::Dense(Elementwise::Ties) => "ties_svd",
            Strategy::Dense(Elementwise::DareLinear) => "dare_linear_svd",
            Strategy::Dense(Elementwise::DareTies) => "dare_ties_svd",
            Strategy::Dense(Elementwise::MagnitudePrune) => "magnitude_prune_svd",
        }
    }

    fn prunes(self) -> bool {
        match self {
            Strategy::Elementwise(way) | Strategy::Dense(way) => way != Elementwise::Linear,
            Strategy::Cat | Strategy::Svd => false,
        }
    }
}

impl Recipe {
    /// The recipe for these parts. Errors: a value is out of range.
    pub(super) fn checked(&self, parts: &[MergePart]) -> Result<Recipe, MergeError> {
        if let Some(part) = parts.iter().find(|part| !part.weight.is_finite()) {
            return Err(MergeError::Weight { name: part.name.clone(), weight: part.weight });
        }
        let is_allowed = |density: f64| density > 0.0 && density <= 1.0;
        match self.density {
            None if self.strategy.prunes() => return Err(MergeError::NoDensity(self.strategy.name())),
            Some(density) if !is_allowed(density) => return Err(MergeError::Density(density)),
            _ => {}
        }
        let strategy = match parts {
            [] => return Err(MergeError::NoPart),
            [_] => Strategy::Elementwise(Elementwise::Linear),
            _ => self.strategy,
        };
        Ok(Recipe { strategy, ..self.clone() })
    }

    /// The rank that comes of these, which are those of `of`.
    pub(super) fn lora_rank(
        &self,
        ranks: impl Iterator<Item = usize> + Clone,
        of: &str,
    ) -> Result<usize, MergeError> {
        let largest = ranks.clone().max().unwrap_or(0);
        match self.strategy {
            Strategy::Cat => Ok(ranks.sum()),
            Strategy::Svd | Strategy::Dense(_) => Ok(self.svd_rank.unwrap_or(largest)),
            Strategy::Elementwise(_) if ranks.clone().all(|rank| rank == largest) => Ok(largest),
            strategy @ Strategy::Elementwise(_) => {
                Err(MergeError::Ranks { strategy: strategy.name(), of: of.into(), ranks: ranks.collect() })
            }
        }
    }
}
