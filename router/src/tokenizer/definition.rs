//! Reads the tokenizer.json of an adapter against the tokenizer of the model, without building a second one: nothing of
//! it is kept but the tokens that it adds.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use tokenizers::{AddedToken, Model};

use super::ModelTokenizer;

/// Most tokens that a file may add.
const MAX_ADDED: usize = 1 << 16;

/// What a tokenizer.json has beside the entries that are the model's.
#[derive(Debug, PartialEq)]
pub(super) struct Definition {
    pub(super) added: Vec<(u32, AddedToken)>,
    /// A digest of the merges, or of the scores of entries.
    pub(super) merges: blake3::Hash,
}

/// An added token, as the file writes it.
#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

/// Reads a file. Errors: it is no JSON of this form, or its vocabulary is not that of the model; the first entry is
/// named that is not.
pub(super) fn read(content: &[u8], base: &ModelTokenizer) -> Result<Definition, serde_json::Error> {
    let mut json = serde_json::Deserializer::from_slice(content);
    let definition = json.deserialize_map(File(base))?;
    json.end()?;
    Ok(definition)
}

/// A visitor of the whole file.
struct File<'a>(&'a ModelTokenizer);

impl<'de> Visitor<'de> for File<'_> {
    type Value = Definition;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tokenizer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Definition, A::Error> {
        let mut definition = Definition { added: Vec::new(), merges: blake3::hash(b"") };
        let mut has_model = false;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            match &*key {
                "added_tokens" => definition.added = map.next_value_seed(AddedTokens)?,
                "model" => {
                    definition.merges = map.next_value_seed(ModelOf(self.0))?;
                    has_model = true;
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        if has_model { Ok(definition) } else { Err(A::Error::missing_field("model")) }
    }
}

/// The list of added tokens.
struct AddedTokens;

impl<'de> DeserializeSeed<'de> for AddedTokens {
    type Value = Vec<(u32, AddedToken)>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for AddedTokens {
    type Value = Vec<(u32, AddedToken)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of added tokens")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut tokens = Vec::new();
        while let Some(added) = list.next_element::<Added>()? {
            if tokens.len() == MAX_ADDED {
                return Err(A::Error::custom(format_args!("more than {MAX_ADDED} added tokens")));
            }
            let Added { id, content, single_word, lstrip, rstrip, normalized, special } = added;
            let normalized = normalized.unwrap_or(!special);
            tokens.push((id, AddedToken { content, single_word, lstrip, rstrip, normalized, special }));
        }
        Ok(tokens)
    }
}

/// The part of the file that has vocabulary and merges.
struct ModelOf<'a>(&'a ModelTokenizer);

impl<'de> DeserializeSeed<'de> for ModelOf<'_> {
    type Value = blake3::Hash;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ModelOf<'_> {
    type Value = blake3::Hash;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a model of a tokenizer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<blake3::Hash, A::Error> {
        let mut hasher = blake3::Hasher::new();
        let mut has_vocabulary = false;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            match &*key {
                "vocab" => {
                    map.next_value_seed(Entries::of(self.0, &mut hasher))?;
                    has_vocabulary = true;
                }
                "merges" => map.next_value_seed(Merges(&mut hasher))?,
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        if has_vocabulary { Ok(hasher.finalize()) } else { Err(A::Error::missing_field("vocab")) }
    }
}

/// Entries that are compared with those of the model as they come.
struct Entries<'a> {
    base: &'a ModelTokenizer,
    scores: &'a mut blake3::Hasher,
    /// Which of the model's have come.
    seen: Vec<bool>,
    /// The lowest id that the model has another entry for, and the entry here.
    other: Option<(u64, String)>,
}

impl<'a> Entries<'a> {
    fn of(base: &'a ModelTokenizer, scores: &'a mut blake3::Hasher) -> Entries<'a> {
        let size = base.tokenizer.get_model().get_vocab_size();
        Entries { base, scores, seen: vec![false; size], other: None }
    }

    fn take(&mut self, text: &str, id: u64) {
        let short = u32::try_from(id).ok();
        if short.is_some() && self.base.tokenizer.token_to_id(text) == short {
            if let Some(seen) = usize::try_from(id).ok().and_then(|id| self.seen.get_mut(id)) {
                *seen = true;
            }
        } else if short.is_none_or(|id| !self.base.added.contains_key(&id))
            && self.other.as_ref().is_none_or(|(other, _)| id < *other)
        {
            // The model's added tokens may have another name, which the added tokens here say.
            self.other = Some((id, text.to_owned()));
        }
    }

    fn end<E: Error>(self) -> Result<(), E> {
        let name = |id: u64| self.base.tokenizer.id_to_token(u32::try_from(id).ok()?);
        let is_missed = |id: u32| {
            let entry = self.base.tokenizer.id_to_token(id);
            entry.is_some_and(|entry| !self.base.is_reserved(id, &entry))
        };
        let missed = (0..).zip(&self.seen).find(|(id, seen)| !**seen && is_missed(*id));
        let missed = missed.map(|(id, _)| u64::from(id));
        let first = self.other.as_ref().map(|(id, _)| *id).into_iter().chain(missed).min();
        let Some(id) = first else { return Ok(()) };
        let own = self.other.filter(|(other, _)| *other == id).map(|(_, text)| text);
        let call =
            |text: Option<String>| text.map_or("none".into(), |text| format!("{:?}", shortened(&text)));
        Err(E::custom(format_args!(
            "the vocabulary is not that of the model: the entry {id} is {}, and the model's is {}",
            call(own),
            call(name(id))
        )))
    }
}

/// The beginning of a text, for a message.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("entries with their ids, or a list of entries with their scores")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((text, id)) = map.next_entry::<Cow<'de, str>, u64>()? {
            self.take(&text, id);
        }
        self.end()
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        let mut id = 0;
        while let Some((text, score)) = list.next_element::<(Cow<'de, str>, f64)>()? {
            self.scores.update(&score.to_le_bytes());
            self.take(&text, id);
            id += 1;
        }
        self.end()
    }
}

/// Merges, each of which is a list of two texts, or a text with a space between them.
struct Merges<'a>(&'a mut blake3::Hasher);

impl<'de> DeserializeSeed<'de> for Merges<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Merges<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Merge(self.0, PhantomData))?.is_some() {}
        Ok(())
    }
}

/// One of them.
struct Merge<'a, 'de>(&'a mut blake3::Hasher, PhantomData<&'de ()>);

impl Merge<'_, '_> {
    fn take(self, one: &str, other: &str) {
        // Bytes that no text has.
        self.0.update(one.as_bytes()).update(&[0xff]).update(other.as_bytes()).update(&[0xfe]);
    }
}

impl<'de> DeserializeSeed<'de> for Merge<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Merge<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge of two texts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        let (one, other) = text.split_once(' ').ok_or_else(|| E::custom("a merge without a space"))?;
        self.take(one, other);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let text = |text: Option<Cow<'de, str>>| text.ok_or_else(|| A::Error::custom("a merge of one text"));
        let (one, other) = (text(list.next_element()?)?, text(list.next_element()?)?);
        self.take(&one, &other);
        // Whatever else is there is none of its two texts.
        match list.next_element::<IgnoredAny>()? {
            None => Ok(()),
            Some(_) => Err(A::Error::custom("a merge of more than two texts")),
        }
    }
}
