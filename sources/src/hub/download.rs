//! The bytes of a file, as they come.

use std::{io, path::Path, time::Duration};

use tokio::{
    fs::OpenOptions,
    io::{AsyncWriteExt, BufWriter},
};

use super::{
    HubError,
    client::{Answer, within},
    settings::BYTES,
};
use crate::retry;

/// Bytes that are gathered before they are written.
const GATHERED: usize = 1 << 20;

/// Makes attempts until one succeeds, fails for good, or was not answered: another wait as long as that one is for the
/// caller to decide.
pub(super) async fn repeatedly<T, F: Future<Output = Result<T, HubError>>>(
    what: &str,
    attempt: impl FnMut() -> F,
) -> Result<T, HubError> {
    let is_passing = |error: &HubError| {
        let again = !matches!(error, HubError::TimedOut { .. }) && error.is_passing();
        if again {
            tracing::debug!("{what}: {error}");
        }
        again
    };
    retry::repeatedly(is_passing, attempt).await
}

/// A file that is being written.
pub(super) struct Part<'a> {
    pub(super) path: &'a Path,
    /// Its name, for messages.
    pub(super) name: &'a str,
    /// How long its next bytes may take.
    pub(super) limit: Duration,
}

impl Part<'_> {
    /// Writes what comes behind the bytes before it, which are kept. `progress` is told how many there are.
    pub(super) async fn receive(
        &self,
        answer: Answer,
        mut progress: impl FnMut(u64),
    ) -> Result<(), HubError> {
        let Answer { mut response, size, from, .. } = answer;
        let failed = |source| HubError::Cache { path: self.path.into(), source };
        let length = |received| HubError::Length {
            file: self.name.into(),
            expected: size.unwrap_or_default(),
            received,
        };
        let mut open = OpenOptions::new();
        let open = open.create(true).write(true).truncate(from == 0).append(from > 0).open(self.path);
        let mut writer = BufWriter::with_capacity(GATHERED, open.await.map_err(failed)?);
        let mut received = from;
        progress(received);
        let came = loop {
            match within(self.limit, BYTES.0, self.name, async { Ok(response.chunk().await?) }).await {
                Ok(Some(chunk)) => {
                    received += chunk.len() as u64;
                    if size.is_some_and(|size| received > size) {
                        break Err(length(received));
                    }
                    writer.write_all(&chunk).await.map_err(failed)?;
                    progress(received);
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // What came before a failure is kept for the next attempt.
        writer.flush().await.map_err(failed)?;
        match (came, size) {
            (Err(error @ HubError::Length { .. }), _) => self.discard(error),
            (Ok(()), Some(size)) if size != received => self.discard(length(received)),
            (came, _) => came,
        }
    }

    /// Removes what is of no use.
    pub(super) fn discard(&self, error: HubError) -> Result<(), HubError> {
        match std::fs::remove_file(self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(HubError::Cache { path: self.path.into(), source })
            }
            _ => Err(error),
        }
    }
}
