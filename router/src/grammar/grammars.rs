//! Compiled grammars, kept by content.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use llguidance::TokenParser;
use lru::LruCache;
use tokio::sync::OnceCell;

use super::{
    Grammar, GrammarError,
    compile::{self, compile},
    vocabulary::Vocabulary,
};
use crate::{
    principal::Principal,
    tokenizer::ModelTokenizer,
    workers::{WorkError, Workers},
};

/// Estimated memory of all grammars that are kept.
const MAX_BYTES: usize = 256 << 20;
/// Vocabularies that are kept: those of the model and of adapters with tokens of their own, of a few MB each.
const MAX_VOCABULARIES: usize = 16;
/// Estimated memory of the rules of a grammar, for each byte of its text.
const BYTES_PER_BYTE: usize = 64;

/// A grammar that masks can be computed from.
pub(crate) struct CompiledGrammar {
    /// Differs from that of any other.
    pub(super) id: u64,
    pub(super) vocabulary: Arc<Vocabulary>,
    /// Only ever copied: what a copy learns while it is used takes memory, which is freed with it.
    pub(super) parser: Mutex<TokenParser>,
    bytes: usize,
}

impl fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CompiledGrammar({})", self.id)
    }
}

/// The reason that there is no compiled grammar.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum CompileError {
    /// The grammar is at fault.
    #[error("{0}")]
    Grammar(#[from] GrammarError),
    /// No thread could compile it.
    #[error("{0}")]
    Work(#[from] WorkError),
}

/// The tokens that masks are for: as many as the model has rows for, some of which end a text.
#[derive(Clone)]
pub(crate) struct Words {
    tokenizer: Arc<ModelTokenizer>,
    size: u32,
    end_ids: Arc<[u32]>,
}

impl Words {
    pub(crate) fn new(tokenizer: &Arc<ModelTokenizer>, size: u32, end_ids: Arc<[u32]>) -> Words {
        Words { tokenizer: tokenizer.clone(), size, end_ids }
    }

    pub(crate) fn into_end_ids(self) -> Arc<[u32]> {
        self.end_ids
    }
}

impl PartialEq for Words {
    fn eq(&self, other: &Words) -> bool {
        let is_same = Arc::ptr_eq(&self.tokenizer, &other.tokenizer);
        is_same && (self.size, &self.end_ids) == (other.size, &other.end_ids)
    }
}

/// A grammar's text, and the number of the vocabulary that it is compiled for.
type Key = (blake3::Hash, u64);
/// Whoever asks first fills it in, and the others wait for that.
type Entry = Arc<OnceCell<Arc<CompiledGrammar>>>;

/// Compiles grammars for the vocabularies of the model and of adapters that add tokens to it.
pub(crate) struct Grammars {
    workers: Arc<Workers>,
    kept: Mutex<Kept>,
    ids: AtomicU64,
}

/// A vocabulary with the number of its grammars' keys.
#[derive(Clone)]
struct Numbered {
    words: Words,
    number: u64,
    vocabulary: Arc<OnceCell<Arc<Vocabulary>>>,
}

struct Kept {
    /// The ones used last, the last one first.
    vocabularies: Vec<Numbered>,
    grammars: LruCache<Key, Entry>,
}

impl Grammars {
    pub(crate) fn new(workers: Arc<Workers>) -> Grammars {
        let kept = Kept { vocabularies: Vec::new(), grammars: LruCache::unbounded() };
        Grammars { workers, kept: Mutex::new(kept), ids: AtomicU64::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compiles a grammar for these tokens, unless it is there already.
    pub(crate) async fn compiled(
        &self,
        principal: &Principal,
        grammar: &Grammar,
        words: &Words,
    ) -> Result<Arc<CompiledGrammar>, CompileError> {
        let text = compile::text(&grammar.source)?;
        let (number, vocabulary) = self.vocabulary(principal, words).await?;
        let key = (blake3::hash(&text), number);
        let entry = self.lock().grammars.get_or_insert(key, Entry::default).clone();
        if let Some(compiled) = entry.get() {
            return Ok(compiled.clone());
        }
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let compiled = entry.get_or_try_init(async || {
            let source = grammar.source.clone();
            let work = move || {
                let parser = compile(&source, &vocabulary)?;
                let bytes = parser.parser.lexer_stats().num_bytes + text.len() * BYTES_PER_BYTE;
                Ok::<_, GrammarError>(CompiledGrammar { id, vocabulary, parser: Mutex::new(parser), bytes })
            };
            let compiled = self.workers.run("compiling a grammar", principal, work).await?;
            Ok::<_, CompileError>(Arc::new(compiled?))
        });
        let compiled = compiled.await.cloned();
        self.tidy(&key);
        compiled
    }

    /// Builds the vocabulary before the first grammar needs it.
    pub(crate) async fn vocabulary(
        &self,
        principal: &Principal,
        words: &Words,
    ) -> Result<(u64, Arc<Vocabulary>), CompileError> {
        let Numbered { number, vocabulary, .. } = self.numbered(words);
        let built = vocabulary.get_or_try_init(async || {
            let words = words.clone();
            let work = move || Vocabulary::new(&words.tokenizer, words.size, &words.end_ids);
            let built = self.workers.run("reading the vocabulary", principal, work).await?;
            Ok::<_, CompileError>(Arc::new(built?))
        });
        Ok((number, built.await?.clone()))
    }

    /// The vocabulary of these tokens. If there are too many, the one that was used longest ago gives way, and grammars
    /// that were compiled for it are never asked for again.
    fn numbered(&self, words: &Words) -> Numbered {
        let kept = &mut self.lock().vocabularies;
        let place = kept.iter().position(|known| known.words == *words);
        let found = place.map(|place| kept.remove(place));
        let found = found.unwrap_or_else(|| Numbered {
            words: words.clone(),
            number: self.ids.fetch_add(1, Ordering::Relaxed),
            vocabulary: Arc::default(),
        });
        kept.insert(0, found.clone());
        kept.truncate(MAX_VOCABULARIES);
        found
    }

    /// Forgets an entry that could not be compiled, and those that were used longest ago while all take too much memory.
    fn tidy(&self, key: &Key) {
        let mut kept = self.lock();
        let failed = kept.grammars.peek(key).is_some_and(|entry| entry.get().is_none());
        if failed && kept.grammars.peek(key).is_some_and(|entry| Arc::strong_count(entry) <= 2) {
            kept.grammars.pop(key);
        }
        let size = |entry: &Entry| entry.get().map_or(0, |compiled| compiled.bytes);
        let mut total: usize = kept.grammars.iter().map(|(_, entry)| size(entry)).sum();
        while total > MAX_BYTES
            && kept.grammars.len() > 1
            && let Some((_, entry)) = kept.grammars.pop_lru()
        {
            total -= size(&entry);
        }
    }
}
