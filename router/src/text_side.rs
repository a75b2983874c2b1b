//! What stands between texts and tokens: the model's tokenizer and chat templates, or those of an adapter that was saved
//! beside its own ([decision 31](../../docs/decisions/0031-adapters-bring-their-templates-and-tokens.md)).

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use exchange::{Content, Fault};
use lru::LruCache;
use tokio::sync::OnceCell;

use crate::{
    chat::ChatTemplates,
    tokenizer::{AdapterTokenizer, ModelTokenizer, Reference, TextError, TextFiles},
};

/// Estimated memory of all that is kept for adapters.
const MAX_BYTES: usize = 256 << 20;
/// The same of one without its tokens and templates, of a token, and of a byte of a template.
const BYTES: usize = 64 << 10;
const BYTES_PER_TOKEN: usize = 512;
const BYTES_PER_BYTE: usize = 16;
/// Contents of which it is remembered what they have.
const CONTENTS: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not zero");

/// A tokenizer with its chat templates.
pub(crate) struct TextSide {
    pub(crate) tokenizer: Arc<ModelTokenizer>,
    pub(crate) chat: ChatTemplates,
    /// A tokenizer with the same tokens, which is the model's own if that has the same ones.
    pub(crate) words: Arc<ModelTokenizer>,
    /// Whether the templates are an adapter's own.
    pub(crate) has_templates: bool,
    /// Tokens that the model has not, or has by another name.
    pub(crate) new_tokens: usize,
    /// The files that it was read from.
    digest: Option<blake3::Hash>,
    /// Estimated memory.
    bytes: usize,
}

impl TextSide {
    /// The model's own.
    pub(crate) fn new(tokenizer: Arc<ModelTokenizer>) -> TextSide {
        let chat = ChatTemplates::new(&tokenizer);
        let words = tokenizer.clone();
        TextSide { tokenizer, chat, words, has_templates: false, new_tokens: 0, digest: None, bytes: 0 }
    }

    fn of_adapter(read: AdapterTokenizer, base: &TextSide, digest: blake3::Hash) -> TextSide {
        let AdapterTokenizer { tokenizer, new_tokens, has_models_tokens, has_templates, template_bytes } =
            read;
        let added = tokenizer.tokenizer.get_added_vocabulary().len();
        let bytes = BYTES + added * BYTES_PER_TOKEN + template_bytes * BYTES_PER_BYTE;
        let words = if has_models_tokens { base.words.clone() } else { tokenizer.clone() };
        let side = TextSide::new(tokenizer);
        TextSide { words, new_tokens, has_templates, digest: Some(digest), bytes, ..side }
    }

    /// Returns whether the same files say how texts become tokens.
    pub(crate) fn is_same(&self, other: &TextSide) -> bool {
        self.digest == other.digest
    }
}

/// An adapter's text side, or what is wrong with its files.
pub(crate) type Read = Result<Arc<TextSide>, TextError>;
/// Whoever asks first fills it in, and the others wait for that.
type Entry = Arc<OnceCell<Read>>;

/// The text sides of the model and of adapters.
pub(crate) struct TextSides {
    base: Arc<TextSide>,
    reference: Reference,
    kept: Mutex<Kept>,
}

struct Kept {
    by_content: LruCache<Content, Entry>,
    /// Adapters whose files are the same share one.
    by_digest: HashMap<blake3::Hash, Weak<TextSide>>,
}

impl TextSides {
    /// Those of adapters of the model at a path, whose own text side this is.
    pub(crate) fn new(base: Arc<TextSide>, model: &Path) -> TextSides {
        let reference = Reference::new(base.tokenizer.clone(), model);
        let kept = Kept { by_content: LruCache::new(CONTENTS), by_digest: HashMap::new() };
        TextSides { base, reference, kept: Mutex::new(kept) }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model's own.
    pub(crate) fn base(&self) -> &Arc<TextSide> {
        &self.base
    }

    /// That of an adapter, if its files have been read.
    pub(crate) fn known(&self, content: Content) -> Option<Read> {
        self.lock().by_content.peek(&content)?.get().cloned()
    }

    /// That of an adapter, which is asked for only once, however many wait for it.
    pub(crate) async fn get(
        &self,
        content: Content,
        read: impl AsyncFnOnce() -> Result<Read, Fault>,
    ) -> Result<Read, Fault> {
        let entry = self.lock().by_content.get_or_insert(content, Entry::default).clone();
        if let Some(read) = entry.get() {
            return Ok(read.clone());
        }
        let read = entry.get_or_try_init(|| read()).await.cloned();
        self.tidy();
        read
    }

    /// Makes that of an adapter of its files. Takes as long as it takes to read them.
    pub(crate) fn read(&self, files: &TextFiles) -> Read {
        if files.is_empty() {
            return Ok(self.base.clone());
        }
        let digest = digest(files);
        let shared = self.lock().by_digest.get(&digest).and_then(Weak::upgrade);
        if let Some(shared) = shared {
            return Ok(shared);
        }
        let read = self.reference.read(files)?;
        if Arc::ptr_eq(&read.tokenizer, &self.base.tokenizer) {
            return Ok(self.base.clone());
        }
        let side = Arc::new(TextSide::of_adapter(read, &self.base, digest));
        for (name, error) in side.chat.broken() {
            tracing::warn!("chats of an adapter that need its template {name:?} will be refused: {error}");
        }
        self.lock().by_digest.insert(digest, Arc::downgrade(&side));
        Ok(side)
    }

    /// Forgets those that were used longest ago while all take too much memory.
    fn tidy(&self) {
        let mut kept = self.lock();
        let kept = &mut *kept;
        let mut counted = HashSet::new();
        let mut total = 0;
        let mut surplus = None;
        for (place, (_, entry)) in kept.by_content.iter().enumerate() {
            let Some(Ok(side)) = entry.get() else { continue };
            if counted.insert(side.digest) {
                total += side.bytes;
            }
            if total > MAX_BYTES {
                surplus = Some(place.max(1));
                break;
            }
        }
        while surplus.is_some_and(|most| kept.by_content.len() > most) {
            kept.by_content.pop_lru();
        }
        kept.by_digest.retain(|_, side| side.strong_count() > 0);
    }
}

fn digest(files: &TextFiles) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for (name, content) in files {
        for part in [name.as_bytes(), content] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
    }
    hasher.finalize()
}
