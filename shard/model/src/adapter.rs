//! LoRA adapters in PEFT's format. What is read is exactly what PEFT would compute; what is not served is refused by
//! the name of its field or tensor. Nothing is ignored.

mod base;
mod config;
mod pattern;
mod python_regex;
mod tensors;

use std::{fmt, path::Path};

use kernels::{DType, LoraPart, LoraShape, LoraSite, LowRank};
use sha2::{Digest, Sha256};

use crate::{
    Decoder, LoadError,
    decoder::{Kind, Module, Modules},
};
pub use base::BaseModel;
use config::Target;
pub use python_regex::PatternError;

/// Name of an adapter's configuration in its folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Names of the file of an adapter's tensors in its folder. The first that is there is read.
pub const WEIGHTS_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// SHA-256 of all that determines an adapter's output.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash(pub [u8; 32]);

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why an adapter was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file that cannot be read, is cut short or corrupt.
    #[error(transparent)]
    File(LoadError),
    /// A file that must be there.
    #[error("{0} is missing")]
    NoFile(&'static str),
    /// A field whose value we cannot serve exactly.
    #[error("{CONFIG_FILE}: {field} = {value} is not supported")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
    },
    /// A field that is missing or of another type.
    #[error("{CONFIG_FILE}: {field} is missing or not {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// A pattern that is no regular expression, is not known here, or takes too long to match.
    #[error("{CONFIG_FILE}: {field}: {source}")]
    Pattern {
        /// The field.
        field: &'static str,
        /// The cause.
        source: PatternError,
    },
    /// A target that this model does not have, or that deltas cannot attach to.
    #[error("{CONFIG_FILE}: target_modules: {0:?} is no projection of this model that an adapter can change")]
    Target(String),
    /// No module of this model is targeted.
    #[error("{CONFIG_FILE}: no module of this model is targeted")]
    NoTarget,
    /// A tensor that belongs to no targeted module.
    #[error("tensor {0} belongs to no targeted module of this model")]
    UnknownTensor(String),
    /// A tensor of the base model that came with the adapter and is another one.
    #[error("tensor {name} is not {module} of this model")]
    NotTheModels {
        /// The tensor.
        name: String,
        /// What it would have to be.
        module: String,
    },
    /// A tensor that a targeted module needs.
    #[error("the adapter's tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor of another shape than model and configuration imply.
    #[error("tensor {name} has the shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The expected shape.
        expected: [usize; 2],
    },
    /// A value that is no number.
    #[error("tensor {0} has NaN or infinite values")]
    NotFinite(String),
    /// An alpha that f32, which deltas are scaled in, cannot hold.
    #[error("{CONFIG_FILE}: the scale of {module} is too large for f32")]
    ScaleTooLarge {
        /// The module.
        module: String,
    },
    /// A value that the type computed with cannot hold.
    #[error("tensor {name} has values that are too large for {dtype:?}")]
    TooLarge {
        /// The tensor.
        name: String,
        /// The type computed with.
        dtype: DType,
    },
}

impl From<LoadError> for AdapterError {
    fn from(error: LoadError) -> AdapterError {
        // Whoever asked for the adapter is told, and is not to learn where this machine keeps its files.
        AdapterError::File(error.without_folder())
    }
}

/// An adapter, ready to be staged.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its identity.
    pub hash: ContentHash,
    /// Its deltas, by site and slice.
    pub parts: Vec<LoraPart>,
    /// Its largest LoRA rank.
    pub max_lora_rank: usize,
    /// Names of the modules that it changes, distinct and sorted.
    pub sites: Vec<String>,
}

/// Paths of what PEFT looks at and is no projection: it refuses a target among them, or changes it in a way that is not
/// served.
fn other_paths(decoder: &Decoder, modules: &Modules) -> Vec<String> {
    let names = &decoder.names;
    let (outer, inner) = names.others;
    let in_layers = (0..decoder.layers.len()).flat_map(|i| {
        inner.iter().map(move |path| match *path {
            "" => format!("{}.{i}", names.layers),
            path => format!("{}.{i}.{path}", names.layers),
        })
    });
    let without_place =
        modules.iter().filter(|module| !is_projection(module)).map(|module| module.path.clone());
    outer.iter().map(|path| (*path).to_owned()).chain(in_layers).chain(without_place).collect()
}

/// Whether deltas can attach to a module.
fn is_projection(module: &Module) -> bool {
    matches!(module.kind, Kind::Linear | Kind::Head)
}

/// Reads the adapter in a folder and checks it against a model.
pub fn read(folder: &Path, model: &BaseModel) -> Result<Adapter, AdapterError> {
    AdapterFolder::open(folder, model)?.read()
}

/// The folder of an adapter whose configuration was read, and nothing else.
pub struct AdapterFolder<'a> {
    folder: &'a Path,
    model: &'a BaseModel,
    targets: Vec<Target>,
}

impl<'a> AdapterFolder<'a> {
    /// Reads the configuration.
    pub fn open(folder: &'a Path, model: &'a BaseModel) -> Result<AdapterFolder<'a>, AdapterError> {
        let config = config::AdapterConfig::read(folder, &model.decoder)?;
        let modules = Modules::of(&model.decoder);
        let projections: Vec<Module> =
            modules.iter().filter(|module| is_projection(module)).cloned().collect();
        let targets = config.targets(&projections, &other_paths(&model.decoder, &modules))?;
        Ok(AdapterFolder { folder, model, targets })
    }

    /// Places and sizes of its deltas.
    pub fn shapes(&self) -> Vec<LoraShape> {
        let shape = |target: &Target| LoraShape::delta(target.place().0, target.place().1, target.lora_rank);
        self.targets.iter().map(shape).collect()
    }

    /// Reads the deltas, and checks that there is nothing else.
    pub fn read(&self) -> Result<Adapter, AdapterError> {
        let parts = tensors::read(self.folder, &self.targets, self.model)?;
        let mut sites: Vec<String> =
            self.targets.iter().map(|target| target.module.name().to_owned()).collect();
        sites.sort_unstable();
        sites.dedup();
        Ok(Adapter {
            hash: hash(&parts),
            max_lora_rank: parts.iter().map(|part| part.shape().lora_rank).max().unwrap_or(0),
            parts,
            sites,
        })
    }
}

/// Bytes of host memory that the deltas of these shapes take between [`AdapterFolder::read`] and their staging.
pub fn read_bytes(shapes: &[LoraShape], sites: &[LoraSite]) -> usize {
    let elements = |shape: &LoraShape| {
        let site = &sites[shape.site];
        shape.lora_rank * (site.inputs + site.outputs[shape.slice])
    };
    shapes.iter().map(elements).sum::<usize>() * size_of::<f32>()
}

/// Hashes what the kernels will compute with: two folders that give the same output have the same identity, however
/// they are written.
fn hash(parts: &[LoraPart]) -> ContentHash {
    let mut sha = Sha256::new();
    for part in parts {
        let LoraShape { site, slice, lora_rank, .. } = part.shape();
        for number in [site, slice, lora_rank] {
            sha.update((number as u64).to_le_bytes());
        }
        if let Some(LowRank { scale, a, b, .. }) = &part.low_rank {
            sha.update(scale.to_le_bytes());
            for tensor in [a, b] {
                sha.update((tensor.data.len() as u64).to_le_bytes());
                sha.update(&tensor.data);
            }
        }
    }
    ContentHash(sha.finalize().into())
}
