//! Stop strings in a text that comes in pieces.
//!
//! The scanned text is more than the visible one: special tokens are left out of an answer, but a stop string may name
//! one, or reach from text into one. A special token is hidden text that a match contains as a whole or not at all, so
//! that the stop string `<` does not match within a hidden `</s>`.
//!
//! Positions count the bytes of the scanned text, visible and hidden, from the beginning of the answer.

use std::ops::Range;

/// Looks for the earliest match of any stop string, and holds back text that may turn out to be the beginning of one.
#[derive(Debug, Clone)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// Text that could be the beginning of a stop string.
    held: String,
    /// The parts of `held` that are hidden.
    hidden: Vec<Range<usize>>,
    /// Position of the first byte of `held`.
    position: usize,
}

/// What is known after a piece of text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Scanned {
    /// Visible text that has become certain.
    pub(super) text: String,
    /// All text before this position is certain.
    pub(super) certain: usize,
    /// The match, if there is one; nothing may be pushed after it.
    pub(super) stop: Option<Match>,
}

/// A stop string that was found; it begins where the certain text ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Match {
    /// Its visible part.
    pub(super) text: String,
    /// Position behind it.
    pub(super) end: usize,
}

impl StopStrings {
    pub(super) fn new(stops: Vec<String>) -> StopStrings {
        StopStrings { stops, held: String::new(), hidden: Vec::new(), position: 0 }
    }

    /// The position behind all that was pushed.
    pub(super) fn end(&self) -> usize {
        self.position + self.held.len()
    }

    /// Takes a piece of visible text, or the text of one special token.
    pub(super) fn push(&mut self, piece: &str, hidden: bool) -> Scanned {
        let from = self.held.len();
        self.held.push_str(piece);
        if hidden {
            self.hidden.push(from..self.held.len());
        }
        match self.find() {
            Some(found) => {
                let (text, certain) = (self.visible(0..found.start), self.position + found.start);
                let stop = Match { text: self.visible(found.clone()), end: self.position + found.end };
                Scanned { text, certain, stop: Some(stop) }
            }
            None => self.release(self.held.len() - self.overlap()),
        }
    }

    /// Releases what was held back, when no more text comes.
    pub(super) fn finish(&mut self) -> Scanned {
        self.release(self.held.len())
    }

    /// The earliest match in the held text; of those that begin together the one that was given first.
    fn find(&self) -> Option<Range<usize>> {
        self.stops
            .iter()
            // Searching for a string takes time in proportion to its length, however short the text is.
            .filter(|stop| stop.len() <= self.held.len())
            .filter_map(|stop| self.find_stop(stop))
            .min_by_key(|range| range.start)
    }

    fn find_stop(&self, stop: &str) -> Option<Range<usize>> {
        let mut from = 0;
        loop {
            let start = from + self.held[from..].find(stop)?;
            let end = start + stop.len();
            if !self.splits_hidden(start) && !self.splits_hidden(end) {
                return Some(start..end);
            }
            from = start + self.held[start..].chars().next().map_or(1, char::len_utf8);
        }
    }

    /// Number of bytes at the end of the held text that may be the beginning of a stop string.
    fn overlap(&self) -> usize {
        self.stops.iter().map(|stop| self.overlap_with(stop)).max().unwrap_or(0)
    }

    fn overlap_with(&self, stop: &str) -> usize {
        let longest = self.held.len().min(stop.len().saturating_sub(1));
        let begins_stop = |len: &usize| {
            let at = self.held.len() - len;
            self.held.is_char_boundary(at)
                && !self.splits_hidden(at)
                && stop.as_bytes().starts_with(&self.held.as_bytes()[at..])
        };
        (1..=longest).rev().find(begins_stop).unwrap_or(0)
    }

    /// Whether an index lies inside the text of a special token.
    fn splits_hidden(&self, at: usize) -> bool {
        self.hidden.iter().any(|range| range.start < at && at < range.end)
    }

    /// The visible text of a range of the held text, which splits no special token.
    fn visible(&self, range: Range<usize>) -> String {
        let (mut text, mut from) = (String::new(), range.start);
        for hidden in
            self.hidden.iter().filter(|hidden| range.start <= hidden.start && hidden.end <= range.end)
        {
            text.push_str(&self.held[from..hidden.start]);
            from = hidden.end;
        }
        text.push_str(&self.held[from..range.end]);
        text
    }

    /// Lets go of the first `len` bytes.
    fn release(&mut self, len: usize) -> Scanned {
        let text = self.visible(0..len);
        self.held.drain(..len);
        self.hidden.retain_mut(|range| {
            *range = range.start.saturating_sub(len)..range.end.saturating_sub(len);
            range.start < range.end
        });
        self.position += len;
        Scanned { text, certain: self.position, stop: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A piece of text; in brackets the text of a special token.
    fn push(scanner: &mut StopStrings, piece: &str) -> Scanned {
        match piece.strip_prefix('[').and_then(|piece| piece.strip_suffix(']')) {
            Some(special) => scanner.push(special, true),
            None => scanner.push(piece, false),
        }
    }

    /// The visible text that is given out for these pieces, and the visible part of the match.
    fn scan(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut scanner = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let scanned = push(&mut scanner, piece);
            text += &scanned.text;
            if let Some(stop) = scanned.stop {
                assert!(stop.end <= scanner.end(), "a match ends within the text");
                return (text, Some(stop.text));
            }
        }
        (text + &scanner.finish().text, None)
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        for (stops, pieces, text, stop) in [
            (&["END"][..], &["a E", "N", "D b"][..], "a ", Some("END")),
            (&["END"], &["a E", "N", "X b"], "a ENX b", None),
            (&["aab"], &["a", "a", "a", "b"], "a", Some("aab")),
            (&["b", "ab"], &["xab"], "x", Some("ab")),
            (&["é!"], &["caf", "é", "!"], "caf", Some("é!")),
            (&["é!"], &["caf", "é", "?"], "café?", None),
            (&["\n\n"], &["one\n", "two\n"], "one\ntwo\n", None),
            (&[], &["any", "thing"], "anything", None),
        ] {
            let expected = (text.to_owned(), stop.map(str::to_owned));
            assert_eq!(scan(stops, pieces), expected, "{stops:?} in {pieces:?}");
        }
    }

    #[test]
    fn stop_strings_contain_special_tokens_whole_or_not_at_all() {
        for (stops, pieces, text, stop) in [
            (&["<|im_end|>"][..], &["a", "[<|im_end|>]", "b"][..], "a", Some("")),
            (&["a<|im_end|>"], &["xa", "[<|im_end|>]"], "x", Some("a")),
            (&["<|im_end|>\n"], &["a", "[<|im_end|>]", "\n", "b"], "a", Some("\n")),
            (&["a<e>b"], &["x", "a", "[<e>]", "bc"], "x", Some("ab")),
            (&["<e><e>"], &["x", "[<e>]", "y", "[<e>]", "[<e>]"], "xy", Some("")),
            (&["<e>b<e>"], &["x", "[<e>]", "b", "[<e>]"], "x", Some("b")),
            (&["<"], &["a", "[<e>]", "b<c"], "ab", Some("<")),
            (&["e>b"], &["a", "[<e>]", "b"], "ab", None),
            (&["a<"], &["a", "[<e>]", "b"], "ab", None),
            (&["a<e>c"], &["a", "[<e>]", "b"], "ab", None),
            (&["e"], &["a", "[<e>]", "[e]", "b"], "a", Some("")),
            (&["<e>", "a"], &["xa", "[<e>]"], "x", Some("a")),
            (&["<e>"], &["a<", "e", ">b"], "a", Some("<e>")),
            (&[], &["a", "[<e>]", "b"], "ab", None),
        ] {
            let expected = (text.to_owned(), stop.map(str::to_owned));
            assert_eq!(scan(stops, pieces), expected, "{stops:?} in {pieces:?}");
        }
    }
}
