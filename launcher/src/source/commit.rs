//! The files of one commit, fetched for as long as the hub keeps sending.

use std::{
    io,
    path::PathBuf,
    sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use hf_hub::{
    Cache, Repo,
    api::{
        Progress,
        sync::{Api, ApiError},
    },
};
use indicatif::{ProgressBar, ProgressStyle};

/// A repository at a commit.
pub(super) struct Commit {
    pub(super) api: Api,
    pub(super) repo: Repo,
    /// What the hub gets to send the next bytes of a file, the first ones after its headers and a wait for whoever
    /// fetches the same file.
    pub(super) patience: Duration,
}

/// How a download goes on.
enum News {
    Bytes,
    End(Result<PathBuf, ApiError>),
}

impl Commit {
    /// Where a file is in the cache, into which it is fetched if it is not there.
    pub(super) fn get(&self, file: &str) -> Result<PathBuf, ApiError> {
        if let Some(path) = Cache::from_env().repo(self.repo.clone()).get(file) {
            return Ok(path);
        }
        let (news, received) = sync_channel(1);
        let (repo, name) = (self.api.repo(self.repo.clone()), file.to_owned());
        // Reads of hf-hub's client may take for ever, and it takes no other client: a thread that hangs stays until the
        // process ends.
        thread::Builder::new().name("download".into()).spawn(move || {
            let result = repo.download_with_progress(&name, Watched { bar: bar(), news: news.clone() });
            // Nobody listens any more if it took too long.
            let _ = news.send(News::End(result));
        })?;
        loop {
            match received.recv_timeout(self.patience) {
                Ok(News::Bytes) => {}
                Ok(News::End(result)) => return result,
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = self.patience.as_secs();
                    let name = super::BYTES.0;
                    let message = format!("while waiting for {file}: nothing came for {seconds} s ({name})");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message).into());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other(format!("the download of {file} panicked")).into());
                }
            }
        }
    }
}

/// Shows how far a download is, and tells that it goes on.
struct Watched {
    bar: ProgressBar,
    news: SyncSender<News>,
}

impl Progress for Watched {
    fn init(&mut self, size: usize, file: &str) {
        self.bar.set_length(size as u64);
        self.bar.set_position(0);
        self.bar.set_message(file.to_owned());
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
        // Where there is no room, news wait already.
        let _ = self.news.try_send(News::Bytes);
    }

    fn finish(&mut self) {
        self.bar.finish();
    }
}

fn bar() -> ProgressBar {
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} ({eta})");
    let bar = ProgressBar::new(0);
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}
