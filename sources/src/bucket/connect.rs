//! Connections to buckets, by the variables that the clouds' own clients read.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStore, Result, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder,
};

use url::Url;

use super::{BucketSettings, Place};
use crate::SourceKind;

/// Variables of the environment that say how to reach buckets, credentials among them.
#[derive(Clone, Default)]
pub struct Variables(BTreeMap<String, String>);

/// Beginnings of their names.
const PREFIXES: [&str; 4] = ["AWS_", "GOOGLE_", "AZURE_", "PREDIBASE_"];
const NAMES: [&str; 2] = ["S3_ENDPOINT_URL", "R2_ACCOUNT_ID"];

impl Variables {
    /// Those of this process.
    pub fn from_env() -> Variables {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        std::env::vars_os().filter_map(text).collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Those of one cloud, in the form that its settings are named by.
    fn of(&self, prefix: &str) -> impl Iterator<Item = (String, &str)> {
        let own = self.0.iter().filter(move |(name, _)| name.starts_with(prefix));
        own.map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
    }

    /// An address that is not the cloud's own.
    pub(crate) fn endpoint(&self, kind: SourceKind) -> Option<String> {
        let any = |names: &[&str]| names.iter().find_map(|name| self.get(name)).map(str::to_owned);
        match kind {
            SourceKind::S3 => {
                let r2 = |account| format!("https://{account}.r2.cloudflarestorage.com");
                any(&["S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
                    .or_else(|| self.get("R2_ACCOUNT_ID").map(r2))
            }
            SourceKind::Gs => any(&["GOOGLE_BASE_URL"]),
            SourceKind::Az => {
                any(&["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_ACCOUNT_NAME"])
            }
            _ => None,
        }
    }
}

impl FromIterator<(String, String)> for Variables {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(all: T) -> Variables {
        let is_ours =
            |name: &str| NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        Variables(all.into_iter().filter(|(name, value)| is_ours(name) && !value.is_empty()).collect())
    }
}

impl fmt::Debug for Variables {
    /// The names alone: some values are secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Makes a connection, which is used when something is asked for.
pub(crate) fn connect(place: &Place, settings: &BucketSettings) -> Result<Arc<dyn ObjectStore>> {
    let variables = &settings.variables;
    let endpoint = variables.endpoint(place.kind);
    if let Some(endpoint) = endpoint.as_ref().filter(|_| place.kind != SourceKind::Az) {
        // The client panics later, when it signs a question to such an address.
        let url = Url::parse(endpoint).ok().filter(Url::has_host);
        let source = "the address of the bucket's server is not a URL".into();
        url.ok_or(object_store::Error::Generic { store: place.kind.name(), source })?;
    }
    let is_plain = endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    let options = options(settings)?.with_allow_http(is_plain);
    let retries = retries(settings);
    Ok(match place.kind {
        SourceKind::Gs => {
            let builder = GoogleCloudStorageBuilder::new().with_bucket_name(&place.bucket);
            let builder =
                variables.of("GOOGLE_").fold(builder, |builder, (name, value)| match name.parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder,
                });
            Arc::new(builder.with_client_options(options).with_retry(retries).build()?)
        }
        SourceKind::Az => {
            let builder = MicrosoftAzureBuilder::new().with_container_name(&place.bucket);
            let builder = variables.of("AZURE_").fold(builder, |builder, (name, value)| match name.parse() {
                Ok(key) => builder.with_config(key, value),
                Err(_) => builder,
            });
            Arc::new(builder.with_client_options(options).with_retry(retries).build()?)
        }
        _ => {
            let builder = AmazonS3Builder::new().with_bucket_name(&place.bucket);
            let builder = variables.of("AWS_").fold(builder, |builder, (name, value)| match name.parse() {
                Ok(key) => builder.with_config(key, value),
                Err(_) => builder,
            });
            let builder = match endpoint {
                Some(endpoint) => builder.with_endpoint(endpoint),
                None => builder,
            };
            Arc::new(builder.with_client_options(options).with_retry(retries).build()?)
        }
    })
}

fn options(settings: &BucketSettings) -> Result<ClientOptions> {
    let roots = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter();
    let roots: Vec<_> = roots.map(|root| Certificate::from_der(root)).collect::<Result<_>>()?;
    let options = ClientOptions::new()
        // A limit on the whole would be one on the size of files.
        .with_timeout_disabled()
        .with_connect_timeout(settings.answer)
        .with_read_timeout(settings.bytes);
    // Besides those of the system, which small images do not have.
    Ok(roots.into_iter().fold(options, ClientOptions::with_root_certificate))
}

fn retries(settings: &BucketSettings) -> RetryConfig {
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(250),
        max_backoff: Duration::from_secs(4),
        base: 2.0,
    };
    RetryConfig { backoff, max_retries: 3, retry_timeout: settings.answer }
}
