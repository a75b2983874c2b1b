//! Adapters as versions of PEFT have written them, and what none of them can mean.

use kernels::DType;
use model::{
    Decoder,
    adapter::{self, Adapter, BaseModel},
    testing::{
        self,
        seeded::{Manifest, Seeded},
    },
};
use serde_json::{Value, json};

use crate::{goldens, kinds::Base};

/// The seed of adapters of all kinds.
const SEED: u64 = 100;

fn manifest(base: &str, adapter: &str) -> Manifest {
    Manifest::read(&goldens::folder(base).join(format!("{adapter}.json"))).unwrap()
}

fn read(base: &str, adapter: &Manifest) -> Result<Adapter, String> {
    let files = Base::new(base);
    let folder = files.model().with_file_name("adapter");
    adapter.write(&folder, DType::F32).unwrap();
    let decoder = Decoder::from_folder(&files.model()).unwrap();
    let model = BaseModel {
        merged: None,
        decoder,
        path: files.model(),
        dtype: DType::F32,
        share: model::Share::WHOLE,
    };
    adapter::read(&folder, &model).map_err(|error| error.to_string())
}

/// The same tensors by other names.
fn renamed(adapter: &Manifest, (from, to): (&str, &str)) -> Manifest {
    let mut renamed = adapter.clone();
    let mut count = 0;
    for tensor in &mut renamed.tensors {
        tensor.key.get_or_insert_with(|| format!("{SEED}/{}", tensor.name));
        count += usize::from(tensor.name.contains(from));
        tensor.name = tensor.name.replace(from, to);
    }
    assert!(count > 0, "no tensor has {from} in its name");
    renamed
}

#[test]
fn older_names_are_the_same_tensors() {
    for (base, kind, names) in [
        ("llama", "kinds/odd-alpha", ("lora_A.weight", "lora_A.default.weight")),
        ("llama", "kinds/odd-alpha", ("lora_B.weight", "lora_B.default.weight")),
        ("llama", "kinds/dora", ("lora_magnitude_vector", "lora_magnitude_vector.weight")),
        ("llama", "kinds/dora", ("lora_magnitude_vector", "lora_magnitude_vector.default.weight")),
        ("llama", "kinds/dora-embedding", ("lora_magnitude_vector", "lora_magnitude_vector.default.weight")),
        ("llama", "kinds/lora-bias", ("lora_B.bias", "lora_B.default.bias")),
        ("llama", "kinds/bias-lora-only", ("base_layer.bias", "bias")),
        ("llama", "kinds/bias-all", ("base_layer.bias", "bias")),
        ("gpt-neox", "kinds/bias-all", ("base_layer.bias", "bias")),
        ("llama", "kinds/embedding", ("lora_embedding_A", "lora_embedding_A.default")),
        ("llama", "kinds/embedding", ("lora_embedding_B", "lora_embedding_B.default")),
        ("llama", "kinds/embedding-copies", ("base_layer.weight", "weight")),
        (
            "llama",
            "kinds/resized-copies",
            ("embed_tokens.weight", "embed_tokens.token_adapter.base_layer.weight"),
        ),
        ("llama", "kinds/tokens", ("trainable_tokens_delta", "trainable_tokens_delta.default")),
        ("gemma2", "kinds/tokens-tied", ("trainable_tokens_delta", "trainable_tokens_delta.default")),
    ] {
        let adapter = manifest(base, kind);
        let (now, then) = (read(base, &adapter).unwrap(), read(base, &renamed(&adapter, names)).unwrap());
        assert_eq!(testing::identity(&now), testing::identity(&then), "{base}, {kind}, {names:?}");
    }
    // GPT-NeoX's head has another name since transformers 5.
    let head = manifest("gpt-neox", "adapters/head");
    let mut older = renamed(&head, ("lm_head", "embed_out"));
    for (tensor, now) in older.tensors.iter_mut().zip(&head.tensors) {
        tensor.key = Some(format!("{}/{}", head_seed(), now.name));
    }
    older.config["target_modules"] = json!(["embed_in", "embed_out"]);
    let [now, then] = [&head, &older].map(|adapter| read("gpt-neox", adapter).unwrap());
    assert_eq!(testing::identity(&now), testing::identity(&then));
}

/// The seed of `adapters/head.json`.
fn head_seed() -> u64 {
    let text = std::fs::read(goldens::folder("gpt-neox").join("adapters/head.json")).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap()["seed"].as_u64().unwrap()
}

/// A manifest with a field changed.
fn with(adapter: &Manifest, field: &str, value: Value) -> Manifest {
    let mut changed = adapter.clone();
    changed.config[field] = value;
    changed
}

/// A manifest with one more target.
fn targets(adapter: &Manifest, more: &str) -> Manifest {
    let mut targets = adapter.config["target_modules"].clone();
    targets.as_array_mut().unwrap().push(more.into());
    with(adapter, "target_modules", targets)
}

/// A manifest with tensors of another one.
fn and(mut adapter: Manifest, other: &Manifest, which: &str) -> Manifest {
    let more = other.tensors.iter().filter(|tensor| tensor.name.contains(which));
    adapter.tensors.extend(more.cloned());
    adapter
}

/// A manifest whose tables have so many rows.
fn resized(mut adapter: Manifest, rows: usize) -> Manifest {
    let is_table = |tensor: &&mut Seeded| {
        tensor.name.ends_with("embed_tokens.weight") || tensor.name.ends_with("lm_head.weight")
    };
    adapter.tensors.iter_mut().filter(is_table).for_each(|tensor| tensor.shape[0] = rows);
    adapter
}

/// A base, an adapter of it, and why it is refused.
type Refused = (&'static str, Manifest, &'static str);

/// Adapters whose fields contradict each other or their tensors.
fn contradictions() -> Vec<Refused> {
    let of = |kind: &str| manifest("llama", &format!("kinds/{kind}"));
    let twice = "in more than one of them";
    vec![
        ("llama", with(&of("lora-bias"), "use_dora", json!(true)), "lora_bias = true, with use_dora"),
        (
            "llama",
            with(&of("lora-bias"), "init_lora_weights", json!("eva")),
            "lora_bias = true, with use_dora or a way",
        ),
        ("llama", targets(&of("save-lm-head"), "lm_head"), twice),
        ("llama", targets(&of("tokens"), "embed_tokens"), twice),
        ("llama", with(&of("tokens"), "modules_to_save", json!(["embed_tokens"])), twice),
        (
            "gemma2",
            with(
                &manifest("gemma2", "kinds/tokens-tied"),
                "trainable_token_indices",
                json!({"embed_tokens": [1], "lm_head": [2]}),
            ),
            "with ensure_weight_tying",
        ),
        (
            "llama",
            and(of("embedding"), &of("resized-copies"), "embed_tokens.weight"),
            "lora_embedding_A has the shape",
        ),
        (
            "gpt2",
            with(&manifest("gpt2", "kinds/lora-bias"), "init_lora_weights", json!("olora")),
            "lora_bias = true",
        ),
        (
            "llama",
            with(&of("dora"), "use_dora", json!(false)),
            "lora_magnitude_vector belongs to no targeted module",
        ),
        ("llama", with(&of("bias-all"), "bias", json!("none")), "bias belongs to no targeted module"),
        (
            "llama",
            with(&of("tokens"), "trainable_token_indices", Value::Null),
            "trainable_tokens_delta belongs to no",
        ),
        (
            "llama",
            and(of("rslora"), &renamed(&of("rslora"), ("lora_A.", "lora_A.default.")), "q_proj.lora_A"),
            "belongs to no targeted",
        ),
    ]
}

/// Adapters that ask for what is not served.
fn unserved() -> Vec<Refused> {
    let of = |kind: &str| manifest("llama", &format!("kinds/{kind}"));
    let neox = |kind: &str| manifest("gpt-neox", &format!("kinds/{kind}"));
    vec![
        (
            "llama",
            with(&of("olora"), "r", json!(1 << 24)),
            "olora, of weights of this size at this rank, is not",
        ),
        (
            "gemma2",
            with(&manifest("gemma2", "kinds/lm-head"), "init_lora_weights", json!("olora")),
            "olora, of an output projection that is the embedding table, is not supported",
        ),
        (
            "llama",
            with(&of("odd-alpha"), "r", json!((1 << 24) + 1)),
            "r is missing or not a positive integer up to",
        ),
        (
            "llama",
            with(&of("odd-alpha"), "r", json!(u64::MAX)),
            "r is missing or not a positive integer up to",
        ),
        (
            "llama",
            with(&of("patterns"), "rank_pattern", json!({"q_proj": i64::MAX})),
            "r is missing or not a positive",
        ),
        ("llama", targets(&of("lora-bias"), "embed_tokens"), "lora_bias = true, of an embedding table"),
        (
            "llama",
            resized(of("resized-copies"), 577),
            "has rows for 577 tokens, this server has room for 576",
        ),
        (
            "llama",
            and(of("dora-embedding"), &of("save-embed-tokens"), "embed_tokens.weight"),
            "use_dora = true, of model.embed_tokens with other rows",
        ),
        (
            "gpt-neox",
            with(&and(neox("dora"), &neox("bias-all"), "input_layernorm.bias"), "bias", json!("all")),
            "bias = all, with a trained base_model.model.gpt_neox.layers.0.input_layernorm.bias in front of",
        ),
        (
            "gpt2",
            with(&manifest("gpt2", "kinds/dora"), "init_lora_weights", json!("olora")),
            "of transposed weights",
        ),
        (
            "llama",
            with(&of("olora"), "init_lora_weights", json!("pissa_niter_4")),
            "path_initial_model_for_weight_conversion",
        ),
    ]
}

#[test]
fn what_cannot_be_meant_is_refused_by_name() {
    for (base, adapter, cause) in contradictions().into_iter().chain(unserved()) {
        let refusal = read(base, &adapter).err().unwrap_or_else(|| panic!("served in spite of: {cause}"));
        assert!(refusal.contains(cause), "{refusal}, not {cause}");
    }
}

#[test]
fn vocabularies_of_any_size_have_the_rows_that_differ() {
    for rows in [1, 64, 319, 320, 321, 325, 400, 576] {
        let adapter = read("llama", &resized(manifest("llama", "kinds/resized-copies"), rows)).unwrap();
        assert_eq!(adapter.vocab, rows.max(320));
        let found: Vec<_> = adapter.parts.iter().filter_map(|part| part.rows.as_ref()).collect();
        let [table, head] = found[..] else { panic!("{} tables", found.len()) };
        assert_eq!((table.values.rows, head.values.rows), (rows, rows));
        // A table that lacks rows leaves the model's; an output that lacks them has no logits there.
        assert_eq!(table.ids.is_some(), rows < 320);
        assert!(head.ids.is_none());
    }
}
