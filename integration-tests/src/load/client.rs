//! Sends one request and notes when each token came.

use std::time::{Duration, Instant};

use anyhow::ensure;
use futures::StreamExt;
use serde_json::{Value, json};

use super::workload::Ask;

/// A client of one server.
#[derive(Debug, Clone)]
pub struct Target {
    /// The server, for instance `http://127.0.0.1:8080`.
    pub url: String,
    /// `model` of requests to the base model.
    pub base: String,
    /// Whether to generate all tokens that are asked for, past the end of a text.
    pub ignore_eos: bool,
    /// A JSON schema that answers must keep to.
    pub schema: Option<Value>,
    http: reqwest::Client,
    timeout: Duration,
}

/// The answer to one request.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Adapter asked for.
    pub adapter: Option<String>,
    /// Tokens asked for.
    pub asked: usize,
    /// Planned time of sending, from the start of the run. Latencies count from here: a user does not wait less because
    /// the generator was late.
    pub planned: Duration,
    /// Time of sending, from the start of the run.
    pub sent: Duration,
    /// Arrival times of events with text, from the start of the run.
    pub events: Vec<Duration>,
    /// Tokens generated, by the server's count; the number of events where it gives none.
    pub tokens: usize,
    /// The failure, if there was one.
    pub error: Option<String>,
}

impl Outcome {
    /// Time to first token.
    pub fn ttft(&self) -> Option<Duration> {
        self.events.first().map(|first| *first - self.planned)
    }

    /// Delay of the generator: how much later than planned the request was sent.
    pub fn lateness(&self) -> Duration {
        self.sent - self.planned
    }

    /// Mean time per token after the first.
    pub fn tpot(&self) -> Option<Duration> {
        let (first, last) = (self.events.first()?, self.events.last()?);
        (self.tokens > 1).then(|| (*last - *first) / (self.tokens as u32 - 1))
    }
}

impl Target {
    /// A server at `url`, whose base model is called `base`. A request fails when for `timeout` not a byte comes.
    ///
    /// # Errors
    /// When the connection pool cannot be made.
    pub fn new(url: &str, base: &str, ignore_eos: bool, timeout: Duration) -> anyhow::Result<Self> {
        let http =
            reqwest::Client::builder().tcp_nodelay(true).connect_timeout(timeout).read_timeout(timeout);
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { url, base: base.to_owned(), ignore_eos, schema: None, http: http.build()?, timeout })
    }

    /// Streams one completion that is to be sent at `planned`, which has come.
    pub async fn send(
        &self,
        ask: &Ask,
        start: Instant,
        planned: Duration,
        progress: &indicatif::ProgressBar,
    ) -> Outcome {
        let mut answer = Answer { sent: planned, ..Answer::default() };
        let streamed = self.stream(ask, start, progress, &mut answer).await;
        let asked = self.ignore_eos.then_some(ask.output_tokens);
        let ended = streamed.and_then(|()| answer.check(asked));
        Outcome {
            adapter: ask.adapter.clone(),
            asked: ask.output_tokens,
            planned,
            sent: answer.sent,
            tokens: answer.usage.unwrap_or(answer.events.len()),
            events: answer.events,
            error: ended.err().map(|error| self.explain(&error)),
        }
    }

    fn explain(&self, error: &anyhow::Error) -> String {
        match error.downcast_ref::<reqwest::Error>() {
            Some(timeout) if timeout.is_timeout() => format!("nothing came for {:?}", self.timeout),
            _ => format!("{error:#}"),
        }
    }

    async fn stream(
        &self,
        ask: &Ask,
        start: Instant,
        progress: &indicatif::ProgressBar,
        answer: &mut Answer,
    ) -> anyhow::Result<()> {
        let body = json!({
            "model": ask.adapter.as_deref().unwrap_or(&self.base),
            "prompt": ask.prompt,
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "guided_json": self.schema,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let request = self.http.post(format!("{}/v1/completions", self.url)).json(&body);
        answer.sent = start.elapsed();
        let response = request.send().await?;
        if !response.status().is_success() {
            anyhow::bail!("{}: {}", response.status(), response.text().await?);
        }
        let mut stream = response.bytes_stream();
        let mut lines = Lines::default();
        while let Some(bytes) = stream.next().await {
            let now = start.elapsed();
            lines.push(&bytes?, |data| answer.on_event(data, now, progress))?;
        }
        Ok(())
    }
}

/// A request in flight, and the part of its answer that has come.
#[derive(Debug, Default)]
struct Answer {
    sent: Duration,
    events: Vec<Duration>,
    /// Tokens by the server's count.
    usage: Option<usize>,
    /// The server said that this is all.
    done: bool,
}

impl Answer {
    /// Handles the data of one server-sent event. Text events are only counted, not parsed: at 10,000 tokens a second
    /// the load generator must not be what is measured.
    fn on_event(
        &mut self,
        data: &[u8],
        now: Duration,
        progress: &indicatif::ProgressBar,
    ) -> anyhow::Result<()> {
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let empty_choices = contains(data, b"\"choices\":[]") || contains(data, b"\"choices\": []");
        if !empty_choices && !contains(data, b"\"error\"") {
            self.events.push(now);
            progress.inc(1);
            return Ok(());
        }
        let event: serde_json::Value = serde_json::from_slice(data)?;
        if let Some(error) = event.get("error") {
            anyhow::bail!("{error}");
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            self.usage = Some(tokens as usize);
        }
        Ok(())
    }

    /// Returns whether a stream that ended was the whole answer; `asked` is given if only that number of tokens is one.
    fn check(&self, asked: Option<usize>) -> anyhow::Result<()> {
        ensure!(!self.events.is_empty(), "the stream ended without a token");
        ensure!(self.done, "the stream ended without [DONE]");
        if let (Some(asked), Some(tokens)) = (asked, self.usage) {
            ensure!(tokens == asked, "{tokens} tokens came, {asked} were asked for");
        }
        Ok(())
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// Splits a byte stream into the data of server-sent events.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(
        &mut self,
        bytes: &[u8],
        mut on_data: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.rest.extend_from_slice(bytes);
        let mut begin = 0;
        while let Some(length) = self.rest[begin..].iter().position(|b| *b == b'\n') {
            let line = self.rest[begin..begin + length].trim_ascii();
            begin += length + 1;
            if let Some(data) = line.strip_prefix(b"data:") {
                on_data(data.trim_ascii_start())?;
            }
        }
        self.rest.drain(..begin);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn events_are_found_however_the_bytes_are_cut() {
        let text = b"data: {\"a\":1}\n\n: comment\n\ndata: [DONE]\n\n";
        for cut in 0..text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for part in [&text[..cut], &text[cut..]] {
                lines
                    .push(part, |d| {
                        seen.push(d.to_vec());
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(seen, [b"{\"a\":1}".to_vec(), b"[DONE]".to_vec()], "cut at {cut}");
        }
    }

    const HEAD: &str = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
    const TOKEN: &str = "data: {\"choices\":[{\"text\":\"hi\"}]}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    fn usage(tokens: usize) -> String {
        format!("data: {{\"choices\":[],\"usage\":{{\"completion_tokens\":{tokens}}}}}\n\n")
    }

    /// The outcome of a request for 3 tokens that is answered with these bytes, and then nothing until it has failed
    /// or, unless it `stalls`, the end of the connection.
    async fn exchange(bytes: String, ignore_eos: bool, stalls: bool) -> Outcome {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut connection, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                assert_ne!(connection.read_buf(&mut request).await.unwrap(), 0);
            }
            connection.write_all(bytes.as_bytes()).await.unwrap();
            if stalls {
                // The other side gives up.
                assert_eq!(connection.read_buf(&mut request).await.unwrap(), 0);
            }
        });
        let timeout = if stalls { Duration::from_millis(200) } else { Duration::from_secs(60) };
        let target = Target::new(&url, "", ignore_eos, timeout).unwrap();
        let ask = Ask { adapter: None, prompt: vec![1], output_tokens: 3 };
        let outcome =
            target.send(&ask, Instant::now(), Duration::ZERO, &indicatif::ProgressBar::hidden()).await;
        server.await.unwrap();
        outcome
    }

    async fn answered(events: String, ignore_eos: bool) -> Outcome {
        exchange(format!("{HEAD}{events}"), ignore_eos, false).await
    }

    #[tokio::test]
    async fn a_server_that_falls_silent_fails_the_request() {
        for bytes in [String::new(), HEAD.to_owned(), format!("{HEAD}{TOKEN}")] {
            let outcome = exchange(bytes, true, true).await;
            assert_eq!(outcome.error.as_deref(), Some("nothing came for 200ms"));
        }
    }

    #[tokio::test]
    async fn usage_wins_over_the_number_of_events() {
        let outcome = answered([TOKEN, TOKEN, &usage(3), DONE].concat(), true).await;
        assert_eq!((outcome.error, outcome.events.len(), outcome.tokens), (None, 2, 3));
        let outcome = answered([TOKEN, TOKEN, DONE].concat(), true).await;
        assert_eq!((outcome.error, outcome.tokens, outcome.asked), (None, 2, 3));
    }

    #[tokio::test]
    async fn a_stream_that_is_not_the_whole_answer_failed() {
        let error = async |events: &[&str], ignore_eos| {
            answered(events.concat(), ignore_eos).await.error.unwrap_or_default()
        };
        for cut in [&[TOKEN][..], &[TOKEN, &usage(3)]] {
            assert!(error(cut, true).await.contains("[DONE]"), "{cut:?}");
        }
        assert!(error(&[DONE], true).await.contains("without a token"));
        assert!(error(&[TOKEN, &usage(1), DONE], true).await.contains("1 tokens came, 3"));
        assert_eq!(error(&[TOKEN, &usage(1), DONE], false).await, "", "the model may end early");
        assert!(error(&[TOKEN, "data: {\"error\":\"no\"}\n\n", DONE], true).await.contains("no"));
    }
}
