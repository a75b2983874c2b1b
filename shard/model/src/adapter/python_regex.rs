//! Python's regular expressions, which PEFT's configurations are written in, as those of `fancy-regex`. The two agree in
//! most of their syntax; what means something else is rewritten, and what has no equal is refused. See the documentation
//! of Python's module `re` (3.11 and later) and of the crate.

use std::str::Chars;

/// Why a pattern cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// It is no regular expression, or takes too long to match.
    #[error(transparent)]
    Regex(#[from] Box<fancy_regex::Error>),
    /// Python refuses it, or means something by it that cannot be said here.
    #[error("{0:?} is no regular expression of Python, or one that is not known here")]
    Construct(String),
    /// A repetition of nothing, or of a repetition.
    #[error("nothing, or a repetition, is repeated by {0:?}")]
    Repetition(char),
}

/// Steps back that one match may take, shared out among the patterns that can make many: a path of a module has some fifty
/// characters, and a pattern that takes this long is of the kind that never ends.
const MAX_STEPS: usize = 10_000;

/// What stands around a pattern, in the crate's own syntax.
#[derive(Clone, Copy)]
pub(super) enum Around {
    /// It must match a whole text.
    Nothing,
    /// It is a part of a larger pattern, where Python takes no flags for all of it.
    Between(&'static str, &'static str),
}

/// A pattern, ready to match.
pub(super) struct Pattern(fancy_regex::Regex);

/// Whether a pattern may need a matcher that goes back, and so any amount of time.
pub(super) fn may_step_back(pattern: &str) -> bool {
    let groups = pattern.match_indices("(?").any(|(at, _)| !pattern[at + 2..].starts_with(':'));
    let backreference = pattern.as_bytes().windows(2).any(|two| two[0] == b'\\' && two[1].is_ascii_digit());
    groups || backreference || ["*+", "++", "?+", "}+"].iter().any(|two| pattern.contains(two))
}

impl Pattern {
    /// Compiles a pattern. `sharers` is the number of patterns that share [`MAX_STEPS`].
    pub(super) fn new(around: Around, pattern: &str, sharers: usize) -> Result<Pattern, PatternError> {
        let source = match around {
            Around::Nothing => format!("^(?:{})$", translate(pattern, true)?),
            Around::Between(before, after) => format!("{before}{}{after}", translate(pattern, false)?),
        };
        let mut builder = fancy_regex::RegexBuilder::new(&source);
        let regex = builder.backtrack_limit(MAX_STEPS / sharers.max(1)).build();
        Ok(Pattern(regex.map_err(Box::new)?))
    }

    /// Whether it matches somewhere; patterns are compiled with the anchors that they need.
    pub(super) fn is_match(&self, text: &str) -> Result<bool, PatternError> {
        Ok(self.0.is_match(text).map_err(Box::new)?)
    }

    /// What a named group matched: none if the pattern does not match, or the group took no part.
    pub(super) fn group<'a>(
        &self,
        text: &'a str,
        name: &str,
    ) -> Result<Option<Option<&'a str>>, PatternError> {
        let captures = self.0.captures(text).map_err(Box::new)?;
        Ok(captures.map(|captures| captures.name(name).map(|found| found.as_str())))
    }
}

/// The same pattern for `fancy-regex`.
fn translate(pattern: &str, takes_flags: bool) -> Result<String, PatternError> {
    let mut translator = Translator { rest: pattern.chars(), to: String::new(), last: Last::Nothing };
    while takes_flags && translator.global_flags()? {}
    while let Some(c) = translator.rest.next() {
        translator.construct(c)?;
    }
    Ok(translator.to)
}

/// What stands before the next character: decides whether it can be repeated.
#[derive(Clone, Copy, PartialEq)]
enum Last {
    Nothing,
    Item,
    /// A repetition that can still be made lazy or possessive.
    Repetition,
    Finished,
}

struct Translator<'a> {
    rest: Chars<'a>,
    to: String,
    last: Last,
}

fn refused(construct: impl Into<String>) -> PatternError {
    PatternError::Construct(construct.into())
}

impl Translator<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.clone().next()
    }

    fn next_if(&mut self, is_wanted: impl Fn(char) -> bool) -> Option<char> {
        self.peek().filter(|c| is_wanted(*c)).and_then(|_| self.rest.next())
    }

    fn take_if(&mut self, c: char) -> bool {
        self.next_if(|next| next == c).is_some()
    }

    fn skip(&mut self, count: usize) {
        for _ in 0..count {
            self.rest.next();
        }
    }

    /// Flags for the whole pattern, which stand at its beginning. Returns whether there were any.
    fn global_flags(&mut self) -> Result<bool, PatternError> {
        let Some((flags, _)) = self.rest.as_str().strip_prefix("(?").and_then(|rest| rest.split_once(')'))
        else {
            return Ok(false);
        };
        if flags.is_empty() || !flags.chars().all(|c| c.is_ascii_lowercase()) {
            return Ok(false);
        }
        self.skip(flags.len() + 3);
        let flags = known_flags(flags)?;
        if !flags.is_empty() {
            self.to.push_str(&format!("(?{flags})"));
        }
        Ok(true)
    }

    fn construct(&mut self, c: char) -> Result<(), PatternError> {
        match c {
            '\\' => self.escape(false)?,
            '[' => self.class()?,
            '(' => return self.group(),
            '*' | '+' | '?' => return self.repetition(c, &c.to_string()),
            '{' => return self.braces(),
            '|' => {
                self.to.push(c);
                self.last = Last::Nothing;
                return Ok(());
            }
            // Alone, they mean themselves.
            '}' | ']' => self.to.extend(['\\', c]),
            _ => self.to.push(c),
        }
        self.last = Last::Item;
        Ok(())
    }

    fn repetition(&mut self, c: char, translated: &str) -> Result<(), PatternError> {
        self.last = match (self.last, c) {
            (Last::Item, _) => Last::Repetition,
            (Last::Repetition, '?' | '+') => Last::Finished,
            _ => return Err(PatternError::Repetition(c)),
        };
        self.to.push_str(translated);
        Ok(())
    }

    /// `{m}`, `{m,}`, `{,n}`, `{m,n}`; anything else in braces means itself.
    fn braces(&mut self) -> Result<(), PatternError> {
        let inside: String = self.rest.clone().take_while(|c| c.is_ascii_digit() || *c == ',').collect();
        let is_closed = self.rest.clone().nth(inside.len()) == Some('}');
        let (least, most) = inside.split_once(',').unwrap_or((&inside, &inside));
        let is_number = |text: &str| text.chars().all(|c| c.is_ascii_digit());
        if !is_closed || inside.is_empty() || !is_number(least) || !is_number(most) {
            self.to.push_str("\\{");
            self.last = Last::Item;
            return Ok(());
        }
        self.skip(inside.len() + 1);
        let least = if least.is_empty() { "0" } else { least };
        let translated = match inside.contains(',') {
            true => format!("{{{least},{most}}}"),
            false => format!("{{{least}}}"),
        };
        self.repetition('{', &translated)
    }

    /// An opening parenthesis, with what tells the kind of the group.
    fn group(&mut self) -> Result<(), PatternError> {
        let before = std::mem::replace(&mut self.last, Last::Nothing);
        self.to.push('(');
        if !self.take_if('?') {
            return Ok(());
        }
        let Some(kind) = self.rest.next() else { return Err(refused("(?")) };
        match (kind, self.peek()) {
            (':' | '=' | '!' | '>', _) => self.to.extend(['?', kind]),
            ('<', Some('=' | '!')) | ('P', Some('<')) => self.to.extend(['?', kind]),
            ('P', Some('=')) => {
                self.to.extend(['?', kind]);
                while let Some(c) = self.next_if(|c| c != ')') {
                    self.to.push(c);
                }
                self.last = Last::Item;
            }
            ('#', _) => {
                self.to.pop();
                if !self.rest.by_ref().any(|c| c == ')') {
                    return Err(refused("(?#"));
                }
                self.last = before;
            }
            ('a'..='z' | '-', _) => {
                let mut flags = kind.to_string();
                while let Some(c) = self.next_if(|c| c.is_ascii_lowercase() || c == '-') {
                    flags.push(c);
                }
                if !self.take_if(':') {
                    return Err(refused(format!("(?{flags}")));
                }
                self.to.push_str(&format!("?{}:", known_flags(&flags)?));
            }
            _ => return Err(refused(format!("(?{kind}"))),
        }
        Ok(())
    }

    /// What follows a backslash.
    fn escape(&mut self, in_class: bool) -> Result<(), PatternError> {
        let Some(c) = self.rest.next() else { return Err(refused("\\")) };
        match c {
            'd' | 'D' | 's' | 'S' | 'w' | 'W' | 'a' | 'f' | 'n' | 'r' | 't' | 'v' => {
                self.to.extend(['\\', c])
            }
            'A' | 'B' if !in_class => self.to.extend(['\\', c]),
            'b' if in_class => self.to.push_str("\\x08"),
            // Followed by a brace, it would be another assertion.
            'b' if self.peek() != Some('{') => self.to.push_str("\\b"),
            'Z' if !in_class => self.to.push_str("\\z"),
            'x' => self.code_point('x', 2)?,
            'u' => self.code_point('u', 4)?,
            'U' => self.code_point('U', 8)?,
            '1'..='9' if !in_class => {
                self.to.extend(['\\', c]);
                let second = self.next_if(|c| c.is_ascii_digit());
                self.to.extend(second);
                if self.peek().is_some_and(|c| c.is_ascii_digit()) {
                    return Err(refused(format!("\\{c}")));
                }
            }
            _ if c.is_ascii_alphanumeric() => return Err(refused(format!("\\{c}"))),
            // Of these, an escape means something else here.
            '<' | '>' => self.to.push(c),
            _ if c.is_ascii_punctuation() => self.to.extend(['\\', c]),
            _ => self.to.push(c),
        }
        Ok(())
    }

    fn code_point(&mut self, kind: char, digits: usize) -> Result<(), PatternError> {
        let hex: String = self.rest.clone().take(digits).take_while(char::is_ascii_hexdigit).collect();
        if hex.len() < digits {
            return Err(refused(format!("\\{kind}")));
        }
        self.skip(digits);
        self.to.push_str(&format!("\\x{{{hex}}}"));
        Ok(())
    }

    /// A class of characters, in which fewer characters are special than here.
    fn class(&mut self) -> Result<(), PatternError> {
        self.to.push('[');
        if self.take_if('^') {
            self.to.push('^');
        }
        if self.take_if(']') {
            self.to.push_str("\\]");
        }
        loop {
            let Some(c) = self.rest.next() else { return Err(refused("[")) };
            match c {
                ']' => break,
                '\\' => self.escape(true)?,
                '[' | '&' | '~' | '^' => self.to.extend(['\\', c]),
                // Here, this would be a difference of classes.
                '-' if self.peek() == Some('-') => return Err(refused("--")),
                _ => self.to.push(c),
            }
        }
        self.to.push(']');
        Ok(())
    }
}

/// Flags without those that change nothing for the names of modules.
fn known_flags(flags: &str) -> Result<String, PatternError> {
    let kept: String = flags.chars().filter(|c| !matches!(c, 'a' | 'u')).collect();
    match kept.chars().all(|c| matches!(c, 'i' | 'm' | 's' | '-')) {
        true => Ok(kept.trim_end_matches('-').into()),
        false => Err(refused(format!("(?{flags}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_the_same_is_kept_and_the_rest_is_rewritten() {
        for (python, translated) in [
            (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
            (r"(?P<n>a)(?P=n)", r"(?P<n>a)(?P=n)"),
            (r"(a)\1(b)\2", r"(a)\1(b)\2"),
            (r"(?<!a)b(?=c)(?!d)(?<=e)(?>f)(?:g)", r"(?<!a)b(?=c)(?!d)(?<=e)(?>f)(?:g)"),
            (r"a{2}b{2,}c{,3}d{2,3}e{,}", r"a{2}b{2,}c{0,3}d{2,3}e{0,}"),
            (r"a{x}b{", r"a\{x\}b\{"),
            (r"[]a][^]b][[c&&d~~e]", r"[\]a][^\]b][\[c\&\&d\~\~e]"),
            (r"[\]\-a]\<\>\-", r"[\]\-a]<>\-"),
            (r"\x41\u0041\U00000041", r"\x{41}\x{0041}\x{00000041}"),
            (r"a\Z[\b]", r"a\z[\x08]"),
            (r"(?iu)(?a)(?s)a(?-i:b)(?a:c)", r"(?i)(?s)a(?-i:b)(?:c)"),
            (r"a(?#what)*b", r"a*b"),
            (r"a*?b+?c??d++e{2}?", r"a*?b+?c??d++e{2}?"),
        ] {
            assert_eq!(translate(python, true).unwrap(), translated, "{python}");
            assert!(Pattern::new(Around::Nothing, python, 1).is_ok(), "{python}");
        }
    }

    #[test]
    fn what_python_refuses_or_is_not_known_is_refused() {
        for python in [
            r"\p{L}",
            r"\Q",
            r"\K",
            r"\G",
            r"\z",
            r"\0",
            r"\100",
            r"\x4",
            r"[\A]",
            r"[\1]",
            r"\",
            r"[a",
            r"a**",
            r"*a",
            r"a|+b",
            r"(*a)",
            r"a{2}{3}",
            r"a??+",
            r"(?<n>a)",
            r"(?P>n)",
            r"(?'n'a)",
            r"(?|a)",
            r"(?(1)a|b)",
            r"(?x)a b",
            r"(?L)a",
            r"a(?i)",
            r"(?i",
            r"(?#a",
            r"[a--b]",
            r"(a",
            r"a)",
            r"(?P=n)",
            r"a{3,2}",
        ] {
            assert!(Pattern::new(Around::Nothing, python, 1).is_err(), "{python}");
        }
    }

    #[test]
    fn a_match_that_would_not_end_is_an_error() {
        let path = "model.layers.0.self_attn.q_proj";
        for python in [
            r"((?=.).+)+!",
            r"(?:(?!x)[^!]+)+!",
            r"(?:(?=.)(?:\w|\.)+)+x",
            r"(?:(.)|(?=.)..|...)*\1!",
            r"(?:(?<=\w)\w*|\w*\.?)*!",
        ] {
            let pattern = Pattern::new(Around::Nothing, python, 1).unwrap();
            let error = pattern.is_match(path).map_err(|error| error.to_string());
            assert!(error.is_err_and(|error| error.contains("acktrack")), "{python}");
        }
        // These two have no need to go back at all.
        for python in [r"(a*)*b", r"(?:(?:[a-z_.0-9]+)+)+!"] {
            assert!(!Pattern::new(Around::Nothing, python, 1).unwrap().is_match(path).unwrap());
        }
    }
}
