//! The states of sequences in their grammars, as one thread keeps them.

use std::{collections::HashMap, sync::PoisonError};

use llguidance::{Matcher, TokenParser, toktrie::SimpleVob};
use lru::LruCache;
use scheduler::RequestId;

use super::mask_workers::{Begin, MaskError};

/// Memory of all lexers that are kept for sequences to come.
const MAX_LEXER_BYTES: usize = 64 << 20;
/// Memory of one lexer that is kept. It grows with the states that it has met, up to a limit at which it fails.
const MAX_KEPT_LEXER: usize = 16 << 20;

/// Sequences and grammars of one thread. Sequences with the same grammar share a lexer, which learns its states as they
/// are met. Only this thread uses it, so that nobody waits for its lock.
#[derive(Default)]
pub(super) struct Matchers {
    sequences: HashMap<RequestId, Sequence>,
    parsers: Parsers,
}

/// Parsers at the beginning of their grammars, by the grammar's id, with the size of their lexers when they were used last.
struct Parsers(LruCache<u64, (TokenParser, usize)>);

impl Default for Parsers {
    fn default() -> Parsers {
        Parsers(LruCache::unbounded())
    }
}

struct Sequence {
    matcher: Matcher,
    begin: Begin,
    /// Tokens that it has.
    tokens: u32,
}

impl Matchers {
    pub(super) fn begin(&mut self, id: RequestId, begin: Begin) {
        let matcher = Matcher::new(Ok(self.parsers.get(&begin)));
        self.sequences.insert(id, Sequence { matcher, begin, tokens: 0 });
    }

    /// Moves a sequence on by some tokens, and returns the mask of the one behind them.
    pub(super) fn mask(&mut self, id: RequestId, tokens: &[u32]) -> Result<Vec<u8>, MaskError> {
        let sequence = self.sequences.get_mut(&id).ok_or(MaskError::Ended)?;
        let mask = sequence.mask(tokens);
        if mask.is_err() {
            // The lexer may have an error that all sequences would meet which begin with it.
            self.parsers.0.pop(&sequence.begin.grammar.id);
        }
        mask
    }

    pub(super) fn end(&mut self, id: RequestId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.parsers.used(sequence.begin.grammar.id);
        }
    }
}

impl Sequence {
    fn mask(&mut self, tokens: &[u32]) -> Result<Vec<u8>, MaskError> {
        let failed = |error: anyhow::Error| MaskError::Grammar(error.to_string());
        self.matcher.consume_tokens(tokens).map_err(failed)?;
        self.tokens += tokens.len() as u32;
        let mut mask = self.matcher.compute_mask_or_eos().map_err(failed)?;
        if self.tokens < self.begin.min_tokens {
            self.leave_out_ends(&mut mask);
        }
        self.check_bans(&mask)?;
        let mut bytes = vec![0; self.begin.grammar.vocabulary.mask_bytes()];
        mask.write_to(&mut bytes);
        Ok(bytes)
    }

    /// Takes the tokens that end a text out of a mask, unless nothing else is left.
    fn leave_out_ends(&self, mask: &mut SimpleVob) {
        let mut rest = mask.clone();
        self.begin.grammar.vocabulary.end_ids.iter().for_each(|id| rest.disallow_token(*id));
        if !rest.is_zero() {
            *mask = rest;
        }
    }

    fn check_bans(&self, mask: &SimpleVob) -> Result<(), MaskError> {
        if self.begin.bans.is_empty() {
            return Ok(());
        }
        let (mut rest, size) = (mask.clone(), mask.len());
        let banned = self.begin.bans.iter().filter(|ban| self.tokens < ban.until);
        banned.filter(|ban| (ban.token as usize) < size).for_each(|ban| rest.disallow_token(ban.token));
        if rest.is_zero() { Err(MaskError::Banned) } else { Ok(()) }
    }
}

impl Parsers {
    fn get(&mut self, begin: &Begin) -> TokenParser {
        let copy = || {
            let parser = begin.grammar.parser.lock().unwrap_or_else(PoisonError::into_inner);
            (parser.deep_clone(), 0)
        };
        self.0.get_or_insert(begin.grammar.id, copy).0.clone()
    }

    /// Notes what a parser takes, and forgets those that take too much.
    fn used(&mut self, id: u64) {
        let Some((parser, bytes)) = self.0.peek_mut(&id) else { return };
        *bytes = parser.parser.lexer_stats().num_bytes;
        if *bytes > MAX_KEPT_LEXER {
            self.0.pop(&id);
        }
        let mut total: usize = self.0.iter().map(|(_, (_, bytes))| bytes).sum();
        while total > MAX_LEXER_BYTES
            && let Some((_, (_, bytes))) = self.0.pop_lru()
        {
            total -= bytes;
        }
    }
}
