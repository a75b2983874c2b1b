//! The tokenizer of an adapter that was saved beside one: that of the model, with the tokens that the adapter's files
//! add to it.
//!
//! Nothing else of the files is used. The steps around the vocabulary are the model's, whose regular expressions and maps
//! come from whoever runs the server.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{
    ModelTokenizer,
    definition::{self, shortened},
    from_folder::added_tokens::{AddedTokens, Others},
    shared, templates, without_panic,
};

/// Most bytes of a file that is read as a whole, and of all templates together.
const MAX_SMALL: usize = 4 << 20;
const MAX_TEMPLATES: usize = 1 << 20;
/// Most tokens that an adapter may add or rename, and the most bytes of the text of one.
const MAX_NEW: usize = 4096;
const MAX_TEXT: usize = 1024;

const DEFINITION: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const IDS: &str = "added_tokens.json";
const GENERATION: &str = "generation_config.json";

/// The contents of the files that an adapter has of its tokenizer, by their names.
pub(crate) type TextFiles = BTreeMap<String, Vec<u8>>;

/// The reason that texts cannot be made into an adapter's tokens. It names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {cause}")]
pub(crate) struct TextError {
    file: &'static str,
    cause: String,
}

impl TextError {
    fn new(file: &'static str, cause: impl ToString) -> TextError {
        TextError { file, cause: cause.to_string() }
    }
}

/// What an adapter's files make of the model's tokenizer.
pub(crate) struct AdapterTokenizer {
    pub(crate) tokenizer: Arc<ModelTokenizer>,
    /// Tokens that the model does not have, or by another name.
    pub(crate) new_tokens: usize,
    /// Whether its tokens are those of the model in all respects.
    pub(crate) has_models_tokens: bool,
    /// Whether the templates are the adapter's.
    pub(crate) has_templates: bool,
    /// Bytes of the sources of its templates.
    pub(crate) template_bytes: usize,
}

/// What an adapter's files are compared with.
pub(crate) struct Reference {
    tokenizer: Arc<ModelTokenizer>,
    /// The model's own tokenizer.json, if it has one.
    definition: Option<PathBuf>,
    merges: OnceLock<Option<blake3::Hash>>,
}

impl Reference {
    /// Of a model in a folder or in a GGUF file.
    pub(crate) fn new(tokenizer: Arc<ModelTokenizer>, model: &Path) -> Reference {
        let definition = Some(model.join(DEFINITION)).filter(|path| path.is_file());
        Reference { tokenizer, definition, merges: OnceLock::new() }
    }

    /// The digest of the model's merges; `None` if its vocabulary comes from another kind of file.
    fn merges(&self) -> Option<blake3::Hash> {
        *self.merges.get_or_init(|| {
            let content = fs::read(self.definition.as_ref()?).ok()?;
            Some(definition::read(&content, &self.tokenizer).ok()?.merges)
        })
    }

    /// Reads the files of an adapter.
    pub(crate) fn read(&self, files: &TextFiles) -> Result<AdapterTokenizer, TextError> {
        let config = object(files, CONFIG)?.unwrap_or_default();
        let sources = templates::from_texts(files, &Value::Object(config.clone()));
        let template_bytes = sources.values().map(String::len).sum();
        if template_bytes > MAX_TEMPLATES {
            let cause =
                format!("the chat templates have {template_bytes} bytes, and may have {MAX_TEMPLATES}");
            return Err(TextError::new(CONFIG, cause));
        }
        let (new_tokens, mut tokenizer) = self.with_tokens(files, &config)?;
        tokenizer.end_at_eos_token();
        let ends = object(files, GENERATION)?.map(|config| ends(&config)).unwrap_or_default();
        for id in ends {
            if !tokenizer.end_ids.contains(&id) {
                tokenizer.end_ids.push(id);
            }
        }
        let has_templates = !sources.is_empty();
        if has_templates {
            tokenizer.chat_templates = sources;
        }
        let base = &self.tokenizer;
        let has_models_tokens = new_tokens == 0 && tokenizer.is_tokenized_like(base);
        let is_bases = has_models_tokens
            && tokenizer.chat_templates == base.chat_templates
            && tokenizer.special_tokens == base.special_tokens
            && tokenizer.end_ids == base.end_ids;
        let tokenizer = if is_bases { base.clone() } else { Arc::new(tokenizer) };
        Ok(AdapterTokenizer { tokenizer, new_tokens, has_models_tokens, has_templates, template_bytes })
    }

    /// The model's tokenizer with the tokens that the files add, and the number of those that are new.
    fn with_tokens(
        &self,
        files: &TextFiles,
        config: &Map<String, Value>,
    ) -> Result<(usize, ModelTokenizer), TextError> {
        let base = &self.tokenizer;
        let special = base.special_tokens.iter();
        let named = special.map(|(name, text)| (name.clone(), Some(AddedToken::from(text.as_str(), true))));
        let others = Others {
            map: object(files, MAP)?.map(Value::Object),
            ids: object(files, IDS)?.map(Value::Object),
        };
        let mut added = AddedTokens::of(named.collect(), config, others);
        if let Some(content) = files.get(DEFINITION) {
            let read = definition::read(content, base).map_err(|error| TextError::new(DEFINITION, error))?;
            if self.merges().is_some_and(|merges| merges != read.merges) {
                let cause = "the merges, or the scores of its entries, are not those of the model";
                return Err(TextError::new(DEFINITION, cause));
            }
            added.define(read.added);
        }
        let all = added.with_ids(base);
        let file = if files.contains_key(DEFINITION) { DEFINITION } else { CONFIG };
        let (new_tokens, merged) = merge(base, all).map_err(|cause| TextError::new(file, cause))?;
        let tokenizer = without_panic(|| shared::with_added(&base.tokenizer, &merged));
        let tokenizer = tokenizer.map_err(|error| TextError::new(file, error))?;
        let tokenizer = ModelTokenizer {
            special_tokens: added.texts(),
            chat_templates: base.chat_templates.clone(),
            end_ids: base.end_ids.clone(),
            cleans_up: base.cleans_up,
            ..ModelTokenizer::over(tokenizer)
        };
        Ok((new_tokens, tokenizer))
    }
}

impl AddedTokens {
    /// All tokens with their ids. One that no file gives an id is the model's of this text, or the next one behind all
    /// others.
    fn with_ids(&self, base: &ModelTokenizer) -> BTreeMap<u32, AddedToken> {
        let mut all = self.by_id().clone();
        let mut known: HashMap<String, u32> =
            all.iter().map(|(id, token)| (token.content.clone(), *id)).collect();
        let size = base.tokenizer.get_vocab_size(true) as u32;
        let mut next = all.keys().next_back().map_or(size, |last| size.max(last.saturating_add(1)));
        let named: Vec<&AddedToken> = self.in_order().collect();
        for token in named.iter().copied().chain(self.extra()) {
            let id = *known.entry(token.content.clone()).or_insert_with(|| {
                base.tokenizer.token_to_id(&token.content).unwrap_or_else(|| {
                    next = next.saturating_add(1);
                    next - 1
                })
            });
            let is_named = named.iter().any(|named| named.content == token.content);
            let old = base.tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id);
            let old = old.filter(|old| old.content == token.content);
            all.entry(id).or_insert_with(|| old.unwrap_or(token).clone()).special |= is_named;
        }
        all.retain(|_, token| !token.content.is_empty());
        all
    }
}

/// The model's added tokens with those of an adapter in their places, and the number of those that are new.
fn merge(
    base: &ModelTokenizer,
    own: BTreeMap<u32, AddedToken>,
) -> Result<(usize, BTreeMap<u32, AddedToken>), String> {
    let decoder = base.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    let mut merged: BTreeMap<u32, AddedToken> =
        decoder.iter().map(|(id, token)| (*id, token.clone().special(base.is_special(*id)))).collect();
    let mut new = 0;
    for (id, token) in &own {
        let text = shortened(&token.content);
        let there = base.tokenizer.id_to_token(*id);
        if there.as_deref() == Some(&*token.content) {
            continue;
        }
        new += 1;
        if token.content.len() > MAX_TEXT {
            return Err(format!("the added token {id} ({text:?}…) has more than {MAX_TEXT} bytes"));
        }
        if let Some(there) = there.filter(|there| !base.is_reserved(*id, there)) {
            return Err(format!("the added token {id} is {text:?}, and the model's entry is {there:?}"));
        }
        let elsewhere = base.tokenizer.token_to_id(&token.content);
        if let Some(other) = elsewhere.filter(|other| own.get(other).is_none_or(|now| now == token)) {
            return Err(format!("the added token {text:?} is {id}, and the model's is {other}"));
        }
    }
    if new > MAX_NEW {
        return Err(format!("{new} tokens are added to those of the model, and at most {MAX_NEW} may be"));
    }
    merged.extend(own);
    // The library normalizes the texts of all of them.
    let bytes: usize = merged.values().map(|token| token.content.len()).sum();
    if bytes > base.longest {
        return Err(format!(
            "the added tokens have {bytes} bytes, and at most {} can be normalized",
            base.longest
        ));
    }
    let mut ids: HashMap<&str, u32> = HashMap::new();
    for (id, token) in &merged {
        if let Some(other) = ids.insert(&token.content, *id) {
            return Err(format!(
                "the added tokens {other} and {id} are both {:?}",
                shortened(&token.content)
            ));
        }
    }
    Ok((new, merged))
}

impl ModelTokenizer {
    /// Returns whether an entry is not one that texts are made of: an added token, or what converters to GGUF fill a
    /// vocabulary up with.
    pub(super) fn is_reserved(&self, id: u32, text: &str) -> bool {
        self.added.contains_key(&id) || text == format!("[PAD{id}]")
    }

    /// Whether all added tokens are the same, with all their settings.
    fn is_tokenized_like(&self, other: &ModelTokenizer) -> bool {
        let of = |tokenizer: &ModelTokenizer| {
            let decoder = tokenizer.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
            let settings = |id: &u32, token: &AddedToken| {
                let flags = (token.single_word, token.lstrip, token.rstrip, token.normalized);
                (*id, (token.content.clone(), flags, tokenizer.is_special(*id)))
            };
            decoder.iter().map(|(id, token)| settings(id, token)).collect::<BTreeMap<_, _>>()
        };
        of(self) == of(other)
    }
}

/// The tokens that end a text by a generation_config.json.
fn ends(config: &Map<String, Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).take(MAX_NEW).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A small file that has an object.
fn object(files: &TextFiles, name: &'static str) -> Result<Option<Map<String, Value>>, TextError> {
    let Some(content) = files.get(name) else { return Ok(None) };
    if content.len() > MAX_SMALL {
        return Err(TextError::new(
            name,
            format!("it has {} bytes, and may have {MAX_SMALL}", content.len()),
        ));
    }
    match serde_json::from_slice(content) {
        Ok(object) => Ok(Some(object)),
        Err(error) => Err(TextError::new(name, error)),
    }
}
