//! The names of an adapter's tensors (`peft/utils/save_and_load.py`).

use std::collections::HashMap;

use super::{
    AdapterError,
    values::{Values, is_zero},
};
use crate::{
    decoder::{Module, Modules, Nesting, Part, is_beside},
    weights::tensor_file::TensorFile,
};

/// PEFT's prefix of a module's path.
pub(super) const PREFIX: &str = "base_model.model.";

/// The role of a tensor in its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Role {
    /// A of the low-rank delta.
    A,
    /// B of the low-rank delta.
    B,
    /// The bias of B.
    DeltaBias,
    /// The magnitude (DoRA).
    Magnitude,
    /// The whole weight, which was trained, or is a copy of the base model's.
    Table,
    /// The trained bias.
    Bias,
    /// The trained rows of some tokens.
    Tokens,
}

impl Role {
    /// The suffix of a tensor's name.
    fn ending(self, is_lookup: bool) -> &'static str {
        match self {
            Role::A if is_lookup => "lora_embedding_A",
            Role::A => "lora_A.weight",
            Role::B if is_lookup => "lora_embedding_B",
            Role::B => "lora_B.weight",
            Role::DeltaBias => "lora_B.bias",
            Role::Magnitude => "lora_magnitude_vector",
            Role::Table => "weight",
            Role::Bias => "bias",
            Role::Tokens => "token_adapter.trainable_tokens_delta",
        }
    }
}

/// The path of a tensor's module, and the tensor's role.
fn place(name: &str) -> Option<(&str, Role)> {
    let name = name.strip_prefix(PREFIX)?;
    let (rest, kind) = match name.rsplit_once('.') {
        Some((rest, kind @ ("weight" | "bias"))) => (rest, kind),
        _ => (name, ""),
    };
    // Checkpoints of a training run have the adapter's name in their tensors' names.
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    let (module, part) = rest.rsplit_once('.').unwrap_or(("", rest));
    Some(match (part, kind) {
        ("lora_A", "weight") | ("lora_embedding_A", "") => (module, Role::A),
        ("lora_B", "weight") | ("lora_embedding_B", "") => (module, Role::B),
        ("lora_B", "bias") => (module, Role::DeltaBias),
        ("lora_magnitude_vector", "weight" | "") => (module, Role::Magnitude),
        ("trainable_tokens_delta", "") => (module.strip_suffix(".token_adapter")?, Role::Tokens),
        ("base_layer", "weight") => (module.strip_suffix(".token_adapter").unwrap_or(module), Role::Table),
        ("base_layer", "bias") => (module, Role::Bias),
        (_, "weight") => (rest, Role::Table),
        (_, "bias") => (rest, Role::Bias),
        _ => return None,
    })
}

/// Where the decoder was in the model that an adapter was trained on.
pub(super) fn nesting(file: &TensorFile) -> Nesting {
    Nesting::of(file.names().filter_map(|name| name.strip_prefix(PREFIX)))
}

/// Refuses a tensor of a part beside the decoder, unless it changes nothing: PEFT adds deltas to a vision tower, too, if
/// its modules have the names that are targeted, and they remain zero as long as training sees no image.
fn check_beside(values: &Values, name: &str) -> Result<(), AdapterError> {
    if let Some((_, Role::A)) = place(name) {
        return Ok(());
    }
    let [rows, cols] = values.file.matrix_shape(name)?;
    let stored = values.file.part(name, 0..rows, 0..cols)?.into_dense();
    if is_zero(&stored) { Ok(()) } else { Err(AdapterError::Beside(name.into())) }
}

/// Whether a tensor belongs to BERT's pooler. Where no text is classified, nothing reads what it computes, but PEFT adds a
/// delta to it, too, if projections of its name are targeted.
fn is_pooler(name: &str) -> bool {
    name.split('.').any(|part| part == "pooler")
}

/// The tensors of a file by module and role. Those that have been taken are removed.
pub(super) struct Tensors {
    by_place: HashMap<(String, Role), String>,
    /// Tensors that have been taken, and may be taken again.
    shared: HashMap<(String, Role), String>,
}

impl Tensors {
    /// Assigns a file's tensors to the modules of a model. Errors: one of them, or all, belong to none.
    pub(super) fn of(values: &Values, modules: &Modules) -> Result<Tensors, AdapterError> {
        let paths: HashMap<&str, &Module> =
            modules.iter().flat_map(|module| module.paths().map(move |path| (path, module))).collect();
        let mut tensors = Tensors { by_place: HashMap::new(), shared: HashMap::new() };
        let mut unknown = None;
        // Names are sorted, so that of several faults the same one is always reported.
        for name in values.file.names() {
            if is_pooler(name) && modules.find(None, Part::Dense).is_none() {
                continue;
            }
            if name.strip_prefix(PREFIX).is_some_and(is_beside) {
                check_beside(values, name)?;
                continue;
            }
            let found = place(name).and_then(|(path, role)| Some((paths.get(path)?.path.clone(), role)));
            let has_place = found.is_some_and(|at| tensors.by_place.insert(at, name.into()).is_none());
            if !has_place {
                unknown.get_or_insert(name);
            }
        }
        match unknown {
            _ if tensors.by_place.is_empty() => Err(AdapterError::NoTensor),
            Some(name) => Err(AdapterError::UnknownTensor(name.into())),
            None => Ok(tensors),
        }
    }

    /// Takes the tensor of a module and role, if there is one.
    pub(super) fn take(&mut self, module: &Module, role: Role) -> Option<String> {
        self.by_place.remove(&(module.path.clone(), role))
    }

    /// Takes a tensor that must exist, and that may be taken again.
    pub(super) fn expect_shared(&mut self, module: &Module, role: Role) -> Result<String, AdapterError> {
        let name = self.expect(module, role)?;
        self.shared.insert((module.path.clone(), role), name.clone());
        Ok(name)
    }

    /// Takes a tensor that must exist.
    pub(super) fn expect(&mut self, module: &Module, role: Role) -> Result<String, AdapterError> {
        let missing = || {
            let ending = role.ending(module.is_lookup());
            AdapterError::MissingTensor(format!("{PREFIX}{}.{ending}", module.path))
        };
        let shared = self.shared.get(&(module.path.clone(), role)).cloned();
        self.take(module, role).or(shared).ok_or_else(missing)
    }

    /// Refuses tensors that have not been taken.
    pub(super) fn expect_no_others(self) -> Result<(), AdapterError> {
        match self.by_place.into_values().min() {
            Some(name) => Err(AdapterError::UnknownTensor(name)),
            None => Ok(()),
        }
    }
}
