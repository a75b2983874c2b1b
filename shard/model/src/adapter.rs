//! LoRA adapters in PEFT's format. What is read is exactly what PEFT would compute; what is not served is refused by
//! the name of its field or tensor. Nothing is ignored.

mod base;
mod change;
mod config;
mod error;
mod initial;
mod names;
mod norms;
mod pattern;
mod plan;
mod python_regex;
mod rows;
mod values;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use kernels::{HostTensor, LoraPart, LoraShape, LowRank, ReplacedRows};
use sha2::{Digest, Sha256};

use crate::weights::tensor_file::TensorFile;
pub use base::BaseModel;
use base::BaseWeights;
use change::Change;
pub use error::AdapterError;
pub use python_regex::PatternError;
use values::Values;

/// Name of an adapter's configuration in its folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Names of the file of an adapter's tensors in its folder. The first that is there is read.
pub const WEIGHTS_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
/// The folder below its own metadata in which Ludwig puts an adapter.
const LUDWIGS: &str = "model_weights";

/// SHA-256 of all that determines an adapter's output.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash(pub [u8; 32]);

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An adapter, ready to be staged.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its identity.
    pub hash: ContentHash,
    /// What it changes, by site and slice.
    pub parts: Vec<LoraPart>,
    /// Its largest LoRA rank.
    pub max_lora_rank: usize,
    /// Names of the modules that it changes, distinct and sorted.
    pub sites: Vec<String>,
    /// Tokens that can be looked up: the model's, and those that only the adapter has.
    pub vocab: usize,
}

/// The folder that has an adapter's files: one itself, or its subfolder if it is Ludwig's.
pub fn files_folder(folder: &Path) -> PathBuf {
    let inner = folder.join(LUDWIGS);
    let is_ludwigs = !folder.join(CONFIG_FILE).exists() && inner.join(CONFIG_FILE).exists();
    if is_ludwigs { inner } else { folder.to_owned() }
}

/// Reads the adapter in a folder and checks it against a model.
pub fn read(folder: &Path, model: &BaseModel) -> Result<Adapter, AdapterError> {
    AdapterFolder::open(folder, model)?.read()
}

/// The folder of an adapter of which it is known what it changes. Nothing of that is in memory yet.
pub struct AdapterFolder<'a> {
    base: BaseWeights<'a>,
    values: Values,
    changes: Vec<Change>,
}

impl<'a> AdapterFolder<'a> {
    /// Reads the configuration and the names of all tensors. Copies of the model's tables are compared with them.
    pub fn open(folder: &Path, model: &'a BaseModel) -> Result<AdapterFolder<'a>, AdapterError> {
        let folder = files_folder(folder);
        let config = config::AdapterConfig::read(&folder, &model.decoder)?;
        let plan = plan::Plan::of(&config, model)?;
        let path = WEIGHTS_FILES.map(|name| folder.join(name)).into_iter().find(|path| path.exists());
        let file = TensorFile::open(&path.ok_or(AdapterError::NoFile(WEIGHTS_FILES[0]))?)?;
        let (values, base) = (Values { file, dtype: model.dtype }, BaseWeights::of(model));
        let changes = plan.changes(&values, &base)?;
        Ok(AdapterFolder { base, values, changes })
    }

    /// Places and sizes of what it changes.
    pub fn shapes(&self) -> Vec<LoraShape> {
        self.changes.iter().filter_map(Change::shape).collect()
    }

    /// Bytes of host memory that it takes between [`Self::read`] and its staging, and while it is read.
    pub fn read_bytes(&self) -> usize {
        let size = self.values.dtype.size();
        let parts: usize = self.changes.iter().map(|change| change.bytes(size)).sum();
        parts + self.changes.iter().map(|change| change.passing_bytes(&self.values)).max().unwrap_or(0)
    }

    /// Reads it. Errors: also that it changes nothing.
    pub fn read(&self) -> Result<Adapter, AdapterError> {
        let (mut parts, mut sites) = (Vec::new(), Vec::new());
        for change in &self.changes {
            if let Some(part) = change.read(&self.values, &self.base)? {
                parts.push(part);
                sites.push(change.module.name().to_owned());
            }
        }
        if parts.iter().all(change::changes_nothing) {
            return Err(AdapterError::ChangesNothing);
        }
        sites.sort_unstable();
        sites.dedup();
        Ok(Adapter {
            hash: hash(&parts),
            max_lora_rank: parts.iter().map(|part| part.shape().lora_rank).max().unwrap_or(0),
            parts,
            sites,
            vocab: self.changes.iter().map(Change::tokens).fold(self.base.model.decoder.vocab, usize::max),
        })
    }
}

/// Hashes what the kernels will compute with: two folders that give the same output have the same identity, however
/// they are written.
fn hash(parts: &[LoraPart]) -> ContentHash {
    let mut sha = Sha256::new();
    for part in parts {
        let LoraShape { site, slice, lora_rank, has_magnitude, has_bias, rows } = part.shape();
        // Of each part it is told what follows, so that no two lists of parts are the same bytes.
        for number in [site, slice, lora_rank, has_magnitude.into(), has_bias.into(), rows] {
            sha.update((number as u64).to_le_bytes());
        }
        if let Some(LowRank { scale, a, b, .. }) = &part.low_rank {
            sha.update(scale.to_le_bytes());
            hash_tensor(&mut sha, a);
            hash_tensor(&mut sha, b);
        }
        for vector in [&part.magnitude, &part.bias].into_iter().flatten() {
            sha.update((vector.len() as u64).to_le_bytes());
            vector.iter().for_each(|x| sha.update(x.to_le_bytes()));
        }
        if let Some(ReplacedRows { ids, values }) = &part.rows {
            sha.update([u8::from(ids.is_some())]);
            ids.iter().flatten().for_each(|id| sha.update(id.to_le_bytes()));
            hash_tensor(&mut sha, values);
        }
    }
    ContentHash(sha.finalize().into())
}

fn hash_tensor(sha: &mut Sha256, tensor: &HostTensor<'_>) {
    sha.update((tensor.data.len() as u64).to_le_bytes());
    sha.update(&tensor.data);
}
