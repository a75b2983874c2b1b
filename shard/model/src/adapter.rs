//! LoRA adapters in PEFT's format. An adapter is read so that its output is exactly PEFT's, or it is refused with the
//! name of the field or tensor that is not served. Nothing that changes the output is ignored.

mod base;
mod change;
mod config;
mod cut;
mod error;
mod initial;
mod merge;
mod names;
mod norms;
mod pattern;
mod plan;
mod python_regex;
mod rows;
mod values;

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
};

use kernels::{DType, HostTensor, LoraPart, LoraShape, LowRank, ReplacedRows};
use sha2::{Digest, Sha256};

use crate::{decoder::Part, files, weights::tensor_file::TensorFile};
pub use base::BaseModel;
use base::BaseWeights;
use change::Change;
use config::AdapterConfig;
use cut::Cutter;
pub use error::AdapterError;
pub use merge::{Elementwise, MajoritySign, Merge, MergeError, MergePart, Recipe, Strategy};
pub use python_regex::PatternError;
use values::Values;

/// The name of an adapter's configuration in its folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The names of the file with an adapter's tensors, of which the first that exists is read.
pub const WEIGHTS_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
/// The subfolder in which Ludwig stores an adapter, below its own metadata.
const LUDWIGS: &str = "model_weights";

/// The SHA-256 of everything that determines an adapter's output.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash(pub [u8; 32]);

impl ContentHash {
    /// The number by which ranks speak of the adapter.
    pub fn number(self) -> u64 {
        self.0[..8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An adapter, ready to be staged.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The hash of its whole content, which identifies it on every rank.
    pub hash: ContentHash,
    /// Its changes to the share of the model, by site and slice.
    pub parts: Vec<LoraPart>,
    /// Its largest LoRA rank.
    pub max_lora_rank: usize,
    /// The names of the modules that it changes, distinct and sorted.
    pub sites: Vec<String>,
    /// The vector that is added to hidden states: the change of the last norm's bias.
    pub hidden_shift: Option<Vec<f32>>,
    /// The number of tokens that can be looked up: those of the model, and those that only the adapter has.
    pub vocab: usize,
}

impl Adapter {
    fn identify(&mut self, content: ContentHash) {
        self.hash = content;
        self.parts.iter_mut().for_each(|part| part.content = content.number());
    }
}

/// The open files of an adapter. Whoever has opened them knows which files they are, whatever becomes of their names.
#[derive(Debug)]
pub struct AdapterFiles {
    /// The configuration.
    pub config: File,
    /// The tensors.
    pub weights: File,
    /// The path by which the tensors were opened. Its extension decides on their format.
    pub weights_path: PathBuf,
}

impl AdapterFiles {
    /// Opens the files in a folder.
    pub fn open(folder: &Path) -> Result<AdapterFiles, AdapterError> {
        let folder = files_folder(folder);
        let there = |name: &'static str| {
            let path = folder.join(name);
            path.exists().then_some(path)
        };
        let config = files::open(&there(CONFIG_FILE).ok_or(AdapterError::NoFile(CONFIG_FILE))?)?;
        let weights_path = WEIGHTS_FILES.into_iter().find_map(there);
        let weights_path = weights_path.ok_or(AdapterError::NoFile(WEIGHTS_FILES[0]))?;
        Ok(AdapterFiles { config, weights: files::open(&weights_path)?, weights_path })
    }
}

/// The folder with an adapter's files: the folder itself, or its subfolder for an adapter of Ludwig.
pub fn files_folder(folder: &Path) -> PathBuf {
    let inner = folder.join(LUDWIGS);
    let is_ludwigs = !folder.join(CONFIG_FILE).exists() && inner.join(CONFIG_FILE).exists();
    if is_ludwigs { inner } else { folder.to_owned() }
}

/// Reads the adapter in a folder, and checks it against a model.
pub fn read(folder: &Path, model: &BaseModel) -> Result<Adapter, AdapterError> {
    AdapterFolder::open(folder, model)?.read()
}

/// An adapter whose configuration and headers have been read, but not its tensors.
pub struct AdapterFolder<'a> {
    base: BaseWeights<'a>,
    values: Values,
    changes: Vec<Change>,
}

impl<'a> AdapterFolder<'a> {
    /// Reads the configuration and the headers of all tensors. Copies of the model's tables are compared with these.
    pub fn open(folder: &Path, model: &'a BaseModel) -> Result<AdapterFolder<'a>, AdapterError> {
        AdapterFolder::of(AdapterFiles::open(folder)?, model)
    }

    /// The same of files that are open.
    pub fn of(files: AdapterFiles, model: &'a BaseModel) -> Result<AdapterFolder<'a>, AdapterError> {
        let config = AdapterConfig::read(&files.config, &model.decoder)?;
        AdapterFolder::with(&config, files, model, model.dtype)
    }

    /// Reads the headers of all tensors, which are to be read as numbers of `dtype`.
    fn with(
        config: &AdapterConfig,
        files: AdapterFiles,
        model: &'a BaseModel,
        dtype: DType,
    ) -> Result<AdapterFolder<'a>, AdapterError> {
        let file = TensorFile::of(&files.weights_path, files.weights)?;
        let plan = plan::Plan::of(config, model, names::nesting(&file))?;
        let (values, base) = (Values { file, dtype }, BaseWeights::of(model));
        let changes = plan.changes(&values, &base)?;
        Ok(AdapterFolder { base, values, changes })
    }

    /// The places and sizes of its parts.
    pub fn shapes(&self) -> Vec<LoraShape> {
        self.changes.iter().filter_map(|change| change.shape_of(self.cutter())).collect()
    }

    fn cutter(&self) -> Cutter<'_> {
        Cutter { decoder: &self.base.model.decoder, share: self.base.model.share }
    }

    /// Bytes of host memory that [`Self::read`] takes, and its result until it has been staged.
    pub fn read_bytes(&self) -> usize {
        let size = self.values.dtype.size();
        let parts: usize = self.changes.iter().map(|change| change.bytes(size)).sum();
        parts + self.changes.iter().map(|change| change.passing_bytes(&self.values)).max().unwrap_or(0)
    }

    /// Reads the tensors. Errors: among others, the adapter changes nothing.
    pub fn read(&self) -> Result<Adapter, AdapterError> {
        let mut sha = Sha256::new();
        let mut adapter = self.read_parts(&|| false, &mut |part| hash(&mut sha, part))?;
        adapter.hidden_shift.iter().flatten().for_each(|x| sha.update(x.to_le_bytes()));
        adapter.identify(ContentHash(sha.finalize().into()));
        Ok(adapter)
    }

    /// Reads the tensors of an adapter whose content is known by this hash. `is_cancelled` is asked before each tensor.
    /// Errors: among others, it was cancelled, or the adapter changes nothing.
    pub fn read_as(
        &self,
        content: ContentHash,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Adapter, AdapterError> {
        let mut adapter = self.read_parts(is_cancelled, &mut |_| {})?;
        adapter.identify(content);
        Ok(adapter)
    }

    fn read_parts(
        &self,
        is_cancelled: &dyn Fn() -> bool,
        visit: &mut dyn FnMut(&LoraPart),
    ) -> Result<Adapter, AdapterError> {
        let (mut parts, mut sites) = (Vec::new(), Vec::new());
        let (mut changes_nothing, mut max_lora_rank) = (true, 0);
        for change in &self.changes {
            if is_cancelled() {
                return Err(AdapterError::Cancelled);
            }
            if let Some(part) = change.read(&self.values, &self.base)? {
                visit(&part);
                changes_nothing &= change::changes_nothing(&part);
                max_lora_rank = max_lora_rank.max(part.shape().lora_rank);
                parts.extend(self.cutter().cut(part, &change.module));
                sites.push(change.module.name().to_owned());
            }
        }
        if changes_nothing {
            return Err(AdapterError::ChangesNothing);
        }
        let last_norm = self.changes.iter().find(|change| change.module.part == Part::Norm);
        let hidden_shift = last_norm.and_then(|change| change.shift.clone());
        sites.sort_unstable();
        sites.dedup();
        Ok(Adapter {
            hash: ContentHash([0; 32]),
            max_lora_rank,
            hidden_shift,
            parts,
            sites,
            vocab: self.changes.iter().map(Change::tokens).fold(self.base.model.decoder.vocab, usize::max),
        })
    }
}

/// Hashes what is computed with, so that two folders with the same output have the same identity, however they are
/// written.
fn hash(sha: &mut Sha256, part: &LoraPart) {
    let LoraShape { site, slice, lora_rank, has_magnitude, has_bias, rows } = part.shape();
    // The shape of each part comes before its data, so that different lists of parts never give the same bytes.
    for number in [site, slice, lora_rank, has_magnitude.into(), has_bias.into(), rows] {
        sha.update((number as u64).to_le_bytes());
    }
    if let Some(LowRank { scale, a, b, .. }) = &part.low_rank {
        sha.update(scale.to_le_bytes());
        hash_tensor(sha, a);
        hash_tensor(sha, b);
    }
    for vector in [&part.magnitude, &part.bias].into_iter().flatten() {
        sha.update((vector.len() as u64).to_le_bytes());
        vector.iter().for_each(|x| sha.update(x.to_le_bytes()));
    }
    if let Some(ReplacedRows { ids, values }) = &part.rows {
        sha.update([u8::from(ids.is_some())]);
        ids.iter().flatten().for_each(|id| sha.update(id.to_le_bytes()));
        hash_tensor(sha, values);
    }
}

fn hash_tensor(sha: &mut Sha256, tensor: &HostTensor<'_>) {
    sha.update((tensor.data.len() as u64).to_le_bytes());
    sha.update(&tensor.data);
}
