//! The model's vocabulary as llguidance needs it: the bytes of each token, and the tokens that end a text.

use std::{collections::BTreeMap, sync::Arc};

use llguidance::{
    ParserFactory,
    api::ParserLimits,
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};

use super::compile::GrammarError;
use crate::tokenizer::ModelTokenizer;

/// States of a lexer: about 2 KB each.
const MAX_LEXER_STATES: usize = 50_000;

/// The tokens of a model, and the factory of parsers for grammars over them.
pub(crate) struct Vocabulary {
    pub(super) factory: ParserFactory,
    /// Special tokens by their texts.
    special: BTreeMap<String, u32>,
    /// Tokens that end a text.
    pub(super) end_ids: Arc<[u32]>,
    size: usize,
}

impl Vocabulary {
    /// A vocabulary with as many entries as the model has rows for. Takes about a microsecond for each token.
    pub(super) fn new(
        tokenizer: &ModelTokenizer,
        size: u32,
        end_ids: &[u32],
    ) -> Result<Vocabulary, GrammarError> {
        let mut special = BTreeMap::new();
        let bytes = |id: u32| {
            let mut bytes = tokenizer.token_bytes(id);
            if tokenizer.is_special(id) {
                special.insert(String::from_utf8_lossy(&bytes).into_owned(), id);
                bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
            bytes
        };
        let words: Vec<_> = (0..size).map(bytes).collect();
        special.remove("");
        let end_ids: Vec<_> = end_ids.iter().copied().filter(|id| *id < size).collect();
        let first = *end_ids.first().ok_or(GrammarError::NoEnd)?;
        let trie = TokTrie::from(&TokRxInfo::new(size, first), &words).with_eos_tokens(&end_ids);
        // Text that a grammar forces is tokenized as the model likes it, not as a tokenizer would.
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::Vocabulary(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: MAX_LEXER_STATES,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Vocabulary { factory, special, end_ids: end_ids.into(), size: size as usize })
    }

    /// Bytes of a mask.
    pub(super) fn mask_bytes(&self) -> usize {
        self.size.div_ceil(8)
    }

    /// The special token of this text.
    pub(super) fn special_token(&self, text: &str) -> Option<u32> {
        self.special.get(text).copied()
    }

    /// Splits a text at the special tokens in it. Of two that begin at the same place the longer one is taken.
    pub(super) fn split_special<'a>(&self, mut text: &'a str) -> Vec<(&'a str, Option<u32>)> {
        let mut parts = Vec::new();
        while !text.is_empty() {
            let found = self.special.iter().filter_map(|(token, id)| Some((text.find(token)?, token, id)));
            let next = found.min_by_key(|(at, token, _)| (*at, usize::MAX - token.len()));
            let Some((at, token, id)) = next else {
                parts.push((text, None));
                break;
            };
            let (before, rest) = text.split_at(at);
            if !before.is_empty() {
                parts.push((before, None));
            }
            let (token, rest) = rest.split_at(token.len());
            parts.push((token, Some(*id)));
            text = rest;
        }
        parts
    }
}
