//! Who asks for what, and when: adapters of mixed ranks, their popularity, and arrivals in bursts.

use std::{error::Error, fmt, str::FromStr, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp, Gamma, Zipf};

/// How requests choose their adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Popularity {
    /// By Zipf's law with this exponent.
    Zipf(f64),
    /// All are equally popular.
    Uniform,
    /// One after the other.
    RoundRobin,
}

/// A popularity that is none of those there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnknownPopularity(String);

impl fmt::Display for UnknownPopularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is none of zipf:EXPONENT, uniform, round-robin", self.0)
    }
}

impl Error for UnknownPopularity {}

impl FromStr for Popularity {
    type Err = UnknownPopularity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "uniform" => Ok(Self::Uniform),
            "round-robin" => Ok(Self::RoundRobin),
            _ => {
                let exponent = text.strip_prefix("zipf:").and_then(|exponent| exponent.parse().ok());
                let exponent = exponent.filter(|exponent: &f64| exponent.is_finite() && *exponent >= 0.0);
                exponent.map(Self::Zipf).ok_or_else(|| UnknownPopularity(text.into()))
            }
        }
    }
}

impl fmt::Display for Popularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zipf(exponent) => write!(f, "zipf:{exponent}"),
            Self::Uniform => write!(f, "uniform"),
            Self::RoundRobin => write!(f, "round-robin"),
        }
    }
}

/// When requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Arrivals {
    /// So many a second, with times between them whose standard deviation is `cv` times their mean. Clients do not wait
    /// for answers.
    Open { rate: f64, cv: f64 },
    /// So many clients, each of which asks again as soon as it has its answer.
    Closed { streams: usize },
}

/// A load.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) adapters: usize,
    /// LoRA ranks, equally frequent.
    pub(crate) lora_ranks: Vec<u32>,
    pub(crate) bytes_per_rank: u64,
    pub(crate) popularity: Popularity,
    pub(crate) arrivals: Arrivals,
    pub(crate) requests: usize,
    pub(crate) tenants: u64,
    /// Mean tokens of prompts and of answers.
    pub(crate) prompt: u32,
    pub(crate) answer: u32,
    /// Whether all prompts and all answers have the mean length.
    pub(crate) equal_lengths: bool,
    /// Share of the requests, the first ones, that do not count.
    pub(crate) warm_up: f64,
    /// Whether the cache on the disk has adapters at the start, as many as fit.
    pub(crate) on_disk: bool,
    /// Share of the adapters whose source never sends them.
    pub(crate) hanging: f64,
    pub(crate) seed: u64,
}

/// One request of a load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    /// Time at which it comes; zero in a closed loop, where it comes when a client is free.
    pub(crate) at: Duration,
    pub(crate) adapter: usize,
    pub(crate) prompt: u32,
    pub(crate) answer: u32,
    /// Whether it counts. The first ones find a server that has nothing.
    pub(crate) counts: bool,
}

impl Workload {
    /// The requests in their order. The same seed gives the same ones.
    pub(crate) fn jobs(&self) -> Vec<Job> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let gaps = match self.arrivals {
            Arrivals::Open { rate, cv } => Gamma::new(1.0 / (cv * cv), cv * cv / rate).ok(),
            Arrivals::Closed { .. } => None,
        };
        let zipf = match self.popularity {
            Popularity::Zipf(exponent) => Zipf::new(self.adapters as f64, exponent).ok(),
            _ => None,
        };
        let mut now = 0.0;
        (0..self.requests)
            .map(|index| {
                now += gaps.map_or(0.0, |gaps| gaps.sample(&mut rng));
                let adapter = match (self.popularity, zipf) {
                    (Popularity::RoundRobin, _) => index % self.adapters,
                    (_, Some(zipf)) => zipf.sample(&mut rng) as usize - 1,
                    _ => rng.random_range(0..self.adapters),
                };
                let mut length = |mean| if self.equal_lengths { mean } else { length(mean, &mut rng) };
                let (prompt, answer) = (length(self.prompt), length(self.answer));
                let counts = index as f64 >= self.warm_up * self.requests as f64;
                Job { at: Duration::from_secs_f64(now), adapter, prompt, answer, counts }
            })
            .collect()
    }

    pub(crate) fn bytes(&self, adapter: usize) -> u64 {
        u64::from(self.lora_ranks[adapter % self.lora_ranks.len()]) * self.bytes_per_rank
    }

    pub(crate) fn tenant(&self, adapter: usize) -> u64 {
        adapter as u64 % self.tenants
    }

    /// Whether the adapter's source never sends it. These are spread over all popularities.
    pub(crate) fn hangs(&self, adapter: usize) -> bool {
        let every = (1.0 / self.hanging).round().max(1.0);
        self.hanging > 0.0 && adapter % every as usize == every as usize / 2
    }
}

/// A length around a mean: a quarter of it is certain, and the rest is exponential, up to four times the mean.
fn length(mean: u32, rng: &mut StdRng) -> u32 {
    let (least, mean) = (f64::from(mean) / 4.0, f64::from(mean));
    let rest = Exp::new(1.0 / (mean - least).max(1e-9)).map_or(0.0, |rest| rest.sample(rng));
    (least + rest).min(4.0 * mean).max(1.0) as u32
}
