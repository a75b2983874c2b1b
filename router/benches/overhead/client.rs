//! Clients that cost as little as possible: they look for the end of a response and nothing else.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The end of a chunked response.
const END: &[u8] = b"\r\n0\r\n\r\n";

/// A field more: a list of records.
const GRAMMAR: &str = r#","guided_json":{"type":"array","minItems":1000,"items":{"type":"object","properties":
    {"name":{"type":"string"},"age":{"type":"integer"},"tags":{"type":"array","items":{"type":"string"}}},
    "required":["name","age","tags"],"additionalProperties":false}}"#;

/// One connection that asks for completions one after the other.
pub(crate) struct Client {
    connection: TcpStream,
    request: Vec<u8>,
    /// Text in the last event but one of every response.
    usage: Vec<u8>,
}

impl Client {
    /// A constrained one asks for JSON that does not end before the answer.
    pub(crate) async fn connect(
        address: SocketAddr,
        prompt: usize,
        output: usize,
        constrained: bool,
    ) -> io::Result<Client> {
        let connection = TcpStream::connect(address).await?;
        connection.set_nodelay(true)?;
        let prompt = vec!["77"; prompt].join(",");
        let body = format!(
            "{{\"prompt\":[{prompt}],\"max_tokens\":{output},\"temperature\":0,\"ignore_eos\":true,\"stream\":true,\
             \"stream_options\":{{\"include_usage\":true}}{}}}",
            if constrained { GRAMMAR } else { "" }
        );
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let usage = format!("\"completion_tokens\":{output}");
        Ok(Client { connection, request: request.into(), usage: usage.into() })
    }

    /// One request; its response has the tokens asked for.
    pub(crate) async fn ask(&mut self) -> io::Result<()> {
        self.connection.write_all(&self.request).await?;
        // Of all that came, the end is enough.
        let mut tail = Vec::with_capacity(1 << 16);
        loop {
            if tail.len() > 1 << 15 {
                tail.drain(..tail.len() - (1 << 10));
            }
            if self.connection.read_buf(&mut tail).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if tail.ends_with(END) {
                break;
            }
        }
        if tail.windows(self.usage.len()).any(|window| window == self.usage) {
            return Ok(());
        }
        Err(io::Error::other(String::from_utf8_lossy(&tail).into_owned()))
    }
}
