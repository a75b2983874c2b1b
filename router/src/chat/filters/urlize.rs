//! The filter `urlize`: makes links of web and mail addresses, as jinja2's `urlize` does.

use std::{collections::BTreeSet, sync::LazyLock};

use fancy_regex::Regex;
use minijinja::{Error, Value};

use super::{
    super::{
        arguments::{Args, bind, integer, string, truth},
        python::{is_space, str_of},
    },
    escaped,
    sequences::elements,
};

/// A web address: with a scheme or `www.` under any domain, without one under a few, or a number.
static WEB: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let domain = r"(?:https?://|www\.)(?:(?:[\w%-]+\.)+)?(?:[a-z]{2,63}|xn--[\w%]{2,59})";
    let bare = r"(?:[\w%-]{2,63}\.)+(?:com|net|int|edu|gov|org|info|mil)";
    let number = r"https?://(?:\d{1,3}(?:\.\d{1,3}){3}|\[(?:[\da-f]{0,4}:){2}(?:[\da-f]{0,4}:?){1,6}\])";
    Regex::new(&format!(r"^(?i:(?:{domain}|{bare}|{number})(?::\d{{1,5}})?(?:[/?#]\S*)?)$")).ok()
});
static MAIL: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\S+@\w[\w.-]*\.\w+$").ok());

/// Brackets that may stand around an address, in text that is escaped.
const BRACKETS: [(&str, &str); 3] = [("(", ")"), ("<", ">"), ("&lt;", "&gt;")];

fn matches(pattern: &LazyLock<Option<Regex>>, text: &str) -> bool {
    pattern.as_ref().is_some_and(|pattern| pattern.is_match(text).unwrap_or(false))
}

/// What a link is made with.
struct Links {
    limit: Option<usize>,
    attributes: String,
    schemes: Vec<String>,
}

/// The filter.
pub(super) fn urlize(value: &Value, args: Args) -> Result<String, Error> {
    let [limit, nofollow, target, rel, schemes] =
        bind(&args.into_values(), ["trim_url_limit", "nofollow", "target", "rel", "extra_schemes"])?;
    let rel = string(&rel)?.unwrap_or_default();
    let mut rel: BTreeSet<&str> = rel.split_whitespace().collect();
    rel.extend(truth(&nofollow, false).then_some("nofollow"));
    rel.insert("noopener");
    let rel = rel.into_iter().collect::<Vec<_>>().join(" ");
    let target = string(&target)?.filter(|target| !target.is_empty());
    let target = target.map(|target| format!(" target=\"{}\"", escaped(&target))).unwrap_or_default();
    let schemes = schemes.filter(|schemes| !schemes.is_none());
    let links = Links {
        limit: integer(&limit)?.map(|limit| usize::try_from(limit).unwrap_or(0)),
        attributes: format!(" rel=\"{}\"{target}", escaped(&rel)),
        schemes: match schemes {
            Some(schemes) => elements(&schemes)?.iter().map(str_of).collect::<Result<_, _>>()?,
            None => Vec::new(),
        },
    };
    let text = if value.is_safe() { str_of(value)? } else { escaped(&str_of(value)?) };
    Ok(text.split_inclusive(is_space).map(|part| links.word(part)).collect())
}

impl Links {
    /// A word, and the space behind it.
    fn word(&self, part: &str) -> String {
        let word = part.trim_end_matches(is_space);
        let space = &part[word.len()..];
        let mut middle = word;
        while let Some(rest) = BRACKETS.iter().find_map(|(open, _)| middle.strip_prefix(open)) {
            middle = rest;
        }
        let head = &word[..word.len() - middle.len()];
        let whole = middle;
        while let Some(rest) = [")", ">", ".", ",", "&gt;"].iter().find_map(|end| middle.strip_suffix(end)) {
            middle = rest;
        }
        // A bracket that was opened within the address is closed within it.
        for (open, close) in BRACKETS {
            let missing = middle.matches(open).count();
            if missing <= middle.matches(close).count() {
                continue;
            }
            for _ in 0..missing {
                let Some(at) = whole[middle.len()..].find(close) else { break };
                middle = &whole[..middle.len() + at + close.len()];
            }
        }
        format!("{head}{}{}{space}", self.link(middle), &whole[middle.len()..])
    }

    fn link(&self, address: &str) -> String {
        let Links { attributes, .. } = self;
        if matches(&WEB, address) {
            let has_scheme = address.starts_with("https://") || address.starts_with("http://");
            let scheme = if has_scheme { "" } else { "https://" };
            return format!("<a href=\"{scheme}{address}\"{attributes}>{}</a>", self.shortened(address));
        }
        if let Some(mail) = address.strip_prefix("mailto:").filter(|mail| matches(&MAIL, mail)) {
            return format!("<a href=\"{address}\">{mail}</a>");
        }
        let may_be_mail = address.contains('@') && !address.starts_with("www.");
        if may_be_mail && !address.starts_with('@') && !address.contains(':') && matches(&MAIL, address) {
            return format!("<a href=\"mailto:{address}\">{address}</a>");
        }
        let mut out = address.to_owned();
        for scheme in &self.schemes {
            if out != *scheme && out.starts_with(scheme.as_str()) {
                out = format!("<a href=\"{out}\"{attributes}>{out}</a>");
            }
        }
        out
    }

    /// What a link shows.
    fn shortened(&self, address: &str) -> String {
        match self.limit {
            Some(limit) if address.chars().count() > limit => {
                address.chars().take(limit).chain("...".chars()).collect()
            }
            _ => address.to_owned(),
        }
    }
}
