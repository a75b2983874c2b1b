//! The fields of bodies that say what an answer must look like: OpenAI's and LoRAX's `response_format`, `grammar` of
//! TGI's clients, `guided_*` and `structured_outputs` of vLLM's. All routes know all of them.

use std::{mem, sync::Arc};

use llguidance::JsonCompileOptions;
use serde_json::{Map, Value};

use super::{
    error::ApiError,
    json::{Rest, refuse},
};
use crate::grammar::{Grammar, GrammarSource, Tag, Tagged};

/// Takes these fields out of those that no other field of a body took. More than one grammar is an error.
pub(super) fn take(rest: &mut Rest) -> Result<Option<Grammar>, ApiError> {
    let mut found: Option<Grammar> = None;
    let mut whitespace = Whitespace::default();
    for (field, read) in FIELDS {
        let Some(value) = rest.remove(field).filter(|value| !value.is_null()) else { continue };
        let Some(grammar) = read(field, value, &mut whitespace)? else { continue };
        if let Some(other) = &found {
            let problem = format!("cannot be used together with `{}`", other.field);
            return Err(ApiError::invalid(field, problem));
        }
        found = Some(grammar);
    }
    // Names of engines that we do not have; which one computes the masks changes no answer.
    rest.remove("guided_decoding_backend");
    Ok(found.map(|grammar| whitespace.apply(grammar)))
}

type Read = fn(&'static str, Value, &mut Whitespace) -> Result<Option<Grammar>, ApiError>;

const FIELDS: [(&str, Read); 8] = [
    ("response_format", |field, value, _| response_format(field, value)),
    ("grammar", |field, value, _| response_format(field, value)),
    ("guided_json", |field, value, _| Ok(Some(json(field, value)?))),
    ("guided_regex", |field, value, _| {
        Ok(Some(Grammar::new(field, GrammarSource::Regex(text(field, value)?))))
    }),
    ("guided_choice", |field, value, _| choice(field, value)),
    ("guided_grammar", |field, value, _| {
        Ok(Some(Grammar::new(field, GrammarSource::Lark(text(field, value)?))))
    }),
    ("guided_whitespace_pattern", |field, value, whitespace| {
        whitespace.pattern = Some(text(field, value)?);
        Ok(None)
    }),
    ("structured_outputs", |field, value, whitespace| structured_outputs(field, value, whitespace)),
];

/// The whitespace between the parts of JSON, if a request has a say in it.
#[derive(Default)]
struct Whitespace {
    pattern: Option<String>,
    none: bool,
}

impl Whitespace {
    fn apply(self, mut grammar: Grammar) -> Grammar {
        if self.none || self.pattern.is_some() {
            match &mut grammar.source {
                GrammarSource::JsonSchema(schema) => self.apply_to(schema),
                GrammarSource::Tagged(tagged) => {
                    tagged.tags.iter_mut().for_each(|tag| self.apply_to(&mut tag.schema));
                }
                // These say themselves where there is space.
                GrammarSource::Regex(_) | GrammarSource::Choice(_) | GrammarSource::Lark(_) => {}
            }
        }
        grammar
    }

    fn apply_to(&self, schema: &mut Arc<Value>) {
        let mut changed = match &**schema {
            Value::Object(fields) => Value::Object(fields.clone()),
            Value::Bool(true) => Value::Object(Map::new()),
            _ => return,
        };
        let options = JsonCompileOptions {
            whitespace_flexible: !self.none,
            whitespace_pattern: self.pattern.clone().filter(|_| !self.none),
            ..JsonCompileOptions::default()
        };
        options.apply_to(&mut changed);
        *schema = Arc::new(changed);
    }
}

/// OpenAI's object, with the forms that LoRAX and TGI know beside it: the schema as `schema` or `value`.
fn response_format(field: &'static str, value: Value) -> Result<Option<Grammar>, ApiError> {
    let mut format = object(field, value)?;
    let kind = match format.remove("type") {
        Some(kind) => text(format!("{field}.type"), kind)?,
        None => return Err(ApiError::Missing { field: format!("{field}.type") }),
    };
    let direct = ["schema", "value"].into_iter().find_map(|name| Some((name, format.remove(name)?)));
    let direct = direct.filter(|(_, value)| !value.is_null());
    let schema =
        |(name, value)| Ok::<_, ApiError>(Grammar::new(field, schema(format!("{field}.{name}"), value)?));
    let grammar = match (kind.as_str(), direct) {
        ("text", None) => None,
        ("json_object" | "json", None) => Some(Grammar::json_object(field)),
        ("json_object" | "json" | "json_schema", Some(direct)) => Some(match direct {
            // TGI's clients name a schema as OpenAI's do, within the value.
            (name, Value::Object(named)) if kind == "json_schema" && named.contains_key("schema") => {
                named_schema(field, format!("{field}.{name}"), named)?
            }
            direct => schema(direct)?,
        }),
        ("json_schema", None) => match format.remove("json_schema") {
            Some(named) => {
                let within = format!("{field}.json_schema");
                Some(named_schema(field, within.clone(), object(within, named)?)?)
            }
            None => return Err(ApiError::Missing { field: format!("{field}.json_schema") }),
        },
        ("regex", Some((name, value))) => {
            Some(Grammar::new(field, GrammarSource::Regex(text(format!("{field}.{name}"), value)?)))
        }
        ("regex", None) => return Err(ApiError::Missing { field: format!("{field}.value") }),
        ("structural_tag", None) => Some(Grammar::new(field, structural_tag(field, &mut format)?)),
        ("text" | "structural_tag", Some((name, _))) => {
            return Err(ApiError::Unsupported { field: format!("{field}.{name}") });
        }
        _ => {
            let problem = format!(
                "is {kind:?}; known are \"text\", \"json_object\", \"json_schema\", \"regex\" and \"structural_tag\""
            );
            return Err(ApiError::invalid(format!("{field}.type"), problem));
        }
    };
    refuse(&format, field, |_, _| false)?;
    Ok(grammar)
}

/// OpenAI's named schema. `strict` is always on, and the model is not told of the others.
fn named_schema(field: &'static str, within: String, mut named: Rest) -> Result<Grammar, ApiError> {
    for name in ["name", "description", "strict"] {
        named.remove(name);
    }
    let given = named.remove("schema").filter(|schema| !schema.is_null());
    refuse(&named, &within, |_, _| false)?;
    match given {
        Some(given) => Ok(Grammar::new(field, schema(format!("{within}.schema"), given)?)),
        None => Ok(Grammar::json_object(field)),
    }
}

/// vLLM's structures, each of which begins behind one of the triggers.
fn structural_tag(field: &'static str, format: &mut Rest) -> Result<GrammarSource, ApiError> {
    let mut take = |name: &str| match format.remove(name) {
        Some(Value::Array(values)) if !values.is_empty() => Ok(values),
        None | Some(Value::Null | Value::Array(_)) => {
            Err(ApiError::Missing { field: format!("{field}.{name}") })
        }
        Some(_) => Err(ApiError::invalid(format!("{field}.{name}"), "must be a list")),
    };
    let (structures, triggers) = (take("structures")?, take("triggers")?);
    let at = |name: &str, index: usize| format!("{field}.{name}[{index}]");
    let triggers = triggers.into_iter().enumerate().map(|(index, value)| text(at("triggers", index), value));
    let triggers: Vec<String> = triggers.collect::<Result<_, _>>()?;
    let tags = structures.into_iter().enumerate().map(|(index, value)| {
        let within = at("structures", index);
        let mut structure = object(within.clone(), value)?;
        let mut part = |name: &str| {
            let place = format!("{within}.{name}");
            structure.remove(name).map_or_else(|| Err(ApiError::Missing { field: place.clone() }), Ok)
        };
        let (begin, end) =
            (text(format!("{within}.begin"), part("begin")?)?, text(format!("{within}.end"), part("end")?)?);
        let GrammarSource::JsonSchema(schema) = schema(format!("{within}.schema"), part("schema")?)? else {
            return Err(ApiError::invalid(within, "has no schema"));
        };
        refuse(&structure, &within, |_, _| false)?;
        let trigger = triggers.iter().find(|trigger| !trigger.is_empty() && begin.starts_with(*trigger));
        let problem = "begins with none of the triggers";
        let trigger = trigger.ok_or_else(|| ApiError::invalid(format!("{within}.begin"), problem))?.clone();
        Ok(Tag { trigger, begin, schema, end })
    });
    let tags = tags.collect::<Result<_, ApiError>>()?;
    let tagged = Tagged { tags, free_text: true, at_least: 0, at_most: None, separator: String::new() };
    Ok(GrammarSource::Tagged(tagged))
}

/// vLLM's object, which has exactly one grammar.
fn structured_outputs(
    field: &'static str,
    value: Value,
    whitespace: &mut Whitespace,
) -> Result<Option<Grammar>, ApiError> {
    let mut fields = object(field, value)?;
    let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
    let mut found = Vec::new();
    if let Some(value) = take("json") {
        found.push(json("structured_outputs.json", value)?);
    }
    if let Some(value) = take("regex") {
        let field = "structured_outputs.regex";
        found.push(Grammar::new(field, GrammarSource::Regex(text(field, value)?)));
    }
    if let Some(value) = take("choice") {
        found.extend(choice("structured_outputs.choice", value)?);
    }
    if let Some(value) = take("grammar") {
        let field = "structured_outputs.grammar";
        found.push(Grammar::new(field, GrammarSource::Lark(text(field, value)?)));
    }
    if let Some(value) = take("json_object")
        && flag("structured_outputs.json_object", value)?
    {
        found.push(Grammar::json_object("structured_outputs.json_object"));
    }
    if let Some(value) = take("whitespace_pattern") {
        whitespace.pattern = Some(text("structured_outputs.whitespace_pattern", value)?);
    }
    if let Some(value) = take("disable_any_whitespace") {
        whitespace.none = flag("structured_outputs.disable_any_whitespace", value)?;
    }
    // There is no other engine to fall back to.
    refuse(&fields, field, |name, value| {
        name == "disable_fallback" || name == "disable_additional_properties" && value == false
    })?;
    match <[Grammar; 1]>::try_from(found) {
        Ok([grammar]) => Ok(Some(grammar)),
        Err(found) if found.is_empty() => Ok(None),
        Err(_) => Err(ApiError::invalid(field, "must have one grammar, not several")),
    }
}

fn json(field: &'static str, value: Value) -> Result<Grammar, ApiError> {
    Ok(Grammar::new(field, schema(field, value)?))
}

fn choice(field: &'static str, value: Value) -> Result<Option<Grammar>, ApiError> {
    let Value::Array(values) = value else {
        return Err(ApiError::invalid(field, "must be a list of strings"));
    };
    let choices =
        values.into_iter().enumerate().map(|(index, value)| text(format!("{field}[{index}]"), value));
    let choices: Vec<_> = choices.collect::<Result<_, _>>()?;
    // As an empty list asks for nothing elsewhere.
    let grammar = || Grammar::new(field, GrammarSource::Choice(choices.clone()));
    Ok((!choices.is_empty()).then(grammar))
}

/// A JSON schema, or the text of one.
fn schema(field: impl Into<String>, value: Value) -> Result<GrammarSource, ApiError> {
    let field = field.into();
    let schema = match value {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::invalid(field.clone(), format!("is not JSON: {error}")))?,
        value => value,
    };
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(GrammarSource::JsonSchema(Arc::new(schema))),
        _ => Err(ApiError::invalid(field, "must be a JSON schema, which is an object")),
    }
}

fn object(field: impl Into<String>, value: Value) -> Result<Rest, ApiError> {
    match value {
        Value::Object(fields) => Ok(fields),
        _ => Err(ApiError::invalid(field.into(), "must be an object")),
    }
}

fn text(field: impl Into<String>, mut value: Value) -> Result<String, ApiError> {
    match &mut value {
        Value::String(text) => Ok(mem::take(text)),
        _ => Err(ApiError::invalid(field.into(), "must be a string")),
    }
}

fn flag(field: &'static str, value: Value) -> Result<bool, ApiError> {
    value.as_bool().ok_or_else(|| ApiError::invalid(field, "must be true or false"))
}
