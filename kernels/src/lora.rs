//! Low-rank deltas as the backends see them: sites that they attach to, and the parts that they are made of.

use crate::{Error, Result};

/// One linear operation that low-rank deltas can attach to. A fused projection (q, k, v or gate, up) is one site with
/// several slices: all slices read the same input, each writes its own range of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraSite {
    /// Width of the input.
    pub inputs: usize,
    /// Width of each slice of the output, in order.
    pub outputs: Vec<usize>,
}

/// The delta of one slice of one site: `y += x · Aᵀ · Bᵀ`.
#[derive(Debug, Clone)]
pub struct LoraPart {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// Rows of A, columns of B. Any from 1.
    pub lora_rank: usize,
    /// A, row-major `[lora_rank, inputs]`.
    pub a: Vec<f32>,
    /// B with the adapter's scale folded in, row-major `[outputs[slice], lora_rank]`.
    pub b: Vec<f32>,
}

impl LoraPart {
    /// Its place and size.
    pub fn shape(&self) -> LoraShape {
        LoraShape { site: self.site, slice: self.slice, lora_rank: self.lora_rank }
    }
}

/// Place and size of a [`LoraPart`], which is all that the memory it takes depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraShape {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// Rows of A, columns of B.
    pub lora_rank: usize,
}

impl LoraShape {
    /// Inputs and outputs of the slice. Errors: there is no such slice, or no rank.
    pub(crate) fn of(self, sites: &[LoraSite]) -> Result<[usize; 2]> {
        let op = "stage";
        let outside = |what, index, limit| Error::Index { op, what, index, limit };
        let site = sites.get(self.site).ok_or(outside("site", self.site, sites.len()))?;
        let outputs = site.outputs.get(self.slice).ok_or(outside("slice", self.slice, site.outputs.len()))?;
        if self.lora_rank == 0 {
            return Err(Error::Shape { op, what: "ranks above 0", got: 0, expected: 1 });
        }
        Ok([site.inputs, *outputs])
    }
}

impl LoraPart {
    /// Refuses a part without a place among the sites, or of another number of elements than its shape has.
    pub(crate) fn check(&self, sites: &[LoraSite]) -> Result<()> {
        let [inputs, outputs] = self.shape().of(sites)?;
        for (what, got, expected) in [
            ("elements of A", self.a.len(), self.lora_rank * inputs),
            ("elements of B", self.b.len(), self.lora_rank * outputs),
        ] {
            if got != expected {
                return Err(Error::Shape { op: "stage", what, got, expected });
            }
        }
        Ok(())
    }
}
