//! The share of an adapter that belongs to the share of a model. Files are checked against the whole model, and what
//! was read is cut before it is staged.

use std::ops::Range;

use kernels::{LoraPart, LoraShape, LowRank, MatrixSource, ReplacedRows};

use super::matrix::Cut;
use crate::{
    Decoder, Share,
    decoder::{Kind, Module},
};

/// Cuts the changes of modules.
#[derive(Clone, Copy)]
pub(super) struct Cutter<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) share: Share,
}

impl Cutter<'_> {
    /// The outputs of the share. Logits have more than the module, for tokens that only adapters have.
    fn outputs(self, module: &Module) -> Vec<Range<usize>> {
        match module.kind {
            Kind::Head => vec![self.share.logits(self.decoder)],
            _ => self.share.outputs(module),
        }
    }

    /// What is cut of a change of this shape, whose replaced rows have these ids; `None` if nothing is left.
    pub(super) fn shape(self, shape: LoraShape, ids: Option<&[u32]>, module: &Module) -> Option<LoraShape> {
        let mut shape = shape;
        shape.has_bias &= self.share.adds_bias(module);
        if module.kind == Kind::Head && shape.rows > 0 {
            let count = shape.rows;
            shape.rows = self.run_of(module, count, ids).len();
            // A rank without any of the rows that replace all others has a bias that hides its base rows.
            shape.has_bias |= ids.is_none() && shape.rows == 0;
        }
        let LoraShape { lora_rank, has_magnitude, has_bias, rows, .. } = shape;
        (lora_rank > 0 || has_magnitude || has_bias || rows > 0).then_some(shape)
    }

    /// Which of `count` replaced rows are those of the share.
    fn run_of(self, module: &Module, count: usize, ids: Option<&[u32]>) -> Range<usize> {
        let own = self.outputs(module).into_iter().next().unwrap_or_default();
        let place = |id: usize| match ids {
            Some(ids) => ids.partition_point(|other| (*other as usize) < id),
            None => id.min(count),
        };
        place(own.start)..place(own.end)
    }

    /// Cuts a part; `None` if nothing of it is left.
    pub(super) fn cut<M: Cut + MatrixSource>(
        self,
        part: LoraPart<M>,
        module: &Module,
    ) -> Option<LoraPart<M>> {
        if self.share == Share::WHOLE {
            return Some(part);
        }
        let ids = part.rows.as_ref().and_then(|rows| rows.ids.as_deref());
        self.shape(part.shape(), ids, module)?;
        let outputs = self.outputs(module);
        let LoraPart { site, slice, low_rank, magnitude, bias, rows: replaced, content } = part;
        let vector = |values: Vec<f32>| -> Vec<f32> {
            within(&outputs, values.len()).into_iter().flat_map(|range| values[range].to_vec()).collect()
        };
        let mut bias = bias.filter(|_| self.share.adds_bias(module)).map(vector);
        let mut own = None;
        if let Some(replaced) = replaced {
            let is_whole = replaced.ids.is_none();
            own = self.rows(replaced, module);
            if own.is_none() && is_whole {
                bias = Some(vec![f32::NEG_INFINITY; self.share.tokens(self.decoder.vocab).len()]);
            }
        }
        let low_rank = low_rank.map(|LowRank { rank, scale, a, b }| {
            if module.is_lookup() {
                return LowRank { rank, scale, a, b };
            }
            let own = within(&outputs, b.shape()[0]);
            LowRank { rank, scale, a: a.columns(self.share.inputs(module)), b: b.rows(&own) }
        });
        let magnitude = if module.is_lookup() { magnitude } else { magnitude.map(vector) };
        Some(LoraPart { site, slice, low_rank, magnitude, bias, rows: own, content })
    }

    /// The replaced rows of the share, numbered from its first one; `None` if there are none.
    fn rows<M: Cut + MatrixSource>(
        self,
        replaced: ReplacedRows<M>,
        module: &Module,
    ) -> Option<ReplacedRows<M>> {
        if module.is_lookup() {
            return Some(replaced);
        }
        let ReplacedRows { ids, values } = replaced;
        let run = self.run_of(module, values.shape()[0], ids.as_deref());
        if run.is_empty() {
            return None;
        }
        let first = self.outputs(module).first().map_or(0, |range| range.start) as u32;
        let ids = ids.map(|ids| ids[run.clone()].iter().map(|id| id - first).collect());
        Some(ReplacedRows { ids, values: values.rows(&[run]) })
    }
}

/// The parts of ranges below `len`.
fn within(ranges: &[Range<usize>], len: usize) -> Vec<Range<usize>> {
    ranges.iter().map(|range| range.start.min(len)..range.end.min(len)).collect()
}
