//! Turns generated tokens into text: the text that every token adds, the part of it that certainly belongs to the
//! answer, and the end of the answer. This layer knows nothing of HTTP, and nothing of chats.

mod detokenizer;
mod prompt;
mod stop_strings;
mod stream;
mod tokens;

pub(crate) use prompt::PromptText;
pub(crate) use stream::TextStream;

/// A token as it is reported.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenText {
    pub(crate) id: u32,
    /// The text that the token adds to the ones before it. A character that several tokens make up belongs to the
    /// last of them; a special token has its name.
    pub(crate) text: String,
    /// The token's own bytes; those of a part of a character are no text.
    pub(crate) bytes: Vec<u8>,
    /// `None` for the first token of a prompt, which nothing predicts.
    pub(crate) logprob: Option<f32>,
    pub(crate) special: bool,
    /// Whether `text` is part of the returned text.
    pub(crate) visible: bool,
    /// The most probable tokens at this place.
    pub(crate) alternatives: Vec<Alternative>,
}

/// A token that could have been chosen.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Alternative {
    pub(crate) id: u32,
    pub(crate) text: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) logprob: f32,
}

/// How an answer ends, beside its stop strings, and how its end is shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending {
    /// Tokens that come before it may end: until then no token that ends a sequence is chosen, and no stop string is
    /// looked for.
    pub(crate) min_tokens: u32,
    /// Tokens that end it, beside those of the model.
    pub(crate) stop_token_ids: Vec<u32>,
    /// Whether the stop string or the token that ends it is part of its text.
    pub(crate) include_stop: bool,
    /// Whether special tokens are part of its text.
    pub(crate) show_special: bool,
    /// Special tokens that are part of its text in any case: marks by which it is taken apart.
    pub(crate) marks: Vec<u32>,
}

/// The reason that an answer ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// It has as many tokens as were asked for.
    Length,
    /// The model ended it.
    EndToken,
    /// A stop string was found.
    StopString {
        /// Its text, without that of special tokens.
        text: String,
    },
}

/// An event of a sequence: first its prompt, if that was asked for, then the pieces of its answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TextEvent {
    Prompt(Echo),
    Piece(Piece),
}

/// A prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Echo {
    pub(crate) text: String,
    /// Its tokens with their log-probabilities, if those are wanted.
    pub(crate) tokens: Vec<TokenText>,
}

/// A piece of an answer. There is one for every generated token; the tokens that make up a character come together when
/// the character is complete.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Piece {
    /// The token as it was generated, with its text cut behind the stop string that it completes. `None` if the answer
    /// ends without a token.
    pub(crate) token: Option<TokenText>,
    /// Text that certainly belongs to the answer by now, and was not told before. It never contains a part of a stop
    /// string.
    pub(crate) text: String,
    /// Tokens whose text is certain to the last byte by now, if they are wanted. Their visible text, joined over all
    /// pieces, is the answer: what a stop string cuts off is not among them.
    pub(crate) settled: Vec<TokenText>,
    /// Set with the last piece.
    pub(crate) end: Option<EndReason>,
}
