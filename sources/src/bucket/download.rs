//! The bytes of an object, as they come.

use std::{fs, path::Path, time::Duration};

use futures::StreamExt;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, path::Path as Key};
use tokio::{
    fs::OpenOptions,
    io::{AsyncWriteExt, BufWriter},
    time::timeout,
};

use super::Failure;
use crate::{AdapterFile, retry::repeatedly};

/// Bytes that are gathered before they are written.
const GATHERED: usize = 1 << 20;

/// An object that is being fetched.
pub(crate) struct Download<'a> {
    pub(crate) store: &'a dyn ObjectStore,
    pub(crate) file: &'a AdapterFile,
    pub(crate) path: &'a Path,
    /// How long its next bytes may take.
    pub(crate) limit: Duration,
}

impl Download<'_> {
    /// Fetches it, and goes on where it was when the answer breaks off. A question that fails has been repeated by the
    /// client.
    pub(crate) async fn run(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<(), Failure> {
        // `None`: it broke off.
        let attempt = || async {
            match self.attempt(progress).await {
                Ok(true) => return Ok(()),
                Ok(false) => tracing::debug!("{}: its bucket broke off", self.file.name),
                Err(failure) => return Err(Some(failure)),
            }
            Err(None)
        };
        let broke_off = || Failure::Unavailable("its bucket broke off again and again".into());
        repeatedly(Option::is_none, attempt).await.map_err(|failure| failure.unwrap_or_else(broke_off))
    }

    /// Fetches what is missing. Returns whether it is all.
    async fn attempt(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<bool, Failure> {
        let failed = |source| Failure::Io { path: self.path.into(), source };
        let from = fs::metadata(self.path).map_or(0, |part| part.len());
        let mut open = OpenOptions::new();
        let open = open.create(true).append(true).open(self.path);
        let mut writer = BufWriter::with_capacity(GATHERED, open.await.map_err(failed)?);
        if from == self.file.bytes {
            return Ok(true);
        }
        let (mut chunks, mut received) = (self.ask(from).await?.into_stream(), from);
        let came = loop {
            match timeout(self.limit, chunks.next()).await {
                Ok(Some(Ok(chunk))) => {
                    received += chunk.len() as u64;
                    if received > self.file.bytes {
                        return Err(Failure::Changed);
                    }
                    writer.write_all(&chunk).await.map_err(failed)?;
                    progress(received);
                }
                Ok(Some(Err(_)) | None) => break Ok(received == self.file.bytes),
                Err(_) => break Err(Failure::TimedOut(self.limit)),
            }
        };
        // What came is kept for the next attempt.
        writer.flush().await.map_err(failed)?;
        came
    }

    /// Asks for the version that was found, from a byte on.
    async fn ask(&self, from: u64) -> Result<GetResult, Failure> {
        let key = Key::parse(&self.file.key).map_err(|_| Failure::NotFound)?;
        let range = (from > 0).then_some(GetRange::Offset(from));
        let options = GetOptions { if_match: self.file.tag.clone(), range, ..GetOptions::default() };
        let asked = timeout(self.limit, self.store.get_opts(&key, options)).await;
        let answer = asked.map_err(|_| Failure::TimedOut(self.limit))??;
        let known = self.file.tag.as_ref();
        let is_other = answer.meta.e_tag.as_ref().zip(known).is_some_and(|(tag, known)| tag != known);
        if answer.meta.size != self.file.bytes || is_other {
            return Err(Failure::Changed);
        }
        Ok(answer)
    }
}
