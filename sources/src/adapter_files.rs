//! The files that make up an adapter, among those that a source has.

/// PEFT's configuration.
const CONFIG: &str = "adapter_config.json";
/// The weights, in the order in which they are preferred.
const WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
/// What an adapter that was saved beside its tokenizer has of it.
pub const TEXT_FILES: [&str; 7] = [
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];
/// The folder in which Ludwig puts all of them.
const LUDWIGS: &str = "model_weights";

/// Returns whether a file of an adapter says how texts become tokens, and nothing of the weights.
pub fn is_of_text(name: &str) -> bool {
    TEXT_FILES.contains(&name)
}

/// The places of an adapter's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// `model_weights` for an adapter of Ludwig.
    pub(crate) folder: Option<&'static str>,
    /// The weights' name.
    pub(crate) weights: &'static str,
    /// Names of the files that are there of its tokenizer.
    pub(crate) text: Vec<&'static str>,
}

impl Layout {
    /// Finds them by asking whether a name is there.
    pub(crate) fn find(has: impl Fn(&str) -> bool) -> Result<Layout, &'static str> {
        let is_ludwigs = !has(CONFIG) && has(&format!("{LUDWIGS}/{CONFIG}"));
        let folder = is_ludwigs.then_some(LUDWIGS);
        let has = |name: &'static str| has(&within(folder, name));
        if !has(CONFIG) {
            return Err("has no adapter_config.json");
        }
        let weights = WEIGHTS.into_iter().find(|name| has(name));
        let weights = weights.ok_or("has neither adapter_model.safetensors nor adapter_model.bin")?;
        let text = TEXT_FILES.into_iter().filter(|name| has(name)).collect();
        Ok(Layout { folder, weights, text })
    }

    /// The names that are worth asking for, the likely ones first.
    pub(crate) fn candidates() -> impl Iterator<Item = String> {
        let names = [CONFIG].into_iter().chain(WEIGHTS);
        [None, Some(LUDWIGS)]
            .into_iter()
            .flat_map(move |folder| names.clone().map(move |name| within(folder, name)))
    }

    /// The same of the tokenizer's files, once it is known where the others are.
    pub(crate) fn text_candidates(&self) -> impl Iterator<Item = String> {
        let folder = self.folder;
        TEXT_FILES.into_iter().map(move |name| within(folder, name))
    }

    /// The names of the files, and where they are.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&'static str, String)> {
        let folder = self.folder;
        let names = [CONFIG, self.weights].into_iter().chain(self.text.iter().copied());
        names.map(move |name| (name, within(folder, name)))
    }
}

fn within(folder: Option<&str>, name: &str) -> String {
    folder.map_or_else(|| name.to_owned(), |folder| format!("{folder}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_without_code_go_before_others() {
        let (config, st, bin) = (CONFIG, WEIGHTS[0], WEIGHTS[1]);
        let ludwigs = |name: &str| format!("{LUDWIGS}/{name}");
        let found = |names: &[&str]| {
            let layout = Layout::find(|name| names.contains(&name))?;
            Ok::<_, &str>(layout.files().map(|(_, path)| path).collect::<Vec<_>>())
        };
        let own = |names: &[&str]| Ok(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        let (template, tools) = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja");
        let (inner_config, inner_st, inner_bin) = (&*ludwigs(config), &*ludwigs(st), &*ludwigs(bin));
        for (names, expected) in [
            (&[config, st][..], own(&[config, st])),
            (&[config, bin], own(&[config, bin])),
            (&[bin, st, config, "README.md"], own(&[config, st])),
            (&[inner_config, inner_st], own(&[inner_config, inner_st])),
            (&[inner_config, inner_bin, st], own(&[inner_config, inner_bin])),
            (&[config, st, inner_config, inner_st], own(&[config, st])),
            (&[template, st, config, tools], own(&[config, st, tools, template])),
            (&[template, inner_config, inner_st], own(&[inner_config, inner_st])),
            (
                &[inner_config, inner_st, &ludwigs(template)],
                own(&[inner_config, inner_st, &ludwigs(template)]),
            ),
            (&[template, st], Err("has no adapter_config.json")),
            (&[config, inner_config, inner_st], Err("has neither")),
            (&[config, "weights.safetensors"], Err("has neither")),
            (&[config, "deep/adapter_model.safetensors"], Err("has neither")),
            (&[inner_config, st], Err("has neither")),
            (&[st], Err("has no adapter_config.json")),
            (&["deep/adapter_config.json", st], Err("has no adapter_config.json")),
            (&[], Err("has no adapter_config.json")),
        ] {
            match (found(names), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{names:?}"),
                (Err(found), Err(expected)) => assert!(found.starts_with(expected), "{names:?}: {found}"),
                (found, expected) => panic!("{names:?}: {found:?}, not {expected:?}"),
            }
        }
    }
}
