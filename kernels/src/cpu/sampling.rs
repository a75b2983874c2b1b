//! Sampling and scoring.

mod draw;
mod ranking;

use std::{
    collections::HashMap,
    sync::{Mutex, OnceLock, PoisonError},
};

use super::{
    CpuBackend,
    memory::CpuMat,
    simd::{Kernel, Simd, Tier, run},
};
use crate::{
    Error, Matrix, Result, SampleRow, Sampled, SamplingParams, TokenMask,
    sampling::{check_masks, check_seat},
};
use ranking::{Buffers, Ranking, lane_maxima};

/// Sampling state by seat.
#[derive(Debug)]
pub struct CpuSampler {
    vocab: usize,
    seats: Vec<Seat>,
    /// Scratch memory that is not in use; there is as much as rows were sampled at the same time.
    spare: Mutex<Vec<Scratch>>,
}

/// Scratch memory for sampling one row.
#[derive(Debug, Default)]
struct Scratch {
    /// The logits after penalties.
    logits: Vec<f32>,
    top: Buffers,
    draw: draw::Scratch,
}

#[derive(Debug, Clone, Default)]
struct Seat {
    params: SamplingParams,
    /// The tokens of prompt and output, each with the number of times that it was generated.
    seen: HashMap<u32, u32>,
    /// The number of draws so far.
    drawn: u64,
    last: u32,
}

impl CpuSampler {
    pub(super) fn new(seats: usize, vocab: usize) -> CpuSampler {
        CpuSampler { vocab, seats: vec![Seat::default(); seats], spare: Mutex::default() }
    }

    /// The token that was sampled last at a seat.
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
        check_seat(params, self.vocab, prompt, output)?;
        let (index, limit) = (seat as usize, self.seats.len());
        let outside = Error::Index { op: "seat", what: "seat", index, limit };
        let place = self.seats.get_mut(index).ok_or(outside)?;
        let mut seen: HashMap<u32, u32> = HashMap::new();
        // Only penalties need the tokens that were seen.
        if params.has_penalty() {
            seen.extend(prompt.iter().map(|&token| (token, 0)));
            output.iter().for_each(|&token| *seen.entry(token).or_default() += 1);
        }
        *place = Seat { params: params.clone(), seen, drawn: output.len() as u64, last: 0 };
        Ok(())
    }
}

pub(super) fn sample(
    be: &CpuBackend,
    logits: &CpuMat,
    rows: &[SampleRow],
    masks: &[Option<&TokenMask>],
    sampler: &mut CpuSampler,
) -> Result<Vec<Sampled>> {
    let op = "sample";
    check_masks(masks, rows.len(), sampler.vocab)?;
    check_rows(op, logits, sampler.vocab, rows.iter().map(|row| row.row))?;
    for row in rows {
        sampler.last(op, row.seat as usize)?;
    }
    let (seats, spare) = (&sampler.seats, || sampler.spare.lock().unwrap_or_else(PoisonError::into_inner));
    let sampled = each(be, rows.len(), |i| {
        let SampleRow { row, seat } = rows[i];
        let mut scratch = spare().pop().unwrap_or_default();
        let logits = Logits { raw: logits.row(row as usize), mask: masks[i] };
        let choice = seats[seat as usize].choose(be.tier, seat, logits, &mut scratch);
        spare().push(scratch);
        choice
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
            top: top(logits, num_top, normalizer, &mut Buffers::default()),
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

/// Computes `f(0) … f(count - 1)` on all threads.
fn each(be: &CpuBackend, count: usize, f: impl Fn(usize) -> Sampled + Sync) -> Vec<Sampled> {
    let results: Vec<OnceLock<Sampled>> = (0..count).map(|_| OnceLock::new()).collect();
    be.pool.run(count, |i| {
        results[i].get_or_init(|| f(i));
    });
    results.into_iter().filter_map(OnceLock::into_inner).collect()
}

/// `ln Σ eˣ`, without the NaNs.
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

/// Sets the logits of tokens that the mask does not allow to negative infinity.
fn rule_out(mask: &TokenMask, logits: &mut [f32]) {
    for (logits, word) in logits.chunks_mut(32).zip(mask.words()) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// The first token with the greatest logit; `None` if all logits are NaN or negative infinity.
fn argmax(logits: &[f32]) -> Option<u32> {
    let most = lane_maxima(logits).into_iter().fold(f32::NEG_INFINITY, f32::max);
    let best = logits.iter().position(|x| *x == most && most > f32::NEG_INFINITY);
    best.map(|token| token as u32)
}

/// The `count` most probable tokens with their log-probabilities, in descending order.
fn top(logits: &[f32], count: u32, normalizer: f32, buffers: &mut Buffers) -> Vec<(u32, f32)> {
    if count == 0 {
        return Vec::new();
    }
    let mut ranking = Ranking::new(logits, buffers);
    ranking.first(count as usize).map(|id| (id, logits[id as usize] - normalizer)).collect()
}

/// The logits of a row, and its mask.
struct Logits<'a> {
    raw: &'a [f32],
    mask: Option<&'a TokenMask>,
}

impl Seat {
    fn choose(&self, tier: Tier, seat: u32, row: Logits<'_>, scratch: &mut Scratch) -> Sampled {
        let Logits { raw, mask } = row;
        let normalizer = log_sum_exp(tier, raw);
        let params = &self.params;
        let changes = params.has_penalty() || !params.logit_bias.is_empty() || !params.bans.is_empty();
        let logits = if changes || mask.is_some() {
            scratch.logits.clear();
            scratch.logits.extend_from_slice(raw);
            self.penalize(&mut scratch.logits);
            mask.into_iter().for_each(|mask| rule_out(mask, &mut scratch.logits));
            &scratch.logits
        } else {
            raw
        };
        let mut token = argmax(logits).unwrap_or_else(|| mask.map_or(0, TokenMask::first));
        // An infinite logit has a probability of 1.
        if params.temperature != 0.0 && logits[token as usize].is_finite() {
            token = draw::draw(params, self.drawn, tier, logits, &mut scratch.draw);
        }
        Sampled {
            seat,
            token,
            logprob: raw[token as usize] - normalizer,
            top: top(raw, params.num_top, normalizer, &mut scratch.top),
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
        for ban in params.bans.iter().filter(|ban| self.drawn < u64::from(ban.until)) {
            logits[ban.token as usize] = f32::NEG_INFINITY;
        }
    }
}
