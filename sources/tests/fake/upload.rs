//! How the official client uploads: it makes a repository, asks which files are large, sends those to where they are
//! kept, and commits.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{
    Server,
    http::{Answer, Asked},
};

fn answer(value: &Value) -> Answer {
    Answer::new(200, value.to_string()).header("content-type", "application/json")
}

impl Server {
    /// `None` if this is not a step of an upload.
    pub(super) fn upload(&self, asked: &Asked) -> Option<Answer> {
        if asked.method != "POST" {
            return None;
        }
        let path: Vec<&str> = asked.path.trim_start_matches('/').split('/').collect();
        Some(match path[..] {
            ["api", "repos", "create"] => self.create(asked),
            ["api", "validate-yaml"] => answer(&json!({"errors": [], "warnings": []})),
            ["api", "models", _, _, "preupload", _] => preupload(asked),
            [_, _, "info", "lfs", "objects", "batch"] => self.batch(asked),
            ["api", "models", owner, name, "commit", revision] => {
                self.commit_of(asked, &format!("{owner}/{name}"), revision)
            }
            _ => return None,
        })
    }

    fn create(&self, asked: &Asked) -> Answer {
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        let owner = body["organization"].as_str().unwrap();
        let id = format!("{owner}/{}", body["name"].as_str().unwrap());
        let mut state = self.state();
        let repository = state.repositories.entry(id.clone()).or_default();
        repository.commit("main", [(".gitattributes".into(), Vec::new())].into());
        answer(&json!({"id": id, "name": id, "url": format!("{}/{id}", self.url)}))
    }

    fn batch(&self, asked: &Asked) -> Answer {
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        let object = |object: &Value| {
            let href = format!("{}/upload", self.storage);
            json!({"oid": object["oid"], "size": object["size"], "actions": {"upload": {"href": href}}})
        };
        let objects: Vec<Value> = body["objects"].as_array().unwrap().iter().map(object).collect();
        answer(&json!({"transfer": "basic", "objects": objects}))
    }

    fn commit_of(&self, asked: &Asked, id: &str, revision: &str) -> Answer {
        let mut state = self.state();
        let repository = &state.repositories[id];
        let mut files = repository.commits[&repository.revisions[revision]].clone();
        for line in asked.body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let line: Value = serde_json::from_slice(line).unwrap();
            let value = &line["value"];
            let bytes = match line["key"].as_str().unwrap() {
                "file" => BASE64_STANDARD.decode(value["content"].as_str().unwrap()).unwrap(),
                "lfsFile" => state.uploaded[value["oid"].as_str().unwrap()].clone(),
                _ => continue,
            };
            files.insert(value["path"].as_str().unwrap().into(), bytes);
        }
        let sha = state.repositories.get_mut(id).unwrap().commit(revision, files);
        let url = format!("{}/{id}/commit/{sha}", self.url);
        answer(&json!({"success": true, "commitOid": sha, "commitUrl": url, "hookOutput": ""}))
    }
}

fn preupload(asked: &Asked) -> Answer {
    let body: Value = serde_json::from_slice(&asked.body).unwrap();
    let file = |file: &Value| {
        let path = file["path"].as_str().unwrap();
        let mode = if path.ends_with(".safetensors") { "lfs" } else { "regular" };
        json!({"path": path, "uploadMode": mode, "shouldIgnore": false, "oid": null})
    };
    let files: Vec<Value> = body["files"].as_array().unwrap().iter().map(file).collect();
    answer(&json!({"files": files}))
}
