//! What the headers of LoRAX's responses have in common.

use std::fmt::Display;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::server::App;

/// The value of `x-compute-type`; `None` while there is no session.
pub(super) fn compute_type(app: &App) -> Option<&'static str> {
    app.engine.info().map(|info| if info.device == "cpu" { "cpu+optimized" } else { "gpu+optimized" })
}

/// Adds a header, unless its value is one that no header can have.
pub(super) fn insert(headers: &mut HeaderMap, name: &'static str, value: impl Display) {
    if let Ok(value) = HeaderValue::try_from(value.to_string()) {
        headers.insert(HeaderName::from_static(name), value);
    }
}
