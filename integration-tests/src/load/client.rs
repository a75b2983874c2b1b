//! Sends one request and notes when each token came.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::json;

use super::workload::Ask;

/// Where requests go and how they are asked.
#[derive(Debug, Clone)]
pub struct Target {
    /// The server, for instance `http://127.0.0.1:8080`.
    pub url: String,
    /// `model` of requests to the base model.
    pub base: String,
    /// Generate all the tokens asked for.
    pub ignore_eos: bool,
    /// The connection pool.
    pub http: reqwest::Client,
}

/// What came back for one request.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Adapter asked for.
    pub adapter: Option<String>,
    /// When it was sent, from the start of the run.
    pub sent: Duration,
    /// When each event with text came, from the start of the run.
    pub events: Vec<Duration>,
    /// Tokens generated, by the server's count; the number of events where it gives none.
    pub tokens: usize,
    /// Why it failed.
    pub error: Option<String>,
}

impl Outcome {
    /// Time to first token.
    pub fn ttft(&self) -> Option<Duration> {
        self.events.first().map(|first| *first - self.sent)
    }

    /// Mean time per token after the first.
    pub fn tpot(&self) -> Option<Duration> {
        let (first, last) = (self.events.first()?, self.events.last()?);
        (self.tokens > 1).then(|| (*last - *first) / (self.tokens as u32 - 1))
    }
}

impl Target {
    /// Streams one completion.
    pub async fn send(&self, ask: &Ask, start: Instant, progress: &indicatif::ProgressBar) -> Outcome {
        let sent = start.elapsed();
        let mut out =
            Outcome { adapter: ask.adapter.clone(), sent, events: Vec::new(), tokens: 0, error: None };
        if let Err(error) = self.stream(ask, start, progress, &mut out).await {
            out.error = Some(format!("{error:#}"));
        }
        if out.tokens == 0 {
            out.tokens = out.events.len();
        }
        out
    }

    async fn stream(
        &self,
        ask: &Ask,
        start: Instant,
        progress: &indicatif::ProgressBar,
        out: &mut Outcome,
    ) -> anyhow::Result<()> {
        let body = json!({
            "model": ask.adapter.as_deref().unwrap_or(&self.base),
            "prompt": ask.prompt,
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let response = self.http.post(format!("{}/v1/completions", self.url)).json(&body).send().await?;
        if !response.status().is_success() {
            anyhow::bail!("{}: {}", response.status(), response.text().await?);
        }
        let mut stream = response.bytes_stream();
        let mut lines = Lines::default();
        while let Some(bytes) = stream.next().await {
            let now = start.elapsed();
            lines.push(&bytes?, |data| on_event(data, now, progress, out))?;
        }
        anyhow::ensure!(!out.events.is_empty(), "the stream ended without a token");
        Ok(())
    }
}

/// Handles the data of one server-sent event. Text events are only counted, not parsed: at 10,000 tokens a second the
/// load generator must not be what is measured.
fn on_event(
    data: &[u8],
    now: Duration,
    progress: &indicatif::ProgressBar,
    out: &mut Outcome,
) -> anyhow::Result<()> {
    if data == b"[DONE]" {
        return Ok(());
    }
    let empty_choices = contains(data, b"\"choices\":[]") || contains(data, b"\"choices\": []");
    if !empty_choices && !contains(data, b"\"error\"") {
        out.events.push(now);
        progress.inc(1);
        return Ok(());
    }
    let event: serde_json::Value = serde_json::from_slice(data)?;
    if let Some(error) = event.get("error") {
        anyhow::bail!("{error}");
    }
    if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
        out.tokens = tokens as usize;
    }
    Ok(())
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

    #[test]
    fn usage_wins_over_the_number_of_events() {
        let bar = indicatif::ProgressBar::hidden();
        let mut out = Outcome { adapter: None, sent: Duration::ZERO, events: vec![], tokens: 0, error: None };
        on_event(b"{\"choices\":[{\"text\":\"hi\"}]}", Duration::from_secs(1), &bar, &mut out).unwrap();
        on_event(
            b"{\"choices\":[],\"usage\":{\"completion_tokens\":3}}",
            Duration::from_secs(2),
            &bar,
            &mut out,
        )
        .unwrap();
        assert_eq!((out.events.len(), out.tokens), (1, 3));
        assert!(on_event(b"{\"error\":{\"message\":\"no\"}}", Duration::ZERO, &bar, &mut out).is_err());
    }
}
