//! Configurations of adapters: what PEFT makes of each, or that it does not serve it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs, path::Path};

use kernels::{DType, LoraPart};
use model::{
    Decoder,
    adapter::{self, Adapter, BaseModel},
    testing::{self, Files, Tensor, Tensors},
};
use serde::Deserialize;
use serde_json::{Value, json};

/// What PEFT does, see `integration-tests/fixtures/make_peft_cases.py`.
#[derive(Deserialize)]
struct Case {
    config: Value,
    /// Rank and scale of each module that is changed, by its path.
    modules: Option<BTreeMap<String, (usize, f64)>>,
    error: Option<String>,
}

fn read(files: &Files) -> Result<Adapter, String> {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("model");
    testing::model().write_model(&base).unwrap();
    let base = BaseModel {
        merged: None,
        decoder: Decoder::from_folder(&base).unwrap(),
        path: base,
        dtype: DType::F32,
        share: model::Share::WHOLE,
    };
    files.write_adapter(folder.path()).unwrap();
    adapter::read(folder.path(), &base).map_err(|error| error.to_string())
}

/// Names, inputs and outputs of the modules of a layer, in the order of sites and slices.
const MODULES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 32, 32),
    ("self_attn.k_proj", 32, 16),
    ("self_attn.v_proj", 32, 16),
    ("self_attn.o_proj", 32, 32),
    ("mlp.gate_proj", 32, 48),
    ("mlp.up_proj", 32, 48),
    ("mlp.down_proj", 48, 32),
];

fn shape(path: &str) -> (usize, usize) {
    let found = MODULES.iter().find(|(name, ..)| path.ends_with(name));
    found.map_or((32, 96), |(_, inputs, outputs)| (*inputs, *outputs))
}

/// An adapter that changes these modules, with ones for B.
fn adapter(config: &Value, modules: &BTreeMap<String, (usize, f64)>) -> Files {
    let mut tensors = Tensors::new();
    for (path, (lora_rank, _)) in modules {
        let (inputs, outputs) = shape(path);
        for (matrix, shape) in [("A", [*lora_rank, inputs]), ("B", [outputs, *lora_rank])] {
            let tensor = Tensor { shape: shape.into(), data: vec![1.0; shape[0] * shape[1]] };
            tensors.insert(format!("base_model.model.{path}.lora_{matrix}.weight"), tensor);
        }
    }
    Files { config: config.clone(), tensors }
}

/// Path of the module that a part of an adapter changes.
fn path(part: &LoraPart) -> String {
    const SITES: [&[usize]; 4] = [&[0, 1, 2], &[3], &[4, 5], &[6]];
    match part.site {
        8 => "lm_head".into(),
        site => format!("model.layers.{}.{}", site / 4, MODULES[SITES[site % 4][part.slice]].0),
    }
}

#[test]
fn adapters_are_served_exactly_where_peft_serves_them() {
    #[derive(Deserialize)]
    struct Cases {
        cases: Vec<Case>,
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/peft/cases.json");
    let Cases { cases } = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert!(cases.len() > 100);
    let mut wrong = Vec::new();
    for Case { config, modules, error } in cases {
        let usual = [("model.layers.0.self_attn.q_proj".to_owned(), (4, 2.0))].into();
        let got = read(&adapter(&config, modules.as_ref().unwrap_or(&usual)));
        let got = got.map(|adapter| {
            let parts = adapter
                .parts
                .iter()
                .map(|part| (path(part), (part.shape().lora_rank, part.low_rank.as_ref().unwrap().scale)));
            parts.collect::<BTreeMap<String, (usize, f32)>>()
        });
        let expected = modules.map(|modules| {
            modules.into_iter().map(|(path, (lora_rank, scale))| (path, (lora_rank, scale as f32))).collect()
        });
        let agrees = match (&got, &expected) {
            (Ok(got), Some(expected)) => got == expected,
            // PEFT serves one that does nothing.
            (Err(refusal), Some(expected)) => {
                refusal.contains("changes nothing") && expected.values().all(|(_, scale)| *scale == 0.0)
            }
            // It is the configuration that is refused.
            // A few need tensors besides, which PEFT does not find either, or which make another layer of it.
            (Err(refusal), None) => {
                refusal.starts_with("adapter_config.json: ") || refusal.ends_with(" is missing")
            }
            _ => false,
        };
        if !agrees {
            wrong.push(format!("{config}\n  here {got:?}\n  PEFT {expected:?} {error:?}\n"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_configuration_of_the_fewest_fields_has_pefts_defaults() {
    let modules: BTreeMap<_, _> = (0..2)
        .flat_map(|layer| ["q_proj", "v_proj"].map(|name| format!("model.layers.{layer}.self_attn.{name}")))
        .map(|path| (path, (8, 1.0)))
        .collect();
    let read = read(&adapter(&json!({"peft_type": "LORA"}), &modules)).unwrap();
    assert_eq!(
        (read.parts.len(), read.max_lora_rank, read.parts[0].low_rank.as_ref().unwrap().scale),
        (4, 8, 1.0)
    );
}

/// Every pattern would keep a matcher busy for years.
#[test]
fn patterns_that_do_not_end_are_refused_by_their_field() {
    let endless = [r"((?=.).+)+!", r"(?:(?!x)[^!]+)+!", r"(?:(?=.)(?:\w|\.)+)+x"];
    for pattern in endless {
        for (field, value) in [
            ("target_modules", json!(pattern)),
            ("exclude_modules", json!(pattern)),
            ("rank_pattern", json!({pattern: 3})),
            ("alpha_pattern", json!({pattern: 3})),
            ("modules_to_save", json!([pattern])),
        ] {
            let mut files = testing::adapter(&["q_proj", "v_proj"], 4, 1);
            files.config[field] = value;
            let refusal = read(&files).err().unwrap();
            assert!(refusal.starts_with(&format!("adapter_config.json: {field}: ")), "{refusal}");
            assert!(refusal.contains("acktrack"), "{refusal}");
        }
    }
}

/// Many patterns that each go back share one allowance.
#[test]
fn many_patterns_are_not_slower_than_one() {
    let patterns: serde_json::Map<String, Value> =
        (0..2000).map(|i| (format!(r"((?=.).+)+{i}x"), json!(3))).collect();
    let mut files = testing::adapter(&["q_proj"], 4, 1);
    files.config["rank_pattern"] = Value::Object(patterns);
    assert!(read(&files).err().unwrap().contains("acktrack"));
}

#[test]
fn names_of_other_fields_and_ways_are_refused_by_name() {
    for (field, value) in [
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
        ("arrow_config", json!({"top_k": 3})),
        ("monteclora_config", json!({"num_samples": 8})),
        ("velora_config", json!({"num_groups": 4})),
        ("kasa_config", json!({"beta": 1e-4})),
        ("megatron_config", json!({"hidden_size": 32})),
        ("peft_type", json!("LOHA")),
        ("peft_type", Value::Null),
        ("something_new", json!(1)),
    ] {
        let mut files = testing::adapter(&["q_proj"], 4, 1);
        files.config[field] = value.clone();
        let refusal = read(&files).err().unwrap_or_else(|| panic!("{field} = {value}"));
        assert!(refusal.starts_with(&format!("adapter_config.json: {field} = ")), "{refusal}");
    }
}
