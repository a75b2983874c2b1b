//! How all processes log.

use clap::Args;
use serde::{Deserialize, Serialize};

/// How all processes log. What they log is set by the environment variable `LOG_LEVEL`.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// Log JSON lines
    #[arg(long, env)]
    pub json_output: bool,
}

impl Default for LogConfig {
    fn default() -> LogConfig {
        crate::defaults()
    }
}
