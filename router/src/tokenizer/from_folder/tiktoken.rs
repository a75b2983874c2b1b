//! Byte-level BPE from ranks, as Llama 3's original tokenizer.model has them: a line for each token, with its bytes in
//! base64 and its rank.

use std::collections::HashMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, Vocab},
};

use super::{
    super::{TokenizerError, bytes, splits},
    added_tokens::AddedTokens,
    steps,
};

/// Tokens with their ranks, in the order of the file.
pub(super) type Ranks = Vec<(Vec<u8>, u32)>;

/// The ranks in a file; `None` if it is one of another kind.
pub(super) fn ranks(content: &[u8]) -> Option<Ranks> {
    let lines = std::str::from_utf8(content).ok()?.lines().filter(|line| !line.is_empty());
    let rank = |line: &str| {
        let (token, rank) = line.split_once(' ')?;
        Some((STANDARD.decode(token).ok()?, rank.trim().parse().ok()?))
    };
    lines.map(rank).collect::<Option<Ranks>>().filter(|ranks| !ranks.is_empty())
}

/// The tokenizer of these ranks. Texts are split as Llama 3's, which is what transformers takes for all such files.
pub(super) fn tokenizer(ranks: &Ranks, added: &AddedTokens) -> Result<Tokenizer, TokenizerError> {
    let letters = bytes::byte_level_letters();
    let text = |bytes: &[u8]| bytes.iter().map(|byte| letters[usize::from(*byte)]).collect::<String>();
    let vocab: Vocab = ranks.iter().map(|(token, rank)| (text(token), *rank)).collect();
    let merges = merges(ranks).into_iter().map(|(left, right)| (text(left), text(right))).collect();
    let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(true).build();
    let mut tokenizer = Tokenizer::new(model.map_err(TokenizerError::Definition)?);
    let pre_tokenizer = splits::by_regex(splits::LLAMA3, false);
    steps::put(&mut tokenizer, Value::Null, pre_tokenizer, splits::bytes_decoder())?;
    tokenizer.with_post_processor(steps::step::<tokenizers::PostProcessorWrapper>(
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true}),
    )?);
    tokenizer.add_special_tokens(&special(ranks.len(), added)?);
    Ok(tokenizer)
}

/// Every way to make a token of two others, tokens of low rank first.
fn merges(ranks: &Ranks) -> Vec<(&[u8], &[u8])> {
    let known: HashMap<&[u8], u32> = ranks.iter().map(|(token, rank)| (&**token, *rank)).collect();
    let mut merges: Vec<_> = ranks
        .iter()
        .flat_map(|(token, rank)| (1..token.len()).map(move |at| (*rank, token.split_at(at))))
        .filter_map(|(rank, (left, right))| {
            Some(((rank, *known.get(left)?, *known.get(right)?), (left, right)))
        })
        .collect();
    merges.sort_by_key(|(order, _)| *order);
    merges.into_iter().map(|(_, pair)| pair).collect()
}

/// Most ids behind the ranks up to the last one that the files list. Llama 3 has 256.
const MAX_LISTED: u32 = 1 << 16;

/// The special tokens behind the ranks: those that the files list by id, with placeholders in between, then the others.
fn special(size: usize, added: &AddedTokens) -> Result<Vec<AddedToken>, TokenizerError> {
    let texts = added.by_id();
    let size = u32::try_from(size).unwrap_or(u32::MAX);
    let end =
        texts.keys().next_back().filter(|last| **last >= size).map_or(size, |last| last.saturating_add(1));
    if end - size > MAX_LISTED {
        let problem = format!("the added token {} is too far behind {size} ranks", end - 1);
        return Err(TokenizerError::Definition(problem.into()));
    }
    let placeholder = |id: u32| format!("<|reserved_token_{id}|>");
    let listed =
        (size..end).map(|id| texts.get(&id).map_or_else(|| placeholder(id), |token| token.content.clone()));
    let more = added.extra().iter().map(|token| token.content.clone());
    Ok(listed.chain(more).map(|text| AddedToken::from(text, true)).collect())
}
