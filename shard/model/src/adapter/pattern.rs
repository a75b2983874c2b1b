//! PEFT's ways to name modules (`peft/tuners/tuners_utils.py`: `check_target_module_exists`, and
//! `peft/utils/other.py`: `get_pattern_key`).

use regex::Regex;

use super::{AdapterError, Module, config::OneOrMany};

/// PEFT's word for every projection but the output's.
const ALL_LINEAR: &str = "all-linear";
/// A module that exists but that deltas cannot attach to here.
const EMBEDDINGS: &str = "model.embed_tokens";

/// Modules by a list of names or path endings, or by a pattern of the whole path.
pub(super) enum Targets {
    Names(Vec<String>),
    Pattern(Regex),
    AllLinear,
}

/// A regular expression that must match the whole text.
fn whole(field: &'static str, pattern: &str) -> Result<Regex, AdapterError> {
    Regex::new(&format!("^(?:{pattern})$")).map_err(|source| AdapterError::Pattern { field, source })
}

impl Targets {
    pub(super) fn new(field: &'static str, value: &OneOrMany<String>) -> Result<Targets, AdapterError> {
        Ok(match value {
            OneOrMany::One(all) if all == ALL_LINEAR => Targets::AllLinear,
            OneOrMany::One(pattern) => Targets::Pattern(whole(field, pattern)?),
            OneOrMany::Many(names) => Targets::Names(names.clone()),
        })
    }

    /// Whether the layer filter has a say in a path that matches: PEFT asks it about endings of paths only.
    pub(super) fn is_filtered(&self, path: &str) -> bool {
        match self {
            Targets::Names(names) => !names.iter().any(|name| name == path),
            Targets::Pattern(_) | Targets::AllLinear => false,
        }
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        match self {
            Targets::Names(names) => names.iter().any(|name| ends_with(path, name)),
            Targets::Pattern(pattern) => pattern.is_match(path),
            Targets::AllLinear => path != "lm_head",
        }
    }

    /// A target that deltas cannot attach to.
    pub(super) fn unknown(&self, modules: &[Module]) -> Option<&str> {
        match self {
            Targets::Names(names) => names
                .iter()
                .find(|name| !modules.iter().any(|module| ends_with(&module.path, name)))
                .map(String::as_str),
            Targets::Pattern(pattern) => pattern.is_match(EMBEDDINGS).then_some(EMBEDDINGS),
            Targets::AllLinear => None,
        }
    }
}

/// Whether a path is a name, or ends in it as a whole part.
fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Which layers are changed.
pub(super) struct LayerFilter {
    layers: Option<Vec<usize>>,
    /// Each has the layer's number as its group `idx`.
    patterns: Vec<Regex>,
}

impl LayerFilter {
    pub(super) fn new(
        layers: Option<&OneOrMany<usize>>,
        patterns: Option<&OneOrMany<String>>,
    ) -> Result<LayerFilter, AdapterError> {
        let named = |name: &String| format!(r"^(?:(?:^|.*?\.){name}\.(?P<idx>\d+)\.)");
        let sources: Vec<String> = match patterns {
            Some(OneOrMany::One(name)) if !name.is_empty() => vec![named(name)],
            Some(OneOrMany::Many(names)) if !names.is_empty() => names.iter().map(named).collect(),
            _ => vec![r"^.*?\.[^.]*\.(?P<idx>\d+)\.".into()],
        };
        let compile = |source: &String| {
            Regex::new(source).map_err(|source| AdapterError::Pattern { field: "layers_pattern", source })
        };
        let layers = match layers {
            None => None,
            Some(OneOrMany::One(layer)) => Some(vec![*layer]),
            // PEFT takes an empty list for "no filter".
            Some(OneOrMany::Many(layers)) => (!layers.is_empty()).then(|| layers.clone()),
        };
        Ok(LayerFilter { layers, patterns: sources.iter().map(compile).collect::<Result<_, _>>()? })
    }

    pub(super) fn allows(&self, path: &str) -> bool {
        let Some(layers) = &self.layers else { return true };
        // The first pattern that matches decides, with or without a number.
        let found = self.patterns.iter().find_map(|pattern| pattern.captures(path));
        let number = found.and_then(|found| found.name("idx")?.as_str().parse().ok());
        number.is_some_and(|number: usize| layers.contains(&number))
    }
}

/// Per path, the value of the first pattern that matches its end. Patterns are compiled one at a time: together, they
/// could take any amount of memory.
pub(super) fn pattern_values<T: Copy>(
    field: &'static str,
    patterns: &[(String, T)],
    paths: &[&str],
) -> Result<Vec<Option<T>>, AdapterError> {
    let mut values = vec![None; paths.len()];
    for (pattern, value) in patterns {
        let pattern = whole(field, &format!(r"(?:.*\.)?(?:{pattern})"))?;
        for (path, found) in paths.iter().zip(&mut values) {
            if found.is_none() && pattern.is_match(path) {
                *found = Some(*value);
            }
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_whole_parts_of_a_path() {
        for (path, name, matches) in [
            ("model.layers.0.self_attn.q_proj", "q_proj", true),
            ("model.layers.0.self_attn.q_proj", "self_attn.q_proj", true),
            ("model.layers.0.self_attn.q_proj", "proj", false),
            ("lm_head", "lm_head", true),
            ("model.layers.10.mlp.up_proj", "0.mlp.up_proj", false),
        ] {
            assert_eq!(ends_with(path, name), matches, "{name} in {path}");
        }
    }

    #[test]
    fn layers_are_filtered_by_number() {
        let some = LayerFilter::new(Some(&OneOrMany::Many(vec![1, 3])), None).unwrap();
        assert!(some.allows("model.layers.1.mlp.up_proj"));
        assert!(!some.allows("model.layers.2.mlp.up_proj"));
        assert!(LayerFilter::new(None, None).unwrap().allows("lm_head"));
        for (name, allows) in [
            ("layers", true),
            ("model.layers", true),
            ("(layers|h)", true),
            ("h", false),
            ("", true),
            // As PEFT puts it into its own pattern, the number belongs to the second of these alone.
            ("layers|h", false),
        ] {
            let named = Some(OneOrMany::One(name.to_owned()));
            let filter = LayerFilter::new(Some(&OneOrMany::One(2)), named.as_ref()).unwrap();
            assert_eq!(filter.allows("model.layers.2.mlp.up_proj"), allows, "{name}");
            assert!(!filter.allows("model.layers.1.mlp.up_proj"), "{name}");
        }
    }

    #[test]
    fn the_first_pattern_wins() {
        let patterns =
            [("q_proj".to_owned(), 4), (r"layers\.1\..*".to_owned(), 8), ("up_proj".to_owned(), 16)];
        let paths = [
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.cup_proj",
        ];
        let values = pattern_values("rank_pattern", &patterns, &paths).unwrap();
        assert_eq!(values, [Some(4), Some(8), Some(16), None]);
        assert!(pattern_values("rank_pattern", &[("(".to_owned(), 1)], &paths).is_err());
    }
}
