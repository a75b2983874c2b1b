//! A tokenizer whose vocabulary several share: the model's own, and those of adapters that add tokens to it.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use tokenizers::{
    AddedToken, AddedVocabulary, DecoderWrapper, Model, ModelWrapper, NormalizerWrapper,
    PostProcessorWrapper, PreTokenizerWrapper, Result, Token, Tokenizer, TokenizerBuilder, TokenizerImpl,
    models::TrainerWrapper,
};

/// The library's tokenizer over a shared vocabulary.
pub type SharedTokenizer = TokenizerImpl<
    SharedVocabulary,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// A vocabulary, some entries of which have other texts or are beyond its end. The library gives an added token the id
/// that the vocabulary says, so that these have the ids that files give them.
#[derive(Clone)]
pub struct SharedVocabulary {
    entries: Arc<ModelWrapper>,
    changed: BTreeMap<u32, String>,
    ids: HashMap<String, u32>,
}

impl SharedVocabulary {
    /// Whether words are merged of pairs.
    pub(super) fn is_bpe(&self) -> bool {
        matches!(*self.entries, ModelWrapper::BPE(_))
    }
}

impl Model for SharedVocabulary {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        self.entries.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        let own = self.ids.get(token).copied();
        own.or_else(|| self.entries.token_to_id(token).filter(|id| !self.changed.contains_key(id)))
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.changed.get(&id).cloned().or_else(|| self.entries.id_to_token(id))
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        let mut vocab = self.entries.get_vocab();
        vocab.retain(|_, id| !self.changed.contains_key(id));
        vocab.extend(self.ids.iter().map(|(text, id)| (text.clone(), *id)));
        vocab
    }

    fn get_vocab_size(&self) -> usize {
        let size = self.entries.get_vocab_size();
        size + self.changed.keys().filter(|id| self.entries.id_to_token(**id).is_none()).count()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        self.entries.save(folder, prefix)
    }

    fn get_trainer(&self) -> TrainerWrapper {
        self.entries.get_trainer()
    }
}

/// The same tokenizer, whose vocabulary can be shared.
pub(super) fn share(tokenizer: &Tokenizer) -> Result<SharedTokenizer> {
    let vocabulary = SharedVocabulary {
        entries: Arc::new(tokenizer.get_model().clone()),
        changed: BTreeMap::new(),
        ids: HashMap::new(),
    };
    TokenizerBuilder::new()
        .with_model(vocabulary)
        .with_normalizer(tokenizer.get_normalizer().cloned())
        .with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned())
        .with_post_processor(tokenizer.get_post_processor().cloned())
        .with_decoder(tokenizer.get_decoder().cloned())
        .with_added_vocabulary(tokenizer.get_added_vocabulary().clone())
        .build()
}

/// A tokenizer with the same steps over the same vocabulary, but with these added tokens in place of its own.
pub(super) fn with_added(
    base: &SharedTokenizer,
    tokens: &BTreeMap<u32, AddedToken>,
) -> Result<SharedTokenizer> {
    let entries = &base.get_model().entries;
    let differs = |id: u32, token: &AddedToken| entries.id_to_token(id).as_deref() != Some(&*token.content);
    let changed = tokens.iter().filter(|(id, token)| differs(**id, token));
    let changed: BTreeMap<_, _> = changed.map(|(id, token)| (*id, token.content.clone())).collect();
    let vocabulary = SharedVocabulary {
        entries: entries.clone(),
        ids: changed.iter().map(|(id, text)| (text.clone(), *id)).collect(),
        changed,
    };
    let mut added = AddedVocabulary::new();
    added.set_encode_special_tokens(base.get_encode_special_tokens());
    let tokens: Vec<AddedToken> = tokens.values().cloned().collect();
    added.add_tokens(&tokens, &vocabulary, base.get_normalizer());
    TokenizerBuilder::new()
        .with_model(vocabulary)
        .with_normalizer(base.get_normalizer().cloned())
        .with_pre_tokenizer(base.get_pre_tokenizer().cloned())
        .with_post_processor(base.get_post_processor().cloned())
        .with_decoder(base.get_decoder().cloned())
        .with_added_vocabulary(added)
        .build()
}
