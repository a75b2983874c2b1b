//! One adapter made of several, as PEFT's `add_weighted_adapter` makes it (`peft/tuners/lora/model.py`).
//!
//! Everything is computed in f32 from the tensors as they are stored, in PEFT's order; SVD is computed in f64. The
//! result is then rounded to the type that kernels compute with, as the tensors of every adapter are. Whole tensors are
//! merged and are cut for the share of a rank afterwards, so that every rank has its share of the same merge.
//!
//! The tensors of one module are in memory at a time, those of all parts.

mod arithmetic;
mod error;
mod mask;
mod modules;
mod recipe;
mod svd;

use kernels::{DType, HostTensor, LoraPart, LoraShape, LowRank};

use super::{
    Adapter, AdapterError, AdapterFiles, AdapterFolder, BaseModel, ContentHash,
    change::{self, Delta},
    config::AdapterConfig,
    cut::Cutter,
    matrix::Cut,
    values::encoded,
};
use crate::{decoder::Kind, load::stored_runs};
use arithmetic::Factors;
pub use error::MergeError;
use modules::MergedModule;
pub use recipe::{Elementwise, MajoritySign, Recipe, Strategy};

/// An adapter that is merged with others.
#[derive(Debug)]
pub struct MergePart {
    /// Its name, for messages.
    pub name: String,
    /// Its files.
    pub files: AdapterFiles,
    /// Its weight, which may be negative.
    pub weight: f64,
}

/// Adapters to be merged, whose configurations and headers have been read, but not their tensors.
pub struct Merge<'a> {
    model: &'a BaseModel,
    recipe: Recipe,
    parts: Vec<Opened<'a>>,
    modules: Vec<MergedModule>,
    /// The factor of all deltas of the result.
    scale: f32,
}

/// A part, and what has been read of it.
struct Opened<'a> {
    name: String,
    weight: f64,
    config: AdapterConfig,
    folder: AdapterFolder<'a>,
}

impl<'a> Opened<'a> {
    fn open(part: MergePart, model: &'a BaseModel) -> Result<Opened<'a>, MergeError> {
        let MergePart { name, files, weight } = part;
        let open = || {
            let config = AdapterConfig::read(&files.config, &model.decoder)?;
            config.check_merge()?;
            let folder = AdapterFolder::with(&config, files, model, DType::F32)?;
            match folder.changes.iter().find(|change| !change.has_only_model_rows()) {
                None => Ok((config, folder)),
                Some(change) => Err(AdapterError::Rows(change.module.path.clone())),
            }
        };
        match open() {
            Ok((config, folder)) => Ok(Opened { name, weight, config, folder }),
            Err(source) => Err(MergeError::of(&name, source)),
        }
    }

    /// The delta of the module at an index of the table of modules.
    fn delta(&self, index: usize) -> Option<&Delta> {
        self.folder.changes[index].delta.as_ref()
    }
}

impl<'a> Merge<'a> {
    /// Reads the configurations and headers of all parts. Refuses what PEFT refuses, and what it leaves out of the
    /// result without a word.
    pub fn open(
        parts: Vec<MergePart>,
        recipe: &Recipe,
        model: &'a BaseModel,
    ) -> Result<Merge<'a>, MergeError> {
        let recipe = recipe.checked(&parts)?;
        let parts = parts.into_iter().map(|part| Opened::open(part, model));
        let parts: Vec<Opened<'a>> = parts.collect::<Result<_, _>>()?;
        let lora_rank = recipe.lora_rank(parts.iter().map(|part| part.config.largest_rank()), "all")?;
        let modules = modules::merged(&parts, &recipe, lora_rank, &model.decoder)?;
        // PEFT makes α the rank, and takes all else from the first part's configuration.
        let uses_rslora = parts.first().is_some_and(|first| first.config.uses_rslora());
        let scale = if uses_rslora { (lora_rank as f64).sqrt() as f32 } else { 1.0 };
        Ok(Merge { model, recipe, parts, modules, scale })
    }

    /// The places and sizes of the parts of the result.
    pub fn shapes(&self) -> Vec<LoraShape> {
        self.modules
            .iter()
            .filter_map(|merged| self.cutter().shape(merged.shape(), None, &merged.module))
            .collect()
    }

    fn cutter(&self) -> Cutter<'_> {
        Cutter { decoder: &self.model.decoder, share: self.model.share }
    }

    /// Bytes of host memory that [`Self::read_as`] takes, and its result until it has been staged.
    pub fn read_bytes(&self) -> usize {
        let size = self.model.dtype.size();
        let result: usize = self.modules.iter().map(|merged| merged.elements() * size).sum();
        let passing = self.modules.iter().map(|merged| {
            let [of_parts, of_result] = match self.recipe.strategy {
                Strategy::Svd => svd::PASSING,
                Strategy::Elementwise(_) | Strategy::Cat | Strategy::Dense(_) => arithmetic::PASSING,
            };
            let whole = match self.recipe.strategy {
                Strategy::Dense(_) => {
                    let [of_part, once] = svd::PASSING_WHOLE;
                    (of_part * self.parts.len() + once) * merged.elements_whole()
                }
                Strategy::Svd | Strategy::Elementwise(_) | Strategy::Cat => 0,
            };
            let stored = self.parts.iter().filter_map(|part| {
                let (delta, values) = (part.delta(merged.index)?, &part.folder.values);
                Some(values.passing_bytes(&delta.a).max(values.passing_bytes(&delta.b)))
            });
            whole
                + stored.max().unwrap_or(0)
                + of_parts * merged.elements_read()
                + of_result * merged.elements()
        });
        result + passing.max().unwrap_or(0)
    }

    /// Reads the tensors and merges them into an adapter whose content is known by this hash. `is_cancelled` is asked
    /// before each module. Errors: among others, the result changes nothing.
    pub fn read_as(
        &self,
        content: ContentHash,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Adapter, MergeError> {
        let (mut parts, mut changes_nothing) = (Vec::new(), true);
        for merged in &self.modules {
            if is_cancelled() {
                return Err(MergeError::Cancelled);
            }
            let part = self.merged(merged)?;
            changes_nothing &= change::changes_nothing(&part);
            parts.extend(self.cutter().cut(part, &merged.module));
        }
        if changes_nothing {
            return Err(MergeError::ChangesNothing);
        }
        let mut sites: Vec<_> = self.modules.iter().map(|merged| merged.module.name().to_owned()).collect();
        sites.sort_unstable();
        sites.dedup();
        let max_lora_rank = self.modules.iter().map(|merged| merged.lora_rank).max().unwrap_or(0);
        let vocab = self.model.decoder.vocab;
        parts.iter_mut().for_each(|part| part.content = content.number());
        let (hidden_shift, beside_sums, invocation) = (None, None, Vec::new());
        Ok(Adapter { parts, max_lora_rank, sites, hidden_shift, vocab, beside_sums, invocation })
    }

    /// The change at a module.
    fn merged(&self, merged: &MergedModule) -> Result<LoraPart, MergeError> {
        let MergedModule { module, lora_rank, .. } = merged;
        let factors = self.factors(merged)?;
        let [a, b] = match self.recipe.strategy {
            Strategy::Cat => arithmetic::beside(&factors),
            Strategy::Svd => {
                svd::truncated(&factors, *lora_rank).ok_or_else(|| MergeError::NoSvd(module.path.clone()))?
            }
            Strategy::Elementwise(way) => arithmetic::elementwise(way, &factors, &self.recipe, &module.path),
            Strategy::Dense(way) => {
                self.truncated(way, &factors, merged).ok_or_else(|| MergeError::NoSvd(module.path.clone()))?
            }
        };
        drop(factors);
        let matrix =
            |rows: usize, values: &[f32]| match values.iter().all(|x| self.model.rounded(*x).is_finite()) {
                true => Ok(encoded([rows, values.len() / rows], values, self.model.dtype)),
                false => Err(MergeError::TooLarge { module: module.path.clone(), dtype: self.model.dtype }),
            };
        let a: HostTensor<'static> = matrix(*lora_rank, &a)?;
        let mut b = matrix(b.len() / lora_rank, &b)?;
        if module.kind != Kind::Lookup {
            let all: Vec<_> = std::iter::once(0..b.rows).collect();
            b = b.rows(&stored_runs(all, module));
        }
        let LoraShape { site, slice, .. } = merged.shape();
        let low_rank = Some(LowRank { rank: *lora_rank, scale: self.scale, a, b });
        Ok(LoraPart { site, slice, low_rank, magnitude: None, bias: None, rows: None, content: 0 })
    }

    /// Merges whole deltas, of whose result A and B of the module's rank are taken.
    fn truncated(
        &self,
        way: Elementwise,
        factors: &[Factors],
        merged: &MergedModule,
    ) -> Option<[Vec<f32>; 2]> {
        let module = &merged.module;
        let is_transposed = module.transposed || module.kind == Kind::Lookup;
        let whole = arithmetic::whole(way, factors, is_transposed, &self.recipe, &module.path);
        // Of a table, B has the columns, and A has the tokens.
        let outputs = if module.kind == Kind::Lookup { module.inputs } else { module.outputs };
        let inputs = whole.len() / outputs;
        let at = |input: usize, output: usize| match is_transposed {
            true => input * outputs + output,
            false => output * inputs + input,
        };
        let elements = (0..inputs).flat_map(|input| (0..outputs).map(move |output| at(input, output)));
        svd::truncated_whole(outputs, elements.map(|at| whole[at]), merged.lora_rank)
    }

    /// Reads the tensors of a module.
    fn factors(&self, merged: &MergedModule) -> Result<Vec<Factors>, MergeError> {
        let mut factors = Vec::new();
        for (part, opened) in self.parts.iter().enumerate() {
            let Some(delta) = opened.delta(merged.index) else { continue };
            let tensors = delta.read(&merged.module, &opened.folder.values);
            let tensors = tensors.map_err(|source| MergeError::of(&opened.name, source))?;
            let [a, b] = tensors.map(|tensor| tensor.to_f32());
            let (weight, scale) = (opened.weight, delta.scale);
            factors.push(Factors { part, lora_rank: delta.lora_rank, weight, scale, a, b });
        }
        Ok(factors)
    }
}
