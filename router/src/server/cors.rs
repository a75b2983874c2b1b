//! What pages of other origins may do, which browsers ask for.

use axum::http::{HeaderName, HeaderValue, Method, Uri};
use config::RouterConfig;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, Any, CorsLayer, ExposeHeaders};

use super::StartError;

/// The headers of responses that a page may want. Browsers take "*" for none of them where credentials are allowed.
const OWN: [&str; 10] = [
    "retry-after",
    "x-request-id",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-prompt-tokens",
    "x-generated-tokens",
    "x-model-id",
    "x-adapter-id",
];

/// The CORS layer; none if no origin is allowed.
pub(super) fn layer(config: &RouterConfig) -> Result<Option<CorsLayer>, StartError> {
    let (origins, credentials) = (&config.cors_allow_origin, config.cors_allow_credentials);
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = match origins.iter().any(|origin| origin == "*") {
        // Beside credentials no "*" is allowed.
        true if credentials => AllowOrigin::mirror_request(),
        true => AllowOrigin::from(Any),
        false => AllowOrigin::list(
            origins.iter().map(|origin| parse_origin(origin)).collect::<Result<Vec<_>, _>>()?,
        ),
    };
    let refused = |flag| move |text: &String| StartError::Cors { flag, text: text.clone() };
    let headers = |flag, names: &[String]| {
        let parse = |name: &String| name.parse::<HeaderName>().map_err(|_| refused(flag)(name));
        names.iter().map(parse).collect::<Result<Vec<_>, _>>()
    };
    let methods = config.cors_allow_method.iter().map(|name| {
        let known = name.to_uppercase().parse::<Method>();
        known.map_err(|_| refused("cors-allow-method")(name))
    });
    let methods = match methods.collect::<Result<Vec<_>, _>>()? {
        none if none.is_empty() && credentials => AllowMethods::mirror_request(),
        none if none.is_empty() => Any.into(),
        methods => methods.into(),
    };
    // To browsers "*" does not include `Authorization`, so the headers that a page asks for are named.
    let allow = match headers("cors-allow-header", &config.cors_allow_header)? {
        none if none.is_empty() => AllowHeaders::mirror_request(),
        headers => headers.into(),
    };
    // Without any a page cannot read `retry-after` and `x-request-id`.
    let expose = match headers("cors-expose-header", &config.cors_expose_header)? {
        none if none.is_empty() && credentials => ExposeHeaders::list(OWN.map(HeaderName::from_static)),
        none if none.is_empty() => Any.into(),
        headers => headers.into(),
    };
    let layer = CorsLayer::new().allow_origin(allowed).allow_methods(methods).allow_headers(allow);
    Ok(Some(layer.expose_headers(expose).allow_credentials(credentials)))
}

/// Reads an origin as browsers send theirs. Any other text would never be equal to one.
fn parse_origin(text: &str) -> Result<HeaderValue, StartError> {
    let is_origin = |uri: &Uri| {
        let (scheme, authority) = (uri.scheme_str()?, uri.authority()?.as_str());
        (!authority.contains('@') && format!("{scheme}://{authority}").eq_ignore_ascii_case(text))
            .then_some(())
    };
    let known = text == "null" || text.parse().is_ok_and(|uri| is_origin(&uri).is_some());
    let value = HeaderValue::from_str(&text.to_ascii_lowercase()).ok().filter(|_| known);
    value.ok_or_else(|| StartError::Origin(text.to_owned()))
}
