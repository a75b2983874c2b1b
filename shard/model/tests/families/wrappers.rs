//! Models that hold a decoder beside a vision tower: what is computed is what the decoder by itself computes, and an
//! adapter is matched under each of the names that it can have.

use kernels::DType;
use model::{
    Decoder,
    adapter::{self, BaseModel},
    testing::seeded::{Manifest, Seeded},
};
use serde_json::{Value, json};

use crate::{
    ADAPTERS, Fixture,
    driver::Driver,
    goldens::{self, Goldens},
};

/// How names are made of those of a decoder by itself.
#[derive(Debug, Clone, Copy)]
enum Naming {
    Alone,
    /// `model.NAME.layers`, `lm_head`.
    Inner(&'static str),
    /// `language_model.model.layers`, `language_model.lm_head`.
    Outer,
}

const INNER: Naming = Naming::Inner("language_model");
const TEXT: Naming = Naming::Inner("text_model");

impl Naming {
    fn of(self, name: &str) -> String {
        match (self, name.strip_prefix("model.")) {
            (Naming::Inner(inner), Some(rest)) => format!("model.{inner}.{rest}"),
            (Naming::Alone | Naming::Inner(_), _) => name.into(),
            (Naming::Outer, _) => format!("language_model.{name}"),
        }
    }

    /// The name of an adapter's tensor.
    fn of_adapter(self, name: &str) -> String {
        let prefix = "base_model.model.";
        format!("{prefix}{}", self.of(name.strip_prefix(prefix).unwrap()))
    }
}

/// A tensor of zeros, or of other numbers.
fn tensor(name: &str, shape: &[usize], m: u64) -> Seeded {
    Seeded { name: name.into(), shape: shape.into(), offset: 0.0, m, s: 4, key: None }
}

/// A model of a fixture in a wrapper.
fn model(fixture: &str, wrapper: &str, naming: Naming) -> Manifest {
    let mut manifest = Manifest::read(&goldens::folder(fixture).join("model.json")).unwrap();
    let text = manifest.config.take();
    manifest.config = json!({
        "model_type": wrapper, "text_config": text, "vision_config": {"model_type": "siglip_vision_model"},
        "image_token_index": 319, "tie_word_embeddings": text["tie_word_embeddings"], "hidden_size": 7,
    });
    manifest.rename(|name| naming.of(name));
    for name in [
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight",
        "multi_modal_projector.mm_input_projection_weight",
    ] {
        manifest.tensors.push(tensor(name, &[3, 5], 9));
    }
    manifest
}

fn adapter(fixture: &str, name: &str, naming: Naming) -> Manifest {
    let file = format!("adapters/{name}.json");
    let mut manifest = Manifest::read(&goldens::folder(fixture).join(file)).unwrap();
    manifest.rename(|name| naming.of_adapter(name));
    manifest
}

/// Fixtures, what they are wrapped in, and how tensors of the model and of its adapters are named.
const SERVED: [(&str, &str, Naming, Naming); 16] = [
    ("gemma3", "gemma3", Naming::Outer, Naming::Outer),
    ("gemma3", "gemma3", INNER, INNER),
    ("gemma3", "gemma3", Naming::Outer, INNER),
    ("gemma3", "gemma3", INNER, Naming::Alone),
    ("gemma3", "gemma3", Naming::Alone, Naming::Outer),
    ("mistral", "mistral3", Naming::Outer, INNER),
    ("mistral", "mistral3", INNER, Naming::Outer),
    ("llama", "llava", Naming::Outer, Naming::Outer),
    ("mistral", "llava_next", INNER, INNER),
    ("qwen2", "llava_onevision", Naming::Outer, INNER),
    ("llama-tied", "llava_next_video", INNER, INNER),
    ("llama", "vipllava", INNER, Naming::Alone),
    ("llama", "video_llava", Naming::Outer, INNER),
    ("qwen3", "internvl", INNER, INNER),
    ("llama", "idefics3", TEXT, TEXT),
    ("phi3", "smolvlm", TEXT, TEXT),
];

#[test]
fn the_decoder_in_a_wrapper_is_served() {
    for (fixture, wrapper, naming, of_adapters) in SERVED {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        model(fixture, wrapper, naming).write(&at("model"), DType::F32).unwrap();
        for name in ADAPTERS {
            adapter(fixture, name, of_adapters).write(&at(name), DType::F32).unwrap();
        }
        let mut goldens = Goldens::read(fixture);
        let lengths: Vec<_> = goldens.prompts.iter().map(Vec::len).collect();
        goldens.cases.retain(|case| (7..=300).contains(&lengths[case.prompt]));
        let adapters = ADAPTERS.map(at).into();
        let fixture = Fixture { name: wrapper, goldens, model: at("model"), adapters, _folder: folder };
        let (cases, mut sequences) = fixture.sequences();
        let tried = |adapter: Option<&str>| cases.iter().any(|case| case.adapter.as_deref() == adapter);
        assert!(tried(None) && ADAPTERS.iter().all(|name| tried(Some(name))));
        Driver::new(DType::F32, &fixture.model, &fixture.adapters).alone(&mut sequences);
        fixture.compare(&format!("as {naming:?} with adapters as {of_adapters:?}"), &cases, &sequences);
    }
}

/// An adapter of the language model in a wrapper, whose files have these tensors besides.
fn read_with(naming: Naming, others: &[Seeded]) -> Result<Vec<String>, String> {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    model("gemma3", "gemma3", naming).write(&at("model"), DType::F32).unwrap();
    let mut manifest = adapter("gemma3", "linear", naming);
    manifest.tensors.extend(others.iter().cloned());
    manifest.write(&at("adapter"), DType::F32).unwrap();
    let decoder = Decoder::from_folder(&at("model")).unwrap();
    let base =
        BaseModel { merged: None, decoder, path: at("model"), dtype: DType::F32, share: model::Share::WHOLE };
    adapter::read(&at("adapter"), &base).map(|adapter| adapter.sites).map_err(|error| error.to_string())
}

#[test]
fn deltas_beside_the_language_model_are_refused_by_name_unless_they_are_zero() {
    let plain = read_with(INNER, &[]).unwrap();
    for module in [
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.11.mlp.fc1",
        "model.vision_tower.transformer.layers.3.attention.k_proj",
        "model.vision_model.encoder.layers.2.self_attn.v_proj",
        "multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
        "model.connector.modality_projection.proj",
        "image_tower.layers.0.q_proj",
        "model.video_tower.layers.0.q_proj",
        "model.image_newline",
    ] {
        for naming in [INNER, Naming::Outer] {
            let name = |role: &str| format!("base_model.model.{module}.lora_{role}.weight");
            let delta = |m| [tensor(&name("A"), &[4, 6], 9), tensor(&name("B"), &[6, 4], m)];
            assert_eq!(read_with(naming, &delta(0)).unwrap(), plain, "{module}");
            let expected =
                format!("tensor {} changes a part beside the language model, which is not served", name("B"));
            assert_eq!(read_with(naming, &delta(1)).unwrap_err(), expected);
        }
    }
    let unknown = tensor("base_model.model.model.audio_tower.q_proj.lora_B.weight", &[6, 4], 0);
    assert!(read_with(INNER, &[unknown]).unwrap_err().contains("audio_tower"));
}

fn refusal(config: &Value) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    Decoder::from_folder(folder.path()).unwrap_err().to_string()
}

#[test]
fn wrappers_that_are_not_served_are_refused_by_name() {
    for other in [
        "mllama",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "paligemma",
        "gemma3n",
        "gemma4",
        "aya_vision",
        "idefics2",
        "llama4",
        "kosmos-2",
        "blip-2",
        "phi4_multimodal",
    ] {
        let refusal = refusal(&json!({"model_type": other, "text_config": {"model_type": "llama"}}));
        let expected = format!("model_type {other:?} is not supported; known are llama, mistral, qwen2,");
        assert!(refusal.starts_with(&expected), "{refusal}");
    }
}

#[test]
fn fields_of_wrappers_that_are_not_served_are_refused_by_name() {
    let object = "text_config is missing or not an object";
    for (wrapper, field, value, expected) in [
        ("gemma3", "text_config", Value::Null, object),
        ("gemma3", "text_config", json!([1]), object),
        ("llava", "text_config", json!("llama"), object),
        (
            "gemma3",
            "text_config",
            json!({"model_type": "llama"}),
            r#"text_config.model_type "llama" is not supported; known are gemma3_text"#,
        ),
        (
            "mistral3",
            "text_config",
            json!({"model_type": "ministral3"}),
            r#"model_type "ministral3" is not supported"#,
        ),
        ("llava", "text_config", json!({"model_type": "qwen2_vl_text"}), r#"model_type "qwen2_vl_text""#),
        (
            "llava",
            "text_config",
            json!({"model_type": "qwen2", "rope_scaling": {"type": "mrope"}}),
            r#"type "mrope" is not supported"#,
        ),
        ("llava", "text_config", json!({"model_type": "gemma2"}), r#"text_config.model_type "gemma2""#),
        ("llava", "text_config", json!({"model_type": "phi"}), r#"text_config.model_type "phi""#),
        (
            "gemma3",
            "text_config",
            json!({"final_logit_softcapping": 30.0}),
            r#"text_config.model_type "gemma3_text" is not supported; known are decoders without"#,
        ),
        (
            "llava",
            "quantization_config",
            json!({"bits": 4}),
            "quantization_config {\"bits\":4} is not supported",
        ),
        ("llava", "is_encoder_decoder", json!(true), "is_encoder_decoder true is not supported"),
        ("llava", "tie_word_embeddings", json!("yes"), "tie_word_embeddings is missing or not true or false"),
        ("llava", "eos_token_id", json!("</s>"), "eos_token_id is missing or not a token id"),
    ] {
        let mut config = json!({"model_type": wrapper, "text_config": {}});
        config[field] = value;
        let refusal = refusal(&config);
        assert!(refusal.starts_with(expected), "{refusal}");
    }
}

/// What published files leave out, and what stands outside of `text_config`.
#[test]
fn defaults_in_a_wrapper_are_those_of_its_decoder() {
    let read = |config: &Value| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        Decoder::from_folder(folder.path()).unwrap()
    };
    // Gemma 3 of 4 billion parameters.
    let gemma = read(&json!({
        "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    }));
    let heads = gemma.heads();
    assert_eq!((heads.query, heads.kv, heads.dim, gemma.vocab), (8, 4, 256, 262_208));
    assert_eq!((gemma.max_positions, gemma.head.tied, gemma.eos), (131_072, true, vec![1, 106]));
    let ends = |config: Value| read(&config).eos;
    assert_eq!(ends(json!({"model_type": "llava", "text_config": {"eos_token_id": 7}})), [7]);
    assert_eq!(ends(json!({"model_type": "llava", "eos_token_id": null, "text_config": {}})), [2]);
    assert_eq!(ends(json!({"model_type": "gemma3", "text_config": {}})), [1]);
    let by_architecture = json!({"architectures": ["LlavaForConditionalGeneration"], "text_config": {}});
    assert_eq!(read(&by_architecture).vocab, 32_000);
    for (wrapper, outside, inside, tied) in [
        ("gemma3", None, None, true),
        ("gemma3", Some(false), Some(true), false),
        ("mistral3", None, Some(false), true),
        ("mistral3", Some(false), None, false),
        ("internvl", None, None, true),
        ("llava", None, None, false),
        ("llava", None, Some(true), true),
        ("llava", Some(false), Some(true), true),
        ("llava", Some(true), Some(false), true),
        ("llava_next", None, Some(true), false),
        ("idefics3", None, Some(true), false),
        ("smolvlm", Some(true), None, true),
    ] {
        let mut config = json!({"model_type": wrapper, "text_config": {}});
        if let Some(outside) = outside {
            config["tie_word_embeddings"] = outside.into();
        }
        if let Some(inside) = inside {
            config["text_config"]["tie_word_embeddings"] = inside.into();
        }
        assert_eq!(read(&config).head.tied, tied, "{config}");
    }
}
