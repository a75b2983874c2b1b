//! The table of a decoder's modules, which is derived from its description. For each module it has the names, the size,
//! the site at which adapters attach, and the order in which rows are stored. The loader, the reader of GGUF files and
//! the code that matches adapters all use this one table.

#[cfg(test)]
mod tests;

use std::iter;

use kernels::{Heads, LoraSite, NormSpan, SiteKind};

use super::{
    ADDED_TOKENS, Attention, Classifier, Decoder, Layer, Nesting, NormSpec, Task, Wiring,
    names::{Names, Part, QkvOrder, Stored},
    share::{Run, Share, Split},
};

/// The number of sites of one layer: q k v, o, gate and up, down.
pub(crate) const LAYER_SITES: usize = 4;

/// One module with weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// Its layer; `None` if it is outside of the layers.
    pub layer: Option<usize>,
    /// Which part of the decoder it is.
    pub(crate) part: Part,
    /// Its path in transformers' model, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Its paths in the model that an adapter was trained on, in all versions of transformers.
    pub(crate) paths: Vec<String>,
    /// Its path in a GGUF file, such as `blk.0.attn_q`.
    pub ggml: String,
    /// The kind of its weight.
    pub kind: Kind,
    /// The site at which adapters attach, and which of the site's slices it is.
    pub place: Option<(usize, usize)>,
    /// Columns of its weight; 1 for a vector.
    pub inputs: usize,
    /// Rows of its weight; elements of a vector.
    pub outputs: usize,
    /// Whether it may have a bias.
    pub bias: bool,
    /// Whether files store its weight as `[in, out]`.
    pub transposed: bool,
    /// How files and adapters order its outputs.
    pub order: RowOrder,
    /// How it is divided among ranks.
    pub(crate) split: Split,
}

impl Module {
    /// Last part of its path.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or_default()
    }

    /// [`Self::paths`].
    pub(crate) fn paths(&self) -> impl Iterator<Item = &str> {
        self.paths.iter().map(String::as_str)
    }

    /// Whether its weight is a table of rows by token.
    pub(crate) fn is_lookup(&self) -> bool {
        self.kind == Kind::Lookup
    }

    /// Names of its tensors: Hugging Face's, and a GGUF file's.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let kinds: &[&str] = match (self.kind, self.bias) {
            (Kind::Vector, _) => &[""],
            (_, false) => &[".weight"],
            (_, true) => &[".weight", ".bias"],
        };
        let ggml_kind = |kind: &str| if kind.is_empty() { ".weight" } else { kind }.to_owned();
        kinds.iter().map(move |kind| (format!("{}{kind}", self.path), self.ggml.clone() + &ggml_kind(kind)))
    }
}

/// The kind of a module's weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A table of rows by token.
    Lookup,
    /// A table of rows by position.
    Positions,
    /// A linear layer.
    Linear,
    /// The linear layer that gives the logits.
    Head,
    /// A norm.
    Norm(NormSpec),
    /// A vector of numbers.
    Vector,
}

/// The order in which files store the rows of a matrix, compared with the order that operations expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// The same order.
    Same,
    /// Query, key and value of the first head, then of the next: `[heads, 3, dim]`, where operations expect
    /// `[3, heads, dim]`.
    ByHead {
        /// The number of heads, which queries, keys and values all have.
        heads: usize,
    },
}

impl RowOrder {
    /// For every row in the expected order, the index of the stored row. `None` if the orders are the same, or if the
    /// rows are not whole heads, in which case the check of the shape fails.
    pub(crate) fn sources(self, rows: usize) -> Option<Vec<usize>> {
        match self {
            RowOrder::Same => None,
            RowOrder::ByHead { heads } if rows.is_multiple_of(3 * heads) => {
                let dim = rows / (3 * heads);
                let source = |row: usize| {
                    let (kind, head, j) = (row / (heads * dim), row / dim % heads, row % dim);
                    (head * 3 + kind) * dim + j
                };
                Some((0..rows).map(source).collect())
            }
            RowOrder::ByHead { .. } => None,
        }
    }
}

/// All modules of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct Modules {
    all: Vec<Module>,
}

impl Modules {
    pub(crate) fn of(decoder: &Decoder) -> Modules {
        Modules::nested(decoder, Nesting::None)
    }

    /// As [`Self::of`], for an adapter that was trained on a model with the decoder at another place.
    pub(crate) fn nested(decoder: &Decoder, nesting: Nesting) -> Modules {
        let mut table = Table { decoder, nesting, all: Vec::new() };
        table.outer();
        for (i, layer) in decoder.layers.iter().enumerate() {
            table.layer(i, layer);
        }
        Modules { all: table.all }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Module> {
        self.all.iter()
    }

    /// The module of a part, in a layer or outside of the layers.
    pub(crate) fn find(&self, layer: Option<usize>, part: Part) -> Option<&Module> {
        self.all.iter().find(|module| module.layer == layer && module.part == part)
    }

    /// The modules of a site, in the order of its slices.
    pub(crate) fn at_site(&self, site: usize) -> Vec<&Module> {
        let mut found: Vec<_> =
            self.all.iter().filter(|module| module.place.is_some_and(|at| at.0 == site)).collect();
        found.sort_by_key(|module| module.place);
        found
    }

    /// The sites of a share at which adapters can attach.
    pub(crate) fn sites(&self, decoder: &Decoder, share: Share) -> Vec<LoraSite> {
        let mut placed: Vec<_> = self.all.iter().filter(|module| module.place.is_some()).collect();
        placed.sort_by_key(|module| module.place);
        let mut sites: Vec<LoraSite> = Vec::new();
        for module in placed {
            let slice = module.place.map_or(0, |(_, slice)| slice);
            let (kind, inputs) = match module.kind {
                // The table is `[tokens, hidden]`: its input is a token.
                Kind::Lookup => (SiteKind::Lookup, module.outputs + ADDED_TOKENS),
                Kind::Head => (SiteKind::Head, module.inputs),
                _ => (SiteKind::Linear, share.inputs(module).len()),
            };
            let outputs = match module.kind {
                Kind::Lookup => module.inputs,
                Kind::Head => share.logits(decoder).len(),
                _ => share.outputs(module).into_iter().map(|range| range.len()).sum(),
            };
            let is_partial = inputs < module.inputs && kind == SiteKind::Linear;
            match sites.last_mut().filter(|_| slice > 0) {
                Some(site) => site.outputs.push(outputs),
                None => sites.push(LoraSite { kind, inputs, outputs: vec![outputs], is_partial }),
            }
        }
        sites
    }
}

/// The table while it is made.
struct Table<'a> {
    decoder: &'a Decoder,
    nesting: Nesting,
    all: Vec<Module>,
}

impl Table<'_> {
    fn names(&self) -> &Names {
        &self.decoder.names
    }

    fn add(
        &mut self,
        layer: Option<usize>,
        part: Part,
        kind: Kind,
        [outputs, inputs]: [usize; 2],
    ) -> &mut Module {
        let Names { base, renamed, .. } = *self.names();
        let path = self.names().path(layer, part);
        let older = renamed.iter().filter(|(_, name)| *name == path).map(|(older, _)| *older);
        let paths = iter::once(path.as_str()).chain(older);
        let mut paths: Vec<String> = paths.map(|path| self.nesting.path(base, path)).collect();
        if self.decoder.task == Task::Embed {
            // Adapters of a model without a head do not name the module that holds everything else.
            let bare = |path: &String| path.strip_prefix(base)?.strip_prefix('.').map(str::to_owned);
            let bare: Vec<String> = paths.iter().filter_map(bare).collect();
            paths.extend(bare);
        }
        let module = Module {
            layer,
            part,
            paths,
            path,
            ggml: Names::ggml(layer, part),
            kind,
            place: None,
            inputs,
            outputs,
            bias: false,
            transposed: false,
            order: RowOrder::Same,
            split: self.split(part),
        };
        self.all.push(module);
        // The list was just added to.
        let last = self.all.len() - 1;
        &mut self.all[last]
    }

    /// How a part is divided: heads and the width of the feed-forward network, and the tokens of the output projection.
    fn split(&self, part: Part) -> Split {
        let Layer { attention, mlp, .. } = &self.decoder.layers[0];
        let Heads { query, kv, dim } = attention.shape.heads;
        let [query_heads, kv_heads] = [query, kv].map(|count| Run { count, size: dim });
        let width = Run { count: mlp.width, size: 1 };
        match part {
            Part::Q => Split::Outputs(vec![query_heads]),
            Part::K | Part::V => Split::Outputs(vec![kv_heads]),
            Part::Qkv => Split::Outputs(vec![query_heads, kv_heads, kv_heads]),
            Part::Sinks => Split::Outputs(vec![Run { count: query, size: 1 }]),
            Part::Gate | Part::Up => Split::Outputs(vec![width]),
            Part::GateUp => Split::Outputs(vec![width, width]),
            Part::Out => Split::Inputs(query_heads),
            Part::Down => Split::Inputs(width),
            Part::Head => Split::Tokens,
            Part::Embed
            | Part::Positions
            | Part::TokenTypes
            | Part::Dense
            | Part::Classifier
            | Part::OutputNorm
            | Part::EmbedNorm
            | Part::Norm
            | Part::AttentionNorm
            | Part::QNorm
            | Part::KNorm
            | Part::AttentionPost
            | Part::MlpNorm
            | Part::MlpPost => Split::Whole,
        }
    }

    fn norm(&mut self, layer: Option<usize>, part: Part, spec: NormSpec, width: usize) {
        self.add(layer, part, Kind::Norm(spec), [width, 1]).bias = spec.bias;
    }

    fn outer(&mut self) {
        let Decoder { hidden, vocab, norm, ref embedding, ref layers, .. } = *self.decoder;
        self.add(None, Part::Embed, Kind::Lookup, [vocab, hidden]).place =
            Some((self.decoder.table_site(), 0));
        if let Some(positions) = embedding.positions {
            self.add(None, Part::Positions, Kind::Positions, [positions.rows, hidden]);
        }
        if let Some(types) = embedding.token_types {
            self.add(None, Part::TokenTypes, Kind::Positions, [types, hidden]);
        }
        if let Some(norm) = embedding.norm {
            self.norm(None, Part::EmbedNorm, norm, hidden);
        }
        if layers.iter().all(|layer| layer.wiring != Wiring::PostNorm) {
            self.norm(None, Part::Norm, norm, hidden);
        }
        self.output();
    }

    /// What is computed from the last hidden states.
    fn output(&mut self) {
        let Decoder { hidden, vocab, head, ref task, .. } = *self.decoder;
        let site = self.decoder.output_site();
        match task {
            Task::Embed => {}
            Task::Generate => {
                let output = self.add(None, Part::Head, Kind::Head, [vocab, hidden]);
                output.place = Some((site, 0));
                output.bias = head.bias;
            }
            Task::Classify(Classifier { labels, dense, .. }) => {
                let mut linear = |part, site, outputs| {
                    let module = self.add(None, part, Kind::Linear, [outputs, hidden]);
                    (module.place, module.bias) = (Some((site, 0)), true);
                };
                linear(Part::Classifier, site, labels.len());
                if dense.is_some() {
                    linear(Part::Dense, site + 1, hidden);
                }
            }
        }
    }

    fn layer(&mut self, i: usize, layer: &Layer) {
        let (at, hidden) = (Some(i), self.decoder.hidden);
        if layer.wiring != Wiring::PostNorm {
            self.norm(at, Part::AttentionNorm, layer.norm, hidden);
        }
        self.attention(i, &layer.attention);
        match layer.wiring {
            Wiring::PostNorm => {
                self.norm(at, Part::MlpNorm, layer.norm, hidden);
                self.norm(at, Part::OutputNorm, layer.norm, hidden);
            }
            Wiring::Sequential { post_norms } => {
                self.norm(at, Part::MlpNorm, layer.norm, hidden);
                if post_norms {
                    self.norm(at, Part::AttentionPost, layer.norm, hidden);
                    self.norm(at, Part::MlpPost, layer.norm, hidden);
                }
            }
            Wiring::Parallel { shared_norm: true } => {}
            Wiring::Parallel { shared_norm: false } => self.norm(at, Part::MlpNorm, layer.norm, hidden),
        }
        let (width, site, bias) = (layer.mlp.width, i * LAYER_SITES + 2, layer.mlp.bias);
        let parts: &[(Part, usize)] = match (layer.mlp.gated, self.names().find(Part::GateUp)) {
            (true, Some(_)) => &[(Part::GateUp, 2 * width)],
            (true, None) => &[(Part::Gate, width), (Part::Up, width)],
            (false, _) => &[(Part::Up, width)],
        };
        self.projections(i, site, hidden, bias, parts);
        self.projections(i, site + 1, width, bias, &[(Part::Down, hidden)]);
    }

    fn attention(&mut self, i: usize, attention: &Attention) {
        let (at, hidden, site) = (Some(i), self.decoder.hidden, i * LAYER_SITES);
        let heads @ Heads { query, kv, dim } = attention.shape.heads;
        let parts: &[(Part, usize)] = match self.names().find(Part::Qkv) {
            Some(_) => &[(Part::Qkv, heads.qkv_cols())],
            None => &[(Part::Q, query * dim), (Part::K, kv * dim), (Part::V, kv * dim)],
        };
        let first = self.all.len();
        self.projections(i, site, hidden, attention.qkv_bias, parts);
        if self.names().qkv_order == QkvOrder::ByHead {
            let fused = self.all[first..].iter_mut().filter(|module| module.part == Part::Qkv);
            fused.for_each(|module| module.order = RowOrder::ByHead { heads: query });
        }
        self.projections(i, site + 1, query * dim, attention.out_bias, &[(Part::Out, hidden)]);
        if let Some((norm, over)) = attention.norms {
            let width = |heads: usize| if over == NormSpan::Head { dim } else { heads * dim };
            self.norm(at, Part::QNorm, norm, width(query));
            self.norm(at, Part::KNorm, norm, width(kv));
        }
        if attention.sinks {
            self.add(at, Part::Sinks, Kind::Vector, [query, 1]);
        }
    }

    /// The modules of one site, by slice.
    fn projections(&mut self, i: usize, site: usize, inputs: usize, bias: bool, parts: &[(Part, usize)]) {
        let transposed = self.names().transposed && self.names().stored == Stored::Folder;
        for (slice, &(part, outputs)) in parts.iter().enumerate() {
            let module = self.add(Some(i), part, Kind::Linear, [outputs, inputs]);
            module.place = Some((site, slice));
            module.bias = bias;
            module.transposed = transposed;
        }
    }
}
