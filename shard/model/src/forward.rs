//! The forward pass of every family: runs the operations that a [`Decoder`] describes on a backend.

use std::path::Path;

use kernels::{
    Activation, Attention, AttentionShape, Backend, Branch, Embedding, Heads, LinearLora, LoraSite, Norm,
    Output, Projection, QkNorms, Qkv, Residual, Rotation, RowSet, Span,
};

use crate::{
    Decoder, Result, Share,
    decoder::{self, NormSpec, Wiring},
    load::{self, Progress},
};

/// The arguments of a forward pass that change from step to step.
pub struct Pass<'a, B: Backend> {
    /// The device.
    pub ops: &'a B,
    /// The step's rows.
    pub batch: &'a B::Batch,
    /// The resident adapters.
    pub slots: &'a B::LoraSlots,
    /// The sampler, which has the tokens that were sampled last.
    pub sampler: &'a B::Sampler,
}

impl<'a, B: Backend> Pass<'a, B> {
    fn lora(&self, site: usize, rows: RowSet) -> Option<LinearLora<'a, B>> {
        Some(LinearLora { slots: self.slots, site, batch: self.batch, rows })
    }
}

/// Memory for activations, which is allocated once for the largest step.
pub struct Scratch<B: Backend> {
    /// Logits of the rows that wanted them, of tokens or of classes: `[logit rows, Decoder::logit_columns]`.
    pub logits: B::Mat,
    /// The columns of this rank, which are gathered into `logits`; `None` for one rank.
    own_logits: Option<B::Mat>,
    /// The normed residual stream, which the next projection reads. After a pass, these are the last hidden states.
    pub hidden: B::Mat,
    stream: B::Mat,
    /// Products that something is done to before they are added to the residual stream.
    products: B::Mat,
    /// The stream after a second norm, for parallel residuals whose branches have different norms.
    other: Option<B::Mat>,
    qkv: B::Mat,
    attended: B::Mat,
    /// The products of gate and up, or of up alone.
    gate_up: B::Mat,
    activated: B::Mat,
    last: B::Mat,
    /// The products and the result of the projection in front of a classifier.
    dense: Option<[B::Mat; 2]>,
}

/// The KV cache of all layers. The layers of an encoder, which keeps nothing beyond a step, share the memory of one.
pub struct KvCache<B: Backend> {
    layers: Vec<B::Kv>,
}

/// The weight of a projection, and the site at which adapters attach to it.
pub(crate) struct Linear<B: Backend> {
    pub(crate) weight: B::Weight,
    pub(crate) bias: Option<B::Vector>,
    pub(crate) site: usize,
}

impl<B: Backend> Linear<B> {
    fn projection<'a>(&'a self, pass: &Pass<'a, B>) -> Projection<'a, B> {
        self.projection_of(pass, RowSet::All)
    }

    fn projection_of<'a>(&'a self, pass: &Pass<'a, B>, rows: RowSet) -> Projection<'a, B> {
        let lora = pass.lora(self.site, rows);
        Projection { weight: &self.weight, bias: self.bias.as_ref(), lora }
    }
}

/// The weights of a norm.
pub(crate) struct NormOf<B: Backend> {
    pub(crate) spec: NormSpec,
    pub(crate) weight: B::Vector,
    pub(crate) bias: Option<B::Vector>,
}

impl<B: Backend> NormOf<B> {
    fn get(&self) -> Norm<'_, B> {
        let NormSpec { kind, eps, .. } = self.spec;
        Norm { kind, weight: &self.weight, bias: self.bias.as_ref(), eps }
    }
}

/// The weights of what is computed from the last hidden states.
pub(crate) enum OutputOf<B: Backend> {
    /// Nothing is.
    Hidden,
    /// The output projection; its weight is the embedding table if there is none.
    Logits { weight: Option<B::Weight>, bias: Option<B::Vector> },
    /// The projection in front of the classifier with its activation, and the classifier.
    Classes { dense: Option<(Linear<B>, Activation)>, classifier: Linear<B> },
}

impl<B: Backend> OutputOf<B> {
    fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        let (dense, classifier) = match self {
            OutputOf::Classes { dense, classifier } => (dense.as_ref(), Some(classifier)),
            OutputOf::Hidden | OutputOf::Logits { .. } => (None, None),
        };
        classifier.into_iter().chain(dense.map(|(linear, _)| linear))
    }
}

/// The weights of a layer.
pub(crate) struct Layer<B: Backend> {
    pub(crate) attention_norm: Option<NormOf<B>>,
    pub(crate) qkv: Linear<B>,
    pub(crate) q_norm: Option<NormOf<B>>,
    pub(crate) k_norm: Option<NormOf<B>>,
    pub(crate) sinks: Option<B::Vector>,
    pub(crate) slopes: Option<B::Vector>,
    pub(crate) out: Linear<B>,
    pub(crate) attention_post: Option<NormOf<B>>,
    pub(crate) mlp_norm: Option<NormOf<B>>,
    /// Gate and up in one matrix, or up alone.
    pub(crate) up: Linear<B>,
    pub(crate) down: Linear<B>,
    pub(crate) mlp_post: Option<NormOf<B>>,
    pub(crate) output_norm: Option<NormOf<B>>,
}

/// The sizes of a rank's share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) share: Share,
    pub(crate) heads: Heads,
    /// The width of the feed-forward networks.
    pub(crate) width: usize,
    /// The columns of logits.
    pub(crate) logits: usize,
}

/// Bytes of a model's matrices on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// Of those that are divided among ranks: the share of this one.
    pub share: usize,
    /// Of those that every rank has.
    pub whole: usize,
}

/// A model's weights on a device: this rank's share of them.
pub struct Model<B: Backend> {
    /// The description of the whole model.
    pub(crate) decoder: Decoder,
    pub(crate) sizes: Sizes,
    /// The sites of this share.
    pub(crate) sites: Vec<LoraSite>,
    pub(crate) embed: B::Weight,
    pub(crate) positions: Option<B::Weight>,
    pub(crate) embed_norm: Option<NormOf<B>>,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) norm: Option<NormOf<B>>,
    pub(crate) output: OutputOf<B>,
    pub(crate) ropes: Vec<B::Rope>,
}

impl<B: Backend> Model<B> {
    /// Loads a GGUF file or a folder in Hugging Face layout, and reports its progress.
    pub fn load(ops: &B, path: &Path, progress: &mut Progress<'_>) -> Result<Model<B>> {
        Model::load_for(ops, path, None, usize::MAX, progress)
    }

    /// As [`Self::load`], with the adapter in the folder `merged` merged into the weights, and for sequences of up to
    /// `longest` tokens. Memory that grows with the longest sequence is taken for no more than these.
    pub fn load_for(
        ops: &B,
        path: &Path,
        merged: Option<&Path>,
        longest: usize,
        progress: &mut Progress<'_>,
    ) -> Result<Model<B>> {
        load::load(ops, (path, merged), longest, progress)
    }

    /// The description of the whole model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The share of this rank.
    pub fn share(&self) -> Share {
        self.sizes.share
    }

    /// Bytes of the weights on the device, vectors apart.
    pub fn weight_bytes(&self, ops: &B) -> WeightBytes {
        let linears = self.layers.iter().flat_map(|at| [&at.qkv, &at.out, &at.up, &at.down]);
        let head = match &self.output {
            OutputOf::Logits { weight, .. } => weight.as_ref(),
            OutputOf::Hidden | OutputOf::Classes { .. } => None,
        };
        let share = linears.map(|linear| &linear.weight).chain(head);
        let classes = self.output.linears().map(|linear| &linear.weight);
        let whole = [&self.embed].into_iter().chain(&self.positions).chain(classes);
        WeightBytes {
            share: share.map(|weight| ops.weight_bytes(weight)).sum(),
            whole: whole.map(|weight| ops.weight_bytes(weight)).sum(),
        }
    }

    /// The sites of this share at which adapters can attach.
    pub fn sites(&self) -> &[LoraSite] {
        &self.sites
    }

    /// The weights of all sites, in the order of [`Self::sites`].
    pub fn site_weights(&self) -> Vec<&B::Weight> {
        let linears = self.layers.iter().flat_map(|at| [&at.qkv, &at.out, &at.up, &at.down]);
        let head = matches!(self.output, OutputOf::Logits { .. }).then(|| self.head());
        let classes = self.output.linears().map(|linear| &linear.weight);
        linears.map(|linear| &linear.weight).chain(head).chain(classes).chain([&self.embed]).collect()
    }

    /// The distinct attention spans of all layers.
    pub fn spans(&self) -> Vec<Span> {
        self.decoder.spans()
    }

    /// Allocates a KV cache of `blocks` blocks.
    pub fn kv_cache(&self, ops: &B, blocks: usize) -> kernels::Result<KvCache<B>> {
        let heads = self.sizes.heads;
        let layers = (0..self.kv_layers()).map(|_| ops.kv(blocks, heads)).collect::<kernels::Result<_>>()?;
        Ok(KvCache { layers })
    }

    /// Bytes of one block of the KV cache, all layers together.
    pub fn kv_block_bytes(&self, ops: &B) -> usize {
        ops.kv_block_bytes(self.sizes.heads) * self.kv_layers()
    }

    /// The number of layers whose keys and values are kept apart.
    fn kv_layers(&self) -> usize {
        if self.decoder.is_bidirectional() { 1 } else { self.layers.len() }
    }

    /// Allocates the activations of steps of up to `max_rows` rows, of which `max_logit_rows` have logits.
    pub fn scratch(&self, ops: &B, max_rows: usize, max_logit_rows: usize) -> kernels::Result<Scratch<B>> {
        let Sizes { share, heads, width, logits } = self.sizes;
        let (hidden, Heads { query, dim, .. }) = (self.decoder.hidden, heads);
        let decoder::Layer { mlp, wiring, .. } = &self.decoder.layers[0];
        let halves = if mlp.gated { 2 } else { 1 };
        let reads_twice = *wiring == Wiring::Parallel { shared_norm: false };
        let dense =
            || Ok::<_, kernels::Error>([ops.mat(max_logit_rows, hidden)?, ops.mat(max_logit_rows, hidden)?]);
        let has_dense = matches!(&self.output, OutputOf::Classes { dense: Some(_), .. });
        Ok(Scratch {
            logits: ops.wide_mat(max_logit_rows, self.decoder.logit_columns())?,
            own_logits: (share.ranks() > 1).then(|| ops.wide_mat(max_logit_rows, logits)).transpose()?,
            hidden: ops.mat(max_rows, hidden)?,
            stream: ops.wide_mat(max_rows, hidden)?,
            products: ops.wide_mat(max_rows, hidden)?,
            other: reads_twice.then(|| ops.mat(max_rows, hidden)).transpose()?,
            qkv: ops.mat(max_rows, heads.qkv_cols())?,
            attended: ops.mat(max_rows, query * dim)?,
            gate_up: ops.mat(max_rows, halves * width)?,
            activated: ops.mat(max_rows, width)?,
            last: ops.mat(max_logit_rows, hidden)?,
            dense: has_dense.then(dense).transpose()?,
        })
    }

    /// Runs one step: stores its keys and values in the KV cache, and computes the logits of its logit rows.
    pub fn forward(
        &self,
        pass: &Pass<'_, B>,
        s: &mut Scratch<B>,
        kv: &mut KvCache<B>,
    ) -> kernels::Result<()> {
        let ops = pass.ops;
        ops.step(pass.batch, Some(pass.slots), || {
            self.embed(pass, s)?;
            let count = kv.layers.len().max(1);
            for i in 0..self.layers.len() {
                self.layer(i, pass, s, &mut kv.layers[i % count])?;
            }
            match &self.output {
                OutputOf::Hidden => Ok(()),
                OutputOf::Logits { bias, .. } => self.logits(pass, bias.as_ref(), s),
                OutputOf::Classes { dense, classifier } => {
                    self.classes(pass, (dense.as_ref(), classifier), s)
                }
            }
        })
    }

    /// Computes the logits of tokens.
    fn logits(
        &self,
        pass: &Pass<'_, B>,
        bias: Option<&B::Vector>,
        s: &mut Scratch<B>,
    ) -> kernels::Result<()> {
        let ops = pass.ops;
        ops.gather_logit_rows(&s.hidden, pass.batch, &mut s.last)?;
        let by = Projection {
            weight: self.head(),
            bias,
            lora: pass.lora(self.decoder.output_site(), RowSet::Logits),
        };
        let shape = self.decoder.head.shape;
        let Some(own) = &mut s.own_logits else {
            return ops.linear(&s.last, by, Output::Logits { y: &mut s.logits, shape });
        };
        ops.linear(&s.last, by, Output::Logits { y: own, shape })?;
        ops.gather_columns(own, &mut s.logits)
    }

    /// Computes the logits of classes.
    fn classes(
        &self,
        pass: &Pass<'_, B>,
        (dense, classifier): (Option<&(Linear<B>, Activation)>, &Linear<B>),
        s: &mut Scratch<B>,
    ) -> kernels::Result<()> {
        let ops = pass.ops;
        ops.gather_logit_rows(&s.hidden, pass.batch, &mut s.last)?;
        let of = |linear| Linear::projection_of(linear, pass, RowSet::Logits);
        let mut x = &s.last;
        if let (Some((linear, activation)), Some([products, y])) = (dense, &mut s.dense) {
            let out = Output::Activate { activation: *activation, products, y: &mut *y };
            ops.linear(x, of(linear), out)?;
            x = y;
        }
        ops.linear(x, of(classifier), Output::Store(&mut s.logits))
    }

    /// The output projection.
    fn head(&self) -> &B::Weight {
        match &self.output {
            OutputOf::Logits { weight: Some(weight), .. } => weight,
            _ => &self.embed,
        }
    }

    /// Embeds the tokens: writes the first value of the residual stream, and its first norm into `s.hidden`.
    fn embed(&self, pass: &Pass<'_, B>, s: &mut Scratch<B>) -> kernels::Result<()> {
        let ops = pass.ops;
        let decoder::Embedding { scale, positions, .. } = self.decoder.embedding;
        let positions = self.positions.as_ref().zip(positions.map(|positions| positions.first));
        let lora = pass.lora(self.decoder.table_site(), RowSet::All);
        let by = Embedding { table: &self.embed, scale, positions, lora };
        let first = self.layers[0].attention_norm.as_ref();
        match (&self.embed_norm, first) {
            (Some(norm), None) => {
                ops.embed(pass.batch, pass.sampler, by, &mut s.stream)?;
                return ops.normalize_stream(&mut s.stream, norm.get(), &mut s.hidden);
            }
            (Some(norm), _) => {
                ops.embed(pass.batch, pass.sampler, by, &mut s.products)?;
                ops.normalize(&s.products, norm.get(), &mut s.stream)?;
            }
            (None, _) => ops.embed(pass.batch, pass.sampler, by, &mut s.stream)?,
        }
        first.map_or(Ok(()), |norm| ops.normalize(&s.stream, norm.get(), &mut s.hidden))
    }

    /// Computes layer `i`. `s.hidden` is the stream after this layer's first norm, and becomes the stream after the
    /// first norm of the next layer.
    fn layer(&self, i: usize, pass: &Pass<'_, B>, s: &mut Scratch<B>, kv: &mut B::Kv) -> kernels::Result<()> {
        let layer = &self.layers[i];
        let next = self.layers.get(i + 1).map_or(&self.norm, |next| &next.attention_norm);
        let next = next.as_ref().map(NormOf::get);
        let wiring = self.decoder.layers[i].wiring;
        if let (Some(other), Some(norm)) = (&mut s.other, &layer.mlp_norm) {
            pass.ops.normalize(&s.stream, norm.get(), other)?;
        }
        self.attend(i, pass, s, kv)?;
        let second = match wiring {
            Wiring::Sequential { .. } => {
                let then = layer.mlp_norm.as_ref().map(NormOf::get);
                self.onto_stream(pass, (layer, Half::Attention), s, (Branch::Only, then))?;
                self.feed_forward(i, pass, s)?;
                Branch::Only
            }
            Wiring::PostNorm => {
                self.onto_stream(pass, (layer, Half::Attention), s, (Branch::Only, None))?;
                self.norm_stream(pass, layer.mlp_norm.as_ref(), s)?;
                self.feed_forward(i, pass, s)?;
                self.onto_stream(pass, (layer, Half::FeedForward), s, (Branch::Only, None))?;
                return self.norm_stream(pass, layer.output_norm.as_ref(), s);
            }
            Wiring::Parallel { .. } => {
                self.feed_forward(i, pass, s)?;
                self.onto_stream(pass, (layer, Half::Attention), s, (Branch::First, None))?;
                Branch::Second
            }
        };
        self.onto_stream(pass, (layer, Half::FeedForward), s, (second, next))
    }

    /// Norms the stream itself.
    fn norm_stream(
        &self,
        pass: &Pass<'_, B>,
        norm: Option<&NormOf<B>>,
        s: &mut Scratch<B>,
    ) -> kernels::Result<()> {
        norm.map_or(Ok(()), |norm| pass.ops.normalize_stream(&mut s.stream, norm.get(), &mut s.hidden))
    }

    /// Computes attention from `s.hidden` into `s.attended`.
    fn attend(
        &self,
        i: usize,
        pass: &Pass<'_, B>,
        s: &mut Scratch<B>,
        kv: &mut B::Kv,
    ) -> kernels::Result<()> {
        let (ops, layer) = (pass.ops, &self.layers[i]);
        let decoder::Attention { shape, rope, norms, clamp, .. } = &self.decoder.layers[i].attention;
        ops.linear(&s.hidden, layer.qkv.projection(pass), Output::Store(&mut s.qkv))?;
        let of_norms = layer.q_norm.as_ref().zip(layer.k_norm.as_ref()).zip(*norms);
        let norms = of_norms.map(|((q, k), (_, over))| QkNorms { query: q.get(), key: k.get(), over });
        let rope = rope.map(|(rope, pairs)| Rotation { table: &self.ropes[rope], pairs });
        let heads = self.sizes.heads;
        let by = Qkv { heads, clamp: *clamp, norms, rope };
        ops.rope_and_store(&mut s.qkv, by, pass.batch, kv)?;
        let shape = AttentionShape { heads, ..*shape };
        let by = Attention { shape, sinks: layer.sinks.as_ref(), slopes: layer.slopes.as_ref() };
        ops.paged_attention(&s.qkv, by, pass.batch, kv, &mut s.attended)
    }

    /// Computes the first half of the feed-forward network from `s.hidden` or, if it has its own normed stream, from
    /// `s.other`, into `s.activated`.
    fn feed_forward(&self, i: usize, pass: &Pass<'_, B>, s: &mut Scratch<B>) -> kernels::Result<()> {
        let decoder::Mlp { activation, gated, .. } = self.decoder.layers[i].mlp;
        let Scratch { hidden, other, gate_up: products, activated: y, .. } = s;
        let out = match gated {
            true => Output::Gate { activation, products, y },
            false => Output::Activate { activation, products, y },
        };
        pass.ops.linear(other.as_ref().unwrap_or(hidden), self.layers[i].up.projection(pass), out)
    }

    /// Applies the last projection of a half of a layer, and adds the result to the stream. If the stream is complete
    /// then, the norm is applied to it next.
    fn onto_stream(
        &self,
        pass: &Pass<'_, B>,
        (layer, half): (&Layer<B>, Half),
        s: &mut Scratch<B>,
        (branch, norm): (Branch, Option<Norm<'_, B>>),
    ) -> kernels::Result<()> {
        let Scratch { stream, products, hidden, attended, activated, .. } = s;
        let (x, by, post) = match half {
            Half::Attention => (attended, &layer.out, &layer.attention_post),
            Half::FeedForward => (activated, &layer.down, &layer.mlp_post),
        };
        let next = norm.map(|norm| (norm, hidden));
        let (post, scale) = (post.as_ref().map(NormOf::get), self.decoder.residual_scale);
        let to = Residual { stream, products, post, scale, branch, next };
        pass.ops.linear(x, by.projection(pass), Output::Residual(to))
    }
}

/// A half of a layer.
#[derive(Debug, Clone, Copy)]
enum Half {
    Attention,
    FeedForward,
}
