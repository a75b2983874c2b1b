//! Which merges are refused, and with which words.

use kernels::DType;
use model::{
    Decoder, Share,
    adapter::{BaseModel, Elementwise, Recipe, Strategy},
    testing::{self, Files, Tensor},
};
use serde_json::{Value, json};

use super::support::{Part, merge, recipe};

const TIES: Strategy = Strategy::Elementwise(Elementwise::Ties);
const LINEAR: Strategy = Strategy::Elementwise(Elementwise::Linear);

/// The words with which a merge of adapters is refused.
fn refusal(model: &Files, adapters: &[Files], weights: &[f64], recipe: &Recipe) -> String {
    let folder = tempfile::tempdir().unwrap();
    model.write_model(folder.path()).unwrap();
    let base = BaseModel {
        merged: None,
        decoder: Decoder::from_folder(folder.path()).unwrap(),
        path: folder.path().into(),
        dtype: DType::F16,
        share: Share::WHOLE,
    };
    let part = |(i, (files, weight)): (usize, (&Files, &f64))| {
        let at = folder.path().join(format!("{i}"));
        files.write_adapter(&at).unwrap();
        Part { name: format!("team/{}", ["one", "two", "three"][i]), folder: at, weight: *weight }
    };
    let parts: Vec<Part> = adapters.iter().zip(weights).enumerate().map(part).collect();
    merge(&parts, recipe, &base).unwrap_err().to_string()
}

fn plain(lora_rank: usize) -> Files {
    testing::adapter(&["q_proj", "v_proj"], lora_rank, lora_rank as u64)
}

fn with(field: &str, value: Value) -> Files {
    let mut files = plain(4);
    files.config[field] = value;
    files
}

#[test]
fn what_is_no_low_rank_delta_is_refused_in_any_place() {
    let table = |rows: usize, value: f32| Tensor { shape: vec![rows, 32], data: vec![value; rows * 32] };
    let mut resized = plain(4);
    resized.tensors.insert("base_model.model.lm_head.weight".into(), table(97, 0.25));
    let mut other = plain(4);
    other.tensors.insert("base_model.model.model.embed_tokens.weight".into(), table(96, 0.25));
    let cases: Vec<(Files, &str)> = vec![
        (with("use_dora", json!(true)), "use_dora"),
        (with("lora_bias", json!(true)), "lora_bias"),
        (with("bias", json!("all")), "bias"),
        (with("bias", json!("lora_only")), "bias"),
        (with("init_lora_weights", json!("olora")), "init_lora_weights"),
        (with("init_lora_weights", json!("OLoRA")), "init_lora_weights"),
        (with("ensure_weight_tying", json!(true)), "ensure_weight_tying"),
        (with("modules_to_save", json!(["lm_head"])), "modules_to_save"),
        (with("modules_to_save", json!(["embed_tokens", "lm_head"])), "modules_to_save"),
        (with("trainable_token_indices", json!([1, 2])), "trainable_token_indices"),
        (with("trainable_token_indices", json!({"embed_tokens": [1]})), "trainable_token_indices"),
        (with("use_qalora", json!(true)), "use_qalora"),
        (with("target_parameters", json!(["mlp.gate"])), "target_parameters"),
        (resized, "the rows of lm_head differ from the model's"),
        (other, "the rows of model.embed_tokens differ from the model's"),
    ];
    for (spoiled, words) in cases {
        for strategy in [LINEAR, TIES, Strategy::Cat, Strategy::Svd] {
            for (adapters, name) in [
                (vec![plain(4), spoiled.clone()], "team/two"),
                (vec![spoiled.clone(), plain(4)], "team/one"),
                (vec![spoiled.clone()], "team/one"),
            ] {
                let refusal = refusal(&testing::model(), &adapters, &[1.0, 1.0], &recipe(strategy));
                assert!(refusal.contains(words) && refusal.contains(name), "{words}: {refusal}");
            }
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let two = [plain(4), plain(4)];
    let refused = |weights: &[f64], recipe: &Recipe| refusal(&testing::model(), &two, weights, recipe);
    for density in [0.0, -0.0, -0.5, 1.0 + f64::EPSILON, 1.5, 2.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY]
    {
        for strategy in [TIES, LINEAR, Strategy::Svd] {
            let recipe = Recipe { density: Some(density), ..recipe(strategy) };
            let refusal = refused(&[1.0, 1.0], &recipe);
            assert_eq!(refusal, format!("density = {density} is not above 0 and at most 1"));
        }
    }
    for weight in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for strategy in [TIES, LINEAR, Strategy::Cat, Strategy::Svd] {
            let refusal = refused(&[1.0, weight], &recipe(strategy));
            assert_eq!(refusal, format!("the weight of adapter team/two is {weight}"));
        }
    }
    for way in
        [Elementwise::Ties, Elementwise::DareLinear, Elementwise::DareTies, Elementwise::MagnitudePrune]
    {
        let recipe = Recipe { density: None, ..recipe(Strategy::Elementwise(way)) };
        let refusal = refused(&[1.0, 1.0], &recipe);
        assert_eq!(refusal, format!("{} needs a density", recipe.strategy.name()));
    }
    assert_eq!(refused(&[], &recipe(TIES)), "a merge needs at least one adapter");
    for strategy in [LINEAR, Strategy::Cat, Strategy::Svd] {
        assert!(refused(&[0.0, 0.0], &recipe(strategy)).contains("the merge changes nothing"));
        let refusal = refused(&[1e30, 1e30], &recipe(strategy));
        assert!(refusal.contains("self_attn.q_proj has values that are too large for F16"), "{refusal}");
    }
}

#[test]
fn unequal_ranks_are_named() {
    let mut pattern = plain(4);
    pattern.config["rank_pattern"] = json!({"layers.1.self_attn.v_proj": 2});
    for (matrix, shape) in [("A", [2, 32]), ("B", [16, 2])] {
        let name = format!("base_model.model.model.layers.1.self_attn.v_proj.lora_{matrix}.weight");
        pattern.tensors.insert(name, Tensor { shape: shape.into(), data: vec![0.5; shape[0] * shape[1]] });
    }
    let cases = [
        (vec![plain(4), plain(2)], "those of all are [4, 2]"),
        (vec![plain(1), plain(4), plain(4)], "those of all are [1, 4, 4]"),
        (vec![plain(4), pattern], "those of model.layers.1.self_attn.v_proj are [4, 2]"),
    ];
    for (adapters, words) in cases {
        for strategy in [LINEAR, TIES] {
            let refusal = refusal(&testing::model(), &adapters, &[1.0; 3], &recipe(strategy));
            assert!(refusal.starts_with(strategy.name()) && refusal.ends_with(words), "{refusal}");
        }
    }
}

#[test]
fn what_the_first_configuration_would_leave_out_is_refused() {
    let mut layer = with("layers_to_transform", json!([1]));
    layer.tensors.retain(|name, _| name.contains("layers.1."));
    let excluded = |field: &str, value: Value, kept: &str| {
        let mut files = with(field, value);
        files.tensors.retain(|name, _| name.contains(kept));
        files
    };
    let cases = [
        (layer, "layers_to_transform of adapter team/one would leave model.layers.0.self_attn.q_proj"),
        (
            excluded("exclude_modules", json!(["v_proj"]), "q_proj"),
            "exclude_modules of adapter team/one would leave model.layers.0.self_attn.v_proj",
        ),
        (
            excluded("exclude_modules", json!(".*layers\\.1.*"), "layers.0."),
            "exclude_modules of adapter team/one would leave model.layers.1.self_attn.q_proj",
        ),
    ];
    for (first, words) in cases {
        for strategy in [LINEAR, TIES, Strategy::Cat, Strategy::Svd] {
            let adapters = [first.clone(), plain(4)];
            let refusal = refusal(&testing::model(), &adapters, &[1.0, 1.0], &recipe(strategy));
            assert!(refusal.contains(words) && refusal.contains("of adapter team/two"), "{refusal}");
        }
    }
}

/// They are refused by their headers alone.
#[test]
fn svd_of_large_ranks_is_refused() {
    let large = [plain(2000), plain(2000)];
    let refusal = refusal(&testing::model(), &large, &[1.0, 1.0], &recipe(Strategy::Svd));
    assert_eq!(refusal, "svd of ranks that add up to 4000 takes too long; cat gives the exact sum");
}
