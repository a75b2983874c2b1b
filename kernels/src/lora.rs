//! Adapters as backends see them: the sites that they attach to, and the parts that they consist of.

pub(crate) mod blocks;
pub(crate) mod readers;
mod source;

use std::ops::Range;

use crate::{DType, Error, HostTensor, Result};
pub use source::MatrixSource;

/// One operation that adapters can attach to. A fused projection (q k v, or gate and up) is one site with several
/// slices. All slices read the same input, and each writes its own columns of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraSite {
    /// The kind of the operation.
    pub kind: SiteKind,
    /// The width of the input. For a [`SiteKind::Lookup`], it is the number of tokens that an adapter may have rows
    /// for, at least as many as the base table has.
    pub inputs: usize,
    /// The width of each slice of the output, in order. For a [`SiteKind::Head`], it is the number of columns of the
    /// logits, at least as many as the base weight has rows. Further columns are for tokens that only an adapter has.
    pub outputs: Vec<usize>,
    /// Whether this rank has only some of the inputs, so that its products are partial sums. The norms of
    /// [`LoraPart::magnitude`] are then those of all ranks' columns together.
    pub is_partial: bool,
}

/// The kind of a site's operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteKind {
    /// A projection of a layer.
    Linear,
    /// The output projection, whose rows an adapter may replace.
    Head,
    /// The embedding table, which is indexed by token and whose rows an adapter may replace.
    Lookup,
}

impl LoraSite {
    /// The site of a projection of a layer.
    pub fn linear(inputs: usize, outputs: &[usize]) -> LoraSite {
        LoraSite { kind: SiteKind::Linear, inputs, outputs: outputs.to_vec(), is_partial: false }
    }

    /// The site of an output projection.
    pub fn head(inputs: usize, columns: usize) -> LoraSite {
        LoraSite { kind: SiteKind::Head, ..LoraSite::linear(inputs, &[columns]) }
    }

    /// The site of an embedding table.
    pub fn lookup(tokens: usize, columns: usize) -> LoraSite {
        LoraSite { kind: SiteKind::Lookup, ..LoraSite::linear(tokens, &[columns]) }
    }

    /// The columns of a slice in the site's output.
    pub(crate) fn columns(&self, slice: usize) -> Range<usize> {
        let start = self.outputs[..slice].iter().sum();
        start..start + self.outputs[slice]
    }
}

/// The change that an adapter makes at one slice of one site.
///
/// Semantics, for W, the slice's rows of the base weight, or what [`Self::rows`] makes of it:
/// `y = gain ∘ (x · Wᵀ + scale · x · Aᵀ · Bᵀ) + base bias + bias`. With a magnitude (DoRA: Liu et al., 2024)
/// `gain = magnitude / ‖W + scale · B · A‖`, with the norm of each row; otherwise it is 1. For a [`SiteKind::Lookup`], x
/// is the unit vector of the token and W the transposed table:
/// `y = gain ∘ (table[token] + scale · Aᵀ[token] · Bᵀ) + bias`, where the norms are those of the table's columns. If A
/// has columns for fewer tokens than the table has rows, the adapter's vocabulary is the smaller one: its norms are those
/// over its own tokens, and other tokens have no delta.
///
/// A part that has rows has neither a low-rank delta nor a magnitude.
///
/// `M` is where its matrices come from. A backend reads them when it stages the adapter.
#[derive(Debug, Clone)]
pub struct LoraPart<M = HostTensor<'static>> {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// A and B.
    pub low_rank: Option<LowRank<M>>,
    /// One element for each output, or for each row of a head's base weight.
    pub magnitude: Option<Vec<f32>>,
    /// One element for each output, or for each row of a head's base weight.
    pub bias: Option<Vec<f32>>,
    /// Rows that replace those of the base weight.
    pub rows: Option<ReplacedRows<M>>,
    /// A number of the adapter's content, which is the same on all ranks. With a magnitude at a site that is partial, the
    /// ranks tell each other their parts of the norms under this number.
    pub content: u64,
}

/// A low-rank delta: `scale · B · A`. The scale is applied in f32 to the sum.
#[derive(Debug, Clone)]
pub struct LowRank<M = HostTensor<'static>> {
    /// The number of rows of A and of columns of B, at least 1.
    pub rank: usize,
    /// The factor of the delta.
    pub scale: f32,
    /// A, `[rank, inputs]`; for a [`SiteKind::Lookup`], it has as many columns as the adapter's vocabulary has tokens.
    pub a: M,
    /// B, `[outputs[slice], rank]`; fewer rows where a [`SiteKind::Head`] has more room than the base weight has rows.
    pub b: M,
}

/// Rows that an adapter has in place of those of the embedding table or the output projection. If the adapter's
/// vocabulary has another size, there may be more or fewer rows than the base model has. The logits of tokens without a
/// row are -∞, and such a token cannot be looked up.
#[derive(Debug, Clone)]
pub struct ReplacedRows<M = HostTensor<'static>> {
    /// The rows that are replaced, strictly ascending; all others are the base model's. `None`: the rows replace the
    /// whole weight, so that this adapter has no others.
    pub ids: Option<Vec<u32>>,
    /// The rows, `[ids, columns]`.
    pub values: M,
}

impl LoraPart {
    /// A part with only a low-rank delta, from row-major A `[rank, inputs]` and B `[outputs, rank]`.
    pub fn delta((site, slice): (usize, usize), rank: usize, scale: f32, a: &[f32], b: &[f32]) -> LoraPart {
        let a = HostTensor::from_f32(rank, a.len() / rank.max(1), a);
        let b = HostTensor::from_f32(b.len() / rank.max(1), rank, b);
        let low_rank = Some(LowRank { rank, scale, a, b });
        LoraPart { site, slice, low_rank, magnitude: None, bias: None, rows: None, content: 0 }
    }
}

impl<M: MatrixSource> LoraPart<M> {
    /// Its place and size.
    pub fn shape(&self) -> LoraShape {
        LoraShape {
            site: self.site,
            slice: self.slice,
            lora_rank: self.low_rank.as_ref().map_or(0, |low_rank| low_rank.rank),
            has_magnitude: self.magnitude.is_some(),
            has_bias: self.bias.is_some(),
            rows: self.rows.as_ref().map_or(0, |rows| rows.values.shape()[0]),
        }
    }

    /// Refuses a part that belongs to none of the sites, or whose numbers of elements do not fit its shape.
    pub(crate) fn check(&self, sites: &[LoraSite]) -> Result<()> {
        let [inputs, outputs] = self.shape().of(sites)?;
        let kind = sites[self.site].kind;
        let mut expected = Vec::new();
        if let Some(LowRank { rank, a, b, .. }) = &self.low_rank {
            let ([a_rows, a_cols], [b_rows, b_cols]) = (a.shape(), b.shape());
            // The base model may have fewer rows than there is room for.
            let inputs = if kind == SiteKind::Lookup { a_cols.min(inputs) } else { inputs };
            let outputs = if kind == SiteKind::Head { b_rows.min(outputs) } else { outputs };
            expected.push(("elements of A", a_rows * a_cols, rank * inputs));
            expected.push(("rows of A", a_rows, *rank));
            expected.push(("elements of B", b_rows * b_cols, rank * outputs));
            expected.push(("columns of B", b_cols, *rank));
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
            let [count, got] = rows.values.shape();
            expected.push(("elements of replaced rows", count * got, count * columns));
        }
        for (what, got, expected) in expected {
            if got != expected {
                return Err(Error::Shape { op: "stage", what, got, expected });
            }
        }
        Ok(())
    }
}

impl<M: MatrixSource> ReplacedRows<M> {
    /// Refuses rows beyond `limit`, and ids that are not ascending.
    fn check(&self, limit: usize) -> Result<()> {
        let (op, what, [count, _]) = ("stage", "replaced row", self.values.shape());
        let last = match &self.ids {
            None => count,
            Some(ids) => {
                if ids.len() != count {
                    let (got, expected) = (ids.len(), count);
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

/// The place and sizes of a [`LoraPart`], on which the memory that it takes depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraShape {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// The rank of the low-rank delta; 0 if there is none.
    pub lora_rank: usize,
    /// Whether there is a magnitude.
    pub has_magnitude: bool,
    /// Whether there is a bias.
    pub has_bias: bool,
    /// The number of replaced rows.
    pub rows: usize,
}

impl LoraShape {
    /// The shape of a part with only a low-rank delta.
    pub fn delta(site: usize, slice: usize, lora_rank: usize) -> LoraShape {
        LoraShape { site, slice, lora_rank, has_magnitude: false, has_bias: false, rows: 0 }
    }

    /// The numbers of inputs and outputs of the slice. Errors: there is no such slice, or the part has something that a
    /// site of its kind cannot have.
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
