//! LoRA adapters in PEFT's format. An adapter is read so that its output is exactly PEFT's, or it is refused with the
//! name of the field or tensor that is not served. Nothing that changes the output is ignored.

mod base;
mod change;
mod config;
mod cut;
mod error;
mod initial;
mod matrix;
mod merge;
mod merged_base;
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

use kernels::{Adapters, DType, LoraPart, LoraShape, LoraSite, LowRank, ReplacedRows};

use crate::{Share, decoder::Part, files, weights::tensor_file::TensorFile};
pub use base::BaseModel;
use base::BaseWeights;
use change::{Change, Sources};
use config::AdapterConfig;
use cut::Cutter;
pub use error::AdapterError;
pub use matrix::{IsCancelled, Matrix};
pub use merge::{Elementwise, MajoritySign, Merge, MergeError, MergePart, Recipe, Strategy};
pub(crate) use merged_base::MergedBase;
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
    /// What it has beside low-rank deltas and biases, if that is something.
    pub beside_sums: Option<&'static str>,
    /// The tokens at which it begins to act; empty if it acts from the first row on.
    pub invocation: Vec<u32>,
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

impl Adapter {
    /// Its parts, and what else is known of it.
    pub fn into_parts(self) -> (Vec<LoraPart>, Properties) {
        let Adapter { parts, max_lora_rank, sites, hidden_shift, vocab, beside_sums, invocation } = self;
        (parts, Properties { max_lora_rank, sites, hidden_shift, vocab, beside_sums, invocation })
    }
}

/// What is known of an adapter.
#[derive(Debug, Clone)]
pub struct Properties {
    /// Its largest LoRA rank.
    pub max_lora_rank: usize,
    /// The names of the modules that it changes, distinct and sorted.
    pub sites: Vec<String>,
    /// The vector that is added to hidden states: the change of the last norm's bias.
    pub hidden_shift: Option<Vec<f32>>,
    /// The number of tokens that can be looked up: those of the model, and those that only the adapter has.
    pub vocab: usize,
    /// What it has beside low-rank deltas and biases, if that is something: then it cannot be added to others.
    pub beside_sums: Option<&'static str>,
    /// The tokens at which it begins to act; empty if it acts from the first row on.
    pub invocation: Vec<u32>,
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
    invocation: Vec<u32>,
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
        let mut changes = plan.changes(&values, &base)?;
        plan.spread(&mut changes, &values, &base)?;
        let folder = AdapterFolder { base, values, changes, invocation: config.invocation().to_vec() };
        // A copied table has rows of its own without any field that says so.
        match folder.properties().beside_sums.filter(|_| !folder.invocation.is_empty()) {
            Some(other) => config.refuse_beside_invocation(other),
            None => Ok(folder),
        }
    }

    /// The places and sizes of its parts.
    pub fn shapes(&self) -> Vec<LoraShape> {
        self.changes.iter().filter_map(|change| change.shape_of(self.cutter())).collect()
    }

    fn sources<'b>(&'b self, is_cancelled: IsCancelled<'b>) -> Sources<'b> {
        Sources { file: &self.values, base: &self.base, is_cancelled }
    }

    fn cutter(&self) -> Cutter<'_> {
        Cutter { decoder: &self.base.model.decoder, share: self.base.model.share }
    }

    /// What is known of it before its tensors have been read.
    fn properties(&self) -> Properties {
        let changes = || self.changes.iter().filter_map(|change| Some((change, change.shape()?)));
        let mut sites: Vec<_> = changes().map(|(change, _)| change.module.name().to_owned()).collect();
        sites.sort_unstable();
        sites.dedup();
        let has = |is: fn(LoraShape) -> bool| changes().any(|(_, shape)| is(shape));
        let last_norm = self.changes.iter().find(|change| change.module.part == Part::Norm);
        Properties {
            max_lora_rank: changes().map(|(_, shape)| shape.lora_rank).max().unwrap_or(0),
            sites,
            hidden_shift: last_norm.and_then(|change| change.shift.clone()),
            beside_sums: match () {
                () if has(|shape| shape.has_magnitude) => Some("magnitudes"),
                () if has(|shape| shape.rows > 0) => Some("rows of its own for tokens"),
                () if last_norm.is_some_and(|change| change.shift.is_some()) => {
                    Some("a bias of the last norm")
                }
                () => None,
            },
            vocab: self.changes.iter().map(Change::tokens).fold(self.base.model.decoder.vocab, usize::max),
            invocation: self.invocation.clone(),
        }
    }

    /// Reads the share of the model that is served here straight into a backend's host memory. `content` is the number by
    /// which ranks speak of the adapter, and `is_cancelled` is asked before each read. Errors: among others, the adapter
    /// changes nothing.
    pub fn stage<B: Adapters>(
        &self,
        ops: &B,
        sites: &[LoraSite],
        content: u64,
        is_cancelled: IsCancelled<'_>,
    ) -> Result<(B::HostAdapter, Properties), AdapterError> {
        let mut parts = self.parts(is_cancelled)?;
        parts.iter_mut().for_each(|part| part.content = content);
        let staged = ops.stage(sites, &parts)?;
        if parts.iter().all(change::changes_nothing) && self.changes_nothing(is_cancelled)? {
            return Err(AdapterError::ChangesNothing);
        }
        Ok((staged, self.properties()))
    }

    /// The parts of the share of the model that is served here. Their vectors have been read, and their matrices are read by
    /// whoever gets the parts.
    pub fn parts<'b>(
        &'b self,
        is_cancelled: IsCancelled<'b>,
    ) -> Result<Vec<LoraPart<Matrix<'b>>>, AdapterError> {
        self.parts_of(self.cutter(), is_cancelled)
    }

    fn parts_of<'b>(
        &'b self,
        cutter: Cutter<'_>,
        is_cancelled: IsCancelled<'b>,
    ) -> Result<Vec<LoraPart<Matrix<'b>>>, AdapterError> {
        let sources = self.sources(is_cancelled);
        let parts = self.changes.iter().map(|change| {
            let part = change.part(sources)?;
            Ok(part.and_then(|part| cutter.cut(part, &change.module)))
        });
        parts.filter_map(Result::transpose).collect()
    }

    /// Whether it leaves the whole model as it is, of whose share here that is known.
    fn changes_nothing(&self, is_cancelled: IsCancelled<'_>) -> Result<bool, AdapterError> {
        if self.base.model.share == Share::WHOLE {
            return Ok(true);
        }
        let whole = Cutter { share: Share::WHOLE, ..self.cutter() };
        for part in self.parts_of(whole, is_cancelled)? {
            if !change::changes_nothing(&in_memory(part, self.values.dtype)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads the share of the model that is served here into memory. Errors: among others, the adapter changes nothing.
    pub fn read(&self) -> Result<Adapter, AdapterError> {
        let parts = self.parts(&|| false)?.into_iter().map(|part| in_memory(part, self.values.dtype));
        let parts: Vec<LoraPart> = parts.collect::<Result<_, _>>()?;
        if parts.iter().all(change::changes_nothing) && self.changes_nothing(&|| false)? {
            return Err(AdapterError::ChangesNothing);
        }
        let Properties { max_lora_rank, sites, hidden_shift, vocab, beside_sums, invocation } =
            self.properties();
        Ok(Adapter { parts, max_lora_rank, sites, hidden_shift, vocab, beside_sums, invocation })
    }
}

/// Reads the matrices of a part.
fn in_memory(part: LoraPart<Matrix<'_>>, dtype: DType) -> Result<LoraPart, AdapterError> {
    let LoraPart { site, slice, low_rank, magnitude, bias, rows, content } = part;
    let low_rank = low_rank.map(|LowRank { rank, scale, a, b }| {
        Ok::<_, AdapterError>(LowRank { rank, scale, a: a.to_tensor(dtype)?, b: b.to_tensor(dtype)? })
    });
    let rows = rows.map(|ReplacedRows { ids, values }| {
        Ok::<_, AdapterError>(ReplacedRows { ids, values: values.to_tensor(dtype)? })
    });
    let (low_rank, rows) = (low_rank.transpose()?, rows.transpose()?);
    Ok(LoraPart { site, slice, low_rank, magnitude, bias, rows, content })
}
