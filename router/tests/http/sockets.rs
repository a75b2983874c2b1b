//! Clients that are more or less than a client should be.

use std::{net::Ipv4Addr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

/// Deadline of a wait.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// The head of a request with a body of so many bytes, after which the connection is closed.
pub(crate) fn head(path: &str, headers: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
    )
}

/// A connection that has sent a request with a key.
pub(crate) async fn open(address: &str, key: &str, path: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    let head = head(path, &format!("authorization: Bearer {key}\r\n"), body.len());
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    stream
}

/// A connection from one of this machine's addresses: 127.0.0.`from`.
pub(crate) async fn connect_from(address: &str, from: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::new(127, 0, 0, from), 0).into()).unwrap();
    socket.connect(address.parse().unwrap()).await.unwrap()
}

/// All that comes until the end of the connection.
pub(crate) async fn answer(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    timeout(LONG, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

/// The status of an answer.
pub(crate) fn status(answer: &str) -> u16 {
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    status.and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no answer: {answer:?}"))
}
