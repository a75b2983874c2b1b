//! Adapters that are made of others. A merge is an adapter of a source of its own: what it is made of is its version and
//! its content, and nothing of it is fetched.

use std::time::Duration;

use blake3::Hasher;
use exchange::{Content, Fetched, Found, Version};
use serde::Deserialize;

/// Bytes that a merge is said to take before the ranks have said how many it takes.
const SMALLEST: u64 = 1;
/// Says what is hashed, so that no content of another kind is equal to one of a merge.
const CONTEXT: &str = "lorax merge of adapters, version 1";

/// How adapters are merged: the arguments of PEFT's `add_weighted_adapter`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Recipe {
    pub(crate) strategy: Strategy,
    /// The fraction of the elements that pruning keeps, if the strategy prunes.
    pub(crate) density: Option<f64>,
    pub(crate) majority_sign: MajoritySign,
    /// The rank of the result of SVD. `None`: the largest of the parts' ranks.
    pub(crate) svd_rank: Option<u32>,
    /// The seed of the elements that DARE drops.
    pub(crate) seed: u64,
}

/// PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Strategy {
    #[default]
    Linear,
    Ties,
    DareLinear,
    DareTies,
    MagnitudePrune,
    Cat,
    Svd,
    TiesSvd,
    DareLinearSvd,
    DareTiesSvd,
    MagnitudePruneSvd,
}

/// How TIES elects the sign of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MajoritySign {
    #[default]
    Total,
    Frequency,
}

impl Strategy {
    /// Whether it drops elements, so that it needs a density.
    pub(crate) fn prunes(self) -> bool {
        !matches!(self, Strategy::Linear | Strategy::Cat | Strategy::Svd)
    }

    /// Whether the rank of the result is chosen.
    fn truncates(self) -> bool {
        match self {
            Strategy::Svd
            | Strategy::TiesSvd
            | Strategy::DareLinearSvd
            | Strategy::DareTiesSvd
            | Strategy::MagnitudePruneSvd => true,
            Strategy::Linear
            | Strategy::Ties
            | Strategy::DareLinear
            | Strategy::DareTies
            | Strategy::MagnitudePrune
            | Strategy::Cat => false,
        }
    }
}

impl Recipe {
    /// The recipe for so many parts, without what has no influence on their merge. Equal merges have equal recipes.
    fn for_parts(self, parts: usize) -> Recipe {
        // PEFT only multiplies a single adapter by its weight.
        let strategy = if parts == 1 { Strategy::Linear } else { self.strategy };
        let elects = matches!(
            strategy,
            Strategy::Ties | Strategy::DareTies | Strategy::TiesSvd | Strategy::DareTiesSvd
        );
        let draws = matches!(
            strategy,
            Strategy::DareLinear | Strategy::DareTies | Strategy::DareLinearSvd | Strategy::DareTiesSvd
        );
        Recipe {
            strategy,
            density: self.density.filter(|_| strategy.prunes()),
            majority_sign: if elects { self.majority_sign } else { MajoritySign::default() },
            svd_rank: self.svd_rank.filter(|_| strategy.truncates()),
            seed: if draws { self.seed } else { 0 },
        }
    }
}

/// A part of a merge.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Part {
    /// Its name, for messages.
    pub(crate) name: String,
    pub(crate) content: Content,
    pub(crate) weight: f64,
}

/// Adapters that are merged into one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Merge {
    pub(super) parts: Vec<Part>,
    pub(super) recipe: Recipe,
}

impl Merge {
    pub(crate) fn new(parts: Vec<Part>, recipe: Recipe) -> Merge {
        let recipe = recipe.for_parts(parts.len());
        Merge { parts, recipe }
    }

    /// The names of its parts.
    pub(super) fn name(&self) -> String {
        let names: Vec<&str> = self.parts.iter().map(|part| &*part.name).collect();
        names.join(", ")
    }

    /// The hash of what it is made of, whatever names led there.
    pub(super) fn content(&self) -> Content {
        let Recipe { strategy, density, majority_sign, svd_rank, seed } = self.recipe;
        let mut hasher = Hasher::new_derive_key(CONTEXT);
        hasher.update(&[strategy as u8, majority_sign as u8]);
        // Neither 0 is a value that these may have.
        hasher.update(&density.unwrap_or(0.0).to_bits().to_le_bytes());
        hasher.update(&svd_rank.unwrap_or(0).to_le_bytes());
        hasher.update(&seed.to_le_bytes());
        for part in &self.parts {
            hasher.update(&part.content.0);
            hasher.update(&part.weight.to_bits().to_le_bytes());
        }
        Content(hasher.finalize().into())
    }

    /// The answer to the question what it is. It costs nothing.
    pub(super) fn found(&self) -> Found {
        let (version, bytes) = (Version(self.content().0), SMALLEST);
        Found { version, bytes, in_place: true, fresh_for: Duration::ZERO }
    }

    /// The answer to a fetch: there is nothing to do.
    pub(super) fn fetched(&self) -> Fetched {
        Fetched { content: self.content(), bytes: SMALLEST }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn merge(parts: &[(u8, f64)], recipe: Recipe) -> Merge {
        let part = |&(content, weight): &(u8, f64)| {
            let content = Content([content; 32]);
            Part { name: format!("{content:?}"), content, weight }
        };
        Merge::new(parts.iter().map(part).collect(), recipe)
    }

    const TIES: Recipe = Recipe {
        strategy: Strategy::Ties,
        density: Some(0.5),
        majority_sign: MajoritySign::Total,
        svd_rank: None,
        seed: 0,
    };

    #[test]
    fn whatever_makes_another_merge_gives_another_content() {
        let two = [(1, 0.5), (2, 0.5)];
        let of = |strategy| Recipe { strategy, ..TIES };
        let (dare, svd) = (of(Strategy::DareTies), of(Strategy::Svd));
        let merges = [
            merge(&two, TIES),
            merge(&[(2, 0.5), (1, 0.5)], TIES),
            merge(&[(1, 0.5), (3, 0.5)], TIES),
            merge(&[(1, 0.5), (2, -0.5)], TIES),
            merge(&[(1, 0.5), (2, 0.5_f64.next_up())], TIES),
            merge(&[(1, 0.5), (2, 0.5), (2, 0.5)], TIES),
            merge(&[(1, 0.5)], TIES),
            merge(&two, Recipe { density: Some(0.5_f64.next_up()), ..TIES }),
            merge(&two, Recipe { majority_sign: MajoritySign::Frequency, ..TIES }),
            merge(&two, dare),
            merge(&two, Recipe { seed: 1, ..dare }),
            merge(&two, Recipe { majority_sign: MajoritySign::Frequency, ..dare }),
            merge(&two, of(Strategy::Linear)),
            merge(&two, of(Strategy::DareLinear)),
            merge(&two, of(Strategy::MagnitudePrune)),
            merge(&two, of(Strategy::Cat)),
            merge(&two, svd),
            merge(&two, Recipe { svd_rank: Some(1), ..svd }),
        ];
        let contents: BTreeSet<Content> = merges.iter().map(Merge::content).collect();
        assert_eq!(contents.len(), merges.len());
        assert!(!contents.contains(&Content([1; 32])));
    }

    #[test]
    fn what_has_no_influence_is_no_part_of_the_content() {
        let two = [(1, 0.5), (2, 0.5)];
        let of = |strategy| Recipe { strategy, ..TIES };
        let others = |recipe: Recipe| Recipe { density: Some(0.1), svd_rank: Some(3), seed: 9, ..recipe };
        for strategy in [Strategy::Linear, Strategy::Cat] {
            let changed = Recipe { majority_sign: MajoritySign::Frequency, ..others(of(strategy)) };
            assert_eq!(merge(&two, of(strategy)).content(), merge(&two, changed).content());
        }
        let changed = Recipe { density: TIES.density, ..others(TIES) };
        assert_eq!(merge(&two, TIES).content(), merge(&two, changed).content());
        let prune = of(Strategy::MagnitudePrune);
        let changed =
            Recipe { density: prune.density, majority_sign: MajoritySign::Frequency, ..others(prune) };
        assert_eq!(merge(&two, prune).content(), merge(&two, changed).content());
        let svd = of(Strategy::Svd);
        let changed = Recipe { svd_rank: None, majority_sign: MajoritySign::Frequency, ..others(svd) };
        assert_eq!(merge(&two, svd).content(), merge(&two, changed).content());
        // A single adapter is multiplied by its weight, whatever the strategy is.
        let one = [(1, 0.5)];
        for strategy in [Strategy::Ties, Strategy::DareTies, Strategy::Cat, Strategy::Svd] {
            assert_eq!(merge(&one, of(strategy)).content(), merge(&one, of(Strategy::Linear)).content());
        }
        let mut renamed = merge(&two, TIES);
        renamed.parts[0].name = "another".into();
        assert_eq!(renamed.content(), merge(&two, TIES).content());
    }
}
