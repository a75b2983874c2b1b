//! Requests and answers, one a connection.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    sync::mpsc,
    time::Duration,
};

/// A request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asked {
    pub(crate) method: String,
    /// The path, without the query. Slashes of a revision are spelt out.
    pub(crate) path: String,
    pub(crate) query: String,
    /// By names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Asked {
    /// The token that is shown.
    pub(crate) fn token(&self) -> Option<&str> {
        self.headers.get("authorization")?.strip_prefix("Bearer ")
    }

    /// Asks somebody else the same.
    pub(super) fn forward(&self, to: &str) -> io::Result<Answer> {
        let mut stream = TcpStream::connect(to.trim_start_matches("http://"))?;
        let mut head = format!("{} {}?{} HTTP/1.1\r\n", self.method, self.path, self.query);
        let skipped = ["connection", "content-length", "transfer-encoding"];
        for (name, value) in self.headers.iter().filter(|(name, _)| !skipped.contains(&name.as_str())) {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("connection: close\r\ncontent-length: {}\r\n\r\n", self.body.len());
        stream.write_all(&[head.as_bytes(), &self.body].concat())?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let mut answer = Answer { status, ..Answer::default() };
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            match &*name.to_lowercase() {
                "connection" => {}
                "content-length" => answer.length = value.parse().ok(),
                name => answer.headers.push((name.to_owned(), value.to_owned())),
            }
        }
        reader.read_to_end(&mut answer.body)?;
        Ok(answer)
    }

    /// The first byte that is asked for.
    pub(crate) fn from(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }

    pub(super) fn read(stream: &TcpStream) -> io::Result<Asked> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = || {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            Ok::<_, io::Error>(line.trim_end().to_owned())
        };
        let first = line()?;
        let mut words = first.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut asked = Asked {
            method: method.into(),
            path: path.replace("%2F", "/"),
            query: query.into(),
            ..Asked::default()
        };
        loop {
            let header = line()?;
            let Some((name, value)) = header.split_once(": ") else { break };
            asked.headers.insert(name.to_lowercase(), value.to_owned());
        }
        let header = |name: &str| asked.headers.get(name).map_or("", String::as_str);
        if header("transfer-encoding") == "chunked" {
            asked.body = chunks(&mut reader)?;
        } else {
            asked.body = vec![0; header("content-length").parse().unwrap_or(0)];
            reader.read_exact(&mut asked.body)?;
        }
        Ok(asked)
    }
}

fn chunks(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let length = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
        let mut chunk = vec![0; length + 2];
        reader.read_exact(&mut chunk)?;
        if length == 0 {
            return Ok(body);
        }
        body.extend_from_slice(&chunk[..length]);
    }
}

/// An answer.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    /// The length that is announced, if it is not that of the body; a negative one is none.
    pub(super) length: Option<i128>,
    /// The bytes of the body that are sent.
    pub(super) sent: Option<usize>,
    pub(super) drips: bool,
}

impl Answer {
    pub(super) fn new(status: u16, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status, body: body.into(), ..Answer::default() }
    }

    #[must_use]
    pub(super) fn header(mut self, name: &str, value: impl Into<String>) -> Answer {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Sends it; the body is left out of an answer to `HEAD`.
    pub(super) fn send(&self, stream: &mut TcpStream, method: &str) -> io::Result<()> {
        let mut head = format!("HTTP/1.1 {} Of A Hub\r\nconnection: close\r\n", self.status);
        let length = self.length.unwrap_or(self.body.len() as i128);
        if length >= 0 {
            head += &format!("content-length: {length}\r\n");
        }
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes())?;
        if method == "HEAD" {
            return Ok(());
        }
        let body = &self.body[..self.sent.unwrap_or(self.body.len())];
        if !self.drips {
            return stream.write_all(body);
        }
        let (_never, pause) = mpsc::sync_channel::<()>(0);
        for byte in body {
            stream.write_all(std::slice::from_ref(byte))?;
            stream.flush()?;
            let _ = pause.recv_timeout(Duration::from_millis(20));
        }
        Ok(())
    }
}
