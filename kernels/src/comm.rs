//! Collectives between the ranks of one model.

use crate::{Backend, Result};

/// Sums and gathers over all ranks. Every rank calls the same operations in the same order.
pub trait Comm<B: Backend>: Send {
    /// How many ranks there are.
    fn ranks(&self) -> usize;
    /// This one, from 0.
    fn rank(&self) -> usize;
    /// Semantics: `x = Σ over ranks of x`.
    fn all_reduce(&self, x: &mut B::Mat) -> Result<()>;
}

/// A world of one rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl<B: Backend> Comm<B> for Solo {
    fn ranks(&self) -> usize {
        1
    }

    fn rank(&self) -> usize {
        0
    }

    fn all_reduce(&self, _x: &mut B::Mat) -> Result<()> {
        Ok(())
    }
}
