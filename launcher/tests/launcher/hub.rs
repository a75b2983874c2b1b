//! A hub on this machine: the two routes that a download needs, over repositories that a test writes.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::{Value, json};

/// A repository at each of its revisions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Repository {
    /// Commits by the names that lead to them.
    pub(crate) revisions: BTreeMap<String, String>,
    /// Files of each commit.
    pub(crate) commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

impl Repository {
    /// A repository whose `main` has these files.
    pub(crate) fn new(files: &[(&str, &str)]) -> Repository {
        Repository::default().with("main", "c0", files)
    }

    /// Lets `revision` lead to a commit with these files.
    pub(crate) fn with(mut self, revision: &str, commit: &str, files: &[(&str, &str)]) -> Repository {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect();
        self.revisions.insert(revision.into(), commit.into());
        self.revisions.insert(commit.into(), commit.into());
        self.commits.insert(commit.into(), files);
        self
    }
}

/// A fault of the hub.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Trouble {
    /// Answers with this status.
    Status(&'static str),
    /// Takes questions and does not answer.
    Silence,
    /// Says what it has, but closes the connection when it is asked for a file.
    NoFiles,
    /// Says what it has, but answers with this status when it is asked for a file.
    Files(&'static str),
    /// Sends half of a file, and then nothing.
    Stall,
}

struct State {
    id: String,
    repository: Mutex<Repository>,
    token: Option<String>,
    trouble: Mutex<Option<Trouble>>,
    /// Connections that wait for an answer, or for the rest of one.
    unanswered: Mutex<Vec<TcpStream>>,
    /// Files whose next answers break off half way, as often as they are named.
    breaks: Mutex<Vec<String>>,
    /// Another hub, to which questions for files are redirected.
    elsewhere: Mutex<Option<String>>,
    /// Credentials that came with questions.
    credentials: Mutex<Vec<String>>,
    asked: Mutex<Vec<String>>,
    /// First bytes of the parts of files that were asked for.
    resumed: Mutex<Vec<usize>>,
}

/// Serves one repository; ends with the process.
pub(crate) struct Hub {
    state: Arc<State>,
    pub(crate) url: String,
}

impl Hub {
    pub(crate) fn start(id: &str, repository: Repository) -> Hub {
        Hub::start_with(id, repository, None)
    }

    /// One that wants a token.
    pub(crate) fn start_with(id: &str, repository: Repository, token: Option<&str>) -> Hub {
        let state = Arc::new(State {
            id: id.into(),
            repository: Mutex::new(repository),
            token: token.map(str::to_owned),
            trouble: Mutex::default(),
            unanswered: Mutex::default(),
            breaks: Mutex::default(),
            elsewhere: Mutex::default(),
            credentials: Mutex::default(),
            asked: Mutex::default(),
            resumed: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that breaks off is not the test's business.
                let _ = answer(&serving, stream.unwrap());
            }
        });
        Hub { state, url }
    }

    pub(crate) fn replace(&self, repository: Repository) {
        *self.state.repository.lock().unwrap() = repository;
    }

    /// Is in trouble from now on.
    pub(crate) fn fail(&self, trouble: Trouble) {
        *self.state.trouble.lock().unwrap() = Some(trouble);
    }

    /// Is in trouble no more.
    pub(crate) fn recover(&self) {
        *self.state.trouble.lock().unwrap() = None;
    }

    /// Breaks off the next answers for these files.
    pub(crate) fn break_off(&self, files: &[&str]) {
        self.state.breaks.lock().unwrap().extend(files.iter().map(|file| (*file).to_owned()));
    }

    /// Redirects questions for files to another hub, and says what the hash of their content is.
    pub(crate) fn redirect_to(&self, other: &Hub) {
        *self.state.elsewhere.lock().unwrap() = Some(other.url.clone());
    }

    /// Credentials that came with questions.
    pub(crate) fn credentials(&self) -> Vec<String> {
        self.state.credentials.lock().unwrap().clone()
    }

    /// Positions from which the rest of a file was asked for.
    pub(crate) fn resumed(&self) -> Vec<usize> {
        self.state.resumed.lock().unwrap().clone()
    }

    /// Paths asked for since the last call, without what is behind a question mark.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.asked.lock().unwrap())
    }
}

/// Answers one request of a connection and closes it.
fn answer(state: &State, mut stream: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let target = request.split(' ').nth(1).unwrap_or_default();
    let path = target.split('?').next().unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    state.asked.lock().unwrap().push(path.clone());
    state.credentials.lock().unwrap().extend(headers.get("authorization").cloned());
    match *state.trouble.lock().unwrap() {
        Some(Trouble::Status(status)) => return respond(&mut stream, status, &[], b""),
        Some(Trouble::Silence) => {
            state.unanswered.lock().unwrap().push(stream);
            return Ok(());
        }
        Some(Trouble::Files(status)) if path.contains("/resolve/") => {
            return respond(&mut stream, status, &[("etag", "\"e\"".into())], b"an error page");
        }
        Some(Trouble::NoFiles) if path.contains("/resolve/") => return Ok(()),
        _ => {}
    }
    let header = |name: &str| headers.get(name).map(String::as_str);
    let expected = state.token.as_ref().map(|token| format!("Bearer {token}"));
    if expected.is_some() && header("authorization") != expected.as_deref() {
        return respond(&mut stream, "401 Unauthorized", &[], b"");
    }
    match find(state, &path) {
        None => respond(&mut stream, "404 Not Found", &[], b""),
        Some(Found::Info(info)) => respond(&mut stream, "200 OK", &[], info.to_string().as_bytes()),
        Some(Found::File { name, commit, bytes }) => {
            file(state, &mut stream, (&name, &commit), &bytes, header("range"))
        }
    }
}

enum Found {
    Info(Value),
    File { name: String, commit: String, bytes: Vec<u8> },
}

fn find(state: &State, path: &str) -> Option<Found> {
    let repository = state.repository.lock().unwrap();
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{}/revision/", state.id)) {
        let commit = repository.revisions.get(revision)?;
        let files = repository.commits[commit].iter();
        let files =
            files.map(|(name, bytes)| json!({"rfilename": name, "size": bytes.len(), "blobId": "b0"}));
        return Some(Found::Info(json!({"sha": commit, "siblings": files.collect::<Vec<_>>()})));
    }
    let (revision, name) = path.strip_prefix(&format!("/{}/resolve/", state.id))?.split_once('/')?;
    let commit = repository.revisions.get(revision)?;
    let bytes = repository.commits[commit].get(name)?.clone();
    Some(Found::File { name: name.into(), commit: commit.clone(), bytes })
}

/// The part of a file that is asked for, as the hub does: with its commit and the hash of its content.
fn file(
    state: &State,
    stream: &mut TcpStream,
    (name, commit): (&str, &str),
    bytes: &[u8],
    range: Option<&str>,
) -> std::io::Result<()> {
    let first =
        range.map(|range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap());
    let part = &bytes[first.unwrap_or(0)..];
    // FNV-1a: equal names for equal content alone.
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    if let Some(other) = &*state.elsewhere.lock().unwrap() {
        let location = format!("{other}/{}/resolve/{commit}/{name}", state.id);
        let linked = format!("\"linked-{name}\"");
        let headers =
            [("location", location), ("x-linked-etag", linked), ("x-linked-size", bytes.len().to_string())];
        return respond(stream, "302 Found", &headers, b"elsewhere");
    }
    let mut headers = vec![("x-repo-commit", commit.to_owned()), ("etag", format!("\"{hash:x}\""))];
    let status = if let Some(first) = first {
        state.resumed.lock().unwrap().push(first);
        headers.push(("content-range", format!("bytes {first}-{}/{}", bytes.len() - 1, bytes.len())));
        "206 Partial Content"
    } else {
        "200 OK"
    };
    let mut breaks = state.breaks.lock().unwrap();
    if let Some(next) = breaks.iter().position(|file| file == name) {
        breaks.remove(next);
        return half(stream, status, &headers, part);
    }
    if part.len() > 1 && matches!(*state.trouble.lock().unwrap(), Some(Trouble::Stall)) {
        state.unanswered.lock().unwrap().push(stream.try_clone()?);
        return half(stream, status, &headers, part);
    }
    respond(stream, status, &headers, part)
}

fn half(
    stream: &mut TcpStream,
    status: &str,
    headers: &[(&str, String)],
    part: &[u8],
) -> std::io::Result<()> {
    head(stream, status, headers, part.len())?;
    stream.write_all(&part[..part.len() / 2])
}

fn head(
    stream: &mut TcpStream,
    status: &str,
    headers: &[(&str, String)],
    length: usize,
) -> std::io::Result<()> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n")
}

fn respond(
    stream: &mut TcpStream,
    status: &str,
    headers: &[(&str, String)],
    body: &[u8],
) -> std::io::Result<()> {
    head(stream, status, headers, body.len())?;
    stream.write_all(body)
}
