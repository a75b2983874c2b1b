//! What adapters change, as the backends see it: sites that they attach to, and the parts that they are made of.

use crate::{DType, Error, HostTensor, Result};

/// One operation that adapters can attach to. A fused projection (q, k, v or gate, up) is one site with several slices:
/// all slices read the same input, each writes its own range of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraSite {
    /// What the operation is.
    pub kind: SiteKind,
    /// Width of the input; rows of the table of a [`SiteKind::Lookup`].
    pub inputs: usize,
    /// Width of each slice of the output, in order.
    pub outputs: Vec<usize>,
}

/// What a site's operation does with its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteKind {
    /// A product with a projection inside of a layer.
    Linear,
    /// A product with the output projection, whose rows an adapter may replace.
    Head,
    /// The embedding table: the input is a token. An adapter may replace its rows.
    Lookup,
}

impl LoraSite {
    /// A projection inside of a layer.
    pub fn linear(inputs: usize, outputs: &[usize]) -> LoraSite {
        LoraSite { kind: SiteKind::Linear, inputs, outputs: outputs.to_vec() }
    }
}

/// What an adapter changes at one slice of one site.
///
/// Semantics, for W, the slice's rows of the base weight, or what [`Self::rows`] makes of it:
/// `y = gain ∘ (x · Wᵀ + scale · x · Aᵀ · Bᵀ) + base bias + bias`, where `gain = magnitude / ‖W + scale · B · A‖`, with the
/// norm of each row, or 1 without a magnitude (DoRA: Liu et al., 2024).
#[derive(Debug, Clone)]
pub struct LoraPart {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// A and B.
    pub low_rank: Option<LowRank>,
    /// One element for each output.
    pub magnitude: Option<Vec<f32>>,
    /// One element for each output.
    pub bias: Option<Vec<f32>>,
    /// Rows of the weight that are others than the base model's.
    pub rows: Option<ReplacedRows>,
}

/// A low-rank delta: `scale · B · A`. The scale is applied in f32 to the sum.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// Rows of A, columns of B. Any from 1.
    pub rank: usize,
    /// Factor of the delta.
    pub scale: f32,
    /// A, `[rank, inputs]`.
    pub a: HostTensor<'static>,
    /// B, `[outputs[slice], rank]`.
    pub b: HostTensor<'static>,
}

/// Rows of a table or of the output projection that an adapter brings along.
#[derive(Debug, Clone)]
pub struct ReplacedRows {
    /// Which rows, ascending; None: the first `values.rows`, which are all that there are for this adapter.
    pub ids: Option<Vec<u32>>,
    /// The rows, `[ids, columns]`.
    pub values: HostTensor<'static>,
}

impl LoraPart {
    /// A low-rank delta from row-major A `[rank, inputs]` and B `[outputs, rank]`, and nothing else.
    pub fn delta((site, slice): (usize, usize), rank: usize, scale: f32, a: &[f32], b: &[f32]) -> LoraPart {
        let a = HostTensor::from_f32(rank, a.len() / rank.max(1), a);
        let b = HostTensor::from_f32(b.len() / rank.max(1), rank, b);
        let low_rank = Some(LowRank { rank, scale, a, b });
        LoraPart { site, slice, low_rank, magnitude: None, bias: None, rows: None }
    }

    /// Its place and size.
    pub fn shape(&self) -> LoraShape {
        LoraShape {
            site: self.site,
            slice: self.slice,
            lora_rank: self.low_rank.as_ref().map_or(0, |low_rank| low_rank.rank),
            has_magnitude: self.magnitude.is_some(),
            has_bias: self.bias.is_some(),
            rows: self.rows.as_ref().map_or(0, |rows| rows.values.rows),
        }
    }

    /// Refuses a part without a place among the sites, or of another number of elements than its shape has.
    pub(crate) fn check(&self, sites: &[LoraSite]) -> Result<()> {
        let [inputs, outputs] = self.shape().of(sites)?;
        let elements = |tensor: &HostTensor<'_>| tensor.data.len() / tensor.dtype.size();
        let mut expected = Vec::new();
        if let Some(LowRank { rank, a, b, .. }) = &self.low_rank {
            expected.push(("elements of A", elements(a), rank * inputs));
            expected.push(("elements of B", elements(b), rank * outputs));
        }
        if let Some(magnitude) = &self.magnitude {
            expected.push(("elements of the magnitude", magnitude.len(), outputs));
        }
        if let Some(bias) = &self.bias {
            expected.push(("elements of the bias", bias.len(), outputs));
        }
        if let Some(ReplacedRows { ids, values }) = &self.rows {
            let columns = match sites[self.site].kind {
                SiteKind::Lookup => outputs,
                SiteKind::Head | SiteKind::Linear => inputs,
            };
            expected.push(("replaced rows", ids.as_ref().map_or(values.rows, Vec::len), values.rows));
            expected.push(("elements of replaced rows", elements(values), values.rows * columns));
        }
        for (what, got, expected) in expected {
            if got != expected {
                return Err(Error::Shape { op: "stage", what, got, expected });
            }
        }
        Ok(())
    }
}

/// Place and size of a [`LoraPart`], which is all that the memory it takes depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraShape {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// Rows of A, columns of B; 0 if there are none.
    pub lora_rank: usize,
    /// Whether there is a magnitude.
    pub has_magnitude: bool,
    /// Whether there is a bias.
    pub has_bias: bool,
    /// Rows that are replaced.
    pub rows: usize,
}

impl LoraShape {
    /// That of a low-rank delta and nothing else.
    pub fn delta(site: usize, slice: usize, lora_rank: usize) -> LoraShape {
        LoraShape { site, slice, lora_rank, has_magnitude: false, has_bias: false, rows: 0 }
    }

    /// Inputs and outputs of the slice. Errors: there is no such slice, or nothing that a site of its kind can have.
    pub(crate) fn of(self, sites: &[LoraSite]) -> Result<[usize; 2]> {
        let op = "stage";
        let outside = |what, index, limit| Error::Index { op, what, index, limit };
        let site = sites.get(self.site).ok_or(outside("site", self.site, sites.len()))?;
        let outputs = site.outputs.get(self.slice).ok_or(outside("slice", self.slice, site.outputs.len()))?;
        let is_empty = self.lora_rank == 0 && self.rows == 0 && !self.has_magnitude && !self.has_bias;
        if is_empty {
            return Err(Error::Shape { op, what: "ranks above 0", got: 0, expected: 1 });
        }
        if self.rows > 0 && site.kind == SiteKind::Linear {
            return Err(Error::Shape { op, what: "replaced rows of a layer", got: self.rows, expected: 0 });
        }
        Ok([site.inputs, *outputs])
    }
}

impl HostTensor<'static> {
    /// A matrix `[rows, cols]` of f32.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> HostTensor<'static> {
        let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        HostTensor { dtype: DType::F32, rows, cols, data: data.into() }
    }
}
