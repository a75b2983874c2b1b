//! Stop strings in a text that comes in pieces.
//!
//! The scanned text is more than the visible one: special tokens are left out of an answer, but a stop string may name
//! one, or reach from text into one. A special token is hidden text that a match contains as a whole or not at all, so
//! that the stop string `<` does not match within a hidden `</s>`. What is visible is scanned as it is seen, too: a
//! hidden token does not part a stop string.
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

/// The result of scanning a piece of text.
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

    /// Takes the same without looking for anything in it. Nothing may be held back.
    pub(super) fn pass(&mut self, piece: &str, hidden: bool) -> Scanned {
        self.position += piece.len();
        let text = if hidden { String::new() } else { piece.to_owned() };
        Scanned { text, certain: self.position, stop: None }
    }

    /// Releases what was held back, when no more text comes.
    pub(super) fn finish(&mut self) -> Scanned {
        self.release(self.held.len())
    }

    /// The earliest match in the held text, with special tokens or without them; of those that begin together the one
    /// that was given first.
    fn find(&self) -> Option<Range<usize>> {
        let whole = |range: &Range<usize>| !self.splits_hidden(range.start) && !self.splits_hidden(range.end);
        let found = self.stops.iter().filter_map(|stop| find(&self.held, stop, whole));
        if self.hidden.is_empty() {
            return found.min_by_key(|range| range.start);
        }
        let visible = self.visible(0..self.held.len());
        let visible = self.stops.iter().filter_map(|stop| find(&visible, stop, |_| true));
        let visible = visible.map(|range| self.place(range.start)..self.place(range.end - 1) + 1);
        found.chain(visible).min_by_key(|range| range.start)
    }

    /// Number of bytes at the end of the held text that may be the beginning of a stop string, with special tokens or
    /// without them.
    fn overlap(&self) -> usize {
        let longest = |text: &str, whole: &dyn Fn(usize) -> bool| {
            self.stops.iter().map(|stop| overlap(text, stop, whole)).max().unwrap_or(0)
        };
        let full = longest(&self.held, &|at| !self.splits_hidden(at));
        if self.hidden.is_empty() {
            return full;
        }
        let visible = self.visible(0..self.held.len());
        match longest(&visible, &|_| true) {
            0 => full,
            len => full.max(self.held.len() - self.place(visible.len() - len)),
        }
    }

    /// The index in the held text of a byte of its visible text.
    fn place(&self, visible: usize) -> usize {
        self.hidden.iter().fold(visible, |at, hidden| if hidden.start <= at { at + hidden.len() } else { at })
    }

    /// Returns whether an index lies inside the text of a special token.
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

/// The first match of a stop string that is accepted.
fn find(text: &str, stop: &str, accepts: impl Fn(&Range<usize>) -> bool) -> Option<Range<usize>> {
    // Searching for a string takes time in proportion to its length, however short the text is.
    if stop.len() > text.len() {
        return None;
    }
    let mut from = 0;
    loop {
        let start = from + text[from..].find(stop)?;
        let range = start..start + stop.len();
        if accepts(&range) {
            return Some(range);
        }
        from = start + text[start..].chars().next().map_or(1, char::len_utf8);
    }
}

/// Length of the longest end of a text that is the beginning of a stop string, and begins at an accepted index.
fn overlap(text: &str, stop: &str, accepts: &dyn Fn(usize) -> bool) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    let begins_stop = |len: &usize| {
        let at = text.len() - len;
        text.is_char_boundary(at) && accepts(at) && stop.as_bytes().starts_with(&text.as_bytes()[at..])
    };
    (1..=longest).rev().find(begins_stop).unwrap_or(0)
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
            (&["ab"], &["xa", "[<e>]", "b"], "x", Some("ab")),
            (&["abc"], &["xa", "[<e>]", "[<e>]", "b", "[<f>]", "cd"], "x", Some("abc")),
            (&["ab"], &["[<e>]", "x", "[<e>]", "a", "[<e>]", "c"], "xac", None),
            (&["é🙂"], &["é", "[<e>]", "é", "[<e>]", "🙂"], "é", Some("é🙂")),
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
