//! The loader: reads the tensors of a decoder's modules, checks their shapes, brings them into the order and form that
//! operations expect, and puts them on the device.

use std::{
    ops::Range,
    panic::resume_unwind,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use kernels::{Backend, DType, HostTensor};

use crate::{
    Decoder, LoadError, LoadProgress, Result, Share,
    adapter::{BaseModel, MergedBase},
    decoder::{Classifier, LAYER_SITES, Module, Modules, NormSpec, Part, Run, Stored, Task},
    forward::{Layer, Linear, Model, NormOf, OutputOf, Sizes},
    weights::{self, Source},
};

/// Called with the progress of loading.
pub(crate) type Progress<'a> = dyn FnMut(LoadProgress) + Send + 'a;

/// The largest number of threads that load layers, which is enough to read from the page cache as fast as a GPU accepts
/// weights.
const LOADERS: usize = 8;

/// What all threads of the loader share.
struct Loader<'a, B: Backend> {
    ops: &'a B,
    source: &'a (dyn Source + Sync),
    modules: Modules,
    share: Share,
    progress: Mutex<(&'a mut Progress<'a>, LoadProgress)>,
}

/// Opens a model, with the adapter of a folder merged into its weights if there is one.
pub(crate) fn open(
    path: &Path,
    merged: Option<&Path>,
    dtype: DType,
) -> Result<(Decoder, Box<dyn Source + Send + Sync>)> {
    let (mut decoder, source) = weights::open(path)?;
    decoder.head.tied = decoder.head.tied && !has_own_head(&*source, &decoder)?;
    let Some(folder) = merged else { return Ok((decoder, source)) };
    let model =
        BaseModel { decoder: decoder.clone(), path: path.into(), merged: None, dtype, share: Share::WHOLE };
    let merged = MergedBase::open(folder, model, source);
    let source = merged.map_err(|source| LoadError::Merged(Box::new(source)))?;
    decoder.head.tied = decoder.head.tied && !has_own_head(&source, &decoder)?;
    Ok((decoder, Box::new(source)))
}

/// Loads this rank's share of a model, and reports its progress.
pub(crate) fn load<B: Backend>(
    ops: &B,
    (path, merged): (&Path, Option<&Path>),
    longest: usize,
    progress: &mut Progress<'_>,
) -> Result<Model<B>> {
    let (mut decoder, source) = open(path, merged, ops.dtype())?;
    decoder.serve_up_to(longest);
    if decoder.names.stored == Stored::Folder {
        // transformers keeps the factor of embeddings in the type of the weights, llama.cpp in f32.
        decoder.embedding.scale = rounded(decoder.embedding.scale, ops.dtype());
    }
    let done = LoadProgress { done_bytes: 0, total_bytes: source.total_bytes() };
    let share = Share::of(&decoder, ops.rank(), ops.ranks())?;
    let modules = Modules::of(&decoder);
    let loader = Loader { ops, source: &*source, modules, share, progress: Mutex::new((progress, done)) };
    let embed = loader.weight(&[loader.module(None, Part::Embed)])?;
    let positions = loader.modules.find(None, Part::Positions).map(|at| loader.positions(at)).transpose()?;
    let embed_norm =
        decoder.embedding.norm.map(|spec| loader.norm(None, Part::EmbedNorm, spec)).transpose()?;
    let layers = loader.layers(&decoder)?;
    let norm = loader.optional_norm(None, Part::Norm, decoder.norm)?;
    let output = loader.output(&decoder)?;
    let ropes = decoder.ropes.iter().map(|spec| ops.rope(spec)).collect::<kernels::Result<_>>()?;
    let sites = loader.modules.sites(&decoder, share);
    let heads = share.heads(decoder.heads());
    let width = share.run(Run { count: decoder.layers[0].mlp.width, size: 1 }).len();
    let logits = match decoder.task {
        Task::Generate => share.logits(&decoder).len(),
        Task::Embed | Task::Classify(_) => decoder.logit_columns(),
    };
    let sizes = Sizes { share, heads, width, logits };
    Ok(Model { embed, positions, embed_norm, layers, norm, output, ropes, sites, sizes, decoder })
}

/// Whether a model that is configured as tied has an output projection that differs from its embedding table.
/// transformers uses it then, and so do we.
fn has_own_head(source: &dyn Source, decoder: &Decoder) -> Result<bool> {
    if decoder.task != Task::Generate {
        return Ok(false);
    }
    let [head, table] = [Part::Head, Part::Embed].map(|part| decoder.names.path(None, part) + ".weight");
    if source.bytes(&head) == 0 {
        return Ok(false);
    }
    Ok(!weights::are_equal(source, &head, &table)?)
}

impl<B: Backend> Loader<'_, B> {
    /// A module that the table has for every decoder of this kind.
    fn module(&self, layer: Option<usize>, part: Part) -> &Module {
        let found = self.modules.find(layer, part);
        found.unwrap_or_else(|| unreachable!("the table of modules has {part:?} wherever it is asked for"))
    }

    /// Loads all layers, several at a time. If several fail, the error of the first one is returned.
    fn layers(&self, decoder: &Decoder) -> Result<Vec<Layer<B>>> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(LOADERS);
        let next = AtomicUsize::new(0);
        let load = || {
            let indices = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)));
            let mine = indices.take_while(|&i| i < decoder.layers.len());
            mine.map(|i| (i, self.layer(decoder, i))).collect::<Vec<_>>()
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

    fn layer(&self, decoder: &Decoder, i: usize) -> Result<Layer<B>> {
        let (spec, at) = (&decoder.layers[i], Some(i));
        let norm = |part, spec| self.optional_norm(at, part, spec);
        let qk = spec.attention.norms.map(|(norm, _)| norm).unwrap_or(spec.norm);
        let vector = |part| self.modules.find(at, part).map(|module| self.vector(module)).transpose();
        let slopes = spec.attention.slopes.as_ref().map(|slopes| {
            let own = self.share.run(Run { count: slopes.len(), size: 1 });
            self.ops.vector(&slopes[own])
        });
        Ok(Layer {
            attention_norm: norm(Part::AttentionNorm, spec.norm)?,
            qkv: self.linear(i, 0)?,
            q_norm: norm(Part::QNorm, qk)?,
            k_norm: norm(Part::KNorm, qk)?,
            sinks: vector(Part::Sinks)?,
            slopes: slopes.transpose()?,
            out: self.linear(i, 1)?,
            attention_post: norm(Part::AttentionPost, spec.norm)?,
            mlp_norm: norm(Part::MlpNorm, spec.norm)?,
            up: self.linear(i, 2)?,
            down: self.linear(i, 3)?,
            mlp_post: norm(Part::MlpPost, spec.norm)?,
            output_norm: norm(Part::OutputNorm, spec.norm)?,
        })
    }

    /// Loads what the task computes from the last hidden states.
    fn output(&self, decoder: &Decoder) -> Result<OutputOf<B>> {
        let site = decoder.output_site();
        match &decoder.task {
            Task::Embed => Ok(OutputOf::Hidden),
            Task::Classify(Classifier { dense, .. }) => {
                let dense = dense.map(|f| Ok::<_, LoadError>((self.linear_at(site + 1)?, f))).transpose()?;
                Ok(OutputOf::Classes { dense, classifier: self.linear_at(site)? })
            }
            Task::Generate => {
                let head = self.module(None, Part::Head);
                let weight = match (decoder.head.tied, self.share == Share::WHOLE) {
                    (true, true) => None,
                    // The embedding table is not divided, but the rows of the output projection are.
                    (true, false) => Some(self.weight_from(self.module(None, Part::Embed), head)?),
                    (false, _) => Some(self.weight(&[head])?),
                };
                Ok(OutputOf::Logits { weight, bias: self.bias(&[head])? })
            }
        }
    }

    /// Loads the table of positions. The vector of the first type of tokens, which all tokens are of, is added to each
    /// row.
    fn positions(&self, module: &Module) -> Result<B::Weight> {
        let Some(types) = self.modules.find(None, Part::TokenTypes) else { return self.weight(&[module]) };
        let shape = [module.outputs, module.inputs];
        let mut rows = self.source.dense(&format!("{}.weight", module.path), shape)?.to_f32();
        let name = format!("{}.weight", types.path);
        let first =
            self.source.dense_part(&name, [types.outputs, types.inputs], 0..1, 0..types.inputs)?.to_f32();
        [module, types].iter().for_each(|module| self.has_read(&format!("{}.weight", module.path)));
        for row in rows.chunks_exact_mut(module.inputs) {
            row.iter_mut().zip(&first).for_each(|(x, add)| *x += add);
        }
        let data: Vec<u8> = rows.into_iter().flat_map(f32::to_le_bytes).collect();
        let [rows, cols] = shape;
        Ok(self.ops.weight(&[HostTensor { dtype: DType::F32, rows, cols, data: data.into() }])?)
    }

    /// Loads the fused projection of a layer's site.
    fn linear(&self, layer: usize, site: usize) -> Result<Linear<B>> {
        self.linear_at(layer * LAYER_SITES + site)
    }

    fn linear_at(&self, site: usize) -> Result<Linear<B>> {
        let modules = self.modules.at_site(site);
        Ok(Linear { weight: self.weight(&modules)?, bias: self.bias(&modules)?, site })
    }

    /// Reports that a tensor has been read, as far as this rank needs it.
    fn has_read(&self, name: &str) {
        let (tell, done) = &mut *self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        done.done_bytes += self.source.bytes(name);
        tell(*done);
    }

    /// Reads a vector.
    fn values(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values = self.source.dense(name, [1, len])?.to_f32();
        self.has_read(name);
        Ok(values)
    }

    /// Loads the weights of several modules as one matrix, with their rows one after the other.
    fn weight(&self, modules: &[&Module]) -> Result<B::Weight> {
        let parts = modules.iter().map(|module| self.parts(module, module)).collect::<Result<Vec<_>>>()?;
        Ok(self.ops.weight(&parts.concat())?)
    }

    /// Loads a weight that is divided as `module` is, from the tensor of another module of the same size.
    fn weight_from(&self, stored: &Module, module: &Module) -> Result<B::Weight> {
        Ok(self.ops.weight(&self.parts(stored, module)?)?)
    }

    /// Reads this rank's share of a module's weight, of which nothing else is read.
    fn parts(&self, stored: &Module, module: &Module) -> Result<Vec<HostTensor<'static>>> {
        let name = format!("{}.weight", stored.path);
        let (source, cols) = (self.source, self.share.inputs(module));
        let runs = stored_runs(self.share.outputs(module), module);
        let parts = runs.into_iter().map(|rows| match module.transposed {
            false => source.dense_part(&name, [module.outputs, module.inputs], rows, cols.clone()),
            true => {
                let stored = source.dense_part(&name, [module.inputs, module.outputs], cols.clone(), rows);
                stored.map(|stored| transposed(&stored))
            }
        });
        let parts = parts.collect::<Result<_>>();
        self.has_read(&name);
        parts
    }

    /// Loads the biases of several modules, or none if none of them may have one. A bias that is missing is zero,
    /// because some modules of a projection may have one while others do not.
    fn bias(&self, modules: &[&Module]) -> Result<Option<B::Vector>> {
        if !modules.iter().any(|module| module.bias && self.share.adds_bias(module)) {
            return Ok(None);
        }
        let values = modules.iter().map(|module| {
            let name = format!("{}.bias", module.path);
            let own = stored_runs(self.share.outputs(module), module);
            if !module.bias || self.source.bytes(&name) == 0 {
                return Ok(vec![0.0; own.iter().map(ExactSizeIterator::len).sum()]);
            }
            let values = self.values(&name, module.outputs)?;
            Ok(own.into_iter().flat_map(|run| values[run].to_vec()).collect())
        });
        let values = values.collect::<Result<Vec<_>>>()?.concat();
        Ok(Some(self.ops.vector(&values)?))
    }

    /// Loads a vector that belongs to no weight.
    fn vector(&self, module: &Module) -> Result<B::Vector> {
        let values = self.values(&module.path, module.outputs)?;
        let own: Vec<f32> =
            self.share.outputs(module).into_iter().flat_map(|range| values[range].to_vec()).collect();
        Ok(self.ops.vector(&own)?)
    }

    /// Loads a norm, if there is one.
    fn optional_norm(&self, layer: Option<usize>, part: Part, spec: NormSpec) -> Result<Option<NormOf<B>>> {
        self.modules.find(layer, part).map(|_| self.norm(layer, part, spec)).transpose()
    }

    fn norm(&self, layer: Option<usize>, part: Part, spec: NormSpec) -> Result<NormOf<B>> {
        let module = self.module(layer, part);
        let mut weight = self.values(&format!("{}.weight", module.path), module.outputs)?;
        if spec.plus_one {
            weight.iter_mut().for_each(|x| *x += 1.0);
        }
        Ok(NormOf { weight: self.ops.vector(&weight)?, bias: self.bias(&[module])?, spec })
    }
}

/// The runs of stored rows that are some outputs of a module, in the order that operations expect.
pub(crate) fn stored_runs(outputs: Vec<Range<usize>>, module: &Module) -> Vec<Range<usize>> {
    let Some(sources) = module.order.sources(module.outputs) else { return outputs };
    let mut runs: Vec<Range<usize>> = Vec::new();
    for row in outputs.into_iter().flatten().map(|output| sources[output]) {
        match runs.last_mut().filter(|run| run.end == row) {
            Some(run) => run.end += 1,
            None => runs.push(row..row + 1),
        }
    }
    runs
}

/// A number as weights of this type have it.
fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::Bf16 => half::bf16::from_f32(x).to_f32(),
        DType::F16 => half::f16::from_f32(x).to_f32(),
    }
}

/// The transposed matrix.
pub(crate) fn transposed(tensor: &HostTensor<'_>) -> HostTensor<'static> {
    let (rows, cols, size) = (tensor.cols, tensor.rows, tensor.dtype.size());
    let mut data = Vec::with_capacity(tensor.data.len());
    for row in 0..rows {
        for col in 0..cols {
            data.extend_from_slice(&tensor.data[(col * rows + row) * size..][..size]);
        }
    }
    HostTensor { dtype: tensor.dtype, rows, cols, data: data.into() }
}
