//! `adapter_config.json`: which modules are changed, at which rank, by which scale.

use std::path::Path;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};

use super::{
    AdapterError, CONFIG_FILE, Module,
    pattern::{LayerFilter, Targets, pattern_values},
};
use crate::{LoadError, files};

/// Longest configuration that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// Fields that have no say in the output.
const HARMLESS: [&str; 11] = [
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Ways to initialize, in lower case, after which the tensors alone give the adapter's output. Others change the base
/// weights too.
const KEEPS_BASE: [&str; 4] = ["eva", "gaussian", "mica", "orthogonal"];

/// A map in the order of the file: PEFT takes the first pattern that matches.
struct Ordered<T>(Vec<(String, T)>);

impl<T> Default for Ordered<T> {
    fn default() -> Self {
        Ordered(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Ordered<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map from patterns to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Ordered(Vec::new()))
            }
        }
        deserializer.deserialize_any(Entries(std::marker::PhantomData))
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// The fields that have a say. All others are in `rest`.
#[derive(Deserialize)]
struct File {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    target_modules: Option<OneOrMany<String>>,
    exclude_modules: Option<OneOrMany<String>>,
    layers_to_transform: Option<OneOrMany<usize>>,
    layers_pattern: Option<OneOrMany<String>>,
    #[serde(default)]
    rank_pattern: Ordered<usize>,
    #[serde(default)]
    alpha_pattern: Ordered<f64>,
    use_rslora: Option<bool>,
    fan_in_fan_out: Option<bool>,
    bias: Option<String>,
    init_lora_weights: Option<Value>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// See the module.
pub(super) struct AdapterConfig {
    file: File,
    targets: Targets,
    excluded: Option<Targets>,
    layers: LayerFilter,
}

/// A module that is changed.
pub(super) struct Target<'a> {
    pub(super) module: &'a Module,
    pub(super) lora_rank: usize,
    /// What its delta is multiplied with.
    pub(super) scale: f32,
}

impl AdapterConfig {
    pub(super) fn read(folder: &Path) -> Result<AdapterConfig, AdapterError> {
        let path = folder.join(CONFIG_FILE);
        if !path.exists() {
            return Err(AdapterError::NoFile(CONFIG_FILE));
        }
        let text = files::read(&path, MAX_CONFIG)?;
        let json = |source| LoadError::Json { path: path.clone(), source };
        let file: File = serde_json::from_slice(&text).map_err(json)?;
        file.check()?;
        let Some(targets) = &file.target_modules else {
            return Err(AdapterError::Field { field: "target_modules", expected: "a list or a pattern" });
        };
        Ok(AdapterConfig {
            targets: Targets::new("target_modules", targets)?,
            excluded: file
                .exclude_modules
                .as_ref()
                .map(|list| Targets::new("exclude_modules", list))
                .transpose()?,
            layers: LayerFilter::new(file.layers_to_transform.as_ref(), file.layers_pattern.as_ref())?,
            file,
        })
    }

    /// The modules that are changed, and how.
    pub(super) fn targets<'a>(&self, modules: &'a [Module]) -> Result<Vec<Target<'a>>, AdapterError> {
        if let Some(unknown) = self.targets.unknown(modules) {
            return Err(AdapterError::Target(unknown.to_owned()));
        }
        let targeted = modules.iter().filter(|module| {
            let path = &module.path;
            !self.excluded.as_ref().is_some_and(|excluded| excluded.matches(path))
                && self.targets.matches(path)
                && (!self.targets.is_filtered(path) || self.layers.allows(path))
        });
        let targeted: Vec<&Module> = targeted.collect();
        if targeted.is_empty() {
            return Err(AdapterError::NoTarget);
        }
        let paths: Vec<&str> = targeted.iter().map(|module| module.path.as_str()).collect();
        let lora_ranks = pattern_values("rank_pattern", &self.file.rank_pattern.0, &paths)?;
        let alphas = pattern_values("alpha_pattern", &self.file.alpha_pattern.0, &paths)?;
        let target = |((module, lora_rank), alpha): ((_, Option<usize>), Option<f64>)| {
            let lora_rank = lora_rank.unwrap_or(self.file.r);
            Target { module, lora_rank, scale: self.scale(alpha.unwrap_or(self.file.lora_alpha), lora_rank) }
        };
        Ok(targeted.into_iter().zip(lora_ranks).zip(alphas).map(target).collect())
    }

    /// α/r, or α/√r (rsLoRA, Kalajdzievski, 2023).
    fn scale(&self, alpha: f64, lora_rank: usize) -> f32 {
        let lora_rank = lora_rank as f64;
        let divisor = if self.file.use_rslora == Some(true) { lora_rank.sqrt() } else { lora_rank };
        (alpha / divisor) as f32
    }
}

impl File {
    /// Refuses what would change the output in a way that is not served.
    fn check(&self) -> Result<(), AdapterError> {
        let refuse = |field: &str, value: &dyn std::fmt::Display| {
            Err(AdapterError::Unsupported { field: field.into(), value: value.to_string() })
        };
        if self.peft_type.as_deref() != Some("LORA") {
            return refuse("peft_type", &self.peft_type.as_deref().unwrap_or("null"));
        }
        if self.r == 0 || self.rank_pattern.0.iter().any(|(_, rank)| *rank == 0) {
            return Err(AdapterError::Field { field: "r", expected: "a positive integer" });
        }
        let alphas = self.alpha_pattern.0.iter().map(|(_, alpha)| alpha).chain([&self.lora_alpha]);
        if alphas.into_iter().any(|alpha| !alpha.is_finite()) {
            return Err(AdapterError::Field { field: "lora_alpha", expected: "a finite number" });
        }
        if let Some(bias) = self.bias.as_deref().filter(|bias| *bias != "none") {
            return refuse("bias", &bias);
        }
        if self.fan_in_fan_out == Some(true) {
            return refuse("fan_in_fan_out", &true);
        }
        let keeps_base = match &self.init_lora_weights {
            None | Some(Value::Bool(_)) => true,
            Some(Value::String(init)) => KEEPS_BASE.contains(&init.to_lowercase().as_str()),
            Some(_) => false,
        };
        if let Some(init) = self.init_lora_weights.as_ref().filter(|_| !keeps_base) {
            return refuse(
                "init_lora_weights",
                &init.as_str().map_or_else(|| init.to_string(), str::to_owned),
            );
        }
        for (field, value) in &self.rest {
            let is_empty = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(fields) => fields.is_empty(),
                _ => false,
            };
            if !is_empty && !HARMLESS.contains(&field.as_str()) {
                return refuse(field, value);
            }
        }
        Ok(())
    }
}
