//! The fields that name tables of which an adapter has whole weights, or rows of some tokens (`peft/utils/other.py`:
//! `set_additional_trainable_modules`).

use serde_json::Value;

use super::{AdapterConfig, file::refuse};
use crate::{
    adapter::AdapterError,
    decoder::{Module, Modules, Part},
};

/// The names of tables that may be tied, in PEFT.
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];

/// The tokens of a table whose rows were trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::adapter) struct TokenRows {
    /// The table that is changed.
    pub(in crate::adapter) part: Part,
    /// The table that the tensor belongs to.
    pub(in crate::adapter) of: Part,
    /// The tokens, in the order of the tensor.
    pub(in crate::adapter) tokens: Vec<u32>,
}

/// The tables of which an adapter may have its own rows.
fn tables(modules: &Modules) -> impl Iterator<Item = &Module> {
    [Part::Embed, Part::Head].into_iter().filter_map(|part| modules.find(None, part))
}

impl AdapterConfig {
    /// Whether a tied table is among these modules, and the adapter asks to keep the tables tied.
    fn ties(&self, names: &[String], is_tied: bool) -> bool {
        let is_table = |name: &String| TABLES.contains(&name.rsplit('.').next().unwrap_or_default());
        is_tied && self.file.ensure_weight_tying == Some(true) && names.iter().any(is_table)
    }

    /// Whether the tables share A and B, so that both are targets.
    pub(in crate::adapter) fn ties_targets(&self, is_tied: bool) -> Result<bool, AdapterError> {
        let saved = self.file.modules_to_save.as_deref().unwrap_or_default();
        if !is_tied || self.file.ensure_weight_tying != Some(true) || self.ties(saved, is_tied) {
            return Ok(false);
        }
        TABLES.into_iter().try_fold(false, |found, name| Ok(found || self.targets.matches(name, false)?))
    }

    /// The tables whose whole weights were trained. `others` are the paths of modules without weights.
    pub(in crate::adapter) fn saved(
        &self,
        modules: &Modules,
        others: &[String],
        is_tied: bool,
    ) -> Result<Vec<Part>, AdapterError> {
        let names = self.file.modules_to_save.as_deref().unwrap_or_default();
        let mut saved = Vec::new();
        for name in names {
            let matcher = self.patterns.saved(name)?;
            for module in modules.iter() {
                let mut matches = module.paths().map(|path| matcher.matches(path));
                if !matches.try_fold(false, |found, matches| Ok::<_, AdapterError>(found || matches?))? {
                    continue;
                }
                if !matches!(module.part, Part::Embed | Part::Head | Part::Dense | Part::Classifier) {
                    return refuse("modules_to_save", serde_json::json!(names));
                }
                saved.push(module.part);
            }
            for path in others {
                if matcher.matches(path)? {
                    return refuse("modules_to_save", serde_json::json!(names));
                }
            }
        }
        if self.ties(names, is_tied) {
            saved.push(Part::Head);
        }
        Ok(saved)
    }

    /// The tables in which rows of some tokens were trained.
    pub(in crate::adapter) fn token_rows(
        &self,
        modules: &Modules,
        is_tied: bool,
    ) -> Result<Vec<TokenRows>, AdapterError> {
        let field = "trainable_token_indices";
        let Some(value) = &self.file.trainable_token_indices else { return Ok(Vec::new()) };
        let vocab = modules.find(None, Part::Embed).map_or(0, |module| module.outputs);
        let listed = |value: &Value| -> Option<Vec<u32>> {
            let tokens = value.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok());
            let tokens = tokens.collect::<Option<Vec<u32>>>()?;
            let mut distinct = tokens.clone();
            distinct.sort_unstable();
            distinct.dedup();
            (!tokens.is_empty() && distinct.len() == tokens.len()).then_some(tokens)
        };
        let rows = |part: Part, value: &Value| {
            let tokens = listed(value);
            // PEFT cannot make such an adapter of this model, but of one with a larger table.
            if let Some(id) = tokens.iter().flatten().find(|id| **id as usize >= vocab) {
                return refuse(field, format!("{id}, beyond the {vocab} rows of the model's table,"));
            }
            let expected = "distinct tokens of the model, in a list or in lists by module";
            let tokens = tokens.ok_or(AdapterError::Field { field, expected })?;
            Ok(TokenRows { part, of: part, tokens })
        };
        let mut found = match value {
            Value::Null => return Ok(Vec::new()),
            Value::Object(lists) => {
                let of_module = |(name, value): (&String, &Value)| {
                    let ends = |path: &str| path == name || path.ends_with(&format!(".{name}"));
                    let module = tables(modules).find(|module| module.paths().any(ends));
                    match module {
                        Some(module) => rows(module.part, value),
                        None => refuse(field, serde_json::json!(lists)),
                    }
                };
                lists.iter().map(of_module).collect::<Result<Vec<_>, AdapterError>>()?
            }
            list => vec![rows(Part::Embed, list)?],
        };
        self.tie_rows(&mut found, is_tied)?;
        Ok(found)
    }

    /// If the tables are tied, rows of the embedding table are also those of the output projection, unless it has
    /// others.
    fn tie_rows(&self, found: &mut Vec<TokenRows>, is_tied: bool) -> Result<(), AdapterError> {
        let position = |part: Part| found.iter().position(|rows| rows.part == part);
        let (Some(embed), true) = (position(Part::Embed), is_tied) else { return Ok(()) };
        let tied = TokenRows { part: Part::Head, ..found[embed].clone() };
        match position(Part::Head) {
            None => found.push(tied),
            Some(head) if found[head].tokens == tied.tokens => found[head] = tied,
            Some(_) if self.file.ensure_weight_tying == Some(true) => {
                let value = self.file.trainable_token_indices.as_ref().unwrap_or(&Value::Null);
                return refuse("trainable_token_indices", format!("{value}, with ensure_weight_tying,"));
            }
            Some(_) => {}
        }
        Ok(())
    }
}
