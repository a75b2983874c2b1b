//! Load generator for OpenAI-compatible servers with many adapters.
#![allow(clippy::print_stdout, reason = "the report is this program's output")]

use std::{fs::OpenOptions, io::Write, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use integration_tests::load::{
    arrivals::{Arrivals, Length, Popularity},
    client::Target,
    plot::plot,
    report::{Objective, Report, write_times},
    run::{Loop, run},
    workload::{Workload, read_trace},
};

/// Puts load on a server's /v1/completions and reports speed, latency and fairness.
///
/// Closed loop by default (`--streams`); `--rate` makes it an open loop, `--trace` replays a file.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Server
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Name of the base model in requests
    #[arg(long, default_value = "")]
    model: String,
    /// Name of this run in reports
    #[arg(long, default_value = "run")]
    label: String,
    /// Closed loop: requests in flight
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Open loop: requests a second
    #[arg(long, conflicts_with = "trace")]
    rate: Option<f64>,
    /// Open loop: coefficient of variation of the gaps; 1 is Poisson
    #[arg(long, default_value_t = 1.0)]
    cv: f64,
    /// Replays JSON lines {"time": seconds, "adapter": name, "in": tokens, "out": tokens}
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Requests in all
    #[arg(long, default_value_t = 32)]
    requests: usize,
    /// Requests sent first, in a closed loop, and not counted
    #[arg(long, default_value_t = 0)]
    warmup: usize,
    /// Names of adapters, separated by commas
    #[arg(long, value_delimiter = ',', conflicts_with = "adapter_pattern")]
    adapters: Vec<String>,
    /// Names of adapters as a pattern with {} for 0 to num-adapters - 1
    #[arg(long, requires = "num_adapters")]
    adapter_pattern: Option<String>,
    /// Number of adapters that the pattern names
    #[arg(long)]
    num_adapters: Option<usize>,
    /// identical, distinct (one a stream), round-robin, uniform, or zipf:ALPHA
    #[arg(long, default_value = "distinct")]
    popularity: Popularity,
    /// Prompt tokens: N or LOW..HIGH
    #[arg(long, default_value = "512")]
    prompt_tokens: Length,
    /// Output tokens: N or LOW..HIGH
    #[arg(long, default_value = "128")]
    output_tokens: Length,
    /// Prompts are random token ids below this
    #[arg(long, default_value_t = 32000)]
    vocab: u32,
    /// Lets the model end its answers early
    #[arg(long)]
    respect_eos: bool,
    /// JSON schema that answers must keep to; it should describe no answer that is shorter than --output-tokens
    #[arg(long)]
    guided_json: Option<serde_json::Value>,
    /// A request fails after so many seconds without a byte from the server
    #[arg(long, default_value_t = 300.0)]
    timeout: f64,
    /// Seed of all draws. Random unless given: servers keep prompts in a prefix cache, so the same ones again measure
    /// that cache
    #[arg(long, default_value_t = rand::random::<u32>().into(), hide_default_value = true)]
    seed: u64,
    /// Objective: time to first token, milliseconds
    #[arg(long, requires = "slo_tpot_ms")]
    slo_ttft_ms: Option<f64>,
    /// Objective: time per output token, milliseconds
    #[arg(long, requires = "slo_ttft_ms")]
    slo_tpot_ms: Option<f64>,
    /// Appends the report to this file as one line of JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Writes the planned and actual time of each request, and the times of its events, one request a line of
    /// JSON
    #[arg(long)]
    times: Option<PathBuf>,
    /// Draws the run as SVG
    #[arg(long)]
    plot: Option<PathBuf>,
}

impl Args {
    fn workload(&self) -> Workload {
        let pattern = self.adapter_pattern.iter().flat_map(|pattern| {
            (0..self.num_adapters.unwrap_or(0)).map(|i| pattern.replace("{}", &i.to_string()))
        });
        Workload {
            adapters: self.adapters.iter().cloned().chain(pattern).collect(),
            popularity: self.popularity,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            vocab: self.vocab,
            seed: self.seed,
        }
    }

    fn pace(&self) -> Result<Loop> {
        let requests = self.requests;
        Ok(match (&self.trace, self.rate) {
            (Some(path), _) => Loop::Trace(read_trace(path, self.vocab, self.seed)?),
            (None, Some(rate)) => Loop::Open { arrivals: Arrivals::new(rate, self.cv)?, requests },
            (None, None) => Loop::Closed { streams: self.streams, requests },
        })
    }

    fn objective(&self) -> Option<Objective> {
        Some(Objective { ttft_ms: self.slo_ttft_ms?, tpot_ms: self.slo_tpot_ms? })
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.vocab > 0 && args.streams > 0 && args.requests > 0, "nothing to ask");
    let timeout = Duration::try_from_secs_f64(args.timeout).context("--timeout")?;
    let mut target = Target::new(&args.url, &args.model, !args.respect_eos, timeout)?;
    target.schema = args.guided_json.clone();
    let workload = args.workload();
    if args.warmup > 0 {
        let seed = workload.seed.wrapping_add(1 << 60);
        let pace = Loop::Closed { streams: args.streams, requests: args.warmup };
        run(&target, &Workload { seed, ..workload.clone() }, pace).await;
    }
    let outcomes = run(&target, &workload, args.pace()?).await;
    let report = Report::new(&args.label, args.seed, &outcomes, args.objective());
    print!("{report}");
    if let Some(path) = &args.json {
        let mut file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.as_mut().map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
        writeln!(file, "{}", serde_json::to_string(&report)?).context("cannot write the report")?;
    }
    if let Some(path) = &args.times {
        write_times(path, &outcomes)?;
    }
    if let Some(path) = &args.plot {
        plot(path, &args.label, &outcomes)?;
    }
    ensure!(report.errors == 0, "{} requests failed", report.errors);
    Ok(())
}
