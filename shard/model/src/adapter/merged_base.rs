//! The weights of a model with an adapter merged into them, as PEFT's `merge_and_unload` makes them. Whoever reads a tensor
//! of [`MergedBase`] gets the merged one, a few rows at a time: so a rank reads its share, adapters that are loaded later
//! are compared with the merged weights, and nothing is written to a disk.
//!
//! A weight is computed in f32 from the numbers of the files, and rounded once, to the type that is computed with:
//! `W + s · B · A`, with DoRA divided by the norms of its rows and multiplied by the magnitudes. Blocks of quantized
//! weights are dequantized before, as they are without an adapter.

use std::{
    collections::HashMap,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use kernels::{DType, Format, HostTensor, WeightPart};

use super::{
    AdapterError, AdapterFiles, BaseModel,
    base::{BaseWeights, ROWS},
    change::{Change, Merged},
    config::AdapterConfig,
    names, plan,
    values::{Values, encoded},
};
use crate::{
    LoadError, Result,
    decoder::Part,
    weights::{Source, tensor_file::TensorFile},
};

/// A model's tensors, of which those that an adapter changes are computed.
pub(crate) struct MergedBase {
    source: Box<dyn Source + Send + Sync>,
    values: Values,
    /// The model before the merge.
    model: BaseModel,
    weights: HashMap<String, Weight>,
    /// Biases that the adapter changes.
    biases: HashMap<String, Vec<f32>>,
    /// The output projection and the embedding table, where the files have one tensor for both and the adapter changes
    /// either.
    untied: Option<[String; 2]>,
}

/// A weight that the adapter changes.
struct Weight {
    change: Change,
    /// Made when the weight is first read.
    merged: Mutex<Option<Arc<Merged>>>,
}

impl MergedBase {
    /// Opens the adapter in a folder. Errors: it is no adapter of this model, or has what weights of the model cannot
    /// take: other tokens, or a bias where the model has none.
    pub(crate) fn open(
        folder: &Path,
        model: BaseModel,
        source: Box<dyn Source + Send + Sync>,
    ) -> std::result::Result<MergedBase, AdapterError> {
        let files = AdapterFiles::open(folder)?;
        let config = AdapterConfig::read(&files.config, &model.decoder)?;
        config.check_acts_always()?;
        let file = TensorFile::of(&files.weights_path, files.weights)?;
        let plan = plan::Plan::of(&config, &model, names::nesting(&file))?;
        let values = Values { file, dtype: DType::F32 };
        let base = BaseWeights::given(&model, &*source);
        let changes = plan.changes(&values, &base)?;
        let (mut weights, mut biases) = (HashMap::new(), HashMap::new());
        for change in changes {
            let path = change.module.path.clone();
            if let Some(bias) = change.merged_bias(&values, &base)? {
                biases.insert(format!("{path}.bias"), bias);
            }
            if change.changes_weight(&values)? {
                weights.insert(format!("{path}.weight"), Weight { change, merged: Mutex::default() });
            }
        }
        let [head, table] =
            [Part::Head, Part::Embed].map(|part| model.decoder.names.path(None, part) + ".weight");
        let is_untied =
            model.decoder.head.tied && [&head, &table].iter().any(|name| weights.contains_key(*name));
        let untied = is_untied.then_some([head, table]);
        Ok(MergedBase { source, values, model, weights, biases, untied })
    }

    /// The name under which the files have a tensor.
    fn stored<'a>(&'a self, name: &'a str) -> &'a str {
        match &self.untied {
            Some([head, table]) if name == head => table,
            _ => name,
        }
    }

    fn merged(&self, weight: &Weight) -> std::result::Result<Arc<Merged>, AdapterError> {
        let made = &mut *weight.merged.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = made {
            return Ok(made.clone());
        }
        let base = BaseWeights::given(&self.model, &*self.source);
        let mut merged = weight.change.merged(&self.values, &base)?;
        if merged.has_magnitude() {
            let [rows, cols] =
                self.source.shape(self.stored(&format!("{}.weight", weight.change.module.path)))?;
            for first in (0..rows).step_by(ROWS) {
                let range = first..rows.min(first + ROWS);
                let mut values = self.read(weight, range.clone(), 0..cols)?;
                merged.add_delta(&mut values, range.clone(), 0..cols);
                merged.count_norms(&values, range);
            }
            merged.divide_by_norms();
        }
        Ok(made.insert(Arc::new(merged)).clone())
    }

    /// Reads some of the model's rows, or those that replace them.
    fn read(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> std::result::Result<Vec<f32>, AdapterError> {
        let name = format!("{}.weight", weight.change.module.path);
        let (name, width) = (self.stored(&name), cols.len());
        let stored = self.source.dense_part(name, self.source.shape(name)?, rows.clone(), cols.clone())?;
        let mut values = stored.to_f32();
        for (row, own) in rows.zip(values.chunks_exact_mut(width)) {
            if let Some(replaced) = weight.change.replaced_row(row, &self.values)? {
                own.copy_from_slice(&replaced[cols.clone()]);
            }
        }
        Ok(values)
    }

    fn computed(
        &self,
        name: &str,
        weight: &Weight,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> std::result::Result<HostTensor<'static>, AdapterError> {
        let merged = self.merged(weight)?;
        let mut values = self.read(weight, rows.clone(), cols.clone())?;
        merged.add_delta(&mut values, rows.clone(), cols.clone());
        merged.multiply(&mut values, rows.clone(), cols.clone());
        if !values.iter().all(|x| self.model.rounded(*x).is_finite()) {
            return Err(AdapterError::TooLarge { name: name.into(), dtype: self.model.dtype });
        }
        Ok(encoded([rows.len(), cols.len()], &values, self.model.dtype))
    }
}

impl Source for MergedBase {
    fn shape(&self, name: &str) -> Result<[usize; 2]> {
        match self.biases.get(name) {
            Some(bias) => Ok([1, bias.len()]),
            None => self.source.shape(self.stored(name)),
        }
    }

    fn part(&self, name: &str, rows: Range<usize>, cols: Range<usize>) -> Result<WeightPart<'static>> {
        let tensor = if let Some(bias) = self.biases.get(name) {
            encoded([1, cols.len()], &bias[cols], DType::F32)
        } else if let Some(weight) = self.weights.get(name) {
            let computed = self.computed(name, weight, rows, cols);
            computed.map_err(|source| LoadError::Merged(Box::new(source)))?
        } else {
            return self.source.part(self.stored(name), rows, cols);
        };
        let HostTensor { dtype, rows, cols, data } = tensor;
        Ok(WeightPart { format: Format::Dense(dtype), rows, cols, data })
    }

    fn block(&self, name: &str) -> Result<usize> {
        match self.biases.contains_key(name) || self.weights.contains_key(name) {
            true => Ok(1),
            false => self.source.block(self.stored(name)),
        }
    }

    fn bytes(&self, name: &str) -> u64 {
        match (self.source.bytes(self.stored(name)), self.biases.get(name)) {
            (0, Some(bias)) => 4 * bias.len() as u64,
            (bytes, _) => bytes,
        }
    }

    fn total_bytes(&self) -> u64 {
        self.source.total_bytes()
    }
}
