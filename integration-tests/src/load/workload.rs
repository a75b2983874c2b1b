//! Workloads: lists of requests, drawn from distributions or read from a trace.

use std::{fs, path::Path};

use anyhow::{Context, bail};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Deserialize;

use super::arrivals::{Length, Popularity};

/// One request to send.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Name of the adapter; `None` for the base model.
    pub adapter: Option<String>,
    /// Prompt as token ids.
    pub prompt: Vec<u32>,
    /// Tokens to generate.
    pub output_tokens: usize,
}

/// Draws requests; the same seed draws the same.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Names of the adapters; empty for the base model alone.
    pub adapters: Vec<String>,
    /// Popularity of the adapters.
    pub popularity: Popularity,
    /// Prompt lengths.
    pub prompt_tokens: Length,
    /// Output lengths.
    pub output_tokens: Length,
    /// Prompts are drawn from ids below this one; the first 100 ids, often special, are left out.
    pub vocab: u32,
    /// Seed of all draws.
    pub seed: u64,
}

impl Workload {
    /// The given request of the given stream.
    pub fn ask(&self, request: usize, stream: usize) -> Ask {
        let mut rng = StdRng::seed_from_u64(self.seed.wrapping_add((request as u64) << 20));
        let adapter = (!self.adapters.is_empty())
            .then(|| self.popularity.pick(self.adapters.len(), request, stream, &mut rng))
            .map(|i| self.adapters[i].clone());
        let prompt_tokens = self.prompt_tokens.draw(&mut rng);
        let output_tokens = self.output_tokens.draw(&mut rng);
        Ask { adapter, prompt: random_prompt(prompt_tokens, self.vocab, &mut rng), output_tokens }
    }
}

fn random_prompt(tokens: usize, vocab: u32, rng: &mut StdRng) -> Vec<u32> {
    let low = if vocab > 200 { 100 } else { 0 };
    (0..tokens).map(|_| rng.random_range(low..vocab)).collect()
}

/// One line of a trace.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TraceLine {
    /// Seconds after the start.
    time: f64,
    /// Name of the adapter; absent or null for the base model.
    #[serde(default)]
    adapter: Option<String>,
    /// Prompt tokens.
    r#in: usize,
    /// Output tokens.
    out: usize,
}

/// Reads a trace: JSON lines `{"time", "adapter", "in", "out"}`, ascending in time. Prompts are random ids.
///
/// # Errors
/// When a line cannot be parsed, times descend or a length is 0.
pub fn read_trace(path: &Path, vocab: u32, seed: u64) -> anyhow::Result<Vec<(f64, Ask)>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut asks: Vec<(f64, Ask)> = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = || format!("{}:{}", path.display(), i + 1);
        let line: TraceLine = serde_json::from_str(line).with_context(at)?;
        if line.r#in == 0 || line.out == 0 || asks.last().is_some_and(|(t, _)| *t > line.time) {
            bail!("{}: lengths must be positive and times ascend", at());
        }
        let prompt = random_prompt(line.r#in, vocab, &mut rng);
        asks.push((line.time, Ask { adapter: line.adapter, prompt, output_tokens: line.out }));
    }
    Ok(asks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_requests() {
        let workload = Workload {
            adapters: vec!["a".into(), "b".into()],
            popularity: Popularity::Uniform,
            prompt_tokens: "3..9".parse().unwrap(),
            output_tokens: "5".parse().unwrap(),
            vocab: 1000,
            seed: 7,
        };
        let draw = |w: &Workload| (0..20).map(|i| w.ask(i, 0)).collect::<Vec<_>>();
        assert_eq!(draw(&workload), draw(&workload));
        assert_ne!(draw(&workload), draw(&Workload { seed: 8, ..workload.clone() }));
    }

    #[test]
    fn a_trace_gives_times_adapters_and_lengths() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            &file,
            "{\"time\":0,\"adapter\":\"x\",\"in\":4,\"out\":2}\n\n{\"time\":1.5,\"in\":1,\"out\":9}\n",
        )
        .unwrap();
        let asks = read_trace(file.path(), 500, 1).unwrap();
        assert_eq!(asks.len(), 2);
        assert_eq!((asks[0].1.adapter.as_deref(), asks[0].1.prompt.len()), (Some("x"), 4));
        assert_eq!((asks[1].0, asks[1].1.adapter.as_deref(), asks[1].1.output_tokens), (1.5, None, 9));
        fs::write(&file, "{\"time\":2,\"in\":4,\"out\":2}\n{\"time\":1,\"in\":1,\"out\":1}\n").unwrap();
        assert!(read_trace(file.path(), 500, 1).is_err());
    }
}
