//! Decoders from GGUF files' metadata, as llama.cpp reads it (`src/llama-model.cpp`, `src/models/*.cpp`). A key that would
//! change the output and is not computed is refused by its name, see [`keys`].

mod architectures;
mod keys;
mod rope;
#[cfg(test)]
mod tests;

use gguf::{FromValue, Gguf};
use kernels::{Activation, Heads, NormKind, Pairs};

use crate::{
    Decoder, LoadError, Result,
    decoder::{
        Attention, Embedding, Head, Layer, MAX_LAYERS, Mlp, Names, NormSpec, Stored, Task, Wiring,
        check_head_dim,
    },
};
use architectures::ARCHITECTURES;

/// An architecture of llama.cpp.
struct Architecture {
    /// Its name, in front of its keys.
    name: &'static str,
    /// The family's names in a folder.
    names: Names,
    norm: NormKind,
    activation: Activation,
    gated: bool,
    /// Whether queries and keys are rotated.
    rotates: bool,
    /// Whether the converter interleaves the halves of q and k heads.
    permuted: bool,
    /// Tensors of rotary factors that it reads.
    factors: &'static [&'static str],
    /// Keys that it reads besides those that all do.
    keys: &'static [&'static str],
    /// What the architecture has besides.
    page: fn(&Metadata<'_>, &mut Decoder) -> Result<()>,
}

/// The keys of a file's architecture.
struct Metadata<'a> {
    file: &'a Gguf,
    architecture: &'static Architecture,
}

fn refused(of: &Metadata<'_>, key: &str, value: impl ToString, known: &str) -> LoadError {
    LoadError::Unsupported { field: of.key(key), value: value.to_string(), known: known.into() }
}

impl<'a> Metadata<'a> {
    fn of(file: &'a Gguf) -> Result<Metadata<'a>> {
        let name: &str = file.require("general.architecture")?;
        match ARCHITECTURES.iter().find(|architecture| architecture.name == name) {
            Some(architecture) => Ok(Metadata { file, architecture }),
            None => {
                let known = ARCHITECTURES.iter().map(|architecture| architecture.name).collect::<Vec<_>>();
                let (field, value) = ("general.architecture".into(), name.into());
                Err(LoadError::Unsupported { field, value, known: known.join(", ") })
            }
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name)
    }

    fn optional<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        Ok(self.file.get(&self.key(key))?)
    }

    fn size(&self, key: &str) -> Result<usize> {
        Ok(self.file.require::<u32>(&self.key(key))? as usize)
    }

    /// A number that must be positive.
    fn positive(&self, key: &str, default: f32) -> Result<f32> {
        let value = self.optional::<f32>(key)?.unwrap_or(default);
        let is_positive = value.is_finite() && value > 0.0;
        if is_positive { Ok(value) } else { Err(refused(self, key, value, "positive numbers")) }
    }

    fn norm(&self) -> Result<NormSpec> {
        let (key, spec): (_, fn(f32) -> NormSpec) = match self.architecture.norm {
            NormKind::Rms => ("attention.layer_norm_rms_epsilon", NormSpec::rms),
            NormKind::Layer => ("attention.layer_norm_epsilon", NormSpec::layer),
        };
        Ok(spec(self.file.require(&self.key(key))?))
    }

    fn heads(&self, hidden: usize) -> Result<Heads> {
        let query = self.size("attention.head_count")?.max(1);
        let dim = self.optional::<u32>("attention.key_length")?.map_or(hidden / query, |dim| dim as usize);
        let kv = self.optional::<u32>("attention.head_count_kv")?.map_or(query, |kv| kv as usize);
        Ok(Heads { query, kv, dim: check_head_dim(dim)? })
    }

    /// Whether some layer has a bias of one of these modules. No key tells of biases.
    fn has_bias(&self, modules: &[&str]) -> bool {
        let is_bias = |name: &str| {
            let module = name.strip_suffix(".bias").and_then(|path| path.rsplit('.').next());
            module.is_some_and(|module| modules.contains(&module))
        };
        self.file.tensors().iter().any(|info| is_bias(&info.name))
    }

    fn layer(&self, heads: Heads) -> Result<Layer> {
        let Architecture { activation, gated, rotates, .. } = *self.architecture;
        let mut attention = Attention::causal(heads);
        attention.rope = rotates.then_some((0, Pairs::Halves));
        attention.qkv_bias = self.has_bias(&["attn_q", "attn_k", "attn_v", "attn_qkv"]);
        attention.out_bias = self.has_bias(&["attn_output"]);
        let mlp = Mlp {
            width: self.size("feed_forward_length")?,
            activation,
            gated,
            bias: self.has_bias(&["ffn_gate", "ffn_up", "ffn_down"]),
        };
        let wiring = Wiring::Sequential { post_norms: false };
        Ok(Layer { norm: self.norm()?, wiring, attention, mlp })
    }

    /// Elements of a head that are rotated.
    fn rotated(&self, heads: Heads) -> Result<usize> {
        let key = "rope.dimension_count";
        let rotated = self.optional::<u32>(key)?.map_or(heads.dim, |count| count as usize);
        let is_partial = self.architecture.keys.contains(&key);
        if rotated == heads.dim
            || (is_partial && rotated <= heads.dim && rotated.is_multiple_of(2) && rotated > 0)
        {
            return Ok(rotated);
        }
        Err(refused(self, key, rotated, "the size of heads"))
    }

    fn decoder(&self) -> Result<Decoder> {
        let Architecture { names, rotates, permuted, factors, .. } = *self.architecture;
        let table = self
            .file
            .tensor("token_embd.weight")
            .ok_or_else(|| LoadError::MissingTensor("token_embd.weight".into()))?;
        let (hidden, context) = (self.size("embedding_length")?, self.size("context_length")?);
        let heads = self.heads(hidden)?;
        let layer = self.layer(heads)?;
        let rope = rotates.then(|| rope::rope(self, self.rotated(heads)?, context)).transpose()?;
        let norm = layer.norm;
        let mut decoder = Decoder {
            hidden,
            vocab: table.dims.get(1).copied().unwrap_or(0),
            max_positions: rope.as_ref().map_or(context, |rope| rope.positions),
            eos: self.file.end_tokens()?,
            embedding: Embedding { scale: 1.0, positions: None, token_types: None, norm: None },
            layers: vec![layer; self.size("block_count")?.min(MAX_LAYERS + 1)],
            norm,
            task: Task::Generate,
            head: Head::plain(self.file.tensor("output.weight").is_none()),
            ropes: rope.into_iter().collect(),
            residual_scale: 1.0,
            names: Names { stored: Stored::Gguf { permuted, factors }, ..names },
        };
        (self.architecture.page)(self, &mut decoder)?;
        decoder.check()
    }
}

impl Decoder {
    /// Reads a GGUF file's metadata.
    pub(crate) fn from_gguf(file: &Gguf) -> Result<Decoder> {
        keys::check_file(file)?;
        let metadata = Metadata::of(file)?;
        let decoder = metadata.decoder()?;
        keys::check_architecture(&metadata, &decoder)?;
        Ok(decoder)
    }
}
