//! Choosing tokens.

use std::collections::HashMap;

use super::{
    CpuBackend,
    memory::CpuMat,
    simd::{Kernel, Simd, Tier, run},
};
use crate::{Error, Matrix, Result, SampleRow, Sampled, SamplingParams};

/// Sampling state by seat.
#[derive(Debug)]
pub struct CpuSampler {
    vocab: usize,
    seats: Vec<Seat>,
}

#[derive(Debug, Clone, Default)]
struct Seat {
    params: SamplingParams,
    /// Tokens of prompt and output, with how often each was generated.
    seen: HashMap<u32, u32>,
    /// Draws so far.
    drawn: u64,
    last: u32,
}

impl CpuSampler {
    pub(super) fn new(seats: usize, vocab: usize) -> CpuSampler {
        CpuSampler { vocab, seats: vec![Seat::default(); seats] }
    }

    /// The token sampled last at a seat.
    pub(super) fn last(&self, op: &'static str, seat: usize) -> Result<u32> {
        let limit = self.seats.len();
        self.seats.get(seat).map(|seat| seat.last).ok_or(Error::Index {
            op,
            what: "seat",
            index: seat,
            limit,
        })
    }

    pub(super) fn seat(
        &mut self,
        seat: u32,
        params: &SamplingParams,
        prompt: &[u32],
        output: &[u32],
    ) -> Result<()> {
        let op = "seat";
        for token in prompt.iter().chain(output).chain(params.logit_bias.iter().map(|(token, _)| token)) {
            if *token as usize >= self.vocab {
                return Err(Error::Index { op, what: "token", index: *token as usize, limit: self.vocab });
            }
        }
        let limit = self.seats.len();
        let place = self.seats.get_mut(seat as usize).ok_or(Error::Index {
            op,
            what: "seat",
            index: seat as usize,
            limit,
        })?;
        let mut seen: HashMap<u32, u32> = HashMap::new();
        // Only penalties look at what was seen.
        if params.has_penalty() {
            seen.extend(prompt.iter().map(|&token| (token, 0)));
            output.iter().for_each(|&token| *seen.entry(token).or_default() += 1);
        }
        *place = Seat { params: params.clone(), seen, drawn: output.len() as u64, last: 0 };
        Ok(())
    }
}

impl SamplingParams {
    fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

pub(super) fn sample(
    be: &CpuBackend,
    logits: &CpuMat,
    rows: &[SampleRow],
    sampler: &mut CpuSampler,
) -> Result<Vec<Sampled>> {
    let op = "sample";
    check_rows(op, logits, sampler.vocab, rows.iter().map(|row| row.row))?;
    for row in rows {
        sampler.last(op, row.seat as usize)?;
    }
    let seats = &sampler.seats;
    let sampled = each(be, rows.len(), |i| {
        let SampleRow { row, seat } = rows[i];
        seats[seat as usize].choose(be.tier, seat, logits.row(row as usize))
    });
    for choice in &sampled {
        let seat = &mut sampler.seats[choice.seat as usize];
        seat.last = choice.token;
        seat.drawn += 1;
        if seat.params.has_penalty() {
            *seat.seen.entry(choice.token).or_default() += 1;
        }
    }
    Ok(sampled)
}

pub(super) fn score(
    be: &CpuBackend,
    logits: &CpuMat,
    targets: &[(u32, u32)],
    num_top: u32,
) -> Result<Vec<Sampled>> {
    let op = "score";
    check_rows(op, logits, logits.cols(), targets.iter().map(|target| target.0))?;
    let limit = logits.cols();
    if let Some((_, token)) = targets.iter().find(|(_, token)| *token as usize >= limit) {
        return Err(Error::Index { op, what: "token", index: *token as usize, limit });
    }
    Ok(each(be, targets.len(), |i| {
        let (row, token) = targets[i];
        let logits = logits.row(row as usize);
        let normalizer = log_sum_exp(be.tier, logits);
        Sampled {
            seat: 0,
            token,
            logprob: logits[token as usize] - normalizer,
            top: top(logits, num_top, normalizer),
        }
    }))
}

fn check_rows(
    op: &'static str,
    logits: &CpuMat,
    vocab: usize,
    rows: impl Iterator<Item = u32>,
) -> Result<()> {
    if logits.cols() != vocab {
        return Err(Error::Shape { op, what: "columns of the logits", got: logits.cols(), expected: vocab });
    }
    let limit = logits.rows();
    for row in rows {
        if row as usize >= limit {
            return Err(Error::Index { op, what: "row", index: row as usize, limit });
        }
    }
    Ok(())
}

/// `f(0) … f(count - 1)`, computed on all threads.
fn each(be: &CpuBackend, count: usize, f: impl Fn(usize) -> Sampled + Sync) -> Vec<Sampled> {
    let results: Vec<std::sync::OnceLock<Sampled>> = (0..count).map(|_| std::sync::OnceLock::new()).collect();
    be.pool.run(count, |i| {
        results[i].get_or_init(|| f(i));
    });
    results.into_iter().filter_map(std::sync::OnceLock::into_inner).collect()
}

/// `ln Σ eˣ`; a NaN adds nothing.
fn log_sum_exp(tier: Tier, logits: &[f32]) -> f32 {
    run(tier, LogSumExp(logits))
}

struct LogSumExp<'a>(&'a [f32]);

impl Kernel for LogSumExp<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let (chunks, rest) = self.0.as_chunks::<16>();
        let rest_max = rest.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // SAFETY: the caller's promise; every chunk has 16 lanes.
        unsafe {
            let mut max = S::splat(rest_max);
            for chunk in chunks {
                max = S::max(S::load(chunk.as_ptr()), max);
            }
            let max = S::largest(max);
            let mut sum = S::splat(0.0);
            for chunk in chunks {
                sum = S::add(sum, S::exp(S::add(S::load(chunk.as_ptr()), S::splat(-max))));
            }
            let rest: f32 = rest.iter().filter(|x| !x.is_nan()).map(|x| (x - max).exp()).sum();
            max + (S::sum(sum) + rest).ln()
        }
    }
}

/// A logit, where NaN is that of a token which is never chosen.
fn or_never(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

/// Greater logit first, then lower id.
fn by_logit(logits: &[f32]) -> impl Fn(&u32, &u32) -> std::cmp::Ordering {
    let logit = |id: u32| or_never(logits[id as usize]);
    move |a, b| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b))
}

/// The first token of the greatest logit; 0 where none can be chosen.
fn argmax(logits: &[f32]) -> u32 {
    let (mut best, mut most) = (0, f32::NEG_INFINITY);
    for (i, x) in logits.iter().enumerate() {
        if *x > most {
            (best, most) = (i, *x);
        }
    }
    best as u32
}

fn top(logits: &[f32], count: u32, normalizer: f32) -> Vec<(u32, f32)> {
    if count == 0 {
        return Vec::new();
    }
    let ids = best_ids(logits, count as usize);
    ids.into_iter().map(|id| (id, logits[id as usize] - normalizer)).collect()
}

/// The `count` tokens of greatest logit, greatest first.
fn best_ids(logits: &[f32], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count < ids.len() && count > 0 {
        ids.select_nth_unstable_by(count - 1, by_logit(logits));
    }
    ids.truncate(count);
    ids.sort_unstable_by(by_logit(logits));
    ids
}

impl Seat {
    fn choose(&self, tier: Tier, seat: u32, raw: &[f32]) -> Sampled {
        let normalizer = log_sum_exp(tier, raw);
        let params = &self.params;
        let mut changed = Vec::new();
        let logits = if params.has_penalty() || !params.logit_bias.is_empty() {
            changed.extend_from_slice(raw);
            self.penalize(&mut changed);
            &changed
        } else {
            raw
        };
        let token = if params.temperature == 0.0 { argmax(logits) } else { self.draw(logits) };
        Sampled {
            seat,
            token,
            logprob: raw[token as usize] - normalizer,
            top: top(raw, params.num_top, normalizer),
        }
    }

    fn penalize(&self, logits: &mut [f32]) {
        let params = &self.params;
        for (&token, &count) in &self.seen {
            let x = &mut logits[token as usize];
            *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
            *x -= count as f32 * params.frequency_penalty;
            if count > 0 {
                *x -= params.presence_penalty;
            }
        }
        for &(token, bias) in &params.logit_bias {
            logits[token as usize] += bias;
        }
    }

    /// One draw from the filtered distribution. An infinite logit has all the probability.
    fn draw(&self, logits: &[f32]) -> u32 {
        let best = argmax(logits);
        if !logits[best as usize].is_finite() {
            return best;
        }
        let mut kept = self.candidates(logits);
        let params = &self.params;
        if params.typical_p < 1.0 {
            typical(&mut kept, params.typical_p);
        }
        if params.top_p < 1.0 {
            kept.truncate(covering(&kept, params.top_p));
        }
        if params.min_p > 0.0 {
            let least = params.min_p * kept[0].1;
            kept.retain(|candidate| candidate.1 >= least);
        }
        let total: f32 = kept.iter().map(|candidate| candidate.1).sum();
        let mut left = uniform(params.seed, self.drawn) * f64::from(total);
        for (token, p) in &kept {
            left -= f64::from(*p);
            if left < 0.0 {
                return *token;
            }
        }
        kept[kept.len() - 1].0
    }

    /// Tokens and probabilities after temperature and top-k, most probable first.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f32)> {
        let params = &self.params;
        let k = if params.top_k == 0 { logits.len() } else { (params.top_k as usize).min(logits.len()) };
        let ids = best_ids(logits, k);
        let max = logits[ids[0] as usize];
        let mut kept: Vec<(u32, f32)> = ids
            .into_iter()
            .map(|id| (id, ((or_never(logits[id as usize]) - max) / params.temperature).exp()))
            .collect();
        let total: f32 = kept.iter().map(|candidate| candidate.1).sum();
        kept.iter_mut().for_each(|candidate| candidate.1 /= total);
        kept
    }
}

/// How many candidates from the front have `mass` together, at least 1.
fn covering(kept: &[(u32, f32)], mass: f32) -> usize {
    let total: f32 = kept.iter().map(|candidate| candidate.1).sum();
    let mut sum = 0.0;
    let reached = kept.iter().position(|candidate| {
        sum += candidate.1;
        sum >= mass * total
    });
    reached.map_or(kept.len(), |last| last + 1)
}

/// Keeps the candidates whose surprise is nearest to the entropy, most probable first as before.
fn typical(kept: &mut Vec<(u32, f32)>, mass: f32) {
    let surprise = |p: f32| -p.max(f32::MIN_POSITIVE).ln();
    let entropy: f32 = kept.iter().map(|(_, p)| p * surprise(*p)).sum();
    kept.sort_by(|a, b| {
        (surprise(a.1) - entropy).abs().total_cmp(&(surprise(b.1) - entropy).abs()).then(a.0.cmp(&b.0))
    });
    kept.truncate(covering(kept, mass));
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
}

/// Draw `i` of a sequence, in [0, 1): SplitMix64's mixing function (Steele et al., 2014) over seed and counter.
fn uniform(seed: u64, i: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed).wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
