//! The fields of an `adapter_config.json`, and the check that all others are neutral.

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};

use crate::adapter::{AdapterError, initial::Initial};

/// Fields of `LoraConfig` (PEFT 0.5 to 0.21) that do not change the output, whatever their value is.
const HARMLESS: [&str; 16] = [
    "auto_mapping",
    "base_model_name_or_path",
    // These belong to initializations, which are done, or are refused by `init_lora_weights`.
    "corda_config",
    "eva_config",
    // PEFT sets it by the kind of a module: A and B have the same shapes either way.
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    // This one has been checked before.
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Initializations after which the tensors alone determine the output, each with whether PEFT ignores the case of its
/// name. Others also change the weights of the base model when an adapter is loaded.
const KEEPS_BASE: [(&str, bool); 5] =
    [("eva", false), ("gaussian", true), ("lora_ga", false), ("mica", true), ("orthogonal", false)];

/// The largest rank that is read. Products with the sizes of a model do not overflow.
const MAX_RANK: usize = 1 << 24;

/// Initializations that change the weights of the base model and are not repeated here. PEFT can convert the adapters that
/// come of them.
const CHANGES_BASE: [&str; 2] = ["pissa", "corda"];

/// A map in the order of the file, because PEFT uses the first pattern that matches.
pub(super) struct Ordered<T>(pub(super) Vec<(String, T)>);

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

/// A value, or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
pub(in crate::adapter) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// PEFT's default of `r` and of `lora_alpha`.
fn default_number<T: From<u8>>() -> T {
    T::from(8)
}

/// The kind of an adapter. It is read first, because fields of other kinds may have other types.
#[derive(Deserialize)]
pub(super) struct PeftType {
    peft_type: Option<String>,
}

impl PeftType {
    /// Refuses everything but LoRA.
    pub(super) fn check(&self) -> Result<(), AdapterError> {
        match self.peft_type.as_deref() {
            Some("LORA") => Ok(()),
            other => refuse("peft_type", other.unwrap_or("null")),
        }
    }
}

/// The fields that may change the output. All others are in `rest`.
#[derive(Deserialize)]
pub(super) struct File {
    #[serde(default = "default_number")]
    pub(super) r: usize,
    #[serde(default = "default_number")]
    pub(super) lora_alpha: f64,
    pub(super) target_modules: Option<OneOrMany<String>>,
    pub(super) exclude_modules: Option<OneOrMany<String>>,
    pub(super) layers_to_transform: Option<OneOrMany<usize>>,
    pub(super) layers_pattern: Option<OneOrMany<String>>,
    pub(super) modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    pub(super) rank_pattern: Ordered<usize>,
    #[serde(default)]
    pub(super) alpha_pattern: Ordered<f64>,
    pub(super) use_rslora: Option<bool>,
    pub(super) use_dora: Option<bool>,
    pub(super) lora_bias: Option<bool>,
    pub(super) ensure_weight_tying: Option<bool>,
    pub(super) trainable_token_indices: Option<Value>,
    pub(super) alora_invocation_tokens: Option<Value>,
    pub(super) init_lora_weights: Option<Value>,
    bias: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

impl File {
    /// All patterns of the file.
    pub(super) fn patterns(&self) -> impl Iterator<Item = &str> {
        let lists = [&self.target_modules, &self.exclude_modules, &self.layers_pattern];
        let lists = lists.into_iter().flatten().flat_map(|list| match list {
            OneOrMany::One(pattern) => std::slice::from_ref(pattern),
            OneOrMany::Many(patterns) => patterns.as_slice(),
        });
        let saved = self.modules_to_save.iter().flatten();
        let ranks = self.rank_pattern.0.iter().map(|(pattern, _)| pattern);
        let alphas = self.alpha_pattern.0.iter().map(|(pattern, _)| pattern);
        lists.chain(saved).chain(ranks).chain(alphas).map(String::as_str)
    }

    /// Refuses values that would change the output in a way that is not served.
    pub(super) fn check(&self) -> Result<(), AdapterError> {
        let is_rank = |rank: &usize| (1..=MAX_RANK).contains(rank);
        if !is_rank(&self.r) || !self.rank_pattern.0.iter().all(|(_, rank)| is_rank(rank)) {
            return Err(AdapterError::Field { field: "r", expected: "a positive integer up to 16777216" });
        }
        let alphas = self.alpha_pattern.0.iter().map(|(_, alpha)| alpha).chain([&self.lora_alpha]);
        if alphas.into_iter().any(|alpha| !alpha.is_finite()) {
            return Err(AdapterError::Field { field: "lora_alpha", expected: "a finite number" });
        }
        if !matches!(self.bias.as_deref(), None | Some("none" | "all" | "lora_only")) {
            return refuse("bias", self.bias.as_deref().unwrap_or_default());
        }
        let plain = matches!(self.init_lora_weights, None | Some(Value::Bool(_)));
        if self.lora_bias == Some(true) && (self.use_dora == Some(true) || !plain) {
            return refuse("lora_bias", "true, with use_dora or a way to initialize,");
        }
        self.check_layers()?;
        self.initial()?;
        let refused = self.rest.iter().find(|(field, value)| {
            let is_empty = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(fields) => fields.is_empty(),
                _ => false,
            };
            !is_empty && !HARMLESS.contains(&field.as_str())
        });
        refused.map_or(Ok(()), |(field, value)| refuse(field, value))
    }

    /// Calls `has` for each field that changes more than deltas are added to, with whether it does.
    pub(super) fn check_deltas_alone(
        &self,
        has: impl Fn(&'static str, bool) -> Result<(), AdapterError>,
    ) -> Result<(), AdapterError> {
        let is_empty = |value: &Value| match value {
            Value::Array(tokens) => tokens.is_empty(),
            Value::Object(tables) => tables.is_empty(),
            value => value.is_null(),
        };
        has("bias", self.has_biases())?;
        has("ensure_weight_tying", self.ensure_weight_tying == Some(true))?;
        has("modules_to_save", self.modules_to_save.as_ref().is_some_and(|names| !names.is_empty()))?;
        has("trainable_token_indices", !self.trainable_token_indices.as_ref().is_none_or(is_empty))
    }

    /// Whether biases of the model were trained.
    pub(super) fn has_biases(&self) -> bool {
        matches!(self.bias.as_deref(), Some("all" | "lora_only"))
    }

    /// Checks the fields of layers, which PEFT allows only where it uses them.
    fn check_layers(&self) -> Result<(), AdapterError> {
        let is_pattern = matches!(self.target_modules, Some(OneOrMany::One(_)));
        if let Some(layers) = self.layers_to_transform.as_ref().filter(|_| is_pattern) {
            let list = match layers {
                OneOrMany::One(layer) => format!("{layer}"),
                OneOrMany::Many(layers) => format!("{layers:?}"),
            };
            return refuse("layers_to_transform", format!("{list}, with a pattern for target_modules,"));
        }
        let has_pattern = match &self.layers_pattern {
            None => false,
            Some(OneOrMany::One(pattern)) => !pattern.is_empty(),
            Some(OneOrMany::Many(patterns)) => !patterns.is_empty(),
        };
        if has_pattern && self.layers_to_transform.is_none() {
            return Err(AdapterError::Field {
                field: "layers_to_transform",
                expected: "given, as layers_pattern is",
            });
        }
        Ok(())
    }

    /// The initialization, if it takes a part out of the weights of the model.
    pub(super) fn initial(&self) -> Result<Option<Initial>, AdapterError> {
        let Some(init) = &self.init_lora_weights else { return Ok(None) };
        let Value::String(way) = init else {
            return if init.is_boolean() { Ok(None) } else { refuse("init_lora_weights", init) };
        };
        let is_known = |(known, in_any_case): &(&str, bool)| {
            if *in_any_case { way.eq_ignore_ascii_case(known) } else { way == known }
        };
        if KEEPS_BASE.iter().any(is_known) {
            return Ok(None);
        }
        if way.eq_ignore_ascii_case("olora") {
            return Ok(Some(Initial::Olora));
        }
        if CHANGES_BASE.iter().any(|changing| way.starts_with(changing)) {
            return Err(AdapterError::Initialization(way.clone()));
        }
        refuse("init_lora_weights", way)
    }
}

/// Refuses a field's value.
pub(super) fn refuse<T>(field: &str, value: impl ToString) -> Result<T, AdapterError> {
    Err(AdapterError::Unsupported { field: field.into(), value: value.to_string() })
}
