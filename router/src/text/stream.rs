//! The answer of one sequence, piece by piece.

use std::{collections::VecDeque, mem, sync::Arc};

use scheduler::Finish;

use super::{
    EndReason, Ending, Piece,
    stop_strings::{Match, Scanned, StopStrings},
    tokens::{NewToken, Placed, Tokens, Unit},
};
use crate::{generation::Scored, tokenizer::ModelTokenizer};

/// Turns tokens into pieces of text, until the text ends.
pub(crate) struct TextStream {
    tokens: Tokens,
    stops: StopStrings,
    /// Whether to report settled tokens.
    settles: bool,
    /// Tokens that are still to come before stop strings are looked for.
    early: usize,
    include_stop: bool,
    /// Tokens whose text is not certain, at their positions in the scanned text.
    unsettled: VecDeque<Placed>,
}

impl TextStream {
    /// Continues a prompt. `settles` asks for settled tokens.
    pub(crate) fn new(
        tokenizer: Arc<ModelTokenizer>,
        prompt: &[u32],
        stops: Vec<String>,
        ending: &Ending,
        settles: bool,
    ) -> TextStream {
        TextStream {
            tokens: Tokens::new(tokenizer, prompt, ending),
            stops: StopStrings::new(stops),
            settles,
            early: ending.min_tokens as usize,
            include_stop: ending.include_stop,
            unsettled: VecDeque::new(),
        }
    }

    /// Takes a token with its alternatives, and returns the pieces of all tokens whose text is complete with it.
    /// Nothing may be pushed after a piece that ends the text.
    pub(crate) fn push(&mut self, token: Scored, top: Vec<Scored>, finish: Option<Finish>) -> Vec<Piece> {
        let token = NewToken { id: token.id, logprob: Some(token.logprob), top };
        let mut units = match finish {
            Some(Finish::StopToken) if !self.include_stop => self.tokens.push_hidden(token),
            _ => self.tokens.push(token),
        };
        if finish.is_some() {
            units.extend(self.tokens.finish());
        }
        let mut pieces = Vec::new();
        for unit in units {
            self.unit(unit, &mut pieces);
            if pieces.last().is_some_and(|piece| piece.end.is_some()) {
                break;
            }
        }
        match finish {
            Some(finish) => self.end(finish, pieces),
            None => pieces,
        }
    }

    /// Adds the pieces of one unit's tokens.
    fn unit(&mut self, unit: Unit, pieces: &mut Vec<Piece>) {
        let position = self.stops.end();
        let is_early = unit.tokens.len() <= self.early;
        self.early = self.early.saturating_sub(unit.tokens.len());
        let scanned = match is_early {
            true => self.stops.pass(&unit.text, unit.hidden),
            false => self.stops.push(&unit.text, unit.hidden),
        };
        let tokens: Vec<Placed> = unit.tokens.into_iter().map(|token| token.shift(position)).collect();
        if self.settles {
            self.unsettled.extend(tokens.iter().cloned());
        }
        // A token behind the stop string was generated nevertheless, but adds nothing.
        let stop_end = scanned.stop.as_ref().map_or(usize::MAX, |stop| stop.end);
        pieces.extend(
            tokens.into_iter().map(|token| Piece { token: Some(token.cut(stop_end)), ..Piece::default() }),
        );
        if let Some(last) = pieces.last_mut() {
            self.tell(scanned, last);
        }
    }

    /// Tells what has become certain.
    fn tell(&mut self, scanned: Scanned, piece: &mut Piece) {
        piece.text += &scanned.text;
        while self.unsettled.front().is_some_and(|token| token.end <= scanned.certain) {
            piece.settled.extend(self.unsettled.pop_front().map(|token| token.token));
        }
        if let Some(Match { text, end }) = scanned.stop {
            let end = if self.include_stop { end } else { scanned.certain };
            if self.include_stop {
                piece.text += &text;
            }
            let cut = mem::take(&mut self.unsettled);
            let kept = cut.into_iter().filter(|token| token.start < end);
            piece.settled.extend(kept.map(|token| token.cut(end)));
            piece.end = Some(EndReason::StopString { text });
        }
    }

    /// Ends the text with the sequence, unless a stop string has ended it.
    fn end(&mut self, finish: Finish, mut pieces: Vec<Piece>) -> Vec<Piece> {
        if pieces.is_empty() {
            pieces.push(Piece::default());
        }
        let Some(last) = pieces.last_mut() else { return pieces };
        match (&last.end, finish) {
            // The end token ends a text, also if a stop string names it.
            (Some(EndReason::StopString { text }), Finish::StopToken) if text.is_empty() => {
                last.end = Some(EndReason::EndToken);
            }
            (Some(_), _) => {}
            (None, finish) => {
                let rest = self.stops.finish();
                self.tell(rest, last);
                last.end = Some(match finish {
                    Finish::Length => EndReason::Length,
                    Finish::StopToken => EndReason::EndToken,
                });
            }
        }
        pieces
    }
}
