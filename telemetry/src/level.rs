//! The levels that `LOG_LEVEL` asks for.

use std::env;

use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Why `LOG_LEVEL` was refused.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    /// A word that names no level.
    #[error("{0:?} is not a level: use error, warn, info, debug, trace or off, or TARGET=LEVEL")]
    Unknown(String),
    /// A target that cannot be read.
    #[error("{asked:?}: {source}")]
    Target {
        /// The value.
        asked: String,
        /// The cause.
        source: tracing_subscriber::filter::ParseError,
    },
}

/// The filter that the variable asks for; without a value it asks for `info`.
pub(crate) fn filter() -> Result<EnvFilter, LevelError> {
    let asked = env::var_os("LOG_LEVEL").unwrap_or_default().to_string_lossy().trim().to_owned();
    parse(if asked.is_empty() { "info" } else { &asked })
}

/// Reads a list of levels, each for everything or for one target. A word that is no level would be taken for a target
/// by the filter, and silence everything else.
fn parse(asked: &str) -> Result<EnvFilter, LevelError> {
    let directive = |directive: &str| {
        let (target, word) = directive.rsplit_once('=').map_or((None, directive), |(t, l)| (Some(t), l));
        let level = level(word.trim()).ok_or_else(|| LevelError::Unknown(word.trim().to_owned()))?;
        Ok(target.map_or_else(|| level.to_string(), |target| format!("{}={level}", target.trim())))
    };
    let directives = asked.split(',').map(directive).collect::<Result<Vec<_>, _>>()?.join(",");
    EnvFilter::try_new(directives).map_err(|source| LevelError::Target { asked: asked.to_owned(), source })
}

/// The level of a name, in either case: `tracing`'s names, and those of Python's levels.
fn level(name: &str) -> Option<LevelFilter> {
    let level = match &*name.to_ascii_lowercase() {
        "off" => LevelFilter::OFF,
        "error" | "critical" | "fatal" => LevelFilter::ERROR,
        "warn" | "warning" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => return None,
    };
    Some(level)
}
