//! A hub on this machine, or what passes questions on to another server, with the faults that a test wants. The hub keeps
//! large files at another address, as the real one does.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part, and fails by panicking")]

mod answers;
mod http;
mod upload;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use sha2::{Digest, Sha256};

pub(crate) use http::Asked;

/// A repository at each of its revisions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Repository {
    /// The commits that names lead to.
    pub(crate) revisions: BTreeMap<String, String>,
    /// The files of each commit.
    pub(crate) commits: BTreeMap<String, Files>,
    /// Nobody else may know of it, if this is not empty.
    pub(crate) readers: BTreeSet<String>,
    /// Its files are kept from all but its readers, its list is not.
    pub(crate) is_gated: bool,
}

/// Contents by their paths.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

impl Repository {
    pub(crate) fn new(files: &[(&str, &[u8])]) -> Repository {
        Repository::default().with("main", files)
    }

    /// Lets `revision` lead to a commit with these files.
    #[must_use]
    pub(crate) fn with(mut self, revision: &str, files: &[(&str, &[u8])]) -> Repository {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        self.commit(revision, files.collect());
        self
    }

    #[must_use]
    pub(crate) fn readable_by(mut self, tokens: &[&str]) -> Repository {
        self.readers = tokens.iter().map(|token| (*token).to_owned()).collect();
        self
    }

    #[must_use]
    pub(crate) fn gated(self) -> Repository {
        Repository { is_gated: true, ..self }
    }

    fn commit(&mut self, revision: &str, files: Files) -> String {
        let all = files.iter().flat_map(|(name, bytes)| [name.as_bytes(), bytes]);
        let sha = hex(all.fold(Sha256::new(), |hash, part| hash.chain_update(part)))[..40].to_owned();
        self.revisions.insert(revision.into(), sha.clone());
        self.revisions.insert(sha.clone(), sha.clone());
        self.commits.insert(sha.clone(), files);
        sha
    }
}

/// The SHA-256 of some bytes.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(Sha256::new().chain_update(bytes))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a question is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    /// The description of a repository.
    Api,
    /// A file, or where it is kept.
    File,
    /// A large file, where it is kept.
    Storage,
}

/// A fault of the hub.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Answers with this status, and repeats the credential in a header, the body and a code.
    Echo(u16),
    /// Takes the question and does not answer.
    Silence,
    /// Closes the connection without an answer.
    Close,
    /// Breaks off after this share of the body.
    Cut(f64),
    /// Sends this share of the body, and then nothing.
    Stall(f64),
    /// Sends one byte after the other, each after a while.
    Drip,
    /// Announces so many bytes, and sends those of the file.
    Length(u64),
    /// Announces no length, and sends this share of the body.
    NoLength(f64),
    /// Sends the file twice over, without a length.
    Twice,
    /// Redirects to the address that was asked for.
    Redirect,
    /// Redirects to this address.
    RedirectTo(String),
    /// Says that the file is of another commit.
    OtherCommit,
    /// Says that the content has another hash.
    OtherHash,
    /// Sends the whole file whatever part is asked for.
    NoRanges,
    /// Sends this instead of a description.
    Text(String),
}

struct Trouble {
    on: On,
    fault: Fault,
    /// How often it is still to occur.
    times: usize,
}

#[derive(Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    /// Tokens that the hub knows.
    tokens: BTreeSet<String>,
    troubles: Vec<Trouble>,
    asked: Vec<Asked>,
    /// Connections that wait for an answer.
    held: Vec<TcpStream>,
    /// The server that answers instead.
    upstream: Option<String>,
    /// What it answers instead, to those with a token that it knows.
    pages: BTreeMap<String, String>,
    /// Large files that are uploaded, by their hashes.
    uploaded: BTreeMap<String, Vec<u8>>,
}

/// A hub, which ends with the process.
#[derive(Clone)]
pub(crate) struct Server {
    state: Arc<Mutex<State>>,
    /// Where it is.
    pub(crate) url: String,
    /// Where large files are.
    pub(crate) storage: String,
}

impl Server {
    pub(crate) fn start() -> Server {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, storage) = (listen(), listen());
        let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let server = Server { state: Arc::default(), url: url(&hub), storage: url(&storage) };
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let server = server.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let (server, stream) = (server.clone(), stream.unwrap());
                    // A client that breaks off is not the test's business.
                    thread::spawn(move || drop(server.answer(stream, is_storage)));
                }
            });
        }
        server
    }

    /// A hub with one repository.
    pub(crate) fn with(id: &str, repository: Repository) -> Server {
        let server = Server::start();
        server.put(id, repository);
        server
    }

    /// Passes on what it is asked: `HEAD` counts as a question for a description, all others as one for a file.
    pub(crate) fn before(upstream: &str) -> Server {
        let server = Server::start();
        server.state().upstream = Some(upstream.into());
        server
    }

    /// Answers a path and query with some text, to those with a token that it knows; it is no hub then.
    pub(crate) fn page(&self, target: &str, text: &str) {
        self.state().pages.insert(target.into(), text.into());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn put(&self, id: &str, repository: Repository) {
        let mut state = self.state();
        state.tokens.extend(repository.readers.iter().cloned());
        state.repositories.insert(id.into(), repository);
    }

    /// Keeps a repository from all but those with one of these tokens.
    pub(crate) fn restrict(&self, id: &str, tokens: &[&str]) {
        let repository = self.state().repositories[id].clone().readable_by(tokens);
        self.put(id, repository);
    }

    /// Lets the hub know a token, which opens nothing.
    pub(crate) fn know(&self, token: &str) {
        self.state().tokens.insert(token.into());
    }

    /// The commit that a revision leads to.
    pub(crate) fn commit(&self, id: &str, revision: &str) -> String {
        self.state().repositories[id].revisions[revision].clone()
    }

    /// Has a fault for so many answers of a kind, after those that it has already.
    pub(crate) fn fail(&self, on: On, fault: Fault, times: usize) {
        self.state().troubles.push(Trouble { on, fault, times });
    }

    /// Has no faults any more.
    pub(crate) fn recover(&self) {
        self.state().troubles.clear();
    }

    /// What it was asked since the last call.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().asked)
    }

    fn fault(&self, on: On) -> Option<Fault> {
        let mut state = self.state();
        let trouble = state.troubles.iter_mut().find(|trouble| trouble.on == on && trouble.times > 0)?;
        trouble.times -= 1;
        Some(trouble.fault.clone())
    }
}
