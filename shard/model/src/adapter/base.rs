//! The base model of an adapter, and the weights that have to be read from it.

use std::{path::PathBuf, sync::OnceLock};

use kernels::{DType, WeightPart};

use super::{AdapterError, values::Values};
use crate::{
    Decoder, Share,
    decoder::{Module, Part},
    load,
    weights::Source,
};

/// The served model, against which adapters are checked.
#[derive(Debug, Clone)]
pub struct BaseModel {
    /// Its description.
    pub decoder: Decoder,
    /// Its files: a folder, or a GGUF file.
    pub path: PathBuf,
    /// The folder of an adapter that is merged into its weights.
    pub merged: Option<PathBuf>,
    /// The type to which its weights are converted.
    pub dtype: DType,
    /// The share of it that is served here, for which adapters are cut.
    pub share: Share,
}

/// The number of rows that are read at a time, because the tables of some models take gigabytes.
pub(super) const ROWS: usize = 64;

impl BaseModel {
    /// Rounds a number to the type of the weights; infinite if the type cannot hold it.
    pub(super) fn rounded(&self, x: f32) -> f32 {
        match self.dtype {
            DType::F32 => x,
            DType::Bf16 => half::bf16::from_f32(x).to_f32(),
            DType::F16 => half::f16::from_f32(x).to_f32(),
        }
    }
}

/// The weights of a model. Its files are opened when they are first needed, since most adapters need none of them.
pub(super) struct BaseWeights<'a> {
    pub(super) model: &'a BaseModel,
    source: OnceLock<Box<dyn Source + Send + Sync>>,
    /// The weights, where they are open already.
    given: Option<&'a (dyn Source + Send + Sync)>,
}

impl<'a> BaseWeights<'a> {
    pub(super) fn of(model: &'a BaseModel) -> BaseWeights<'a> {
        BaseWeights { model, source: OnceLock::new(), given: None }
    }

    /// Weights that are open.
    pub(super) fn given(model: &'a BaseModel, source: &'a (dyn Source + Send + Sync)) -> BaseWeights<'a> {
        BaseWeights { model, source: OnceLock::new(), given: Some(source) }
    }

    fn source(&self) -> Result<&dyn Source, AdapterError> {
        if let Some(given) = self.given {
            return Ok(given);
        }
        if self.source.get().is_none() {
            let BaseModel { path, merged, dtype, .. } = self.model;
            // If another thread was faster, its source is as good.
            let _ = self.source.set(load::open(path, merged.as_deref(), *dtype)?.1);
        }
        self.source.get().map(|source| &**source as &dyn Source).ok_or(AdapterError::NoTensor)
    }

    /// The name of a module's weight.
    fn name(&self, module: &Module) -> String {
        let Decoder { head, names, .. } = &self.model.decoder;
        match module.part {
            Part::Head if head.tied => names.path(None, Part::Embed) + ".weight",
            _ => format!("{}.weight", module.path),
        }
    }

    /// Reads the bias of a module, which is zero if the module may have one and has none.
    pub(super) fn bias(&self, module: &Module) -> Result<Vec<f32>, AdapterError> {
        let (source, name) = (self.source()?, format!("{}.bias", module.path));
        if source.bytes(&name) == 0 {
            return Ok(vec![0.0; module.outputs]);
        }
        Ok(source.dense(&name, [1, module.outputs])?.to_f32())
    }

    /// Calls `call` with every row of a module's weight, rounded as for computing, in the order of the file.
    pub(super) fn each_row(
        &self,
        module: &Module,
        mut call: impl FnMut(usize, &[f32]),
    ) -> Result<(), AdapterError> {
        let (source, name) = (self.source()?, self.name(module));
        let numbers = |part: WeightPart<'_>| -> Vec<f32> {
            part.into_dense().to_f32().into_iter().map(|x| self.model.rounded(x)).collect()
        };
        if module.transposed {
            let stored = numbers(source.part(&name, 0..module.inputs, 0..module.outputs)?);
            for row in 0..module.outputs {
                let column: Vec<f32> = stored[row..].iter().step_by(module.outputs).copied().collect();
                call(row, &column);
            }
            return Ok(());
        }
        for first in (0..module.outputs).step_by(ROWS) {
            let rows = first..module.outputs.min(first + ROWS);
            let stored = numbers(source.part(&name, rows, 0..module.inputs)?);
            stored.chunks_exact(module.inputs).enumerate().for_each(|(i, row)| call(first + i, row));
        }
        Ok(())
    }

    /// The rows of an adapter's table that differ from those of the model once both are converted, and all beyond the
    /// model's rows.
    pub(super) fn differing(
        &self,
        file: &Values,
        name: &str,
        module: &Module,
    ) -> Result<Vec<u32>, AdapterError> {
        let (source, base) = (self.source()?, self.name(module));
        let [rows, cols] = file.file.matrix_shape(name)?;
        let shared = rows.min(module.outputs);
        let numbers = |part: WeightPart<'_>| part.into_dense().to_f32();
        let mut differing = Vec::new();
        for first in (0..shared).step_by(ROWS) {
            let rows = first..shared.min(first + ROWS);
            let own = numbers(file.file.part(name, rows.clone(), 0..cols)?);
            let bases = numbers(source.part(&base, rows.clone(), 0..cols)?);
            let pairs = own.chunks_exact(cols).zip(bases.chunks_exact(cols));
            let is_other = |(own, base): (&[f32], &[f32])| {
                own.iter().zip(base).any(|(own, base)| self.model.rounded(*own) != self.model.rounded(*base))
            };
            differing.extend(rows.zip(pairs).filter(|(_, pair)| is_other(*pair)).map(|(row, _)| row as u32));
        }
        differing.extend(shared as u32..rows as u32);
        Ok(differing)
    }
}
