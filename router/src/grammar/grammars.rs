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

/// The tokens of the model that masks are for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct VocabularyKey {
    size: u32,
    end_ids: Arc<[u32]>,
}

type Key = blake3::Hash;
/// Whoever asks first fills it in, and the others wait for that.
type Entry = Arc<OnceCell<Arc<CompiledGrammar>>>;

/// Compiles grammars for the model's vocabulary.
pub(crate) struct Grammars {
    tokenizer: Arc<ModelTokenizer>,
    workers: Arc<Workers>,
    kept: Mutex<Kept>,
    ids: AtomicU64,
}

struct Kept {
    vocabulary: Option<(VocabularyKey, Arc<OnceCell<Arc<Vocabulary>>>)>,
    grammars: LruCache<Key, Entry>,
}

impl Grammars {
    pub(crate) fn new(tokenizer: Arc<ModelTokenizer>, workers: Arc<Workers>) -> Grammars {
        let kept = Kept { vocabulary: None, grammars: LruCache::unbounded() };
        Grammars { tokenizer, workers, kept: Mutex::new(kept), ids: AtomicU64::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compiles a grammar for a model with so many tokens, of which some end a text, unless it is there already.
    pub(crate) async fn compiled(
        &self,
        principal: &Principal,
        grammar: &Grammar,
        size: u32,
        end_ids: &Arc<[u32]>,
    ) -> Result<Arc<CompiledGrammar>, CompileError> {
        let text = compile::text(&grammar.source)?;
        let vocabulary = self.vocabulary(principal, size, end_ids).await?;
        let key = blake3::hash(&text);
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
        size: u32,
        end_ids: &Arc<[u32]>,
    ) -> Result<Arc<Vocabulary>, CompileError> {
        let key = VocabularyKey { size, end_ids: end_ids.clone() };
        let cell = {
            let mut kept = self.lock();
            if kept.vocabulary.as_ref().is_none_or(|(present, _)| *present != key) {
                // Grammars of another model, which may have been replaced while its shards were restarted.
                kept.grammars.clear();
                kept.vocabulary = Some((key.clone(), Arc::default()));
            }
            kept.vocabulary.as_ref().map(|(_, cell)| cell.clone()).unwrap_or_default()
        };
        let vocabulary = cell.get_or_try_init(async || {
            let tokenizer = self.tokenizer.clone();
            let work = move || Vocabulary::new(&tokenizer, key.size, &key.end_ids);
            let vocabulary = self.workers.run("reading the vocabulary", principal, work).await?;
            Ok::<_, CompileError>(Arc::new(vocabulary?))
        });
        vocabulary.await.cloned()
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
