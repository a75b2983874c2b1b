//! The forward pass of a Llama-like decoder.

use std::{
    panic::resume_unwind,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use kernels::{
    Activation, AttentionShape, Backend, Embedding, Heads, HostTensor, LinearLora, LogitShape, LoraSite,
    Norm, NormKind, Output, Pairs, Projection, Qkv, Residual, RopeSpec, Rotation, RowSet, Span, Stretch,
};

use crate::{
    Config, LoadProgress, Result,
    weights::{self, Source},
};

/// Sites of one layer, see [`Config::sites`].
const SITES: usize = 4;

/// What one step brings to the forward pass.
pub struct Pass<'a, B: Backend> {
    /// The device.
    pub ops: &'a B,
    /// The rows.
    pub batch: &'a B::Batch,
    /// Resident adapters.
    pub slots: &'a B::LoraSlots,
    /// Tokens sampled last.
    pub sampler: &'a B::Sampler,
}

/// Activations, allocated once for the largest step.
pub struct Scratch<B: Backend> {
    /// Logits of the rows that wanted them, `[logit rows, vocab]`.
    pub logits: B::Mat,
    x: B::Mat,
    residual: B::Mat,
    qkv: B::Mat,
    attn: B::Mat,
    gate_up: B::Mat,
    act: B::Mat,
    last: B::Mat,
    products: B::Mat,
}

/// Keys and values of all layers.
pub struct KvCache<B: Backend> {
    layers: Vec<B::Kv>,
}

/// A projection with its low-rank site.
struct Linear<B: Backend> {
    weight: B::Weight,
    bias: Option<B::Vector>,
    site: usize,
}

impl<B: Backend> Linear<B> {
    fn projection<'a>(&'a self, pass: &Pass<'a, B>) -> Projection<'a, B> {
        let lora = LinearLora { slots: pass.slots, site: self.site, batch: pass.batch, rows: RowSet::All };
        Projection { weight: &self.weight, bias: self.bias.as_ref(), lora: Some(lora) }
    }
}

struct Layer<B: Backend> {
    attn_norm: B::Vector,
    qkv: Linear<B>,
    o: Linear<B>,
    mlp_norm: B::Vector,
    gate_up: Linear<B>,
    down: Linear<B>,
}

/// A model's weights on a device.
pub struct Model<B: Backend> {
    config: Config,
    embed: B::Weight,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// `None` when the embedding table serves.
    lm_head: Option<B::Weight>,
    rope: B::Rope,
}

impl<B: Backend> Model<B> {
    /// Loads a GGUF file or a folder in Hugging Face layout, and tells how far it is.
    pub fn load(ops: &B, path: &Path, progress: &mut Progress<'_>) -> Result<Model<B>> {
        let (mut config, source) = weights::open(path)?;
        config.tied = config.tied && !has_own_head(&*source)?;
        let done = LoadProgress { done_bytes: 0, total_bytes: source.total_bytes() };
        let loader = Loader { ops, source: &*source, progress: Mutex::new((progress, done)) };
        let embed = loader.weight(&[("model.embed_tokens", config.vocab)], config.hidden)?;
        let layers = loader.layers(&config)?;
        let norm = loader.vector("model.norm.weight", config.hidden)?;
        let lm_head = match config.tied {
            true => None,
            false => Some(loader.weight(&[("lm_head", config.vocab)], config.hidden)?),
        };
        let rope = ops.rope(&RopeSpec {
            inv_freq: config.rope.inv_freq.clone(),
            scale: config.rope.attention_factor,
            positions: config.max_positions,
            stretch: Stretch::None,
        })?;
        Ok(Model { embed, layers, norm, lm_head, rope, config })
    }

    /// What the model looks like.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where low-rank deltas can attach.
    pub fn sites(&self) -> Vec<LoraSite> {
        self.config.sites()
    }

    /// Keys and values of all layers, for `blocks` blocks.
    pub fn kv_cache(&self, ops: &B, blocks: usize) -> kernels::Result<KvCache<B>> {
        let layers =
            self.layers.iter().map(|_| ops.kv(blocks, self.config.heads)).collect::<kernels::Result<_>>()?;
        Ok(KvCache { layers })
    }

    /// Bytes of one block, all layers together.
    pub fn kv_block_bytes(&self, ops: &B) -> usize {
        ops.kv_block_bytes(self.config.heads) * self.layers.len()
    }

    /// Activations for steps of up to `max_rows` rows, `max_logit_rows` of them with logits.
    pub fn scratch(&self, ops: &B, max_rows: usize, max_logit_rows: usize) -> kernels::Result<Scratch<B>> {
        let Config { hidden, ffn, vocab, heads, .. } = self.config;
        Ok(Scratch {
            logits: ops.wide_mat(max_logit_rows, vocab)?,
            x: ops.mat(max_rows, hidden)?,
            residual: ops.wide_mat(max_rows, hidden)?,
            qkv: ops.mat(max_rows, heads.qkv_cols())?,
            attn: ops.mat(max_rows, heads.query * heads.dim)?,
            gate_up: ops.mat(max_rows, 2 * ffn)?,
            act: ops.mat(max_rows, ffn)?,
            last: ops.mat(max_logit_rows, hidden)?,
            products: ops.wide_mat(max_rows, hidden)?,
        })
    }

    /// Runs one step: stores its keys and values and computes the logits that it wants.
    pub fn forward(
        &self,
        pass: &Pass<'_, B>,
        s: &mut Scratch<B>,
        kv: &mut KvCache<B>,
    ) -> kernels::Result<()> {
        let ops = pass.ops;
        ops.step(pass.batch, pass.slots, || {
            let embedding = Embedding { table: &self.embed, scale: 1.0, positions: None, lora: None };
            ops.embed(pass.batch, pass.sampler, embedding, &mut s.residual)?;
            let norms = self.layers.iter().map(|layer| &layer.attn_norm).chain([&self.norm]);
            let mut norms = norms.map(|weight| self.norm(weight));
            if let Some(norm) = norms.next() {
                ops.normalize(&s.residual, norm, &mut s.x)?;
            }
            for ((layer, next), kv) in self.layers.iter().zip(norms).zip(&mut kv.layers) {
                self.layer(layer, next, pass, s, kv)?;
            }
            ops.gather_logit_rows(&s.x, pass.batch, &mut s.last)?;
            let site = self.layers.len() * SITES;
            let lora = LinearLora { slots: pass.slots, site, batch: pass.batch, rows: RowSet::Logits };
            let weight = self.lm_head.as_ref().unwrap_or(&self.embed);
            let to = Output::Logits { y: &mut s.logits, shape: LogitShape::PLAIN };
            ops.linear(&s.last, Projection::new(weight, Some(lora)), to)
        })
    }

    fn norm<'a>(&self, weight: &'a B::Vector) -> Norm<'a, B> {
        Norm { kind: NormKind::Rms, weight, bias: None, eps: self.config.rms_eps }
    }

    /// Which keys a row sees, in any layer.
    pub fn spans(&self) -> Vec<Span> {
        vec![self.config.window.map_or(Span::Causal, Span::Window)]
    }

    /// The weights of the sites, in their order.
    pub fn site_weights(&self) -> Vec<&B::Weight> {
        let linears = self.layers.iter().flat_map(|at| [&at.qkv, &at.o, &at.gate_up, &at.down]);
        linears.map(|linear| &linear.weight).chain([self.lm_head.as_ref().unwrap_or(&self.embed)]).collect()
    }

    /// One layer behind its first norm, up to the `next` one: from `s.x` to `s.x`, and onto the residual stream.
    fn layer(
        &self,
        layer: &Layer<B>,
        next: Norm<'_, B>,
        pass: &Pass<'_, B>,
        s: &mut Scratch<B>,
        kv: &mut B::Kv,
    ) -> kernels::Result<()> {
        let (ops, heads, window) = (pass.ops, self.config.heads, self.config.window);
        let span = window.map_or(Span::Causal, Span::Window);
        let attention = AttentionShape { span, ..AttentionShape::causal(heads) };
        ops.linear(&s.x, layer.qkv.projection(pass), Output::Store(&mut s.qkv))?;
        let rope = Some(Rotation { table: &self.rope, pairs: Pairs::Halves });
        ops.rope_and_store(&mut s.qkv, Qkv { heads, clamp: None, norms: None, rope }, pass.batch, kv)?;
        ops.paged_attention(&s.qkv, attention.into(), pass.batch, kv, &mut s.attn)?;
        let (stream, products) = (&mut s.residual, &mut s.products);
        let next_of = Some((self.norm(&layer.mlp_norm), &mut s.x));
        let to = Residual { stream, products, post: None, scale: 1.0, more: false, next: next_of };
        ops.linear(&s.attn, layer.o.projection(pass), Output::Residual(to))?;
        let to = Output::Gate { activation: Activation::Silu, products: &mut s.gate_up, y: &mut s.act };
        ops.linear(&s.x, layer.gate_up.projection(pass), to)?;
        let (stream, products) = (&mut s.residual, &mut s.products);
        let to =
            Residual { stream, products, post: None, scale: 1.0, more: false, next: Some((next, &mut s.x)) };
        ops.linear(&s.act, layer.down.projection(pass), Output::Residual(to))
    }
}

/// Whether a model has an output projection other than its embedding table. transformers then uses it, though the
/// configuration says that there is one for both.
fn has_own_head(source: &dyn Source) -> Result<bool> {
    let head = "lm_head.weight";
    if source.bytes(head) == 0 {
        return Ok(false);
    }
    Ok(!weights::are_equal(source, head, "model.embed_tokens.weight")?)
}

/// Whoever is told how far loading is.
type Progress<'a> = dyn FnMut(LoadProgress) + Send + 'a;

/// Threads that load layers: enough to read from the page cache as fast as a GPU takes weights.
const LOADERS: usize = 8;

/// Reads tensors, checks their shapes, and puts them on the device.
struct Loader<'a, B: Backend> {
    ops: &'a B,
    source: &'a (dyn Source + Sync),
    progress: Mutex<(&'a mut Progress<'a>, LoadProgress)>,
}

impl<B: Backend> Loader<'_, B> {
    /// All layers, several at a time. Of several faults, that of the first layer is reported.
    fn layers(&self, config: &Config) -> Result<Vec<Layer<B>>> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(LOADERS);
        let next = AtomicUsize::new(0);
        let load = || {
            let indices = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)));
            let mine = indices.take_while(|&i| i < config.layers);
            mine.map(|i| (i, self.layer(config, i))).collect::<Vec<_>>()
        };
        let mut layers: Vec<_> = thread::scope(|scope| {
            let loaders: Vec<_> = (0..threads).map(|_| scope.spawn(load)).collect();
            loaders
                .into_iter()
                .flat_map(|loader| loader.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        });
        layers.sort_unstable_by_key(|(i, _)| *i);
        layers.into_iter().map(|(_, layer)| layer).collect()
    }

    fn tensor(&self, name: &str, rows: usize, cols: usize) -> Result<HostTensor<'static>> {
        let tensor = self.source.dense(name, [rows, cols])?;
        let (tell, done) = &mut *self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        done.done_bytes += self.source.bytes(name);
        tell(*done);
        Ok(tensor)
    }

    /// The rows of several modules' weights, one after the other.
    fn weight(&self, modules: &[(&str, usize)], cols: usize) -> Result<B::Weight> {
        let parts =
            modules.iter().map(|(module, rows)| self.tensor(&format!("{module}.weight"), *rows, cols));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        Ok(self.ops.weight(&parts)?)
    }

    fn values(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, 1, len)?;
        Ok(tensor.to_f32())
    }

    /// A bias, which is zero where there is none: some projections of a model may have one without the others.
    fn bias(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        if self.source.bytes(name) == 0 { Ok(vec![0.0; len]) } else { self.values(name, len) }
    }

    fn vector(&self, name: &str, len: usize) -> Result<B::Vector> {
        let values = self.values(name, len)?;
        Ok(self.ops.vector(&values)?)
    }

    fn linear(
        &self,
        modules: &[(&str, usize)],
        cols: usize,
        (bias, site): (bool, usize),
    ) -> Result<Linear<B>> {
        let weight = self.weight(modules, cols)?;
        let bias = if bias {
            let values = modules.iter().map(|(module, rows)| self.bias(&format!("{module}.bias"), *rows));
            let values = values.collect::<Result<Vec<_>>>()?.concat();
            Some(self.ops.vector(&values)?)
        } else {
            None
        };
        Ok(Linear { weight, bias, site })
    }

    fn layer(&self, config: &Config, i: usize) -> Result<Layer<B>> {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let (hidden, ffn, Heads { query, kv, dim }) = (config.hidden, config.ffn, config.heads);
        let [q, k, v, o] = ["q", "k", "v", "o"].map(|part| at(&format!("self_attn.{part}_proj")));
        let [gate, up, down] = ["gate", "up", "down"].map(|part| at(&format!("mlp.{part}_proj")));
        let site = i * SITES;
        let (attention, mlp) = (config.attention_bias, config.mlp_bias);
        Ok(Layer {
            attn_norm: self.vector(&at("input_layernorm.weight"), hidden)?,
            qkv: self.linear(
                &[(&q, query * dim), (&k, kv * dim), (&v, kv * dim)],
                hidden,
                (attention, site),
            )?,
            o: self.linear(&[(&o, hidden)], query * dim, (attention, site + 1))?,
            mlp_norm: self.vector(&at("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.linear(&[(&gate, ffn), (&up, ffn)], hidden, (mlp, site + 2))?,
            down: self.linear(&[(&down, hidden)], ffn, (mlp, site + 3))?,
        })
    }
}
