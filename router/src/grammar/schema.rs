//! JSON schemas in the words that llguidance knows. A schema is rewritten only into one that describes the same JSON:
//! where that cannot be seen, the keyword stays, and llguidance refuses it.

use std::collections::BTreeSet;

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

/// Formats that JSON Schema defines. Any other is an annotation, which every validator must pass over.
const FORMATS: [&str; 19] = [
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "idn-email",
    "hostname",
    "idn-hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uri-reference",
    "iri",
    "iri-reference",
    "uuid",
    "uri-template",
    "json-pointer",
    "relative-json-pointer",
    "regex",
];
/// Keywords whose value is an object of schemas.
const OBJECTS: [&str; 5] = ["properties", "patternProperties", "definitions", "$defs", "dependentSchemas"];
/// Keywords whose value is a schema or a list of some.
const SCHEMAS: [&str; 9] = [
    "items",
    "prefixItems",
    "additionalItems",
    "additionalProperties",
    "contains",
    "propertyNames",
    "allOf",
    "anyOf",
    "oneOf",
];
/// All types of JSON. Integers are numbers.
const TYPES: [&str; 6] = ["null", "boolean", "number", "string", "array", "object"];
/// References that are followed one after the other, and properties within properties that are looked at.
const MAX_DEPTH: usize = 8;
/// Alternatives that one keyword becomes.
const MAX_ALTERNATIVES: usize = 64;

/// Rewrites a schema.
pub(super) fn rewrite(mut schema: Value) -> Value {
    let root = schema.clone();
    Rewriter { root: &root }.schema(&mut schema);
    schema
}

struct Rewriter<'a> {
    root: &'a Value,
}

impl Rewriter<'_> {
    fn schema(&self, schema: &mut Value) {
        let Value::Object(fields) = schema else { return };
        for keyword in OBJECTS {
            let inner = fields.get_mut(keyword).and_then(Value::as_object_mut);
            inner.into_iter().flat_map(Map::values_mut).for_each(|inner| self.schema(inner));
        }
        if fields.get("format").and_then(Value::as_str).is_some_and(|format| !FORMATS.contains(&format)) {
            fields.remove("format");
        }
        let mut all = dependencies(fields);
        if let Some(exclusive) =
            fields.get("oneOf").and_then(Value::as_array).and_then(|list| self.exclusive(list))
        {
            fields.remove("oneOf");
            all.push(json!({ "anyOf": exclusive }));
        }
        if let Some(negated) = fields.get("not").and_then(|inner| negated(inner, MAX_DEPTH)) {
            fields.remove("not");
            all.push(negated);
        }
        if !all.is_empty() {
            // Of a list of another kind llguidance tells.
            match fields.entry("allOf").or_insert_with(|| json!([])) {
                Value::Array(list) => list.append(&mut all),
                _ => return,
            }
        }
        for keyword in SCHEMAS {
            match fields.get_mut(keyword) {
                Some(Value::Array(list)) => list.iter_mut().for_each(|inner| self.schema(inner)),
                Some(inner) => self.schema(inner),
                None => {}
            }
        }
    }

    /// Alternatives of which at most one can hold, and that hold together where exactly one of `list` does.
    fn exclusive(&self, list: &[Value]) -> Option<Vec<Value>> {
        // What all of them say of objects alone, all other JSON keeps to: more than one, so that it is not described.
        let of_objects = list.len() > 1 && list.iter().all(says_of_objects_alone);
        let list =
            &list.iter().cloned().map(|one| if of_objects { typed(one) } else { one }).collect::<Vec<_>>();
        let pairs = || (0..list.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        if pairs().all(|(i, j)| self.disjoint(&list[i], &list[j], MAX_DEPTH)) {
            return Some(list.to_vec());
        }
        // Objects that differ in the properties that they must have.
        let required = list.iter().map(required).collect::<Option<Vec<_>>>()?;
        let mut alternatives = Vec::new();
        for (index, own) in required.iter().enumerate() {
            let others = required.iter().enumerate().filter(|(other, _)| *other != index);
            // Each of the others lacks a property that it needs.
            let mut missing: Vec<BTreeSet<&str>> = vec![BTreeSet::new()];
            for (_, other) in others {
                let mut longer = Vec::new();
                for (set, name) in missing.iter().flat_map(|set| other.iter().map(move |name| (set, *name))) {
                    if !own.contains(name) {
                        let mut set = set.clone();
                        set.insert(name);
                        longer.push(set);
                    }
                }
                missing = longer;
                if missing.len() > MAX_ALTERNATIVES {
                    return None;
                }
            }
            alternatives.extend(missing.iter().map(|missing| lacking(own, missing)));
        }
        (alternatives.len() <= MAX_ALTERNATIVES).then_some(alternatives)
    }

    /// Follows references within the document.
    fn resolved<'b>(&'b self, mut schema: &'b Value) -> &'b Value {
        for _ in 0..MAX_DEPTH {
            let target =
                schema.get("$ref").and_then(Value::as_str).and_then(|target| target.strip_prefix('#'));
            match target.and_then(|target| self.root.pointer(target)) {
                Some(found) => schema = found,
                None => break,
            }
        }
        schema
    }

    /// Whether it is plain that no JSON is described by both.
    fn disjoint(&self, a: &Value, b: &Value, depth: usize) -> bool {
        let (a, b) = (self.resolved(a), self.resolved(b));
        if depth == 0 || a == &Value::Bool(false) || b == &Value::Bool(false) {
            return depth > 0;
        }
        let within = |list: &Value, other: &Value| {
            let list = list.as_array()?;
            Some(!list.is_empty() && list.iter().all(|inner| self.disjoint(inner, other, depth - 1)))
        };
        if ["anyOf", "oneOf"]
            .iter()
            .any(|keyword| within(&a[keyword], b).unwrap_or(false) || within(&b[keyword], a).unwrap_or(false))
        {
            return true;
        }
        if let (Some(a), Some(b)) = (values(a), values(b)) {
            return a.iter().all(|value| !b.contains(value));
        }
        if missed(a, b) || missed(b, a) {
            return true;
        }
        let (a_types, b_types) = (types(a), types(b));
        if a_types.is_disjoint(&b_types) {
            return true;
        }
        // What only objects have in common can differ in a property.
        a_types.intersection(&b_types).all(|kind| *kind == "object") && self.properties_differ(a, b, depth)
    }

    /// Whether a property that one of two kinds of objects must have is never the same in both.
    fn properties_differ(&self, a: &Value, b: &Value, depth: usize) -> bool {
        let names = [a, b].into_iter().filter_map(|schema| schema["required"].as_array()).flatten();
        names.filter_map(Value::as_str).any(|name| {
            match (a["properties"].get(name), b["properties"].get(name)) {
                (Some(a), Some(b)) => self.disjoint(a, b, depth - 1),
                _ => false,
            }
        })
    }
}

/// Whether a schema lists texts none of which the pattern of another one finds.
fn missed(listed: &Value, other: &Value) -> bool {
    let pattern = other["pattern"].as_str().and_then(|pattern| Regex::new(pattern).ok());
    let (Some(values), Some(pattern)) = (values(listed), pattern) else { return false };
    values
        .iter()
        .all(|value| value.as_str().is_some_and(|text| pattern.is_match(text).is_ok_and(|found| !found)))
}

/// Whether a schema has keywords for objects and no others.
fn says_of_objects_alone(schema: &Value) -> bool {
    let known = [
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "minProperties",
        "maxProperties",
    ];
    let fields = schema.as_object().filter(|fields| !fields.is_empty());
    fields.is_some_and(|fields| fields.keys().all(|keyword| known.contains(&keyword.as_str())))
}

/// The objects that a schema describes.
fn typed(mut schema: Value) -> Value {
    schema["type"] = "object".into();
    schema
}

/// Takes what a property's presence asks for out of a schema. Each becomes a choice: the property is not there, or what
/// it asks for is.
fn dependencies(fields: &mut Map<String, Value>) -> Vec<Value> {
    let taken =
        ["dependencies", "dependentRequired", "dependentSchemas"].map(|keyword| match fields.get(keyword) {
            Some(Value::Object(_)) => fields.remove(keyword),
            _ => None,
        });
    let taken = taken.into_iter().flatten().filter_map(|value| match value {
        Value::Object(asked) => Some(asked),
        _ => None,
    });
    let choice = |(name, asked): (String, Value)| {
        let asked = match asked {
            Value::Array(names) => json!({ "type": "object", "required": names }),
            schema => schema,
        };
        let there = json!({ "type": "object", "required": [&name] });
        let other = json!({ "type": TYPES[..5] });
        json!({ "anyOf": [absent(&name), { "allOf": [there, asked] }, other] })
    };
    taken.flatten().map(choice).collect()
}

/// Objects without a property.
fn absent(name: &str) -> Value {
    json!({ "type": "object", "properties": { name: false } })
}

/// Objects with some properties and without others.
fn lacking(present: &BTreeSet<&str>, missing: &BTreeSet<&str>) -> Value {
    let properties: Map<String, Value> = missing.iter().map(|name| ((*name).into(), false.into())).collect();
    json!({ "type": "object", "required": present, "properties": properties })
}

/// What a schema does not describe, where that can be said.
fn negated(schema: &Value, depth: usize) -> Option<Value> {
    let fields = schema.as_object().filter(|_| depth > 0)?;
    let only = |keyword: &str| Some(fields.get(keyword)?).filter(|_| fields.len() == 1);
    let each = |list: &Value| {
        let list = list.as_array()?.iter().map(|inner| negated(inner, depth - 1));
        list.collect::<Option<Vec<_>>>()
    };
    if let Some(list) = only("allOf") {
        return Some(json!({ "anyOf": each(list)? }));
    }
    if let Some(list) = only("anyOf") {
        return Some(json!({ "allOf": each(list)? }));
    }
    if let Some(kinds) = only("type") {
        // What is no integer can be a number.
        let integers =
            kinds == "integer" || kinds.as_array().is_some_and(|kinds| kinds.contains(&"integer".into()));
        let left: Vec<_> = TYPES.into_iter().filter(|kind| !types(schema).contains(kind)).collect();
        return (!left.is_empty() && !integers).then(|| json!({ "type": left }));
    }
    let required = required(schema)?;
    let absent: Vec<_> = required.into_iter().map(absent).collect();
    // Only objects can lack a property. If the schema names their type, whatever is none is not described either.
    match fields.contains_key("type") {
        true => Some(json!({ "anyOf": [{ "anyOf": absent }, { "type": TYPES[..5] }] })),
        false => Some(json!({ "anyOf": absent })),
    }
}

/// The properties of a schema that asks for nothing but these.
fn required(schema: &Value) -> Option<BTreeSet<&str>> {
    let fields = schema.as_object()?;
    let plain = fields.iter().all(|(keyword, value)| match keyword.as_str() {
        "required" => true,
        "type" => value == "object",
        // Properties of any kind.
        "properties" => value.as_object().is_some_and(|all| all.values().all(|one| *one == json!({}))),
        _ => false,
    });
    let names = schema["required"].as_array().filter(|names| plain && !names.is_empty())?;
    names.iter().map(Value::as_str).collect()
}

/// The values of a schema that lists them.
fn values(schema: &Value) -> Option<Vec<&Value>> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(vec![value]),
        (None, Some(Value::Array(values))) => Some(values.iter().collect()),
        _ => None,
    }
}

/// The types that a schema allows.
fn types(schema: &Value) -> BTreeSet<&'static str> {
    let kind_of = |value: &Value| match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if let Some(values) = values(schema) {
        return values.into_iter().map(kind_of).collect();
    }
    let named = |kind: &Value| match kind.as_str() {
        Some("integer") => Some("number"),
        kind => TYPES.into_iter().find(|known| Some(*known) == kind),
    };
    match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(named).collect(),
        Value::Null => TYPES.into_iter().collect(),
        kind => named(kind).map_or_else(|| TYPES.into_iter().collect(), |kind| [kind].into_iter().collect()),
    }
}
