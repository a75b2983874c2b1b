//! What all questions over HTTP and all downloads have in common.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Certificate, Client, header::HeaderValue, redirect::Policy};
use secrecy::{ExposeSecret, SecretString};

/// A client that follows no redirects: only who is asked gets the token.
pub(crate) fn client(connect_timeout: Duration) -> reqwest::Result<Client> {
    // Besides those of the system, which small images do not have.
    let roots = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter();
    let roots: Vec<_> = roots.map(|root| Certificate::from_der(root)).collect::<Result<_, _>>()?;
    Client::builder()
        .tls_certs_merge(roots)
        .connect_timeout(connect_timeout)
        .redirect(Policy::none())
        .user_agent(concat!("lorax/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// The header that shows a token, unless it has characters that no token has.
pub(crate) fn bearer(token: &SecretString) -> Option<HeaderValue> {
    let token = token.expose_secret();
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Shows how far a download is, where stderr is a terminal.
pub(crate) fn bar(file: &str, size: u64, from: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} ({eta})");
    let bar = ProgressBar::new(size).with_message(file.to_owned()).with_position(from);
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}
