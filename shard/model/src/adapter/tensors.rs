//! `adapter_model.safetensors`, or else `adapter_model.bin`: A and B of every targeted module.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use kernels::LoraPart;

use super::{AdapterError, BaseModel, WEIGHTS_FILES, base::copied_module, config::Target};
use crate::weights::tensor_file::TensorFile;

/// What PEFT puts in front of a module's path.
pub(super) const PREFIX: &str = "base_model.model.";

/// Where a tensor belongs: a module's path and "A" or "B".
fn place(name: &str) -> Option<(&str, char)> {
    let path = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    // Checkpoints of a training run keep the adapter's name.
    let path = path.strip_suffix(".default").unwrap_or(path);
    let (module, matrix) = path.rsplit_once(".lora_")?;
    match matrix {
        "A" => Some((module, 'A')),
        "B" => Some((module, 'B')),
        _ => None,
    }
}

/// Reads the deltas of all targets, in their order.
pub(super) fn read(
    folder: &Path,
    targets: &[Target],
    model: &BaseModel,
) -> Result<Vec<LoraPart>, AdapterError> {
    let path = WEIGHTS_FILES.map(|name| folder.join(name)).into_iter().find(|path| path.exists());
    let file = TensorFile::open(&path.ok_or(AdapterError::NoFile(WEIGHTS_FILES[0]))?)?;
    // They are sorted: of several faults, the same one is reported every time.
    let names: Vec<&str> = file.names().collect();
    let targeted: HashSet<&str> = targets.iter().map(|target| target.module.path.as_str()).collect();
    let mut places: HashMap<(&str, char), &str> = HashMap::new();
    let mut copies = Vec::new();
    for name in names {
        if let Some(module) = copied_module(name) {
            copies.push((name, module));
            continue;
        }
        let found = place(name).filter(|(path, _)| targeted.contains(path));
        let twice = found.is_some_and(|found| places.insert(found, name).is_some());
        if found.is_none() || twice {
            return Err(AdapterError::UnknownTensor(name.into()));
        }
    }
    let parts = targets.iter().map(|target| part(&file, &places, target, model)).collect::<Result<_, _>>()?;
    // Last, because only these need the model's files.
    copies.into_iter().try_for_each(|(name, module)| model.check_copy(&file, name, module))?;
    Ok(parts)
}

fn part(
    file: &TensorFile,
    places: &HashMap<(&str, char), &str>,
    target: &Target,
    model: &BaseModel,
) -> Result<LoraPart, AdapterError> {
    let &Target { ref module, lora_rank, scale } = target;
    let read = |which: char, expected: [usize; 2]| {
        let name = places.get(&(module.path.as_str(), which)).copied();
        let missing = || AdapterError::MissingTensor(format!("{PREFIX}{}.lora_{which}.weight", module.path));
        let name = name.ok_or_else(missing)?;
        let values = values(file, name, expected)?;
        // Rounding keeps the order: if the type can hold the largest, it can hold all.
        let largest = values.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
        if model.rounded(largest).is_finite() {
            return Ok(values);
        }
        Err(AdapterError::TooLarge { name: name.into(), dtype: model.dtype })
    };
    if !scale.is_finite() {
        return Err(AdapterError::ScaleTooLarge { module: module.path.clone() });
    }
    let a = read('A', [lora_rank, module.inputs])?;
    let stored = read('B', [module.outputs, lora_rank])?;
    let b = match module.order.sources(module.outputs) {
        None => stored,
        Some(rows) => {
            rows.into_iter().flat_map(|row| &stored[row * lora_rank..][..lora_rank]).copied().collect()
        }
    };
    Ok(LoraPart::delta(target.place(), lora_rank, scale, &a, &b))
}

/// Refuses a tensor of another shape, which may be of any length and is not read.
pub(super) fn expect_shape(file: &TensorFile, name: &str, expected: [usize; 2]) -> Result<(), AdapterError> {
    let shape = file.shape(name)?;
    if shape != expected {
        return Err(AdapterError::Shape { name: name.into(), got: shape.into(), expected });
    }
    Ok(())
}

fn values(file: &TensorFile, name: &str, expected: [usize; 2]) -> Result<Vec<f32>, AdapterError> {
    expect_shape(file, name, expected)?;
    let values = file.part(name, 0..expected[0], 0..expected[1])?.into_dense().to_f32();
    if values.iter().any(|x| !x.is_finite()) {
        return Err(AdapterError::NotFinite(name.into()));
    }
    Ok(values)
}
