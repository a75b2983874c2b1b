//! `adapter_config.json`: the modules that are changed, with their ranks and scales.

mod file;
mod invocation;
mod merged;
mod tables;

use std::{fs, path::Path};

use super::{
    AdapterError, CONFIG_FILE,
    initial::Initial,
    pattern::{LayerFilter, Patterns, Targets, pattern_values},
};
use crate::{
    Decoder, LoadError,
    decoder::{Kind, Module, Modules},
    files,
};
pub(super) use file::OneOrMany;
use file::{File, PeftType};
pub(super) use tables::TokenRows;

/// The longest configuration that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// A checked configuration, with its patterns compiled.
pub(super) struct AdapterConfig {
    file: File,
    patterns: Patterns,
    targets: Targets,
    excluded: Option<Targets>,
    layers: LayerFilter,
    invocation: Vec<u32>,
}

/// A module that is changed.
pub(super) struct Target {
    pub(super) module: Module,
    pub(super) lora_rank: usize,
    /// The factor of its delta.
    pub(super) scale: f32,
    /// Whether it has a magnitude (DoRA).
    pub(super) has_magnitude: bool,
    /// Whether B has a bias.
    pub(super) has_bias: bool,
    /// The part that its initialization has taken out of the base model's weight.
    pub(super) initial: Option<Initial>,
}

impl AdapterConfig {
    /// Reads an open file.
    pub(super) fn read(file: &fs::File, model: &Decoder) -> Result<AdapterConfig, AdapterError> {
        let path = Path::new(CONFIG_FILE);
        let text = files::read(path, file, MAX_CONFIG)?;
        let json = |source| LoadError::Json { path: path.into(), source };
        serde_json::from_slice::<PeftType>(&text).map_err(json)?.check()?;
        let file: File = serde_json::from_slice(&text).map_err(json)?;
        file.check()?;
        file.check_invocation(model)?;
        let invocation = file.invocation()?;
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
        Ok(AdapterConfig { file, patterns, targets, excluded, layers, invocation })
    }

    /// The modules that are changed. `others` are the paths of modules without weights, which PEFT matches, too. None
    /// of them can be changed.
    pub(super) fn targets(
        &self,
        modules: &Modules,
        others: &[String],
        is_tied: bool,
    ) -> Result<Vec<Target>, AdapterError> {
        for other in others {
            if self.is_target(other, false)? {
                return Err(AdapterError::Target(other.clone()));
            }
        }
        let ties = self.ties_targets(is_tied)?;
        let mut targeted = Vec::new();
        for module in modules.iter() {
            let is_table = matches!(module.kind, Kind::Lookup | Kind::Head);
            let mut path = None;
            for candidate in module.paths() {
                if path.is_none() && self.is_target(candidate, module.kind == Kind::Linear)? {
                    path = Some(candidate);
                }
            }
            match path.or((is_table && ties).then_some(module.path.as_str())) {
                Some(_) if module.place.is_none() => return Err(AdapterError::Target(module.path.clone())),
                Some(path) => targeted.push((module, path)),
                None => {}
            }
        }
        if targeted.is_empty() {
            return Err(AdapterError::NoTarget);
        }
        let paths: Vec<&str> = targeted.iter().map(|(_, path)| *path).collect();
        let lora_ranks = pattern_values("rank_pattern", &self.file.rank_pattern.0, &paths, self.patterns)?;
        let alphas = pattern_values("alpha_pattern", &self.file.alpha_pattern.0, &paths, self.patterns)?;
        let values = lora_ranks.into_iter().zip(alphas);
        targeted.into_iter().zip(values).map(|((module, _), values)| self.target(module, values)).collect()
    }

    /// The target of a module, with the rank and the alpha that patterns give it.
    fn target(
        &self,
        module: &Module,
        (lora_rank, alpha): (Option<usize>, Option<f64>),
    ) -> Result<Target, AdapterError> {
        self.check_invoked(module.kind)?;
        let lora_rank = lora_rank.unwrap_or(self.file.r);
        let initial = self.file.initial()?;
        let has_bias = self.file.lora_bias == Some(true);
        if has_bias && module.kind == Kind::Lookup {
            return file::refuse("lora_bias", "true, of an embedding table,");
        }
        Ok(Target {
            module: module.clone(),
            lora_rank,
            scale: self.scale(alpha.unwrap_or(self.file.lora_alpha), lora_rank),
            has_magnitude: self.file.use_dora == Some(true),
            has_bias,
            initial,
        })
    }

    /// Whether biases of the model were trained.
    pub(super) fn has_biases(&self) -> bool {
        self.file.has_biases()
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
