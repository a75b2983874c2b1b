//! How a user names a model of a hub: `owner/name`, with a revision behind `@`, and one of its GGUF files by its path or
//! behind a colon, as in llama.cpp, Ollama and vLLM.

use crate::hub::is_plain;

/// Hosts that Ollama wants in front of a name. The endpoint decides on the hub all the same.
const HOSTS: [&str; 2] = ["hf.co/", "huggingface.co/"];
const ENDING: &str = ".gguf";

/// A model of a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name<'a> {
    /// `name` or `owner/name`.
    pub(crate) id: &'a str,
    pub(crate) revision: Option<&'a str>,
    pub(crate) gguf: Option<Gguf<'a>>,
}

/// A file of a repository with several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gguf<'a> {
    /// By its path in the repository.
    Path(&'a str),
    /// By its name, or by the part of the name that tells its type.
    Tag(&'a str),
}

impl<'a> Name<'a> {
    /// `None` if it cannot be the name of a model.
    pub(crate) fn of(text: &'a str) -> Option<Name<'a>> {
        let text = HOSTS.iter().find_map(|host| text.strip_prefix(host)).unwrap_or(text);
        let (name, revision) = text.split_once('@').map_or((text, None), |(name, rest)| (name, Some(rest)));
        let (name, tag) = tagged(name);
        // A colon cannot be in a revision.
        let (revision, later) = revision.map_or((None, None), |revision| {
            let (revision, tag) = tagged(revision);
            (Some(revision), tag)
        });
        let (id, path) = match name.match_indices('/').nth(1) {
            Some((slash, _)) => (&name[..slash], Some(&name[slash + 1..])),
            None => (name, None),
        };
        let gguf = match (path, tag, later) {
            (None, None, None) => None,
            (Some(path), None, None) if is_gguf(path) && is_plain(path) => Some(Gguf::Path(path)),
            (None, Some(tag), None) | (None, None, Some(tag)) if is_word(tag) => Some(Gguf::Tag(tag)),
            _ => return None,
        };
        is_repository(id).then_some(Name { id, revision, gguf })
    }
}

/// Longest name of a repository that the hub takes, in bytes.
const MAX_REPOSITORY: usize = 96;

/// Whether a text is `owner/name` or `name` as the hub allows them (`validate_repo_id` of `huggingface_hub`). Two hyphens
/// stand for the slash in the cache, so that a name must not have them.
pub(crate) fn is_repository(id: &str) -> bool {
    let is_edge = |c: char| "-.".contains(c);
    let is_part = |part: &str| is_word(part) && !part.starts_with(is_edge) && !part.ends_with(is_edge);
    let is_plain = !id.contains("--") && !id.ends_with(".git");
    id.len() <= MAX_REPOSITORY && is_plain && id.split('/').count() <= 2 && id.split('/').all(is_part)
}

/// A text and what is behind its colon.
fn tagged(text: &str) -> (&str, Option<&str>) {
    text.split_once(':').map_or((text, None), |(text, tag)| (text, Some(tag)))
}

fn is_word(part: &str) -> bool {
    !part.is_empty()
        && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && !part.contains("..")
}

fn is_gguf(file: &str) -> bool {
    file.len() > ENDING.len() && file.to_ascii_lowercase().ends_with(ENDING)
}

/// A language model in GGUF files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GgufModel<'a> {
    /// One file, or the parts that a repository has, in their order.
    pub(crate) files: Vec<&'a str>,
    /// The name without numbers of parts, and how many there must be.
    split: Option<(&'a str, usize)>,
}

impl<'a> GgufModel<'a> {
    /// All of a repository. Other GGUF files beside them are vision towers and importance matrices.
    pub(crate) fn all(files: &'a [String]) -> Vec<GgufModel<'a>> {
        let is_model = |file: &&str| {
            let name = file.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
            is_gguf(&name) && !name.contains("mmproj") && !name.contains("imatrix")
        };
        let mut models: Vec<GgufModel<'a>> = Vec::new();
        for file in files.iter().map(String::as_str).filter(is_model) {
            let split = part(file).map(|(stem, _, count)| (stem, count));
            match models.iter_mut().find(|model| split.is_some() && model.split == split) {
                Some(model) => model.files.push(file),
                None => models.push(GgufModel { files: vec![file], split }),
            }
        }
        models.iter_mut().for_each(|model| model.files.sort_unstable());
        models
    }

    /// Whether a name means this model.
    pub(crate) fn is_named(&self, name: Gguf<'_>) -> bool {
        let whole = |file: &&str| name.names_file(file);
        self.files.iter().any(whole) || name.names_type(self.split.map_or(self.files[0], |(stem, _)| stem))
    }

    /// The first part that is missing.
    pub(crate) fn missing(&self) -> Option<String> {
        let (stem, count) = self.split?;
        let ending = &self.files[0][self.files[0].len() - ENDING.len()..];
        (1..=count)
            .find(|number| {
                self.files.get(number - 1).and_then(|file| part(file)).is_none_or(|part| part.1 != *number)
            })
            .map(|number| format!("{stem}-{number:05}-of-{count:05}{ending}"))
    }
}

/// The stem, the number and the count of a file that is one of several which make up a model, as llama.cpp names them:
/// `-00001-of-00003.gguf`.
fn part(file: &str) -> Option<(&str, usize, usize)> {
    let stem = file.get(..file.len().checked_sub(ENDING.len())?)?;
    let (first, count) = stem.rsplit_once("-of-")?;
    let (stem, number) = first.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let number_in = |text: &str| is_number(text).then(|| text.parse::<usize>().ok()).flatten();
    let (number, count) = (number_in(number)?, number_in(count)?);
    (1..=count).contains(&number).then_some((stem, number, count))
}

impl Gguf<'_> {
    /// Whether this is the whole name of a file.
    fn names_file(self, file: &str) -> bool {
        match self {
            Gguf::Path(path) => path == file,
            Gguf::Tag(tag) => file.rsplit('/').next().unwrap_or_default().eq_ignore_ascii_case(tag),
        }
    }

    /// Whether this is the type in the name of a file or a stem: a part that is set apart, or one of a folder.
    fn names_type(self, file: &str) -> bool {
        let Gguf::Tag(tag) = self else { return false };
        let (file, tag) = (file.to_ascii_lowercase(), tag.to_ascii_lowercase());
        file.trim_end_matches(ENDING).split('/').any(|part| has(part, &tag))
    }
}

/// Whether a tag is a name, or stands between hyphens and dots in it.
fn has(name: &str, tag: &str) -> bool {
    let is_end = |c: Option<char>| c.is_none_or(|c| "-.".contains(c));
    name.match_indices(tag).any(|(start, _)| {
        is_end(name[..start].chars().next_back()) && is_end(name[start + tag.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_in_every_spelling() {
        let name = |id, revision, gguf| Some(Name { id, revision, gguf });
        let tag = |tag| Some(Gguf::Tag(tag));
        let path = |path| Some(Gguf::Path(path));
        for (text, expected) in [
            ("gpt2", name("gpt2", None, None)),
            ("org/name", name("org/name", None, None)),
            ("org/name@main", name("org/name", Some("main"), None)),
            ("org/name@", name("org/name", Some(""), None)),
            ("org/name@refs/pr/1", name("org/name", Some("refs/pr/1"), None)),
            ("org/name:Q4_K_M", name("org/name", None, tag("Q4_K_M"))),
            ("org/name:Q4_K_M@v2", name("org/name", Some("v2"), tag("Q4_K_M"))),
            ("org/name@v2:Q4_K_M", name("org/name", Some("v2"), tag("Q4_K_M"))),
            ("hf.co/org/name:UD-IQ1_S", name("org/name", None, tag("UD-IQ1_S"))),
            ("huggingface.co/org/name", name("org/name", None, None)),
            ("org/name:m.Q8_0.gguf", name("org/name", None, tag("m.Q8_0.gguf"))),
            ("org/name/m.Q8_0.gguf", name("org/name", None, path("m.Q8_0.gguf"))),
            ("org/name/BF16/m.GGUF@v2", name("org/name", Some("v2"), path("BF16/m.GGUF"))),
            ("name.gguf:q4_0", name("name.gguf", None, tag("q4_0"))),
        ] {
            assert_eq!(Name::of(text), expected, "{text}");
        }
        for text in [
            "",
            "/",
            "a b",
            "a/b/c",
            "@main",
            "org/..",
            "../x",
            "/no/such/path",
            "org/name:",
            ":Q4_0",
            "org/name:a/b",
            "org/name:..",
            "org/name/../x.gguf",
            "org/name//x.gguf",
            "org/name/.gguf",
            "org/name/x.gguf:Q4_0",
            "org/name:Q4_0@v2:Q8_0",
            "org/name:Q4 0",
            "org//m.gguf",
            "hf.co/a/b/c",
        ] {
            assert_eq!(Name::of(text), None, "{text}");
        }
    }

    #[test]
    fn tags_are_parts_of_names() {
        for (tag, file, expected) in [
            ("Q4_K_M", "model-Q4_K_M.gguf", true),
            ("q4_k_m", "model.Q4_K_M.gguf", true),
            ("Q4_K_M", "model-q4_k_m.gguf", true),
            ("Q4_K", "model-Q4_K_M.gguf", false),
            ("K_M", "model-Q4_K_M.gguf", false),
            ("Q4_K_M", "model-Q4_K_M-imat.gguf", true),
            ("Q4_K_XL", "model-UD-Q4_K_XL.gguf", true),
            ("UD-Q4_K_XL", "model-UD-Q4_K_XL.gguf", true),
            ("BF16", "BF16/model-BF16-00001-of-00002.gguf", true),
            ("BF16", "BF16/model.gguf", true),
            ("model-Q8_0.gguf", "model-Q8_0.gguf", true),
            ("Model-Q8_0.gguf", "deep/model-Q8_0.gguf", true),
            ("model-Q8_0", "model-Q8_0.gguf", true),
            ("gguf", "model-Q8_0.gguf", false),
            ("F16", "model-BF16.gguf", false),
        ] {
            let files = [file.to_owned()];
            let is_named = GgufModel::all(&files)[0].is_named(Gguf::Tag(tag));
            assert_eq!(is_named, expected, "{tag} {file}");
        }
    }

    #[test]
    fn parts_are_known_by_their_names() {
        for (file, expected) in [
            ("m-00001-of-00003.gguf", true),
            ("a/b/m-Q4_K_M-00002-of-00002.GGUF", true),
            ("m-1-of-3.gguf", false),
            ("m-00000-of-00003.gguf", false),
            ("m-00004-of-00003.gguf", false),
            ("m-+0001-of-00003.gguf", false),
            ("\u{e4}-0001-of-00003.ggu\u{e4}", false),
            ("m-00001-of-0003.gguf", false),
            ("m-00001.gguf", false),
            ("best-of-three.gguf", false),
            ("m-of-00003.gguf", false),
            ("m.gguf", false),
            (".gguf", false),
            ("", false),
        ] {
            assert_eq!(part(file).is_some(), expected, "{file}");
        }
        let files = [
            "mmproj-model-f16.gguf",
            "b/mmproj-F16.gguf",
            "m.imatrix.gguf",
            "m.gguf",
            "x/M.GGUF",
            "README.md",
            ".gguf",
        ];
        let files = files.map(str::to_owned);
        let models = GgufModel::all(&files);
        assert_eq!(models.iter().map(|model| &*model.files).collect::<Vec<_>>(), [["m.gguf"], ["x/M.GGUF"]]);
    }

    #[test]
    fn parts_make_up_models() {
        let of = |stem: &str, numbers: &[usize], count: usize| {
            numbers.iter().map(|number| format!("{stem}-{number:05}-of-{count:05}.gguf")).collect::<Vec<_>>()
        };
        for (files, models, missing) in [
            (of("m", &[1, 2], 2), 1, vec![]),
            (of("m", &[2, 1], 2), 1, vec![]),
            (of("m", &[1], 1), 1, vec![]),
            (of("m", &[1, 3], 3), 1, vec!["m-00002-of-00003.gguf"]),
            (of("m", &[2, 3], 3), 1, vec!["m-00001-of-00003.gguf"]),
            (of("m", &[1, 2], 3), 1, vec!["m-00003-of-00003.gguf"]),
            ([of("m", &[1, 2], 2), of("n", &[1, 2], 2)].concat(), 2, vec![]),
            ([of("m", &[1, 2], 2), of("m", &[1, 3], 3)].concat(), 2, vec!["m-00002-of-00003.gguf"]),
            (
                [of("a/m", &[1], 2), of("b/m", &[2], 2)].concat(),
                2,
                vec!["a/m-00002-of-00002.gguf", "b/m-00001-of-00002.gguf"],
            ),
            ([of("m", &[1, 2], 2), vec!["m.gguf".into()]].concat(), 2, vec![]),
            (of("m", &[1], 99999), 1, vec!["m-00002-of-99999.gguf"]),
        ] {
            let found = GgufModel::all(&files);
            assert_eq!(found.len(), models, "{files:?}");
            assert_eq!(found.iter().filter_map(GgufModel::missing).collect::<Vec<_>>(), missing, "{files:?}");
        }
        let files = of("BF16/m-BF16", &[1, 2], 2);
        let model = &GgufModel::all(&files)[0];
        for (name, expected) in [
            (Gguf::Tag("BF16"), true),
            (Gguf::Tag("bf16"), true),
            (Gguf::Tag("m-BF16-00001-of-00002.gguf"), true),
            (Gguf::Path("BF16/m-BF16-00001-of-00002.gguf"), true),
            (Gguf::Path("BF16/m-BF16-00002-of-00002.gguf"), true),
            (Gguf::Path("m-BF16-00002-of-00002.gguf"), false),
            (Gguf::Tag("00001"), false),
            (Gguf::Tag("of"), false),
            (Gguf::Tag("F16"), false),
        ] {
            assert_eq!(model.is_named(name), expected, "{name:?}");
        }
    }
}
