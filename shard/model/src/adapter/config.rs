//! `adapter_config.json`: which modules are changed, at which rank, by which scale.

mod file;

use std::path::Path;

use super::{
    AdapterError, CONFIG_FILE, Module,
    pattern::{LayerFilter, Patterns, Targets, pattern_values, saved_module},
};
use crate::{Decoder, LoadError, files};
use file::File;
pub(super) use file::OneOrMany;

/// Longest configuration that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// A checked configuration, with its patterns compiled.
pub(super) struct AdapterConfig {
    file: File,
    patterns: Patterns,
    targets: Targets,
    excluded: Option<Targets>,
    layers: LayerFilter,
}

/// A module that is changed.
pub(super) struct Target {
    pub(super) module: Module,
    pub(super) lora_rank: usize,
    /// What its delta is multiplied with.
    pub(super) scale: f32,
}

impl Target {
    /// The site and slice of its module.
    pub(super) fn place(&self) -> (usize, usize) {
        self.module.place.unwrap_or_default()
    }
}

impl AdapterConfig {
    pub(super) fn read(folder: &Path, model: &Decoder) -> Result<AdapterConfig, AdapterError> {
        let path = folder.join(CONFIG_FILE);
        if !path.exists() {
            return Err(AdapterError::NoFile(CONFIG_FILE));
        }
        let text = files::read(&path, MAX_CONFIG)?;
        let json = |source| LoadError::Json { path: path.clone(), source };
        let file: File = serde_json::from_slice(&text).map_err(json)?;
        file.check(model)?;
        let patterns = Patterns::of(file.patterns());
        let targets = match &file.target_modules {
            Some(targets) => Targets::new(targets, patterns)?,
            None => Targets::Names(model.names.targets.iter().map(|name| (*name).to_owned()).collect()),
        };
        let excluded = file.exclude_modules.as_ref();
        let excluded =
            excluded.map(|list| Targets::excluded("exclude_modules", list, patterns)).transpose()?;
        let layers =
            LayerFilter::new(file.layers_to_transform.as_ref(), file.layers_pattern.as_ref(), patterns)?;
        Ok(AdapterConfig { file, patterns, targets, excluded, layers })
    }

    /// The modules that are changed, and how. `others` are the paths of the model's other modules, none of which can be.
    pub(super) fn targets(&self, modules: &[Module], others: &[String]) -> Result<Vec<Target>, AdapterError> {
        let paths = modules.iter().map(|module| &module.path).chain(others);
        let paths: Vec<&str> = paths.map(String::as_str).collect();
        let saved = self.file.modules_to_save.as_deref().unwrap_or_default();
        if saved_module(saved, &paths, self.patterns)?.is_some() {
            return file::refuse("modules_to_save", serde_json::json!(saved));
        }
        for other in others {
            if self.is_target(other, false)? {
                return Err(AdapterError::Target(other.clone()));
            }
        }
        let mut targeted = Vec::new();
        for module in modules {
            if self.is_target(&module.path, true)? {
                targeted.push(module);
            }
        }
        if targeted.is_empty() {
            return Err(AdapterError::NoTarget);
        }
        let paths: Vec<&str> = targeted.iter().map(|module| module.path.as_str()).collect();
        let lora_ranks = pattern_values("rank_pattern", &self.file.rank_pattern.0, &paths, self.patterns)?;
        let alphas = pattern_values("alpha_pattern", &self.file.alpha_pattern.0, &paths, self.patterns)?;
        let target = |((module, lora_rank), alpha): ((&Module, Option<usize>), Option<f64>)| {
            let lora_rank = lora_rank.unwrap_or(self.file.r);
            Target {
                module: module.clone(),
                lora_rank,
                scale: self.scale(alpha.unwrap_or(self.file.lora_alpha), lora_rank),
            }
        };
        Ok(targeted.into_iter().zip(lora_ranks).zip(alphas).map(target).collect())
    }

    fn is_target(&self, path: &str, is_linear: bool) -> Result<bool, AdapterError> {
        if let Some(excluded) = &self.excluded
            && excluded.matches(path, is_linear)?
        {
            return Ok(false);
        }
        Ok(self.targets.matches(path, is_linear)?
            && (!self.targets.is_filtered(path) || self.layers.allows(path)?))
    }

    /// α/r, or α/√r (rsLoRA, Kalajdzievski, 2023).
    fn scale(&self, alpha: f64, lora_rank: usize) -> f32 {
        let lora_rank = lora_rank as f64;
        let divisor = if self.file.use_rslora == Some(true) { lora_rank.sqrt() } else { lora_rank };
        (alpha / divisor) as f32
    }
}
