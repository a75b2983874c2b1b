//! Figures of a run.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    time::Duration,
};

use anyhow::Context;
use serde::Serialize;
use serde_json::json;

use super::client::Outcome;

/// Median and tails, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize, PartialEq)]
pub struct Quantiles {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Quantiles {
    /// Nearest-rank quantiles; `None` for an empty list.
    pub fn of(mut values: Vec<Duration>) -> Option<Self> {
        values.sort_unstable();
        let at = |q: f64| -> Option<f64> {
            let rank = (q * values.len() as f64).ceil() as usize;
            Some(values.get(rank.max(1) - 1)?.as_secs_f64() * 1e3)
        };
        Some(Self { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }
}

/// The objective that an answer must reach to count as good.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Objective {
    /// Time to first token, milliseconds.
    pub ttft_ms: f64,
    /// Time per output token, milliseconds.
    pub tpot_ms: f64,
}

/// Figures of one adapter.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterFigures {
    /// Requests answered.
    pub requests: usize,
    /// 99th percentile of the time to first token, milliseconds.
    pub ttft_p99: f64,
    /// 99th percentile of the gap between tokens, milliseconds.
    pub gap_p99: f64,
    /// Mean over its requests of tokens a second from when it was to be sent to the last token.
    pub tokens_per_second: f64,
}

/// Figures of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the run; copied from the command line.
    pub label: String,
    /// Seed of its draws.
    pub seed: u64,
    /// Requests answered in full.
    pub requests: usize,
    /// Requests that failed.
    pub errors: usize,
    /// The first few distinct failures.
    pub error_samples: Vec<String>,
    /// First request due to last token received, seconds.
    pub seconds: f64,
    /// Output tokens.
    pub output_tokens: usize,
    /// Output tokens a second.
    pub output_tokens_per_second: f64,
    /// Requests answered a second.
    pub requests_per_second: f64,
    /// How much later than planned requests were sent; where it is not small beside the latencies, the generator is
    /// the bottleneck.
    pub late_ms: Option<Quantiles>,
    /// Time to first token, from when the request was to be sent.
    pub ttft_ms: Option<Quantiles>,
    /// Mean time per output token after the first, of each request.
    pub tpot_ms: Option<Quantiles>,
    /// Time between events of a stream.
    pub gap_ms: Option<Quantiles>,
    /// Share of requests that met the objective; failed ones did not.
    pub objective_met: Option<f64>,
    /// Jain's fairness index of the adapters' `tokens_per_second`: 1 is even, 1/n is one taking all.
    pub jain_index: Option<f64>,
    /// Figures by adapter; the base model is "".
    pub adapters: BTreeMap<String, AdapterFigures>,
}

impl Report {
    /// Computes the figures.
    pub fn new(label: &str, seed: u64, outcomes: &[Outcome], objective: Option<Objective>) -> Self {
        let good: Vec<&Outcome> = outcomes.iter().filter(|o| o.error.is_none()).collect();
        let begin = outcomes.iter().map(|o| o.planned).min().unwrap_or_default();
        let end = good.iter().filter_map(|o| o.events.last()).max().copied().unwrap_or(begin);
        let seconds = (end - begin).as_secs_f64().max(1e-9);
        let output_tokens = good.iter().map(|o| o.tokens).sum();
        let adapters = by_adapter(&good);
        let mut error_samples: Vec<String> = outcomes.iter().filter_map(|o| o.error.clone()).collect();
        error_samples.sort();
        error_samples.dedup();
        error_samples.truncate(5);
        Self {
            label: label.to_owned(),
            seed,
            requests: good.len(),
            errors: outcomes.len() - good.len(),
            error_samples,
            seconds,
            output_tokens,
            output_tokens_per_second: output_tokens as f64 / seconds,
            requests_per_second: good.len() as f64 / seconds,
            late_ms: Quantiles::of(outcomes.iter().map(Outcome::lateness).collect()),
            ttft_ms: Quantiles::of(good.iter().filter_map(|o| o.ttft()).collect()),
            tpot_ms: Quantiles::of(good.iter().filter_map(|o| o.tpot()).collect()),
            gap_ms: Quantiles::of(good.iter().flat_map(|o| gaps(o)).collect()),
            objective_met: objective.map(|goal| {
                good.iter().filter(|o| meets(o, goal)).count() as f64 / outcomes.len().max(1) as f64
            }),
            jain_index: jain(adapters.values().map(|a| a.tokens_per_second)),
            adapters,
        }
    }
}

/// Writes one line of JSON per request: `adapter`, `planned_ms`, `sent_ms` and `events_ms` from the start of the run,
/// `tokens`, `error`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_times(path: &Path, outcomes: &[Outcome]) -> anyhow::Result<()> {
    let ms = |time: &Duration| time.as_secs_f64() * 1e3;
    let mut file = BufWriter::new(File::create(path).with_context(|| path.display().to_string())?);
    for outcome in outcomes {
        let line = json!({
            "adapter": outcome.adapter,
            "planned_ms": ms(&outcome.planned),
            "sent_ms": ms(&outcome.sent),
            "events_ms": outcome.events.iter().map(ms).collect::<Vec<_>>(),
            "tokens": outcome.tokens,
            "error": outcome.error,
        });
        writeln!(file, "{line}")?;
    }
    Ok(file.flush()?)
}

fn gaps(outcome: &Outcome) -> impl Iterator<Item = Duration> {
    outcome.events.windows(2).map(|w| w[1] - w[0])
}

/// An answer without a time per output token met no goal for it, unless a single token was asked for.
fn meets(outcome: &Outcome, goal: Objective) -> bool {
    let within = |time: Duration, limit| time.as_secs_f64() * 1e3 <= limit;
    outcome.ttft().is_some_and(|ttft| within(ttft, goal.ttft_ms))
        && outcome.tpot().map_or(outcome.asked == 1, |tpot| within(tpot, goal.tpot_ms))
}

fn by_adapter(good: &[&Outcome]) -> BTreeMap<String, AdapterFigures> {
    let mut groups: BTreeMap<String, Vec<&Outcome>> = BTreeMap::new();
    for outcome in good {
        groups.entry(outcome.adapter.clone().unwrap_or_default()).or_default().push(outcome);
    }
    let p99 = |values: Vec<Duration>| Quantiles::of(values).map_or(0.0, |q| q.p99);
    let figures = |group: Vec<&Outcome>| {
        let speed = |o: &&Outcome| {
            let end = o.events.last().copied().unwrap_or(o.planned);
            o.tokens as f64 / (end - o.planned).as_secs_f64().max(1e-9)
        };
        AdapterFigures {
            requests: group.len(),
            ttft_p99: p99(group.iter().filter_map(|o| o.ttft()).collect()),
            gap_p99: p99(group.iter().flat_map(|o| gaps(o)).collect()),
            tokens_per_second: group.iter().map(speed).sum::<f64>() / group.len() as f64,
        }
    };
    groups.into_iter().map(|(name, group)| (name, figures(group))).collect()
}

/// Jain's fairness index `(Σx)² / (n · Σx²)`.
fn jain(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (n, sum, squares) =
        values.fold((0.0, 0.0, 0.0), |(n, sum, squares), x| (n + 1.0, sum + x, squares + x * x));
    (squares > 0.0).then(|| sum * sum / (n * squares))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quantiles = |q: Option<Quantiles>| {
            q.map_or("-".into(), |q| format!("{:.1} / {:.1} / {:.1}", q.p50, q.p90, q.p99))
        };
        writeln!(f, "{}", self.label)?;
        writeln!(f, "  seed         {}", self.seed)?;
        writeln!(f, "  requests     {} in {:.2} s, {} failed", self.requests, self.seconds, self.errors)?;
        let (tokens, requests) = (self.output_tokens_per_second, self.requests_per_second);
        writeln!(f, "  output       {tokens:.1} tokens/s, {requests:.2} requests/s")?;
        writeln!(f, "  TTFT, ms     {}   (p50 / p90 / p99)", quantiles(self.ttft_ms))?;
        writeln!(f, "  TPOT, ms     {}", quantiles(self.tpot_ms))?;
        writeln!(f, "  gap, ms      {}", quantiles(self.gap_ms))?;
        writeln!(f, "  late, ms     {}", quantiles(self.late_ms))?;
        if let Some(share) = self.objective_met {
            writeln!(f, "  objective    {:.1} % met", share * 100.0)?;
        }
        if let Some(jain) = self.jain_index.filter(|_| self.adapters.len() > 1) {
            writeln!(f, "  fairness     {jain:.3} (Jain, {} adapters)", self.adapters.len())?;
        }
        self.error_samples.iter().try_for_each(|e| writeln!(f, "  error        {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(adapter: &str, sent: u64, events: &[u64], error: Option<&str>) -> Outcome {
        Outcome {
            adapter: Some(adapter.into()),
            asked: events.len(),
            planned: Duration::from_millis(sent),
            sent: Duration::from_millis(sent),
            events: events.iter().map(|t| Duration::from_millis(*t)).collect(),
            tokens: events.len(),
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn figures_of_a_small_run_are_what_one_computes_by_hand() {
        let outcomes = [
            outcome("a", 0, &[100, 110, 120], None),
            outcome("b", 0, &[300, 340], None),
            outcome("b", 50, &[], Some("no")),
        ];
        let report = Report::new("x", 1, &outcomes, Some(Objective { ttft_ms: 200.0, tpot_ms: 50.0 }));
        assert_eq!((report.requests, report.errors, report.output_tokens), (2, 1, 5));
        assert!((report.seconds - 0.34).abs() < 1e-9);
        assert!(report.to_string().contains("seed         1\n"), "{report}");
        assert_eq!(report.ttft_ms, Some(Quantiles { p50: 100.0, p90: 300.0, p99: 300.0 }));
        assert_eq!(report.gap_ms, Some(Quantiles { p50: 10.0, p90: 40.0, p99: 40.0 }));
        assert_eq!(report.objective_met, Some(1.0 / 3.0));
        let (a, b) = (3.0 / 0.12, 2.0 / 0.34);
        let expected = (a + b) * (a + b) / (2.0 * (a * a + b * b));
        assert!((report.jain_index.unwrap() - expected).abs() < 1e-9);
    }

    #[test]
    fn one_token_meets_an_objective_only_where_one_was_asked_for() {
        let short = outcome("a", 0, &[100], None);
        let goal = Some(Objective { ttft_ms: 200.0, tpot_ms: 50.0 });
        for (asked, met) in [(1, 1.0), (128, 0.0)] {
            let report = Report::new("x", 1, &[Outcome { asked, ..short.clone() }], goal);
            assert_eq!(report.objective_met, Some(met), "{asked} asked for");
        }
    }

    #[test]
    fn latencies_count_from_when_a_request_was_to_be_sent() {
        let late = Outcome { planned: Duration::ZERO, ..outcome("a", 70, &[100, 110], None) };
        let report = Report::new("x", 1, &[late], Some(Objective { ttft_ms: 50.0, tpot_ms: 50.0 }));
        let all = |ms| Some(Quantiles { p50: ms, p90: ms, p99: ms });
        assert_eq!(
            (report.late_ms, report.ttft_ms, report.objective_met),
            (all(70.0), all(100.0), Some(0.0))
        );
        assert!((report.seconds - 0.11).abs() < 1e-9);
        assert!((report.adapters["a"].tokens_per_second - 2.0 / 0.11).abs() < 1e-9);
    }

    #[test]
    fn times_are_written_as_they_were() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let late =
            Outcome { adapter: None, planned: Duration::from_millis(4), ..outcome("", 7, &[], Some("no")) };
        let outcomes = [outcome("a", 5, &[10, 30], None), late];
        write_times(file.path(), &outcomes).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let first = json!({"adapter": "a", "planned_ms": 5.0, "sent_ms": 5.0, "events_ms": [10.0, 30.0], "tokens": 2, "error": null});
        let second = json!({"adapter": null, "planned_ms": 4.0, "sent_ms": 7.0, "events_ms": [], "tokens": 0, "error": "no"});
        assert_eq!(lines, [first, second]);
    }

    #[test]
    fn a_run_without_answers_has_no_quantiles() {
        let report = Report::new("x", 1, &[outcome("a", 0, &[], Some("refused"))], None);
        assert_eq!((report.requests, report.errors, report.ttft_ms), (0, 1, None));
        assert_eq!(report.error_samples, ["refused"]);
    }
}
