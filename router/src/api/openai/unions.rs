//! Fields that may have several types. Their readers are written by hand, so that errors say what is expected and
//! name the element that is at fault.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Unexpected, Visitor, value::SeqAccessDeserializer},
};

use super::messages::Part;

/// `stop`: a string or a list of strings.
#[derive(Debug, Default)]
pub(super) struct Stop(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Stop, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Stop, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(Stop)
            }
        }

        deserializer.deserialize_any(Reader)
    }
}

/// `prompt`: a text, a list of texts, a list of token ids, or a list of such lists.
#[derive(Debug)]
pub(super) enum Prompts {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Prompts, D::Error> {
        deserializer.deserialize_any(PromptsReader)
    }
}

struct PromptsReader;

impl<'de> Visitor<'de> for PromptsReader {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of token ids, or a list of lists of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts::Texts(vec![text.to_owned()]))
    }

    /// All elements are of the first one's type.
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
        Ok(match list.next_element()? {
            None => Prompts::Texts(Vec::new()),
            Some(Element::Text(first)) => Prompts::Texts(rest(first, list)?),
            Some(Element::Token(first)) => Prompts::Tokens(vec![rest(first, list)?]),
            Some(Element::Tokens(first)) => Prompts::Tokens(rest(first, list)?),
        })
    }
}

fn rest<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(first: T, mut list: A) -> Result<Vec<T>, A::Error> {
    let mut all = vec![first];
    while let Some(next) = list.next_element()? {
        all.push(next);
    }
    Ok(all)
}

/// An element of a list of prompts.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Element, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id, or a list of token ids")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                let token = u32::try_from(id);
                token.map(Element::Token).map_err(|_| E::invalid_value(Unexpected::Unsigned(id), &self))
            }

            fn visit_i64<E: Error>(self, id: i64) -> Result<Element, E> {
                let token = u32::try_from(id);
                token.map(Element::Token).map_err(|_| E::invalid_value(Unexpected::Signed(id), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Element, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(Element::Tokens)
            }
        }

        deserializer.deserialize_any(Reader)
    }
}

/// `content` of a message: a text, or a list of parts.
#[derive(Debug)]
pub(super) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of parts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Content, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(Content::Parts)
            }
        }

        deserializer.deserialize_any(Reader)
    }
}

/// The schemas of these types.
macro_rules! schema {
    ($type:ident, $generator:ident => $schema:expr) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema($generator: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}

schema!(Stop, generator => {
    let (text, list) = (generator.subschema_for::<String>(), generator.subschema_for::<Vec<String>>());
    json_schema!({ "anyOf": [text, list] })
});
schema!(Prompts, generator => {
    let (text, texts) = (generator.subschema_for::<String>(), generator.subschema_for::<Vec<String>>());
    let (ids, lists) = (generator.subschema_for::<Vec<u32>>(), generator.subschema_for::<Vec<Vec<u32>>>());
    json_schema!({ "anyOf": [text, texts, ids, lists] })
});
schema!(Content, generator => {
    let (text, parts) = (generator.subschema_for::<String>(), generator.subschema_for::<Vec<Part>>());
    json_schema!({ "anyOf": [text, parts] })
});
