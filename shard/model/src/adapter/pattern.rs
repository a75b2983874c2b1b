//! PEFT's ways to name modules (`peft/tuners/tuners_utils.py`: `check_target_module_exists`, and
//! `peft/utils/other.py`: `get_pattern_key`).

use std::{collections::HashSet, iter};

use super::{
    AdapterError,
    config::OneOrMany,
    python_regex::{Around, Pattern, PatternError, may_step_back},
};

/// PEFT's word for every projection but the output's, in any case.
const ALL_LINEAR: &str = "all-linear";

/// A field's patterns, compiled as they share the time of matching.
#[derive(Clone, Copy)]
pub(super) struct Patterns {
    sharers: usize,
}

impl Patterns {
    /// Of all patterns of a configuration.
    pub(super) fn of<'a>(patterns: impl Iterator<Item = &'a str>) -> Patterns {
        Patterns { sharers: patterns.filter(|pattern| may_step_back(pattern)).count() }
    }

    fn compile(
        self,
        field: &'static str,
        around: Around,
        pattern: &str,
    ) -> Result<FieldPattern, AdapterError> {
        let pattern = Pattern::new(around, pattern, self.sharers).map_err(fault(field))?;
        Ok(FieldPattern { field, pattern })
    }
}

fn fault(field: &'static str) -> impl Fn(PatternError) -> AdapterError {
    move |source| AdapterError::Pattern { field, source }
}

/// A pattern, with the field that a fault is reported for.
pub(super) struct FieldPattern {
    field: &'static str,
    pattern: Pattern,
}

impl FieldPattern {
    fn is_match(&self, path: &str) -> Result<bool, AdapterError> {
        self.pattern.is_match(path).map_err(fault(self.field))
    }
}

/// Modules by a list of names or path endings, or by a pattern of the whole path.
pub(super) enum Targets {
    /// Names and endings of paths.
    Names(HashSet<String>),
    Pattern(FieldPattern),
    AllLinear,
}

impl Targets {
    /// The modules that an adapter changes.
    pub(super) fn new(value: &OneOrMany<String>, patterns: Patterns) -> Result<Targets, AdapterError> {
        match value {
            OneOrMany::One(all) if all.eq_ignore_ascii_case(ALL_LINEAR) => Ok(Targets::AllLinear),
            _ => Targets::excluded("target_modules", value, patterns),
        }
    }

    /// As for [`Self::new`], but without a word for all.
    pub(super) fn excluded(
        field: &'static str,
        value: &OneOrMany<String>,
        patterns: Patterns,
    ) -> Result<Targets, AdapterError> {
        Ok(match value {
            OneOrMany::One(pattern) => Targets::Pattern(patterns.compile(field, Around::Nothing, pattern)?),
            OneOrMany::Many(names) => Targets::Names(names.iter().cloned().collect()),
        })
    }

    /// Whether the layer filter has a say in a path that matches: PEFT asks it about endings of paths only.
    pub(super) fn is_filtered(&self, path: &str) -> bool {
        match self {
            Targets::Names(names) => !names.contains(path),
            Targets::Pattern(_) | Targets::AllLinear => false,
        }
    }

    /// Whether a module is one of these. `is_linear`: it is a projection of a layer, not one of the modules around them.
    pub(super) fn matches(&self, path: &str, is_linear: bool) -> Result<bool, AdapterError> {
        match self {
            Targets::Names(names) => Ok(endings(path).any(|ending| names.contains(ending))),
            Targets::Pattern(pattern) => pattern.is_match(path),
            Targets::AllLinear => Ok(is_linear),
        }
    }
}

/// A path, and what is left of it without its first parts.
fn endings(path: &str) -> impl Iterator<Item = &str> {
    iter::successors(Some(path), |rest| rest.split_once('.').map(|(_, rest)| rest))
}

/// Which layers are changed.
pub(super) struct LayerFilter {
    layers: Option<Vec<usize>>,
    /// Each has the layer's number as its group `idx`.
    patterns: Vec<FieldPattern>,
}

impl LayerFilter {
    pub(super) fn new(
        layers: Option<&OneOrMany<usize>>,
        names: Option<&OneOrMany<String>>,
        patterns: Patterns,
    ) -> Result<LayerFilter, AdapterError> {
        let compile = |around: Around, name: &str| patterns.compile("layers_pattern", around, name);
        let named = |name: &String| compile(Around::Between(r"^(?:(?:^|.*?\.)", r"\.(?P<idx>\d+)\.)"), name);
        let patterns = match names {
            Some(OneOrMany::One(name)) if !name.is_empty() => vec![named(name)?],
            Some(OneOrMany::Many(names)) if !names.is_empty() => {
                names.iter().map(named).collect::<Result<_, _>>()?
            }
            _ => vec![compile(Around::Between(r"^.*?\.[^.]*\.(?P<idx>\d+)\.", ""), "")?],
        };
        let layers = match layers {
            None => None,
            Some(OneOrMany::One(layer)) => Some(vec![*layer]),
            // PEFT takes an empty list for "no filter".
            Some(OneOrMany::Many(layers)) => (!layers.is_empty()).then(|| layers.clone()),
        };
        Ok(LayerFilter { layers, patterns })
    }

    pub(super) fn allows(&self, path: &str) -> Result<bool, AdapterError> {
        let Some(layers) = &self.layers else { return Ok(true) };
        // The first pattern that matches decides, with or without a number.
        for FieldPattern { field, pattern } in &self.patterns {
            if let Some(number) = pattern.group(path, "idx").map_err(fault(field))? {
                let number = number.and_then(|number| number.parse().ok());
                return Ok(number.is_some_and(|number: usize| layers.contains(&number)));
            }
        }
        Ok(false)
    }
}

/// Per path, the value of the first pattern that matches its end. Patterns are compiled one at a time: together, they
/// could take any amount of memory.
pub(super) fn pattern_values<T: Copy>(
    field: &'static str,
    entries: &[(String, T)],
    paths: &[&str],
    patterns: Patterns,
) -> Result<Vec<Option<T>>, AdapterError> {
    let mut values = vec![None; paths.len()];
    for (pattern, value) in entries {
        // The groups are PEFT's own, which numbers in the pattern count.
        let pattern = patterns.compile(field, Around::Between(r"^(.*\.)?(", ")$"), pattern)?;
        for (path, found) in paths.iter().zip(&mut values) {
            if found.is_none() && pattern.is_match(path)? {
                *found = Some(*value);
            }
        }
    }
    Ok(values)
}

/// Modules to save by one of their names.
pub(super) struct Saved<'a> {
    name: &'a str,
    pattern: FieldPattern,
}

impl Patterns {
    /// Which modules PEFT takes for a name among the modules to save.
    pub(super) fn saved(self, name: &str) -> Result<Saved<'_>, AdapterError> {
        let around = Around::Between(r"^(?:(?:^|.*\.)", r"(?:$|\..*))");
        Ok(Saved { name, pattern: self.compile("modules_to_save", around, name)? })
    }
}

impl Saved<'_> {
    pub(super) fn matches(&self, path: &str) -> Result<bool, AdapterError> {
        Ok(path.ends_with(self.name) || self.pattern.is_match(path)?)
    }
}
