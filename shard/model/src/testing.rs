//! For tests: small models and adapters as files, with weights that look random and are the same every time.

pub mod seeded;
mod torch_file;

use std::{collections::BTreeMap, fs, path::Path};

use kernels::testing::Numbers;
use safetensors::{Dtype, View, serialize_to_file};
use serde_json::{Value, json};

use crate::adapter;
pub use torch_file::{Pickle, write_archive, write_torch};

/// What an adapter changes: adapters with the same output have the same text, however their files are written.
pub fn identity(adapter: &adapter::Adapter) -> String {
    format!("{:?} {:?}", adapter.parts, adapter.hidden_shift)
}

/// One f32 tensor of a file.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub data: Vec<f32>,
}

impl Tensor {
    /// Elements uniform in `scale · [-1, 1)`.
    pub fn random(numbers: &mut Numbers, shape: &[usize], scale: f32) -> Tensor {
        let data = (0..shape.iter().product()).map(|_| numbers.number() * scale).collect();
        Tensor { shape: shape.into(), data }
    }
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.data.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        self.data.len() * 4
    }
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Files of a model or an adapter before they are written, so that a test can spoil them.
#[derive(Debug, Clone)]
pub struct Files {
    /// The configuration.
    pub config: Value,
    /// The tensors.
    pub tensors: Tensors,
}

/// A Llama of two layers: hidden 32, ffn 48, 4 query and 2 key heads of 8, vocabulary 96, untied.
pub fn model() -> Files {
    let mut numbers = Numbers(11);
    let mut tensors = Tensors::new();
    let mut add = |name: &str, shape: &[usize], scale: f32| {
        tensors.insert(format!("{name}.weight"), Tensor::random(&mut numbers, shape, scale));
    };
    add("model.embed_tokens", &[96, 32], 1.0);
    add("model.norm", &[32], 1.0);
    add("lm_head", &[96, 32], 0.5);
    for layer in 0..2 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(&format!("model.layers.{layer}.{norm}"), &[32], 1.0);
        }
        for (module, [outputs, inputs]) in MODULES {
            add(&format!("model.layers.{layer}.{module}"), &[outputs, inputs], 0.25);
        }
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "eos_token_id": 2,
    });
    Files { config, tensors }
}

/// Projections of a layer of [`model`] with their shapes `[outputs, inputs]`.
const MODULES: [(&str, [usize; 2]); 7] = [
    ("self_attn.q_proj", [32, 32]),
    ("self_attn.k_proj", [16, 32]),
    ("self_attn.v_proj", [16, 32]),
    ("self_attn.o_proj", [32, 32]),
    ("mlp.gate_proj", [48, 32]),
    ("mlp.up_proj", [48, 32]),
    ("mlp.down_proj", [32, 48]),
];

/// An adapter of [`model`] on the named projections of all layers, of `lora_rank`, in PEFT's format. `seed` makes it
/// unlike others.
pub fn adapter(names: &[&str], lora_rank: usize, seed: u64) -> Files {
    let mut numbers = Numbers(seed);
    let mut tensors = Tensors::new();
    for layer in 0..2 {
        for (module, [outputs, inputs]) in MODULES {
            if names.iter().any(|name| module.ends_with(name)) {
                for (matrix, shape) in [("A", [lora_rank, inputs]), ("B", [outputs, lora_rank])] {
                    let name = format!("base_model.model.model.layers.{layer}.{module}.lora_{matrix}.weight");
                    tensors.insert(name, Tensor::random(&mut numbers, &shape, 0.5));
                }
            }
        }
    }
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora_rank, "lora_alpha": 2 * lora_rank,
        "target_modules": names, "bias": "none", "lora_dropout": 0.0, "use_rslora": false, "use_dora": false,
    });
    Files { config, tensors }
}

impl Files {
    fn write(&self, folder: &Path, config: &str, weights: &str) -> crate::Result<()> {
        let path = folder.join(config);
        let io = |source| crate::LoadError::Io { path: folder.into(), source };
        fs::create_dir_all(folder).map_err(io)?;
        fs::write(&path, self.config.to_string()).map_err(io)?;
        serialize_to_file(&self.tensors, None, &folder.join(weights))
            .map_err(|error| crate::LoadError::Safetensors { path, fault: error.to_string() })
    }

    /// Writes a model in Hugging Face layout.
    pub fn write_model(&self, folder: &Path) -> crate::Result<()> {
        self.write(folder, "config.json", "model.safetensors")
    }

    /// Writes an adapter in PEFT's layout.
    pub fn write_adapter(&self, folder: &Path) -> crate::Result<()> {
        self.write(folder, adapter::CONFIG_FILE, adapter::WEIGHTS_FILES[0])
    }
}
