//! The tokens that files add to a vocabulary, and the names that they give to some.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::{
    super::{
        TokenizerError,
        special_tokens::{self, NAMES, SpecialTokens},
    },
    Folder, is_true,
};
use crate::json_file;

/// The tokens that the files of a folder add, in the order in which transformers adds them: an id that the vocabulary
/// does not have is the next free one, whatever the file says.
pub(in super::super) struct AddedTokens {
    /// By name, those of the class first; `None` where a file says that there is none.
    named: Vec<(String, Option<AddedToken>)>,
    /// Further special tokens; `None` if no file lists any.
    extra: Option<Vec<AddedToken>>,
    /// Those that an older file lists. They count if neither the configuration nor a sentencepiece model has any.
    older_extra: Option<Vec<AddedToken>>,
    by_id: BTreeMap<u32, AddedToken>,
    /// Whether the configuration lists the added tokens, so that no other file does.
    listed: bool,
}

/// The files that list added tokens where tokenizer_config.json does not.
#[derive(Default)]
pub(in super::super) struct Others {
    /// special_tokens_map.json.
    pub(in super::super) map: Option<Value>,
    /// added_tokens.json.
    pub(in super::super) ids: Option<Value>,
}

/// Returns whether a tokenizer_config.json lists the added tokens, so that no other file does.
fn lists(config: &Map<String, Value>) -> bool {
    config.contains_key("added_tokens_decoder")
}

impl AddedTokens {
    /// Reads tokenizer_config.json and, unless that lists the added tokens, special_tokens_map.json and
    /// added_tokens.json.
    pub(super) fn read(folder: &Folder) -> Result<AddedTokens, TokenizerError> {
        let none = Map::new();
        let config = folder.config.as_object().unwrap_or(&none);
        let defaults = folder.class.named_tokens().iter();
        let defaults = defaults.map(|(name, text)| ((*name).to_owned(), Some(AddedToken::from(*text, true))));
        let read = |name: &str| match lists(config) {
            true => Ok(None),
            false => json_file::read_if_exists(&folder.path.join(name)),
        };
        let others = Others { map: read("special_tokens_map.json")?, ids: read("added_tokens.json")? };
        Ok(AddedTokens::of(defaults.collect(), config, others))
    }

    /// What these files say, beside what is named if they do not say otherwise.
    pub(in super::super) fn of(
        named: Vec<(String, Option<AddedToken>)>,
        config: &Map<String, Value>,
        others: Others,
    ) -> AddedTokens {
        let listed = config.get("added_tokens_decoder").and_then(Value::as_object);
        let mut added = AddedTokens {
            named,
            extra: extra(config),
            older_extra: None,
            by_id: BTreeMap::new(),
            listed: lists(config),
        };
        added.name(config, false);
        for (id, value) in listed.into_iter().flatten() {
            if let (Ok(id), Some(token)) = (id.parse(), token(value)) {
                added.by_id.insert(id, token);
            }
        }
        if added.listed {
            return added;
        }
        if let Some(Value::Object(file)) = others.map {
            added.name(&file, true);
            if let Some(more) = list(&file, "extra_special_tokens") {
                added.extra.get_or_insert_default().extend(more);
            }
            added.older_extra = list(&file, "additional_special_tokens");
        }
        if let Some(Value::Object(file)) = others.ids {
            let special = added.special_texts();
            let ids = file.iter().filter_map(|(text, id)| Some((text, u32::try_from(id.as_u64()?).ok()?)));
            let tokens = ids.map(|(text, id)| (id, AddedToken::from(text, special.contains(text.as_str()))));
            added.by_id.extend(tokens.collect::<Vec<_>>());
        }
        added
    }

    fn name(&mut self, file: &Map<String, Value>, special: bool) {
        for (name, value) in special_tokens::named(file) {
            let token = token(value).map(|token| if special { token.special(true) } else { token });
            match self.named.iter_mut().find(|(known, _)| known == name) {
                Some((_, known)) => *known = token,
                None => self.named.push((name.to_owned(), token)),
            }
        }
    }

    /// Takes over the added tokens of a tokenizer.json, unless the configuration lists them.
    pub(in super::super) fn define(&mut self, tokens: impl IntoIterator<Item = (u32, AddedToken)>) {
        if !self.listed {
            self.by_id.extend(tokens);
        }
    }

    /// Takes over tokens of a sentencepiece model, unless a file lists further special tokens.
    pub(super) fn add_extra(&mut self, tokens: Vec<AddedToken>) {
        self.extra.get_or_insert(tokens);
    }

    /// Names a token unless a file says something of the name.
    pub(super) fn name_by_default(&mut self, name: &str, text: &str) {
        if self.named.iter().all(|(known, _)| known != name) {
            self.named.push((name.to_owned(), Some(AddedToken::from(text, true))));
        }
    }

    /// Lets added tokens be found before the text is normalized.
    pub(super) fn find_in_raw_text(&mut self) {
        self.by_id.values_mut().for_each(|token| token.normalized = false);
    }

    /// The added tokens by the ids that the files give them.
    pub(in super::super) fn by_id(&self) -> &BTreeMap<u32, AddedToken> {
        &self.by_id
    }

    /// The further special tokens.
    pub(in super::super) fn extra(&self) -> &[AddedToken] {
        self.extra.as_ref().or(self.older_extra.as_ref()).map_or(&[], Vec::as_slice)
    }

    /// The text of a named token.
    pub(super) fn named(&self, name: &str) -> Option<&str> {
        Some(&*self.token(name)?.content)
    }

    /// The texts of all named tokens.
    pub(in super::super) fn texts(&self) -> SpecialTokens {
        let text = |(name, token): &(String, Option<AddedToken>)| {
            Some((name.clone(), token.as_ref()?.content.clone()))
        };
        self.named.iter().filter_map(text).collect()
    }

    /// Adds all that the tokenizer does not have.
    pub(super) fn add_to(&self, tokenizer: &mut Tokenizer) {
        let existing: Vec<AddedToken> = tokenizer.get_added_tokens_decoder().into_values().collect();
        let exists = |token: &AddedToken| existing.iter().any(|other| are_alike(token, other));
        let mut tokens: Vec<AddedToken> =
            self.by_id.values().filter(|token| !exists(token)).cloned().collect();
        let known: HashSet<String> =
            existing.iter().chain(&tokens).map(|token| token.content.clone()).collect();
        let more = self.in_order().chain(self.extra()).filter(|token| !known.contains(&token.content));
        tokens.extend(more.cloned());
        let named: HashSet<&str> = self.in_order().map(|token| &*token.content).collect();
        for token in &mut tokens {
            token.special |= named.contains(&*token.content);
        }
        tokenizer.add_tokens(&tokens);
    }

    /// Makes the named and the further tokens special, though they may be listed as ordinary ones.
    pub(super) fn mark_special(&self, tokenizer: &mut Tokenizer) {
        let tokens = self.in_order().chain(self.extra());
        let tokens: Vec<_> = tokens.map(|token| AddedToken::from(&*token.content, true)).collect();
        tokenizer.add_special_tokens(&tokens);
    }

    /// The named tokens, those first that every class has.
    pub(in super::super) fn in_order(&self) -> impl Iterator<Item = &AddedToken> {
        let own = self.named.iter().filter(|(name, _)| !NAMES.contains(&name.as_str()));
        NAMES.iter().filter_map(|name| self.token(name)).chain(own.filter_map(|(_, token)| token.as_ref()))
    }

    fn token(&self, name: &str) -> Option<&AddedToken> {
        self.named.iter().find(|(known, _)| known == name)?.1.as_ref()
    }

    fn special_texts(&self) -> HashSet<String> {
        let tokens = NAMES.iter().filter_map(|name| self.named(name));
        let extra = self.extra.iter().flatten().map(|token| &*token.content);
        tokens.chain(extra).map(str::to_owned).collect()
    }
}

/// The further special tokens that a configuration lists. Of the two names for the list, the older one counts where the
/// newer one lists none.
fn extra(config: &Map<String, Value>) -> Option<Vec<AddedToken>> {
    let newer = config.get("extra_special_tokens").filter(|value| is_true(value));
    list(config, if newer.is_some() { "extra_special_tokens" } else { "additional_special_tokens" })
}

fn list(file: &Map<String, Value>, name: &str) -> Option<Vec<AddedToken>> {
    Some(file.get(name)?.as_array()?.iter().filter_map(token).collect())
}

/// A token is its text, or an object that has it. A text alone is special.
fn token(value: &Value) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(AddedToken::from(text, true));
    }
    let flag = |name: &str| value.get(name).map(is_true);
    let special = flag("special").unwrap_or(false);
    Some(AddedToken {
        content: value.get("content")?.as_str()?.to_owned(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}

/// Returns whether all settings of two tokens are the same; the library's equality compares their texts alone.
fn are_alike(one: &AddedToken, other: &AddedToken) -> bool {
    let settings =
        |token: &AddedToken| (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special);
    one == other && settings(one) == settings(other)
}
