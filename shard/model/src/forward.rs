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

use kernels::{Attention, Backend, Comm, Heads, HostTensor, LinearLora, LoraSite, Projection, RowSet};

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
    /// The other ranks.
    pub comm: &'a dyn Comm<B>,
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

    fn forward(&self, pass: &Pass<'_, B>, x: &B::Mat, y: &mut B::Mat) -> kernels::Result<()> {
        pass.ops.linear(x, self.projection(pass), y)
    }

    /// Adds this projection of `x` to the residual stream, and norms that into `y`. Where every rank has a share, one of
    /// them adds its own, with the bias, to the stream, the others put theirs in its place, and the sum over ranks is the
    /// stream again.
    fn add_norm(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Mat,
        residual: &mut B::Mat,
        norm: Norm<'_, B>,
        y: &mut B::Mat,
    ) -> kernels::Result<()> {
        let projection = self.projection(pass);
        if pass.comm.ranks() == 1 {
            return pass.ops.add_linear_norm(x, projection, residual, norm, y);
        }
        if pass.comm.rank() == 0 {
            pass.ops.add_linear(x, projection, residual)?;
        } else {
            pass.ops.linear(x, Projection { bias: None, ..projection }, residual)?;
        }
        pass.comm.all_reduce(residual)?;
        pass.ops.rms_norm(residual, norm.0, norm.1, y)
    }
}

/// Weights of a norm, and what is added to the mean of squares.
type Norm<'a, B> = (&'a <B as Backend>::Vector, f32);

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
        let rope = ops.rope(&config.rope.inv_freq, config.max_positions, config.rope.attention_factor)?;
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
        ops.step(pass.batch, || {
            ops.embed(pass.batch, pass.sampler, &self.embed, &mut s.residual)?;
            let norms = self.layers.iter().map(|layer| &layer.attn_norm).chain([&self.norm]);
            let mut norms = norms.map(|norm| (norm, self.config.rms_eps));
            if let Some((norm, eps)) = norms.next() {
                ops.rms_norm(&s.residual, norm, eps, &mut s.x)?;
            }
            for ((layer, next), kv) in self.layers.iter().zip(norms).zip(&mut kv.layers) {
                self.layer(layer, next, pass, s, kv)?;
            }
            ops.gather_logit_rows(&s.x, pass.batch, &mut s.last)?;
            let site = self.layers.len() * SITES;
            let lora = LinearLora { slots: pass.slots, site, batch: pass.batch, rows: RowSet::Logits };
            let weight = self.lm_head.as_ref().unwrap_or(&self.embed);
            ops.linear(&s.last, Projection::new(weight, Some(lora)), &mut s.logits)
        })
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
        let Config { heads, window, rms_eps, .. } = self.config;
        let attention = Attention { heads, scale: 1.0 / (heads.dim as f32).sqrt(), window, softcap: None };
        layer.qkv.forward(pass, &s.x, &mut s.qkv)?;
        pass.ops.rope_and_store(&mut s.qkv, heads, &self.rope, pass.batch, kv)?;
        pass.ops.paged_attention(&s.qkv, &attention, pass.batch, kv, &mut s.attn)?;
        layer.o.add_norm(pass, &s.attn, &mut s.residual, (&layer.mlp_norm, rms_eps), &mut s.x)?;
        let gate_up = layer.gate_up.projection(pass);
        pass.ops.gated_linear(&s.x, gate_up, &mut s.gate_up, &mut s.act)?;
        layer.down.add_norm(pass, &s.act, &mut s.residual, next, &mut s.x)
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
