//! What the hub answers to questions, as it was seen to do.

use std::{io, net::TcpStream};

use serde_json::{Value, json};

use super::{
    Fault, On, Repository, Server,
    http::{Answer, Asked},
    sha256,
};

/// Files from this size on are kept elsewhere.
const LARGE: usize = 1000;

/// Stands for git's hash of a file.
fn git_hash(bytes: &[u8]) -> String {
    sha256(&[bytes, b"of git"].concat())[..40].to_owned()
}

fn is_large(path: &str, bytes: &[u8]) -> bool {
    bytes.len() >= LARGE || [".safetensors", ".bin", ".gguf"].iter().any(|ending| path.ends_with(ending))
}

impl Server {
    pub(super) fn answer(&self, mut stream: TcpStream, is_storage: bool) -> io::Result<()> {
        let asked = Asked::read(&stream)?;
        self.state().asked.push(asked.clone());
        let upstream = self.state().upstream.clone();
        let on = match is_storage {
            true => On::Storage,
            false if upstream.is_some() && asked.method == "HEAD" => On::Api,
            false if upstream.is_some() => On::File,
            false if asked.path.starts_with("/api/") => On::Api,
            false => On::File,
        };
        let fault = self.fault(on);
        match &fault {
            Some(Fault::Close) => return Ok(()),
            Some(Fault::Silence) => {
                self.state().held.push(stream);
                return Ok(());
            }
            _ => {}
        }
        let answer = match upstream {
            Some(upstream) => asked.forward(&upstream)?,
            None if is_storage => self.stored(&asked, fault.as_ref()),
            None => self.asked_for(&asked, fault.as_ref()),
        };
        let answer =
            fault.as_ref().map_or_else(|| answer.clone(), |fault| spoil(answer.clone(), fault, &asked));
        answer.send(&mut stream, &asked.method)?;
        if matches!(fault, Some(Fault::Stall(_))) {
            self.state().held.push(stream);
        }
        Ok(())
    }

    fn asked_for(&self, asked: &Asked, fault: Option<&Fault>) -> Answer {
        if let Some(answer) = self.upload(asked) {
            return answer;
        }
        let is_known = asked.token().is_none_or(|token| self.state().tokens.contains(token));
        if !is_known {
            return Answer::new(401, "")
                .header("x-error-message", "Invalid credentials in Authorization header");
        }
        if !self.state().pages.is_empty() {
            return self.page_of(asked);
        }
        let path: Vec<&str> = asked.path.trim_start_matches('/').split('/').collect();
        match path[..] {
            ["api", "models", owner, name, "revision", ref revision @ ..] => {
                self.description(asked, &format!("{owner}/{name}"), &revision.join("/"))
            }
            ["api", "models", owner, name, "tree", ref revision @ ..] => {
                self.tree(asked, &format!("{owner}/{name}"), &revision.join("/"))
            }
            ["api", "models", owner, name] => self.description(asked, &format!("{owner}/{name}"), "main"),
            [owner, name, "resolve", revision, ref file @ ..] => {
                self.file(asked, &format!("{owner}/{name}"), (revision, &file.join("/")), fault)
            }
            _ => Answer::new(404, ""),
        }
    }

    fn page_of(&self, asked: &Asked) -> Answer {
        let separator = if asked.query.is_empty() { "" } else { "?" };
        let target = format!("{}{separator}{}", asked.path, asked.query);
        match self.state().pages.get(&target) {
            _ if asked.token().is_none() => Answer::new(401, ""),
            Some(text) => Answer::new(200, text.as_bytes()).header("content-type", "application/json"),
            None => Answer::new(404, ""),
        }
    }

    /// A repository, if the caller may know of it.
    fn repository(&self, asked: &Asked, id: &str) -> Result<Repository, Answer> {
        let found = self.state().repositories.get(id).cloned();
        let is_reader =
            |repository: &Repository| asked.token().is_some_and(|token| repository.readers.contains(token));
        let is_public = |repository: &Repository| repository.readers.is_empty() || repository.is_gated;
        found.filter(|found| is_public(found) || is_reader(found)).ok_or_else(|| {
            // Nobody is told whether it exists.
            let status = if asked.token().is_some() { 404 } else { 401 };
            let message =
                if status == 404 { "Repository not found" } else { "Invalid username or password." };
            Answer::new(status, "").header("x-error-message", message).header("x-error-code", "RepoNotFound")
        })
    }

    fn description(&self, asked: &Asked, id: &str, revision: &str) -> Answer {
        let repository = match self.repository(asked, id) {
            Ok(repository) => repository,
            Err(answer) => return answer,
        };
        let Some(commit) = repository.revisions.get(revision) else { return missing("RevisionNotFound") };
        let with_blobs = asked.query.contains("blobs=true");
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let mut sibling = json!({"rfilename": name});
            if with_blobs {
                sibling["size"] = json!(bytes.len());
                sibling["blobId"] = json!(git_hash(bytes));
                if is_large(name, bytes) {
                    sibling["lfs"] =
                        json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 130});
                }
            }
            sibling
        };
        let siblings: Vec<Value> = repository.commits[commit].iter().map(sibling).collect();
        let gated = if repository.is_gated { json!("manual") } else { json!(false) };
        let info = json!({"id": id, "modelId": id, "sha": commit, "private": !repository.readers.is_empty(),
                          "gated": gated, "disabled": false, "tags": [], "downloads": 0, "likes": 0,
                          "siblings": siblings});
        Answer::new(200, info.to_string()).header("content-type", "application/json")
    }

    /// The list of all files, which the official client asks for before it fetches them.
    fn tree(&self, asked: &Asked, id: &str, revision: &str) -> Answer {
        let repository = match self.repository(asked, id) {
            Ok(repository) => repository,
            Err(answer) => return answer,
        };
        let Some(commit) = repository.revisions.get(revision) else { return missing("RevisionNotFound") };
        let entry = |(name, bytes): (&String, &Vec<u8>)| {
            let mut entry =
                json!({"type": "file", "path": name, "size": bytes.len(), "oid": git_hash(bytes)});
            if is_large(name, bytes) {
                entry["lfs"] = json!({"oid": sha256(bytes), "size": bytes.len(), "pointerSize": 130});
            }
            entry
        };
        let entries: Vec<Value> = repository.commits[commit].iter().map(entry).collect();
        Answer::new(200, json!(entries).to_string()).header("content-type", "application/json")
    }

    fn file(&self, asked: &Asked, id: &str, (revision, path): (&str, &str), fault: Option<&Fault>) -> Answer {
        let repository = match self.repository(asked, id) {
            Ok(repository) => repository,
            Err(answer) => return answer,
        };
        let is_reader = asked.token().is_some_and(|token| repository.readers.contains(token));
        if repository.is_gated && !is_reader {
            let status = if asked.token().is_some() { 403 } else { 401 };
            let message = format!("Access to model {id} is restricted.");
            return Answer::new(status, "")
                .header("x-error-code", "GatedRepo")
                .header("x-error-message", message);
        }
        let Some(commit) = repository.revisions.get(revision) else { return missing("RevisionNotFound") };
        let Some(bytes) = repository.commits[commit].get(path) else {
            return missing("EntryNotFound").header("x-repo-commit", commit);
        };
        let commit = if fault == Some(&Fault::OtherCommit) { "0".repeat(40) } else { commit.clone() };
        if !is_large(path, bytes) {
            let etag = git_hash(bytes);
            return part(asked, bytes, fault)
                .header("etag", format!("\"{etag}\""))
                .header("x-repo-commit", commit);
        }
        let hash = if fault == Some(&Fault::OtherHash) { "f".repeat(64) } else { sha256(bytes) };
        let location = format!("{}/{}?X-Amz-Signature=secret-signature", self.storage, sha256(bytes));
        Answer::new(302, "elsewhere")
            .header("location", location)
            .header("x-linked-etag", format!("\"{hash}\""))
            .header("x-linked-size", bytes.len().to_string())
            .header("x-repo-commit", commit)
    }

    /// A large file, to whoever has its signed address.
    fn stored(&self, asked: &Asked, fault: Option<&Fault>) -> Answer {
        if asked.method == "PUT" {
            self.state().uploaded.insert(sha256(&asked.body), asked.body.clone());
            return Answer::new(200, "");
        }
        let state = self.state();
        let commits = state.repositories.values().flat_map(|repository| repository.commits.values());
        let found = commits
            .flat_map(|files| files.values())
            .find(|bytes| asked.path.trim_start_matches('/') == sha256(bytes));
        let signed = asked.query == "X-Amz-Signature=secret-signature";
        match found.filter(|_| signed) {
            Some(bytes) => part(asked, bytes, fault).header("etag", "\"of-the-storage\""),
            None => Answer::new(403, ""),
        }
    }
}

fn missing(code: &str) -> Answer {
    Answer::new(404, "").header("x-error-code", code)
}

/// The part of a file that is asked for.
fn part(asked: &Asked, bytes: &[u8], fault: Option<&Fault>) -> Answer {
    match asked.from().filter(|_| fault != Some(&Fault::NoRanges)) {
        None => Answer::new(200, bytes),
        Some(from) if from >= bytes.len() => Answer::new(416, ""),
        Some(from) => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            Answer::new(206, &bytes[from..]).header("content-range", range)
        }
    }
}

fn spoil(answer: Answer, fault: &Fault, asked: &Asked) -> Answer {
    let share = |share: &f64| Some((answer.body.len() as f64 * share) as usize);
    let here = format!(
        "http://{}{}?{}",
        asked.headers.get("host").map_or("", String::as_str),
        asked.path,
        asked.query
    );
    match fault {
        Fault::Status(status) => Answer::new(*status, "an error page").header("etag", "\"e\""),
        Fault::Echo(status) => {
            let token = asked.headers.get("authorization").cloned().unwrap_or_default();
            Answer::new(*status, token.clone())
                .header("x-error-message", token.clone())
                .header("x-error-code", token)
        }
        Fault::Cut(part) | Fault::Stall(part) => Answer { sent: share(part), ..answer },
        Fault::Drip => Answer { drips: true, ..answer },
        Fault::Length(length) => Answer { length: Some((*length).into()), ..answer },
        Fault::NoLength(part) => Answer { length: Some(-1), sent: share(part), ..answer },
        Fault::Twice => Answer { length: Some(-1), body: [&*answer.body; 2].concat(), ..answer },
        Fault::Redirect => Answer::new(302, "").header("location", here),
        Fault::RedirectTo(location) => Answer::new(302, "").header("location", location),
        Fault::Text(text) => Answer::new(200, text.as_bytes()),
        Fault::Silence | Fault::Close => answer,
        Fault::OtherCommit | Fault::OtherHash | Fault::NoRanges => answer,
    }
}
