//! Where the modules of a decoder are in a model that holds it beside other parts, such as a vision tower.

/// How a model names the modules of its decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nesting {
    /// The decoder is the model: `model.layers`, `lm_head`.
    None,
    /// transformers since 4.52, by the name of the decoder: `model.language_model.layers`, `lm_head`.
    Inner(&'static str),
    /// transformers before: `language_model.model.layers`, `language_model.lm_head`.
    Outer,
}

/// The decoder's name in [`Nesting::Outer`].
const OUTER: &str = "language_model";

impl Nesting {
    /// All but the first kind.
    pub(crate) const NESTED: [Nesting; 3] =
        [Nesting::Inner("language_model"), Nesting::Inner("text_model"), Nesting::Outer];

    /// The nesting of the first of these paths that has one.
    pub(crate) fn of<'a>(mut paths: impl Iterator<Item = &'a str>) -> Nesting {
        let nesting = |path: &str| Nesting::NESTED.into_iter().find(|nesting| nesting.holds(path));
        paths.find_map(nesting).unwrap_or(Nesting::None)
    }

    /// Whether a path is one of the decoder's.
    fn holds(self, path: &str) -> bool {
        let (path, name) = match self {
            Nesting::None => return true,
            Nesting::Inner(name) => (path.strip_prefix("model."), name),
            Nesting::Outer => (Some(path), OUTER),
        };
        path.and_then(|path| path.strip_prefix(name)).is_some_and(|rest| rest.starts_with('.'))
    }

    /// The path of a module that has the path `path` in a decoder that is the model, where `base` holds all but the
    /// output projection.
    pub(crate) fn path(self, base: &str, path: &str) -> String {
        match self {
            Nesting::None => path.into(),
            Nesting::Inner(name) => match path.strip_prefix(base) {
                Some(rest) if rest.is_empty() || rest.starts_with('.') => format!("model.{name}{rest}"),
                _ => path.into(),
            },
            Nesting::Outer => format!("{OUTER}.{path}"),
        }
    }

    /// The modules that hold the decoder, and have no weights of their own.
    pub(crate) fn holders(self) -> &'static [&'static str] {
        match self {
            Nesting::None => &[],
            Nesting::Inner(_) => &["model"],
            Nesting::Outer => &[OUTER],
        }
    }
}

/// Parts that models have beside their decoder.
const BESIDE: [&str; 7] = [
    "vision_tower",
    "vision_model",
    "image_tower",
    "video_tower",
    "multi_modal_projector",
    "connector",
    "image_newline",
];

/// Whether a path leads to a part of a model beside its decoder.
pub(crate) fn is_beside(path: &str) -> bool {
    let first = path.strip_prefix("model.").unwrap_or(path).split('.').next();
    first.is_some_and(|first| BESIDE.contains(&first))
}
