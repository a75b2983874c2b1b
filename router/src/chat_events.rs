//! Turns text into chat events: the layer that knows the form in which a model writes its answer.

use crate::text::{EndReason, Piece, TextEvent, TokenText};

/// A part of an assistant's answer. Models that think, or call tools, will have events of their own.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ChatEvent {
    /// Text of the content, and the tokens whose text is part of it to the last byte by now. Either may be empty.
    Text { text: String, tokens: Vec<TokenText> },
    /// The answer is complete; the last event.
    End(EndReason),
}

/// Reads an answer as it comes.
#[derive(Debug, Default)]
pub(crate) struct ChatEvents {}

impl ChatEvents {
    /// The chat events of a text event. The prompt has none, because it is not part of the answer.
    pub(crate) fn push(&mut self, event: TextEvent) -> Vec<ChatEvent> {
        let TextEvent::Piece(Piece { text, settled, end, .. }) = event else { return Vec::new() };
        let tokens = settled.into_iter().filter(|token| token.visible).collect();
        let text = ChatEvent::Text { text, tokens };
        [Some(text), end.map(ChatEvent::End)].into_iter().flatten().collect()
    }
}
