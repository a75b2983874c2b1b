//! Every field of every family with values that it should not have: read or refused by the name of a field, never a panic.

use std::{fs, path::Path};

use model::testing::seeded::Manifest;
use serde_json::{Map, Value, json};

use crate::read;

/// Fields that a refusal may name though they are not there: that is what is wrong.
const MISSING: [&str; 6] =
    ["head_dim", "num_key_value_heads", "rope_parameters", "factor", "low_freq_factor", "short_factor"];

/// Values that some field or other cannot have.
fn odd_values() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(0.5),
        json!(1e-300),
        json!(1e300),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(""),
        json!("64"),
        json!([]),
        json!([1, "x", null]),
        json!({}),
        json!({"rope_type": "yarn", "factor": -1.0, "type": 7}),
    ]
}

/// The object with each of its fields changed or left out, and with each field of the objects in it.
fn mutations(object: &Map<String, Value>) -> Vec<Map<String, Value>> {
    let mut all = Vec::new();
    for (field, value) in object {
        let mut without = object.clone();
        without.remove(field);
        all.push(without);
        let inner = value.as_object().map(mutations).unwrap_or_default().into_iter().map(Value::Object);
        for value in odd_values().into_iter().chain(inner) {
            let mut changed = object.clone();
            changed.insert(field.clone(), value);
            all.push(changed);
        }
    }
    all
}

/// Names of fields, those of objects in it included.
fn names(object: &Map<String, Value>) -> Vec<String> {
    let inner = object.values().filter_map(Value::as_object).flat_map(names);
    object.keys().cloned().chain(inner).collect()
}

#[test]
fn no_value_of_a_field_is_a_panic() {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/families");
    let fixtures = fs::read_dir(&families).unwrap().map(|entry| entry.unwrap().path().join("model.json"));
    let (mut tried, mut refused) = (0, 0);
    for path in fixtures.filter(|path| path.exists()) {
        let config = Manifest::read(&path).unwrap().config;
        let object = config.as_object().unwrap();
        let mut known = names(object);
        known.extend(MISSING.map(str::to_owned));
        for changed in mutations(object) {
            tried += 1;
            if let Err(refusal) = read(&Value::Object(changed.clone())) {
                refused += 1;
                let is_named = known.iter().any(|field| refusal.contains(field.as_str()));
                assert!(is_named, "{refusal}: {changed:?}");
            }
        }
    }
    assert!(tried > 8_000 && refused > 3_000, "{tried} were tried, {refused} refused");
}
