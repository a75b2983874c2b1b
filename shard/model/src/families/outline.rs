//! What most families have in common: a stack of equal layers whose sizes are fields of the same names. A family's
//! outline has its defaults, and its page changes what is built from it.

use kernels::{Activation, Heads, NormKind, Pairs};

use super::{
    fields::Fields,
    rope::{self, RopeFields},
};
use crate::{
    Decoder, LoadError, Result,
    decoder::{
        Attention, Embedding, Head, Layer, MAX_LAYERS, Mlp, Names, NormSpec, Task, Wiring, check_head_dim,
    },
};

/// Names of a family's parts, and the values that transformers takes for absent fields.
pub(super) struct Outline {
    pub(super) names: Names,
    pub(super) hidden: usize,
    pub(super) vocab: usize,
    pub(super) layers: usize,
    pub(super) query: usize,
    /// Key heads; none stands for as many as there are queries.
    pub(super) kv: Option<usize>,
    /// Size of heads; none stands for the share that a head has in the hidden size.
    pub(super) head_dim: Option<usize>,
    /// Whether the hidden size has to be a multiple of the number of heads, even if the heads have another size.
    pub(super) whole_heads: bool,
    /// Width of the feed-forward network; none stands for four times the hidden size.
    pub(super) ffn: Option<usize>,
    pub(super) gated: bool,
    /// The field of the activation, and its default.
    pub(super) activation: (&'static str, Activation),
    pub(super) norm: NormKind,
    pub(super) eps: f32,
    pub(super) max_positions: usize,
    pub(super) rope: Option<RopeFields>,
    pub(super) tied: bool,
    /// The token that ends a sequence.
    pub(super) eos: Option<u32>,
}

impl Outline {
    /// The decoder that the fields describe: without biases, windows and whatever else a page adds.
    pub(super) fn decoder(&self, fields: &Fields) -> Result<Decoder> {
        let hidden = fields.size("hidden_size", self.hidden)?;
        let heads = self.heads(fields, hidden)?;
        let max_positions = fields.size("max_position_embeddings", self.max_positions)?;
        let eps = fields.number(self.names.eps, self.eps)?;
        let norm = match self.norm {
            NormKind::Rms => NormSpec::rms(eps),
            NormKind::Layer => NormSpec::layer(eps),
        };
        let (field, activation) = self.activation;
        let mlp = Mlp {
            width: match self.ffn {
                Some(default) => fields.size("intermediate_size", default)?,
                None => fields.optional_size("intermediate_size")?.unwrap_or(4 * hidden),
            },
            activation: fields.activation(field, activation)?,
            gated: self.gated,
            bias: false,
        };
        let rope =
            self.rope.as_ref().map(|of| rope::rope(fields, of, heads.dim, max_positions)).transpose()?;
        let mut attention = Attention::causal(heads);
        attention.rope = rope.as_ref().map(|_| (0, Pairs::Halves));
        let layer = Layer { norm, wiring: Wiring::Sequential { post_norms: false }, attention, mlp };
        Ok(Decoder {
            hidden,
            vocab: fields.size("vocab_size", self.vocab)?,
            max_positions: rope.as_ref().map_or(max_positions, |rope| rope.positions),
            eos: self.eos.into_iter().collect(),
            embedding: Embedding { scale: 1.0, positions: None, token_types: None, norm: None },
            layers: vec![layer; self.layers(fields)?],
            norm,
            task: Task::Generate,
            head: Head::plain(fields.flag("tie_word_embeddings", self.tied)?),
            ropes: rope.into_iter().collect(),
            residual_scale: 1.0,
            names: self.names,
        })
    }

    fn heads(&self, fields: &Fields, hidden: usize) -> Result<Heads> {
        let query = fields.size("num_attention_heads", self.query)?;
        // Where null is no value of the field, it stands for what an absent field would.
        let kv = match (fields.raw("num_key_value_heads"), self.kv) {
            (None, Some(default)) => default,
            _ => fields.optional_size("num_key_value_heads")?.unwrap_or(query),
        };
        if self.whole_heads && !hidden.is_multiple_of(query) {
            let expected = "a multiple of the number of attention heads";
            return Err(LoadError::Field { field: fields.name("hidden_size"), expected });
        }
        let dim = self.head_dim.unwrap_or(hidden / query);
        let dim = check_head_dim(fields.optional_size("head_dim")?.unwrap_or(dim))?;
        Ok(Heads { query, kv, dim })
    }

    /// The number of layers. Memory is taken for each of them before weights are there to contradict.
    fn layers(&self, fields: &Fields) -> Result<usize> {
        let (field, expected) = ("num_hidden_layers", "a positive integer up to 1024");
        let layers = fields.size(field, self.layers)?;
        if layers <= MAX_LAYERS {
            Ok(layers)
        } else {
            Err(LoadError::Field { field: fields.name(field), expected })
        }
    }
}
