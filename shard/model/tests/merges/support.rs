//! Models, recipes and parts for these tests.

use std::{
    fs,
    path::{Path, PathBuf},
};

use kernels::{DType, LoraPart};
use model::{
    Decoder, Share,
    adapter::{
        Adapter, AdapterFiles, BaseModel, ContentHash, Elementwise, MajoritySign, Merge, MergeError,
        MergePart, Recipe, Strategy,
    },
};
use serde_json::{Value, json};

/// All strategies.
pub(crate) const STRATEGIES: [Strategy; 11] = [
    Strategy::Elementwise(Elementwise::Linear),
    Strategy::Elementwise(Elementwise::Ties),
    Strategy::Elementwise(Elementwise::DareLinear),
    Strategy::Elementwise(Elementwise::DareTies),
    Strategy::Elementwise(Elementwise::MagnitudePrune),
    Strategy::Cat,
    Strategy::Svd,
    Strategy::Dense(Elementwise::Ties),
    Strategy::Dense(Elementwise::DareLinear),
    Strategy::Dense(Elementwise::DareTies),
    Strategy::Dense(Elementwise::MagnitudePrune),
];

/// The folder with what PEFT merges, see `integration-tests/fixtures/make_merges.py`.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/merges")
}

/// The model of the fixtures, of which merges need the configuration alone.
pub(crate) fn base(folder: &Path, dtype: DType) -> BaseModel {
    let config: Value = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 24,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "eos_token_id": 2,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    BaseModel {
        merged: None,
        decoder: Decoder::from_folder(folder).unwrap(),
        path: folder.into(),
        dtype,
        share: Share::WHOLE,
    }
}

/// An adapter that is to be merged.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    pub(crate) weight: f64,
}

/// Opens the files of adapters.
pub(crate) fn opened(parts: &[Part]) -> Vec<MergePart> {
    let open = |part: &Part| MergePart {
        name: part.name.clone(),
        files: AdapterFiles::open(&part.folder).unwrap(),
        weight: part.weight,
    };
    parts.iter().map(open).collect()
}

/// Adapters of the fixtures.
pub(crate) fn parts(names: &[&str], weights: &[f64]) -> Vec<Part> {
    let part = |(name, weight): (&&str, &f64)| Part {
        name: (*name).into(),
        folder: fixtures().join("adapters").join(name),
        weight: *weight,
    };
    names.iter().zip(weights).map(part).collect()
}

/// A recipe of this strategy that prunes half of the elements.
pub(crate) fn recipe(strategy: Strategy) -> Recipe {
    let majority_sign = MajoritySign::Total;
    Recipe { strategy, density: Some(0.5), majority_sign, svd_rank: None, seed: 3 }
}

/// Merges adapters.
pub(crate) fn merge(parts: &[Part], recipe: &Recipe, base: &BaseModel) -> Result<Adapter, MergeError> {
    Merge::open(opened(parts), recipe, base)?.read_as(ContentHash([7; 32]), &|| false)
}

/// The path of the module that a part changes.
pub(crate) fn path(part: &LoraPart) -> String {
    let name = match (part.site % 4, part.slice) {
        (0, slice) => ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][slice],
        (1, _) => "self_attn.o_proj",
        (2, slice) => ["mlp.gate_proj", "mlp.up_proj"][slice],
        _ => "mlp.down_proj",
    };
    match part.site {
        9 => "model.embed_tokens".into(),
        8 => "lm_head".into(),
        site => format!("model.layers.{}.{name}", site / 4),
    }
}

/// The change of a part, `[rows, columns]` as PEFT has it: that of a table is `[tokens, columns]`.
pub(crate) fn delta(part: &LoraPart) -> Vec<f32> {
    let low_rank = part.low_rank.as_ref().unwrap();
    let (a, b, rank) = (low_rank.a.to_f32(), low_rank.b.to_f32(), low_rank.rank);
    let (inputs, outputs) = (low_rank.a.cols, low_rank.b.rows);
    assert_eq!((low_rank.a.rows, low_rank.b.cols), (rank, rank));
    let element = |output: usize, input: usize| {
        let products = (0..rank).map(|k| f64::from(b[output * rank + k]) * f64::from(a[k * inputs + input]));
        (products.sum::<f64>() * f64::from(low_rank.scale)) as f32
    };
    match path(part).as_str() {
        "model.embed_tokens" => {
            (0..inputs).flat_map(|token| (0..outputs).map(move |column| element(column, token))).collect()
        }
        _ => (0..outputs).flat_map(|row| (0..inputs).map(move |column| element(row, column))).collect(),
    }
}

/// The largest difference, as a fraction of the largest element.
pub(crate) fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
    let apart = got.iter().zip(expected).fold(0.0, |apart: f32, (x, y)| apart.max((x - y).abs()));
    if largest == 0.0 { apart } else { apart / largest }
}
