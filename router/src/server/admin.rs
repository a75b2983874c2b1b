//! The routes that register and remove adapters, and who may use them.

use axum::http::Method;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Routes of controllers, beside `/v1/adapters` and what is below it.
const ROUTES: [&str; 4] =
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_adapter/load", "/v1/lora_adapter/unload"];

/// The administrator's key, if there is one.
pub(super) struct Admin {
    hash: Option<[u8; 32]>,
}

impl Admin {
    pub(super) fn new(token: Option<&SecretString>) -> Admin {
        Admin { hash: token.map(|token| Sha256::digest(token.expose_secret()).into()) }
    }

    /// Returns whether a caller is let in to the routes of administration as anybody else is.
    pub(super) fn is_anybody(&self) -> bool {
        self.hash.is_none()
    }

    /// Returns whether a caller shows the key. The time that this takes tells nothing about it.
    pub(super) fn shows(&self, bearer: Option<&str>) -> bool {
        let shown: Option<[u8; 32]> = bearer.map(|bearer| Sha256::digest(bearer).into());
        match (&self.hash, &shown) {
            (Some(hash), Some(shown)) => bool::from(hash.ct_eq(shown)),
            _ => false,
        }
    }
}

/// Returns whether a path is one of administration.
pub(super) fn is_managing(path: &str) -> bool {
    let below = path.strip_prefix("/v1/adapters");
    below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) || ROUTES.contains(&path)
}

/// Returns whether the administrator's key opens a route that is not one of administration: controllers look there for
/// what they have loaded, and metrics tell the administrator more.
pub(super) fn is_list(method: &Method, path: &str) -> bool {
    matches!(*method, Method::GET | Method::HEAD) && matches!(path, "/v1/models" | "/metrics")
}
