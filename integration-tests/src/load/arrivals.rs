//! Random draws of arrival times, sizes and adapters.

use std::{fmt, str::FromStr};

use anyhow::{Context, bail};
use rand::{Rng, rngs::StdRng};
use rand_distr::{Distribution, Gamma, Zipf};

/// Time between requests of an open loop, in seconds: Gamma distributed with the given coefficient of variation.
/// `cv = 1` is a Poisson process; larger is burstier.
#[derive(Debug, Clone, Copy)]
pub struct Arrivals {
    gamma: Gamma<f64>,
}

impl Arrivals {
    /// `rate` requests a second with coefficient of variation `cv`: shape `1/cv²`, scale `cv²/rate`.
    ///
    /// # Errors
    /// When either is not positive and finite.
    pub fn new(rate: f64, cv: f64) -> anyhow::Result<Self> {
        let gamma = Gamma::new(1.0 / (cv * cv), cv * cv / rate).context("rate and cv must be positive")?;
        Ok(Self { gamma })
    }

    /// Seconds until the next request.
    pub fn next_gap(&self, rng: &mut StdRng) -> f64 {
        self.gamma.sample(rng)
    }
}

/// A number of tokens: `128`, or `16..512` for a uniform draw with both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    low: usize,
    high: usize,
}

impl Length {
    /// One draw.
    pub fn draw(self, rng: &mut StdRng) -> usize {
        rng.random_range(self.low..=self.high)
    }
}

impl FromStr for Length {
    type Err = anyhow::Error;

    fn from_str(s: &str) -> anyhow::Result<Self> {
        let (low, high) = s.split_once("..").unwrap_or((s, s));
        let (low, high) = (low.parse()?, high.parse()?);
        if low == 0 || low > high {
            bail!("a length is N or LOW..HIGH with 0 < LOW <= HIGH");
        }
        Ok(Self { low, high })
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high {
            write!(f, "{}", self.low)
        } else {
            write!(f, "{}..{}", self.low, self.high)
        }
    }
}

/// The popularity of adapters: a rule that picks one of N for each request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Popularity {
    /// Always the first.
    Identical,
    /// Closed loop: every stream has its own. Open loop: one after the other.
    Distinct,
    /// One after the other over all requests.
    RoundRobin,
    /// Each with the same probability.
    Uniform,
    /// The k-th with a probability proportional to `k^-alpha`.
    Zipf(f64),
}

impl Popularity {
    /// Index of the adapter, below `adapters`, for the given request of the given stream.
    pub fn pick(self, adapters: usize, request: usize, stream: usize, rng: &mut StdRng) -> usize {
        match self {
            Self::Identical => 0,
            Self::Distinct => stream % adapters,
            Self::RoundRobin => request % adapters,
            Self::Uniform => rng.random_range(0..adapters),
            Self::Zipf(alpha) => {
                let zipf =
                    Zipf::new(adapters as f64, alpha).expect("invariant: alpha was checked when parsed");
                (zipf.sample(rng) as usize - 1).min(adapters - 1)
            }
        }
    }
}

impl FromStr for Popularity {
    type Err = anyhow::Error;

    fn from_str(s: &str) -> anyhow::Result<Self> {
        Ok(match s {
            "identical" => Self::Identical,
            "distinct" => Self::Distinct,
            "round-robin" => Self::RoundRobin,
            "uniform" => Self::Uniform,
            _ => {
                let alpha: f64 = s
                    .strip_prefix("zipf:")
                    .context("one of identical, distinct, round-robin, uniform, zipf:ALPHA")?
                    .parse()?;
                if !(alpha.is_finite() && alpha >= 0.0) {
                    bail!("alpha must be finite and not negative");
                }
                Self::Zipf(alpha)
            }
        })
    }
}

impl fmt::Display for Popularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identical => f.write_str("identical"),
            Self::Distinct => f.write_str("distinct"),
            Self::RoundRobin => f.write_str("round-robin"),
            Self::Uniform => f.write_str("uniform"),
            Self::Zipf(alpha) => write!(f, "zipf:{alpha}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn gaps_have_the_rate_and_variation_asked_for() {
        let mut rng = StdRng::seed_from_u64(1);
        for cv in [0.5, 1.0, 4.0] {
            let arrivals = Arrivals::new(8.0, cv).unwrap();
            let gaps: Vec<f64> = (0..200_000).map(|_| arrivals.next_gap(&mut rng)).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            assert!((mean * 8.0 - 1.0).abs() < 0.05, "cv {cv}: mean {mean}");
            assert!((variance.sqrt() / mean / cv - 1.0).abs() < 0.05, "cv {cv}");
        }
    }

    #[test]
    fn zipf_follows_its_law() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut counts = [0usize; 100];
        for i in 0..200_000 {
            counts[Popularity::Zipf(1.0).pick(100, i, 0, &mut rng)] += 1;
        }
        let ratio = counts[0] as f64 / counts[9] as f64;
        assert!((ratio / 10.0 - 1.0).abs() < 0.1, "first to tenth {ratio}");
    }

    #[test]
    fn lengths_are_parsed_or_refused() {
        assert_eq!("128".parse::<Length>().unwrap().to_string(), "128");
        assert_eq!("1..9".parse::<Length>().unwrap().to_string(), "1..9");
        for bad in ["0", "9..1", "", "a"] {
            assert!(bad.parse::<Length>().is_err(), "{bad}");
        }
    }
}
