//! Tokenizers from a sentencepiece model.
//!
//! The messages are those of sentencepiece_model.proto in <https://github.com/google/sentencepiece>, without the fields
//! that have no say in the tokens of a text.

use std::{cmp::Ordering, collections::HashMap, path::Path};

use prost::Message;
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, ModelWrapper, Tokenizer,
    models::{
        bpe::{BPE, Merges, Vocab},
        unigram::Unigram,
    },
};

use super::{
    super::TokenizerError,
    added_tokens::AddedTokens,
    charsmap,
    steps::{self, SPACE},
};

#[derive(Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    r#type: Option<i32>,
}

/// `type` of a piece that the text is made of.
const NORMAL: i32 = 1;
/// `type` of a piece that no text has, such as `<s>`.
const CONTROL: i32 = 3;
/// `type` of a piece that is always taken whole.
const USER_DEFINED: i32 = 4;

#[derive(Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40", default = "0")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41", default = "1")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    eos_id: Option<i32>,
    #[prost(string, optional, tag = "45", default = "<unk>")]
    unk_piece: Option<String>,
    #[prost(string, optional, tag = "46", default = "<s>")]
    bos_piece: Option<String>,
    #[prost(string, optional, tag = "47", default = "</s>")]
    eos_piece: Option<String>,
}

/// `model_type` of the two kinds of models that are served.
const UNIGRAM: i32 = 1;
const MERGES: i32 = 2;

#[derive(Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// A sentencepiece model that a tokenizer can be built from.
pub(super) struct Model {
    pieces: Vec<Piece>,
    trainer: TrainerSpec,
    normalizer: NormalizerSpec,
}

impl Model {
    /// Reads a model's file, and refuses kinds of models that the tokenizers library does not have.
    pub(super) fn read(content: &[u8], path: &Path) -> Result<Model, TokenizerError> {
        let proto = ModelProto::decode(content)
            .map_err(|source| TokenizerError::File { path: path.into(), source: source.into() })?;
        let trainer = proto.trainer_spec.unwrap_or_default();
        let refuse = |field: &'static str, value: String| {
            Err(TokenizerError::Sentencepiece { path: path.into(), field, value })
        };
        if proto.pieces.is_empty() {
            return refuse("pieces", "[]".into());
        }
        if !matches!(trainer.model_type(), UNIGRAM | MERGES) {
            return refuse("model_type", trainer.model_type().to_string());
        }
        if trainer.treat_whitespace_as_suffix() {
            return refuse("treat_whitespace_as_suffix", "true".into());
        }
        let normalizer = proto.normalizer_spec.unwrap_or_default();
        let map = normalizer.precompiled_charsmap();
        if !(map.is_empty() || charsmap::growth(map).is_some()) {
            return Err(TokenizerError::Charsmap { path: path.into() });
        }
        Ok(Model { pieces: proto.pieces, trainer, normalizer })
    }

    pub(super) fn is_unigram(&self) -> bool {
        self.trainer.model_type() == UNIGRAM
    }

    /// Control and user-defined pieces: the library finds them in a text before it splits the rest.
    pub(super) fn added_tokens(&self) -> Vec<AddedToken> {
        let added = self.pieces.iter().filter(|piece| matches!(piece.r#type(), CONTROL | USER_DEFINED));
        added
            .map(|piece| AddedToken::from(piece.piece(), piece.r#type() == CONTROL).normalized(false))
            .collect()
    }

    /// The merges as classes of transformers derive them: every split of a piece into two is one, and the pieces come
    /// in the order of their ids.
    pub(super) fn merged_in_order(&self) -> Result<BPE, TokenizerError> {
        let vocab: Vocab = self.numbered().map(|(id, piece)| (piece.piece().to_owned(), id)).collect();
        let splits = self.numbered().flat_map(|(_, piece)| splits(piece.piece()));
        let known = splits.filter(|(left, right)| vocab.contains_key(*left) && vocab.contains_key(*right));
        let merges = known.map(|(left, right)| (left.to_owned(), right.to_owned())).collect();
        BPE::builder().vocab_and_merges(vocab, merges).build().map_err(TokenizerError::Definition)
    }

    /// The tokenizer that the model's own settings describe. `legacy` puts a space in front of the text behind each
    /// added token, as sentencepiece does in front of a text.
    pub(super) fn tokenizer(
        &self,
        legacy: bool,
        added: &mut AddedTokens,
    ) -> Result<Tokenizer, TokenizerError> {
        let names = self.names(added);
        let kinds = self.pieces.iter().map(Piece::r#type).zip(&names);
        let whole: Vec<&str> =
            kinds.filter(|(kind, _)| *kind == USER_DEFINED).map(|(_, name)| &**name).collect();
        let model = if self.is_unigram() {
            self.unigram()?
        } else {
            self.merged_by_score(&names, !whole.is_empty())?
        };
        let mut tokenizer = Tokenizer::new(model);
        let pre_tokenizer = self.pre_tokenizer(legacy, &whole);
        steps::put(&mut tokenizer, Value::Null, pre_tokenizer, self.decoder())?;
        tokenizer.with_normalizer(self.normalizer(legacy)?);
        self.name_ends(added);
        let is_whole = |token: &AddedToken| whole.contains(&&*token.content);
        added.add_extra(self.added_tokens().into_iter().filter(|token| !is_whole(token)).collect());
        if self.normalizer.add_dummy_prefix() {
            added.find_in_raw_text();
        }
        Ok(tokenizer)
    }

    fn numbered(&self) -> impl Iterator<Item = (u32, &Piece)> {
        (0..).zip(&self.pieces)
    }

    /// The texts of the pieces. A configuration may give an id that is reserved in the model another text.
    fn names(&self, added: &AddedTokens) -> Vec<String> {
        let given = if self.is_unigram() { &Default::default() } else { added.by_id() };
        let kept: Vec<&str> = self
            .numbered()
            .filter(|(id, _)| !given.contains_key(id))
            .map(|(_, piece)| piece.piece())
            .collect();
        let kept: std::collections::HashSet<&str> = kept.into_iter().collect();
        let name = |(id, piece): (u32, &Piece)| {
            let given = given.get(&id).map(|token| &*token.content).filter(|name| !kept.contains(name));
            given.unwrap_or(piece.piece()).to_owned()
        };
        self.numbered().map(name).collect()
    }

    fn unigram(&self) -> Result<ModelWrapper, TokenizerError> {
        let vocab =
            self.pieces.iter().map(|piece| (piece.piece().to_owned(), f64::from(piece.score()))).collect();
        let unknown = usize::try_from(self.trainer.unk_id()).ok();
        let model = Unigram::from(vocab, unknown, self.trainer.byte_fallback());
        Ok(model.map_err(TokenizerError::Definition)?.into())
    }

    /// Merges of normal pieces into such, the piece with the highest score first.
    fn merged_by_score(&self, names: &[String], has_whole: bool) -> Result<ModelWrapper, TokenizerError> {
        let normal: HashMap<&str, (f32, u32)> = self
            .numbered()
            .zip(names)
            .filter(|((_, piece), _)| piece.r#type() == NORMAL)
            .map(|((id, piece), name)| (&**name, (piece.score(), id)))
            .collect();
        let mut ranked: Vec<_> = normal
            .iter()
            .flat_map(|(piece, rank)| splits(piece).map(move |pair| (*rank, pair)))
            .filter(|(_, (left, right))| normal.contains_key(left) && normal.contains_key(right))
            .collect();
        ranked.sort_by(|((score, id), pair), ((other_score, other_id), other_pair)| {
            let by_score = other_score.partial_cmp(score).unwrap_or(Ordering::Equal);
            by_score.then_with(|| (id, pair).cmp(&(other_id, other_pair)))
        });
        let merges: Merges = ranked.into_iter().map(|(_, (l, r))| (l.to_owned(), r.to_owned())).collect();
        let vocab: Vocab = names.iter().cloned().zip(0..).collect();
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .unk_token(self.trainer.unk_piece().to_owned())
            .fuse_unk(true)
            .byte_fallback(self.trainer.byte_fallback())
            .ignore_merges(has_whole)
            .build();
        Ok(model.map_err(TokenizerError::Definition)?.into())
    }

    /// The steps of sentencepiece in its order.
    fn normalizer(&self, legacy: bool) -> Result<Option<tokenizers::NormalizerWrapper>, TokenizerError> {
        use tokenizers::normalizers::{Precompiled, Sequence};
        let spec = &self.normalizer;
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let mut rules = Vec::new();
        if spec.remove_extra_whitespaces() {
            rules.push(replace(json!({"Regex": r"\A +| +\z"}), ""));
            rules.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if spec.escape_whitespaces() {
            rules.push(replace(json!({"String": " "}), SPACE));
        }
        if spec.add_dummy_prefix() && legacy {
            // The pre-tokenizer puts no space before one that the text begins with, sentencepiece does.
            rules.push(replace(json!({"Regex": format!(r"\A{SPACE}")}), &SPACE.repeat(2)));
        }
        let mut normalizers: Vec<tokenizers::NormalizerWrapper> = Vec::new();
        if !spec.precompiled_charsmap().is_empty() {
            let map = Precompiled::from(spec.precompiled_charsmap());
            normalizers.push(map.map_err(|error| TokenizerError::Definition(Box::new(error)))?.into());
        }
        for rule in rules {
            normalizers.extend(steps::step::<tokenizers::NormalizerWrapper>(rule)?);
        }
        Ok(Some(Sequence::new(normalizers).into()))
    }

    fn pre_tokenizer(&self, legacy: bool, whole: &[&str]) -> Value {
        let mut steps = Vec::new();
        if self.normalizer.add_dummy_prefix() {
            steps.push(steps::metaspace(Some(if legacy { "always" } else { "first" })));
        }
        if !whole.is_empty() {
            let mut longest_first = whole.to_vec();
            longest_first.sort_by_key(|piece| std::cmp::Reverse(piece.chars().count()));
            let pattern: Vec<_> = longest_first.into_iter().map(fancy_regex::escape).collect();
            steps.push(json!({
                "type": "Split", "pattern": {"Regex": pattern.join("|")}, "behavior": "Isolated", "invert": false,
            }));
        }
        if steps.is_empty() { Value::Null } else { json!({"type": "Sequence", "pretokenizers": steps}) }
    }

    fn decoder(&self) -> Value {
        let mut decoders = vec![json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})];
        let (prefix, bytes) = (self.normalizer.add_dummy_prefix(), self.trainer.byte_fallback());
        if bytes {
            decoders.push(json!({"type": "ByteFallback"}));
        }
        if prefix || bytes {
            decoders.push(json!({"type": "Fuse"}));
        }
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": decoders})
    }

    /// Names the tokens around a text, and the one for what is unknown, unless a file does.
    fn name_ends(&self, added: &mut AddedTokens) {
        let trainer = &self.trainer;
        for (name, id, piece) in [
            ("bos_token", trainer.bos_id(), trainer.bos_piece()),
            ("eos_token", trainer.eos_id(), trainer.eos_piece()),
            ("unk_token", trainer.unk_id(), trainer.unk_piece()),
        ] {
            if id >= 0 {
                added.name_by_default(name, piece);
            }
        }
    }
}

/// Every way to cut a piece into two, the shortest first part first.
fn splits(piece: &str) -> impl Iterator<Item = (&str, &str)> {
    piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at))
}
