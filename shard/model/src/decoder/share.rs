//! The share of a model that one rank has: some heads, a part of the feed-forward networks, some rows of the output
//! projection, and everything that is not divided.

use std::{iter, ops::Range};

use kernels::{Heads, NormSpan};

use super::{Decoder, Module};
use crate::{LoadError, Result};

/// How the weight of a module is divided among ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Split {
    /// It is not: every rank has it whole.
    Whole,
    /// Every rank has some of its outputs, of each run.
    Outputs(Vec<Run>),
    /// Every rank has some of its inputs, so that the products of all ranks are to be summed.
    Inputs(Run),
    /// Every rank has the rows of some tokens.
    Tokens,
}

/// Units of which every rank has as many, such as heads. If there are fewer than ranks, several ranks have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The number of units.
    pub(crate) count: usize,
    /// The number of rows or columns of a unit.
    pub(crate) size: usize,
}

impl Run {
    fn len(self) -> usize {
        self.count * self.size
    }
}

/// The smallest share of a vocabulary whose first row is aligned.
const LARGE: usize = 256;
/// What the first row of a large share is a multiple of.
const ALIGNED: usize = 16;

/// The share of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    rank: usize,
    ranks: usize,
}

impl Share {
    /// The whole model.
    pub const WHOLE: Share = Share { rank: 0, ranks: 1 };

    /// The share of rank `rank` of `ranks`. Errors: the model cannot be divided into as many.
    pub fn of(decoder: &Decoder, rank: usize, ranks: usize) -> Result<Share> {
        let refused = |what, size| Err(LoadError::Share { what, size, ranks });
        let layer = &decoder.layers[0];
        let Heads { query, kv, .. } = decoder.heads();
        if ranks == 0 || rank >= ranks {
            return refused("ranks before this one", rank);
        }
        if !query.is_multiple_of(ranks) {
            return refused("query heads", query);
        }
        if !kv.is_multiple_of(ranks) && !ranks.is_multiple_of(kv) {
            return refused("key heads", kv);
        }
        if !layer.mlp.width.is_multiple_of(ranks) {
            return refused("columns of the feed-forward networks", layer.mlp.width);
        }
        if decoder.vocab < ranks {
            return refused("tokens", decoder.vocab);
        }
        let over_row = |(_, over)| over == NormSpan::Row;
        if ranks > 1 && decoder.layers.iter().any(|layer| layer.attention.norms.is_some_and(over_row)) {
            return refused("heads that are normed together", query);
        }
        Ok(Share { rank, ranks })
    }

    /// The most ranks, up to `at_most`, that the model can be divided into, and why it is not that many.
    pub fn most(decoder: &Decoder, at_most: usize) -> (usize, Option<LoadError>) {
        let mut refused = None;
        for ranks in (2..=at_most).rev() {
            match Share::of(decoder, 0, ranks) {
                Ok(_) => return (ranks, refused),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        (1, refused)
    }

    /// The number of ranks.
    pub fn ranks(self) -> usize {
        self.ranks
    }

    /// The heads of this share.
    pub fn heads(self, all: Heads) -> Heads {
        let of = |count| self.run(Run { count, size: 1 }).len();
        Heads { query: of(all.query), kv: of(all.kv), dim: all.dim }
    }

    /// The elements of a run.
    pub(crate) fn run(self, run: Run) -> Range<usize> {
        let start = self.rank * run.count / self.ranks;
        let end = ((self.rank + 1) * run.count / self.ranks).max(start + 1);
        start * run.size..end * run.size
    }

    /// The rows of the output projection. The last rank has those that are left, and the columns of logits for tokens
    /// that only adapters have.
    pub(crate) fn tokens(self, vocab: usize) -> Range<usize> {
        let mut each = vocab / self.ranks;
        if each >= LARGE {
            each -= each % ALIGNED;
        }
        let end = if self.rank + 1 == self.ranks { vocab } else { (self.rank + 1) * each };
        self.rank * each..end
    }

    /// The columns of logits, of which there are more than tokens of the base model.
    pub(crate) fn logits(self, decoder: &Decoder) -> Range<usize> {
        let Range { start, end } = self.tokens(decoder.vocab);
        start..if self.rank + 1 == self.ranks { decoder.logit_columns() } else { end }
    }

    /// The outputs of a module, in the order that operations expect.
    pub(crate) fn outputs(self, module: &Module) -> Vec<Range<usize>> {
        match &module.split {
            Split::Whole | Split::Inputs(_) => iter::once(0..module.outputs).collect(),
            Split::Tokens => iter::once(self.tokens(module.outputs)).collect(),
            Split::Outputs(runs) => {
                let mut first = 0;
                let ranges = runs.iter().map(|run| {
                    let Range { start, end } = self.run(*run);
                    first += run.len();
                    first - run.len() + start..first - run.len() + end
                });
                ranges.collect()
            }
        }
    }

    /// The inputs of a module.
    pub(crate) fn inputs(self, module: &Module) -> Range<usize> {
        match module.split {
            Split::Inputs(run) => self.run(run),
            Split::Whole | Split::Outputs(_) | Split::Tokens => 0..module.inputs,
        }
    }

    /// Whether this rank adds the bias of a module: of partial products only one rank may.
    pub(crate) fn adds_bias(self, module: &Module) -> bool {
        self.rank == 0 || !matches!(module.split, Split::Inputs(_))
    }
}
