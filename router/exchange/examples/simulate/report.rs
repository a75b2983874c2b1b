//! What came of a load.

use std::{collections::BTreeMap, time::Duration};

use super::workload::Job;

/// The end of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Served {
    pub(crate) adapter: usize,
    /// From its arrival to its first token, and to its last one. None if it failed.
    pub(crate) times: Option<(Duration, Duration)>,
    pub(crate) tokens: u32,
    /// Whether it counts among the waits.
    pub(crate) counts: bool,
}

impl Served {
    /// The end of a job.
    pub(crate) fn of(job: &Job, tokens: u32, times: Option<(Duration, Duration)>) -> Served {
        Served { adapter: job.adapter, times, tokens, counts: job.counts }
    }
}

/// Copies made and evicted on a tier, and evictions of what was needed next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Moves {
    pub(crate) loads: u64,
    pub(crate) evictions: u64,
    pub(crate) needed: u64,
}

/// The requests of a run, and what was moved for them.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) served: Vec<Served>,
    pub(crate) ended: Duration,
    pub(crate) disk: Moves,
    pub(crate) host: Moves,
    pub(crate) device: Moves,
    /// Steps in which slots had no work, beside the first of each time, while requests waited for slots, where that is
    /// counted.
    pub(crate) idle_slot_steps: Option<u64>,
}

/// Figures of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figures {
    pub(crate) tokens_per_second: f64,
    pub(crate) failed: usize,
    /// Seconds from arrival to first token: over all requests.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Of the mean waits of the adapters, the 99th percentile.
    pub(crate) p99_adapter: f64,
    /// Jain's index of the speeds that the adapters' requests saw: tokens by time in the server.
    pub(crate) jain: f64,
}

impl Outcome {
    pub(crate) fn figures(&self) -> Figures {
        let counted = || self.served.iter().filter(|served| served.counts);
        let times = counted().filter_map(|served| served.times);
        let mut waits: Vec<_> = times.map(|(first, _)| first.as_secs_f64()).collect();
        let mut adapters: BTreeMap<usize, (f64, f64, f64, f64)> = BTreeMap::new();
        for served in counted() {
            let Some((first, last)) = served.times else { continue };
            let (requests, wait, tokens, time) = adapters.entry(served.adapter).or_default();
            *requests += 1.0;
            *wait += first.as_secs_f64();
            *tokens += f64::from(served.tokens);
            *time += last.as_secs_f64();
        }
        let mut means: Vec<_> = adapters.values().map(|(requests, wait, ..)| wait / requests).collect();
        let speeds: Vec<_> = adapters.values().map(|(_, _, tokens, time)| tokens / time).collect();
        let (sum, squares) = speeds.iter().fold((0.0, 0.0), |(a, b), speed| (a + speed, b + speed * speed));
        let tokens: u64 = self.served.iter().map(|served| u64::from(served.tokens)).sum();
        Figures {
            tokens_per_second: tokens as f64 / self.ended.as_secs_f64(),
            failed: counted().filter(|served| served.times.is_none()).count(),
            p50: percentile(&mut waits, 0.5),
            p99: percentile(&mut waits, 0.99),
            p99_adapter: percentile(&mut means, 0.99),
            jain: if squares > 0.0 { sum * sum / (speeds.len() as f64 * squares) } else { 0.0 },
        }
    }
}

fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get((values.len().saturating_sub(1) as f64 * share) as usize).copied().unwrap_or(0.0)
}
