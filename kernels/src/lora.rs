//! What adapters change, as the backends see it: sites that they attach to, and the parts that they are made of.

use std::ops::Range;

use crate::{DType, Error, HostTensor, Result};

/// One operation that adapters can attach to. A fused projection (q, k, v or gate, up) is one site with several slices:
/// all slices read the same input, each writes its own range of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraSite {
    /// What the operation is.
    pub kind: SiteKind,
    /// Width of the input. Of a [`SiteKind::Lookup`]: the tokens that an adapter may have rows for, at least those of the
    /// base table.
    pub inputs: usize,
    /// Width of each slice of the output, in order. Of a [`SiteKind::Head`]: the columns of the logits, at least as many
    /// as the base weight has rows. The columns beyond are room for tokens that only an adapter knows.
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

    /// The columns of a slice in the site's output.
    pub(crate) fn columns(&self, slice: usize) -> Range<usize> {
        let start = self.outputs[..slice].iter().sum();
        start..start + self.outputs[slice]
    }
}

/// What an adapter changes at one slice of one site.
///
/// Semantics, for W, the slice's rows of the base weight, or what [`Self::rows`] makes of it:
/// `y = gain ∘ (x · Wᵀ + scale · x · Aᵀ · Bᵀ) + base bias + bias`, where `gain = magnitude / ‖W + scale · B · A‖`, with the
/// norm of each row, or 1 without a magnitude (DoRA: Liu et al., 2024). For a [`SiteKind::Lookup`], x is the unit vector of
/// the token and W the transposed table: `y = gain ∘ (table[token] + scale · Aᵀ[token] · Bᵀ) + bias`, where the norms are
/// those of the table's columns.
///
/// Rows stand for themselves: a part that has some has neither a low-rank delta nor a magnitude.
#[derive(Debug, Clone)]
pub struct LoraPart {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// A and B.
    pub low_rank: Option<LowRank>,
    /// One element for each output, or for each row of a head's base weight.
    pub magnitude: Option<Vec<f32>>,
    /// One element for each output, or for each row of a head's base weight.
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
    /// A, `[rank, inputs]`; fewer columns where a [`SiteKind::Lookup`] has more room than the base table has rows.
    pub a: HostTensor<'static>,
    /// B, `[outputs[slice], rank]`; fewer rows where a [`SiteKind::Head`] has more room than the base weight has rows.
    pub b: HostTensor<'static>,
}

/// Rows of a table or of the output projection that an adapter brings along. There may be more than the base model has,
/// or fewer, if the adapter's vocabulary has another size: then logits of tokens without a row are -∞, and a token
/// without a row cannot be looked up.
#[derive(Debug, Clone)]
pub struct ReplacedRows {
    /// Which rows, strictly ascending, beside those of the base model; None: the first `values.rows`, which are all that
    /// there are for this adapter.
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
        let kind = sites[self.site].kind;
        let elements = |tensor: &HostTensor<'_>| tensor.data.len() / tensor.dtype.size();
        let mut expected = Vec::new();
        if let Some(LowRank { rank, a, b, .. }) = &self.low_rank {
            // The base model may have fewer rows than there is room for.
            let inputs = if kind == SiteKind::Lookup { a.cols.min(inputs) } else { inputs };
            let outputs = if kind == SiteKind::Head { b.rows.min(outputs) } else { outputs };
            expected.push(("elements of A", elements(a), rank * inputs));
            expected.push(("elements of B", elements(b), rank * outputs));
        }
        for (what, vector) in
            [("elements of the magnitude", &self.magnitude), ("elements of the bias", &self.bias)]
        {
            let Some(vector) = vector else { continue };
            let outputs = if kind == SiteKind::Head { vector.len().min(outputs) } else { outputs };
            expected.push((what, vector.len(), outputs));
        }
        if let Some(rows) = &self.rows {
            let [columns, limit] =
                if kind == SiteKind::Lookup { [outputs, inputs] } else { [inputs, outputs] };
            rows.check(limit)?;
            expected.push(("elements of replaced rows", elements(&rows.values), rows.values.rows * columns));
        }
        for (what, got, expected) in expected {
            if got != expected {
                return Err(Error::Shape { op: "stage", what, got, expected });
            }
        }
        Ok(())
    }
}

impl ReplacedRows {
    /// Refuses rows that there is no room for, and ids in disorder.
    fn check(&self, limit: usize) -> Result<()> {
        let (op, what) = ("stage", "replaced row");
        let last = match &self.ids {
            None => self.values.rows,
            Some(ids) => {
                if ids.len() != self.values.rows {
                    let (got, expected) = (ids.len(), self.values.rows);
                    return Err(Error::Shape { op, what: "numbers of replaced rows", got, expected });
                }
                if let Some(pair) = ids.windows(2).find(|pair| pair[0] >= pair[1]) {
                    return Err(Error::Index { op, what, index: pair[1] as usize, limit: pair[0] as usize });
                }
                ids.last().map_or(0, |id| *id as usize + 1)
            }
        };
        if last > limit { Err(Error::Index { op, what, index: last - 1, limit }) } else { Ok(()) }
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
        if self.rows > 0 && (self.lora_rank > 0 || self.has_magnitude) {
            return Err(Error::Shape {
                op,
                what: "replaced rows beside a delta",
                got: self.rows,
                expected: 0,
            });
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
