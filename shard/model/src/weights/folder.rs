//! Files of tensors of a folder in Hugging Face layout, found and named as transformers does (`modeling_utils.py`:
//! `_get_resolved_checkpoint_files`, and `core_model_loading.py`: `rename_source_key`).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    ops::Range,
    path::Path,
};

use kernels::WeightPart;
use serde::Deserialize;

use super::{Source, tensor_file::TensorFile};
use crate::{
    Decoder, LoadError, Result,
    decoder::{Modules, Nesting, Part, Task},
};

const WHOLE: &str = "model.safetensors";
/// The names of a whole file and of an index of several files, in the order in which transformers looks for them.
const FILES: [(&str, &str); 2] =
    [(WHOLE, "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")];

/// A tensor in one of the files.
#[derive(Clone)]
struct Place {
    file: usize,
    /// Its name there.
    name: String,
}

/// The tensors that a model needs, with their files. Others are ignored, as transformers does: copies of rotary
/// frequencies, heads for training.
pub(super) struct Folder {
    files: Vec<TensorFile>,
    places: BTreeMap<String, Place>,
}

impl Folder {
    pub(super) fn open(folder: &Path, decoder: &Decoder) -> Result<Folder> {
        let files = file_names(folder)?;
        let files =
            files.iter().map(|name| TensorFile::open(&folder.join(name))).collect::<Result<Vec<_>>>()?;
        let taken = Taken::of(decoder);
        let mut places = BTreeMap::new();
        let mut beside = BTreeSet::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.names() {
                let Some(taken) = taken.name(name) else {
                    beside.extend(part(name));
                    continue;
                };
                // A tensor of exactly this name wins over one that is meant by another name.
                if taken == name || !places.contains_key(&taken) {
                    places.insert(taken, Place { file: i, name: name.into() });
                }
            }
        }
        if decoder.names.is_wrapped && !beside.is_empty() {
            tracing::info!("the language model is served alone, without {beside:?}");
        }
        // If the output projection is the embedding table, either tensor may be missing.
        let [table, head] = [Part::Embed, Part::Head].map(|part| decoder.names.path(None, part) + ".weight");
        if decoder.task == Task::Generate
            && decoder.head.tied
            && !places.contains_key(&table)
            && let Some(head) = places.get(&head).cloned()
        {
            places.insert(table, head);
        }
        Ok(Folder { files, places })
    }

    fn place(&self, name: &str) -> Result<(&TensorFile, &str)> {
        let place = self.places.get(name).ok_or_else(|| LoadError::MissingTensor(name.into()))?;
        Ok((&self.files[place.file], &place.name))
    }
}

/// The files with the tensors: a whole file if there is one, whatever an index beside it says.
fn file_names(folder: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let has = |name: &str| folder.join(name).is_file();
    let Some((whole, index)) = FILES.into_iter().find(|(whole, index)| has(whole) || has(index)) else {
        return Ok(vec![WHOLE.into()]);
    };
    if has(whole) {
        return Ok(vec![whole.into()]);
    }
    let index = folder.join(index);
    let text = fs::read(&index).map_err(|source| LoadError::Io { path: index.clone(), source })?;
    let parsed: Index =
        serde_json::from_slice(&text).map_err(|source| LoadError::Json { path: index, source })?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// The part of a model that a tensor belongs to.
fn part(name: &str) -> Option<String> {
    name.strip_prefix("model.").unwrap_or(name).split('.').next().map(str::to_owned)
}

/// The names of the tensors that a model needs.
struct Taken {
    names: HashSet<String>,
    /// The same by the names that they have in a larger model.
    nested: HashMap<String, String>,
    /// A prefix that files may leave out, or add.
    base: String,
    /// Modules that files may call by another name.
    renamed: &'static [(&'static str, &'static str)],
}

impl Taken {
    fn of(decoder: &Decoder) -> Taken {
        let modules = Modules::of(decoder);
        let names =
            modules.iter().flat_map(|module| module.tensors().map(|(name, _)| name).collect::<Vec<_>>());
        let names: HashSet<String> = names.collect();
        let nestings = Nesting::NESTED.into_iter().filter(|_| decoder.names.is_wrapped);
        let nested = |nesting: Nesting| {
            names.iter().map(move |name| (nesting.path(decoder.names.base, name), name.clone()))
        };
        Taken {
            nested: nestings.flat_map(nested).collect(),
            names,
            base: format!("{}.", decoder.names.base),
            renamed: decoder.names.renamed,
        }
    }

    /// The name under which the model takes a tensor: its own, or the same with or without the module in front that
    /// holds a decoder in a model with a head.
    fn name(&self, name: &str) -> Option<String> {
        // The names of the first version of BERT.
        let old = [(".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")];
        let renamed = old.iter().find_map(|(old, new)| Some(format!("{}{new}", name.strip_suffix(old)?)));
        let name = renamed.as_deref().unwrap_or(name);
        if let Some(name) = self.nested.get(name) {
            return Some(name.clone());
        }
        let renamed = self.renamed.iter().find_map(|(theirs, ours)| {
            let kind = name.strip_prefix(theirs).filter(|kind| kind.starts_with('.'))?;
            Some(format!("{ours}{kind}")).filter(|name| self.names.contains(name))
        });
        if renamed.is_some() {
            return renamed;
        }
        let without = name.strip_prefix(&self.base).filter(|without| self.names.contains(*without));
        if let Some(without) = without {
            return Some(without.into());
        }
        [format!("{}{name}", self.base), name.into()].into_iter().find(|name| self.names.contains(name))
    }
}

impl Source for Folder {
    fn shape(&self, name: &str) -> Result<[usize; 2]> {
        let (file, stored) = self.place(name)?;
        file.matrix_shape(stored)
    }

    fn part(&self, name: &str, rows: Range<usize>, cols: Range<usize>) -> Result<WeightPart<'static>> {
        let (file, stored) = self.place(name)?;
        file.part(stored, rows, cols)
    }

    fn block(&self, _name: &str) -> Result<usize> {
        Ok(1)
    }

    fn bytes(&self, name: &str) -> u64 {
        self.place(name).map_or(0, |(file, stored)| file.bytes(stored))
    }

    fn total_bytes(&self) -> u64 {
        self.places.keys().map(|name| self.bytes(name)).fold(0, u64::saturating_add)
    }
}
