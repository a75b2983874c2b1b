//! Random LoRA adapters in PEFT's format, made on the fly.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Map, json};

/// Widths of a Llama.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of keys and of values.
    pub kv: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
}

/// The shape of the demo model.
pub const DEMO: Shape = Shape { layers: 30, hidden: 576, kv: 192, intermediate: 1536 };
/// The shape of the fixture `tiny`.
pub const TINY: Shape = Shape { layers: 2, hidden: 64, kv: 32, intermediate: 112 };

/// All projections of a layer.
pub const ALL_SITES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

impl Shape {
    /// Inputs and outputs of a projection, and the module that it is in.
    fn site(&self, name: &str) -> Result<(usize, usize, &'static str)> {
        match name {
            "q_proj" | "o_proj" => Ok((self.hidden, self.hidden, "self_attn")),
            "k_proj" | "v_proj" => Ok((self.hidden, self.kv, "self_attn")),
            "gate_proj" | "up_proj" => Ok((self.hidden, self.intermediate, "mlp")),
            "down_proj" => Ok((self.intermediate, self.hidden, "mlp")),
            _ => None.context(format!("{name} is no projection")),
        }
    }

    /// Writes an adapter of this model into `folder`: `rank` on every one of `sites`, in f32; the same for the same
    /// seed.
    ///
    /// # Errors
    /// If a site is unknown, or the folder cannot be written.
    pub fn write_adapter(&self, folder: &Path, rank: usize, sites: &[&str], seed: u64) -> Result<()> {
        fs::create_dir_all(folder)?;
        let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
            "target_modules": sites, "bias": "none"});
        fs::write(folder.join("adapter_config.json"), config.to_string())?;
        let mut tensors = Vec::new();
        for layer in 0..self.layers {
            for name in sites {
                let (columns, rows, part) = self.site(name)?;
                let prefix = format!("base_model.model.model.layers.{layer}.{part}.{name}");
                tensors.push((format!("{prefix}.lora_A.weight"), [rank, columns], columns));
                tensors.push((format!("{prefix}.lora_B.weight"), [rows, rank], rank));
            }
        }
        let (mut header, mut end) = (Map::new(), 0);
        for (name, shape, _) in &tensors {
            let begin = end;
            end += 4 * shape[0] * shape[1];
            let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
            header.insert(name.clone(), entry);
        }
        let header = serde_json::to_vec(&header)?;
        let mut file = BufWriter::new(File::create(folder.join("adapter_model.safetensors"))?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        let mut random = StdRng::seed_from_u64(seed);
        for (_, [rows, columns], fan_in) in tensors {
            // Large enough for another answer.
            let scale = 2.0 / (fan_in as f32).sqrt();
            for _ in 0..rows * columns {
                file.write_all(&random.random_range(-scale..scale).to_le_bytes())?;
            }
        }
        Ok(file.flush()?)
    }
}
