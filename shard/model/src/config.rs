//! What a decoder looks like, from `config.json` or from a GGUF file's metadata.

mod from_gguf;
mod from_json;
mod rope;

use kernels::{Heads, LoraSite, SiteKind};

use crate::{LoadError, Result};
pub(crate) use from_gguf::ROPE_FACTORS;
pub use rope::Rope;

/// Most layers of a model.
const MAX_LAYERS: usize = 1 << 10;
/// Most positions of a model; the longest context that a Llama was trained for.
const MAX_POSITIONS: usize = 1 << 22;
/// Most elements of a head; those in use have up to 576.
const MAX_HEAD_DIM: usize = 1 << 12;

/// A Llama-like decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: Heads,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding table, which are the columns of the logits. A tokenizer may know fewer tokens, where the
    /// table was padded, or more. [`Model::load`](crate::Model::load) refuses a table of another size.
    pub vocab: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Tokens that end a sequence, sorted, all below `vocab`.
    pub eos: Vec<u32>,
    /// Added to the mean square in norms.
    pub rms_eps: f32,
    /// Positions.
    pub rope: Rope,
    /// The output projection is the embedding table.
    pub tied: bool,
    /// q, k, v and o have biases.
    pub attention_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// Most positions that a row attends to, its own included; `None` for all before it.
    pub window: Option<u32>,
}

/// Refuses a size of heads that no model has. A table of rotary frequencies is made of it before weights are there to
/// contradict.
fn check_head_dim(dim: usize) -> Result<usize> {
    let expected = "a positive integer up to 4096";
    if dim <= MAX_HEAD_DIM { Ok(dim) } else { Err(LoadError::Field { field: "head_dim", expected }) }
}

impl Config {
    /// Refuses sizes that contradict each other, and leaves out ends of sequences that the model cannot generate.
    fn check(mut self) -> Result<Config> {
        let inconsistent = |what, got, expected| Err(LoadError::Inconsistent { what, got, expected });
        let Heads { query, kv, dim } = self.heads;
        if kv == 0 || !query.is_multiple_of(kv) {
            return inconsistent("num_attention_heads, a multiple of num_key_value_heads", query, kv);
        }
        if dim == 0 || !dim.is_multiple_of(2) {
            return inconsistent("head_dim, an even number", dim, dim + 1);
        }
        if self.layers == 0 || self.vocab == 0 || self.ffn == 0 || self.max_positions == 0 {
            return inconsistent("a size of the model", 0, 1);
        }
        // Memory is taken for each of them before weights are there to contradict.
        if self.layers > MAX_LAYERS {
            let expected = "a positive integer up to 1024";
            return Err(LoadError::Field { field: "num_hidden_layers", expected });
        }
        if self.max_positions > MAX_POSITIONS {
            let expected = "a positive integer up to 4194304";
            return Err(LoadError::Field { field: "max_position_embeddings", expected });
        }
        if !self.rms_eps.is_finite() {
            return Err(LoadError::Field { field: "rms_norm_eps", expected: "a finite number" });
        }
        let Rope { inv_freq, attention_factor } = &self.rope;
        if !inv_freq.iter().chain([attention_factor]).all(|x| x.is_finite() && *x >= 0.0) {
            let expected = "parameters that give finite rotary frequencies";
            return Err(LoadError::Field { field: "rope_parameters", expected });
        }
        self.eos.retain(|id| (*id as usize) < self.vocab);
        self.eos.sort_unstable();
        self.eos.dedup();
        Ok(self)
    }

    /// The low-rank sites of the model, by their index: per layer q k v, o, gate up, down; then the output projection.
    pub fn sites(&self) -> Vec<LoraSite> {
        let Heads { query, kv, dim } = self.heads;
        let site = LoraSite::linear;
        let layer = [
            site(self.hidden, &[query * dim, kv * dim, kv * dim]),
            site(query * dim, &[self.hidden]),
            site(self.hidden, &[self.ffn, self.ffn]),
            site(self.ffn, &[self.hidden]),
        ];
        let layers = std::iter::repeat_n(layer, self.layers).flatten();
        layers.chain([LoraSite { kind: SiteKind::Head, ..site(self.hidden, &[self.vocab]) }]).collect()
    }
}
