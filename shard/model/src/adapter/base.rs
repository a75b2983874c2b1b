//! The model that an adapter belongs to, and the copies of its tensors that PEFT writes beside A and B.

use std::path::PathBuf;

use kernels::{DType, WeightPart};

use super::{
    AdapterError,
    tensors::{self, PREFIX},
};
use crate::{
    Decoder,
    decoder::Part,
    weights::{self, tensor_file::TensorFile},
};

/// A model that is served, as adapters are checked against it.
#[derive(Debug, Clone)]
pub struct BaseModel {
    /// What it looks like.
    pub decoder: Decoder,
    /// Its files: a folder, or a GGUF file.
    pub path: PathBuf,
    /// What its weights are converted to.
    pub dtype: DType,
}

/// Rows of a table that are compared at a time.
const ROWS: usize = 64;

/// Modules whose weights PEFT writes into an adapter that targets one of them, unless `save_embedding_layers` is off.
const COPIED: [&str; 2] = ["lm_head", "model.embed_tokens"];

/// The module that a tensor claims to be a copy of.
pub(super) fn copied_module(name: &str) -> Option<&'static str> {
    let module = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let module = module.strip_suffix(".base_layer").unwrap_or(module);
    COPIED.into_iter().find(|copied| *copied == module)
}

impl BaseModel {
    /// Refuses a tensor of an adapter that is not what the model has for `module`, once both are converted. A few rows at
    /// a time: tables of some models take gigabytes.
    pub(super) fn check_copy(&self, file: &TensorFile, name: &str, module: &str) -> Result<(), AdapterError> {
        let table = self.decoder.names.path(None, Part::Embed);
        let module = if self.decoder.head.tied { &table } else { module };
        let Decoder { vocab, hidden, .. } = self.decoder;
        tensors::expect_shape(file, name, [vocab, hidden])?;
        let (_, source) = weights::open(&self.path)?;
        let base = format!("{module}.weight");
        for first in (0..vocab).step_by(ROWS) {
            let rows = first..vocab.min(first + ROWS);
            let (copy, base) =
                (file.part(name, rows.clone(), 0..hidden)?, source.part(&base, rows, 0..hidden)?);
            let converted =
                |part: WeightPart<'_>| part.into_dense().to_f32().into_iter().map(|x| self.rounded(x));
            if !converted(copy).eq(converted(base)) {
                return Err(AdapterError::NotTheModels { name: name.into(), module: module.into() });
            }
        }
        Ok(())
    }

    /// A number as it is computed with; infinite if the type cannot hold it.
    pub(super) fn rounded(&self, x: f32) -> f32 {
        match self.dtype {
            DType::F32 => x,
            DType::Bf16 => half::bf16::from_f32(x).to_f32(),
            DType::F16 => half::f16::from_f32(x).to_f32(),
        }
    }
}
