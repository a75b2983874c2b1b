//! Sampling and scoring: the state that is kept for each seat, the launches, and the copies of their results to the host.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    CudaBackend, CudaMat, convert,
    convert::Plain,
    device::{Device, DeviceBuf, Event, PinnedBuf, Stream},
    ffi, unsupported,
};
use crate::{
    Ban, Error, MAX_BIASES, MAX_TOP, Matrix, Result, SampleRow, Sampled, SamplingParams, TokenMask,
    sampling::{check_masks, check_seat},
};

/// The largest number of rows of one launch.
const MAX_ROWS: usize = 512;
/// Bytes of a `SeatParams` in `sample.cu`.
const PARAMS: usize = 56;
/// Bytes of a `Bias` in `sample.cu`.
const BIAS: usize = 12;
/// Bytes of a `Choice` in `sample.cu`.
const PAIR: usize = 8;
/// Bytes of a `SampleRow` in `sample.cu`.
const ROW: usize = 12;
/// The place of a row's mask if it has none; `kNoMask` in `sample.cu`.
const NO_MASK: u32 = u32::MAX;

/// Sampling state by seat.
pub struct CudaSampler {
    pub(super) seats: usize,
    vocab: usize,
    params: DeviceBuf,
    biases: DeviceBuf,
    seen: DeviceBuf,
    draws: DeviceBuf,
    pub(super) last: DeviceBuf,
    scratch: DeviceBuf,
    /// The masks of one launch.
    masks: DeviceBuf,
    /// How many of the most probable tokens each seat reports.
    num_top: Vec<u32>,
}

impl CudaSampler {
    pub(super) fn new(be: &CudaBackend, seats: usize, vocab: usize) -> Result<CudaSampler> {
        let zeroed = |bytes| DeviceBuf::zeroed(&be.device, bytes, "sampling state");
        Ok(CudaSampler {
            seats,
            vocab,
            params: zeroed(seats * PARAMS)?,
            biases: zeroed(seats * MAX_BIASES * BIAS)?,
            seen: zeroed(seats * seen_stride(vocab) * 2)?,
            draws: zeroed(seats * 4)?,
            last: zeroed(seats * 4)?,
            scratch: zeroed(seats.min(MAX_ROWS) * vocab * 4)?,
            masks: zeroed(seats.min(MAX_ROWS) * vocab.div_ceil(32) * 4)?,
            num_top: vec![0; seats],
        })
    }

    pub(super) fn seat(
        &mut self,
        be: &CudaBackend,
        seat: u32,
        params: &SamplingParams,
        (prompt, output): (&[u32], &[u32]),
    ) -> Result<()> {
        let at = seat as usize;
        check_seat(params, self.vocab, prompt, output)?;
        expect_below("seat", "seat", seat, self.seats)?;
        let penalized = params.has_penalty();
        let bans = params.bans.iter().map(|ban| (ban.token, f32::NEG_INFINITY, ban.until));
        let always = params.logit_bias.iter().map(|&(token, bias)| (token, bias, Ban::ALWAYS));
        let mut biases = Vec::new();
        for (token, bias, until) in always.chain(bans) {
            token.put(&mut biases);
            bias.put(&mut biases);
            until.put(&mut biases);
        }
        let seen = self.seen.at() + (at * seen_stride(self.vocab) * 2) as u64;
        let place = |buffer: &DeviceBuf, size: usize| buffer.at() + (at * size) as u64;
        be.device.bind()?;
        let mut staging = be.staging();
        // SAFETY: the seat was checked, and every buffer has room for all seats.
        unsafe {
            let words = seat_params(params, penalized);
            staging.copy(&be.stream, place(&self.params, PARAMS), &words)?;
            staging.copy(&be.stream, place(&self.biases, MAX_BIASES * BIAS), &biases)?;
            staging.copy(&be.stream, place(&self.draws, 4), &convert::bytes_of(&[output.len() as u32]))?;
            if penalized {
                be.stream.clear(seen, seen_stride(self.vocab) * 2)?;
            }
        }
        drop(staging);
        self.num_top[at] = params.num_top;
        if penalized {
            self.mark(be, seen, prompt, false)?;
            self.mark(be, seen, output, true)?;
        }
        Ok(())
    }

    /// Counts tokens as those of the prompt, or as generated ones.
    fn mark(&self, be: &CudaBackend, seen: u64, tokens: &[u32], generated: bool) -> Result<()> {
        for tokens in tokens.chunks(MAX_ROWS * ROW / 4) {
            // SAFETY: `rows` has room for a chunk, and tokens were checked against the vocabulary.
            unsafe { be.staging().copy(&be.stream, be.reports.rows.at(), &convert::bytes_of(tokens))? };
            let (count, vocab) = (tokens.len() as i32, self.vocab as i32);
            // SAFETY: as above.
            be.launch("seat", tokens.len(), |_, stream| unsafe {
                let from = be.reports.rows.at();
                ffi::lorax_mark_seen(seen, from, count, i32::from(generated), vocab, stream)
            })?;
        }
        Ok(())
    }

    /// Samples from `rows`, each with its mask if it has one.
    pub(super) fn sample(
        &self,
        be: &CudaBackend,
        logits: &CudaMat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
    ) -> Result<CudaPending> {
        let op = "sample";
        logits.expect_cols(op, "columns of the logits", self.vocab)?;
        check_masks(masks, rows.len(), self.vocab)?;
        for row in rows {
            expect_below(op, "row", row.row, logits.rows())?;
            expect_below(op, "seat", row.seat, self.seats)?;
        }
        let at_once = self.seats.clamp(1, MAX_ROWS);
        let mut pending = CudaPending::default();
        for (rows, masks) in rows.chunks(at_once).zip(masks.chunks(at_once)) {
            pending.parts.push(self.sample_at_once(be, logits, rows, masks)?);
        }
        Ok(pending)
    }

    /// Launches sampling from rows that fit into one launch.
    fn sample_at_once(
        &self,
        be: &CudaBackend,
        logits: &CudaMat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
    ) -> Result<Part> {
        let num_top: Vec<u32> = rows.iter().map(|r| self.num_top[r.seat as usize]).collect();
        let seats: Vec<u32> = rows.iter().map(|r| r.seat).collect();
        let max_top = num_top.iter().copied().max().unwrap_or(0);
        let args = ffi::SampleArgs {
            params: self.params.at(),
            biases: self.biases.at(),
            seen: self.seen.at(),
            draws: self.draws.at(),
            last: self.last.at(),
            scratch: self.scratch.at(),
            masks: self.masks.at(),
            seen_stride: seen_stride(self.vocab) as i32,
            max_biases: MAX_BIASES as i32,
            mask_words: self.vocab.div_ceil(32) as i32,
            ..be.reports.args(logits, rows.len(), max_top)
        };
        let mut num_masks = 0;
        let words = rows.iter().zip(masks).flat_map(|(row, mask)| {
            num_masks += u32::from(mask.is_some());
            [row.row, row.seat, if mask.is_some() { num_masks - 1 } else { NO_MASK }]
        });
        let words: Vec<u32> = words.collect();
        let masks: Vec<&TokenMask> = masks.iter().copied().flatten().collect();
        self.upload_masks(be, &masks)?;
        // SAFETY: rows, seats and masks were checked; results have room for `MAX_ROWS`.
        let launch = |elem, stream| unsafe {
            ffi::lorax_sample(&raw const args, elem, logits.wide(), rows.len() as i32, stream)
        };
        be.reports.fetch(be, &words, (seats, num_top), launch)
    }

    /// Copies the masks of one launch to the device, one after the other.
    fn upload_masks(&self, be: &CudaBackend, masks: &[&TokenMask]) -> Result<()> {
        let size = self.vocab.div_ceil(32) * 4;
        be.device.bind()?;
        let fill = |mut at: usize, mut out: &mut [u8]| {
            while !out.is_empty() {
                let words = &masks[at / size].words()[at % size / 4..];
                let (piece, rest) = out.split_at_mut(out.len().min(words.len() * 4));
                for (bytes, word) in piece.chunks_exact_mut(4).zip(words) {
                    bytes.copy_from_slice(&word.to_le_bytes());
                }
                at += piece.len();
                out = rest;
            }
        };
        // SAFETY: there is room for a mask of every row of a launch.
        unsafe { be.staging().write(&be.stream, self.masks.at(), masks.len() * size, 4, fill) }
    }
}

/// The number of counts that a seat has room for. It is even, because kernels update two counts as one word.
fn seen_stride(vocab: usize) -> usize {
    vocab.next_multiple_of(2)
}

fn expect_below(op: &'static str, what: &'static str, index: u32, limit: usize) -> Result<()> {
    let index = index as usize;
    if index < limit { Ok(()) } else { Err(Error::Index { op, what, index, limit }) }
}

/// Temperatures below this count as 0. Logits might overflow if they were divided by less, and the most probable token
/// has all of the probability anyway.
const LEAST_TEMPERATURE: f32 = 1e-6;

/// A `SeatParams` of `sample.cu`.
fn seat_params(params: &SamplingParams, penalized: bool) -> Vec<u8> {
    let mut words = Vec::with_capacity(PARAMS);
    let warm = params.temperature >= LEAST_TEMPERATURE;
    for x in [
        if warm { params.temperature } else { 0.0 },
        params.top_p,
        params.min_p,
        params.typical_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    ] {
        x.put(&mut words);
    }
    let biases = params.logit_bias.len() + params.bans.len();
    for x in [params.top_k, params.num_top, biases as u32, u32::from(penalized), 0] {
        x.put(&mut words);
    }
    params.seed.put(&mut words);
    words
}

pub(super) fn score(
    be: &CudaBackend,
    logits: &CudaMat,
    targets: &[(u32, u32)],
    num_top: u32,
) -> Result<CudaPending> {
    let op = "score";
    for &(row, token) in targets {
        expect_below(op, "row", row, logits.rows())?;
        expect_below(op, "token", token, logits.cols())?;
    }
    if num_top as usize > MAX_TOP {
        return Err(unsupported(format!("reporting {num_top} tokens, above {MAX_TOP},")));
    }
    let mut pending = CudaPending::default();
    for targets in targets.chunks(MAX_ROWS) {
        let args = be.reports.args(logits, targets.len(), num_top);
        let words: Vec<u32> = targets.iter().flat_map(|&(row, token)| [row, token, NO_MASK]).collect();
        let (seats, num_top) = (vec![0; targets.len()], vec![num_top; targets.len()]);
        // SAFETY: rows and tokens were checked; results have room for `MAX_ROWS`.
        let launch = |elem, stream| unsafe {
            ffi::lorax_score(&raw const args, elem, logits.wide(), targets.len() as i32, stream)
        };
        pending.parts.push(be.reports.fetch(be, &words, (seats, num_top), launch)?);
    }
    Ok(pending)
}

/// Pinned memory to which the results of one launch are copied.
struct Report {
    memory: PinnedBuf,
    copied: Event,
    stream: Arc<Stream>,
}

impl Drop for Report {
    fn drop(&mut self) {
        // Results that nobody collects may be dropped while they are copied. If another rank is lost, the work before the
        // copy ends by itself. If waiting fails for another reason, the device has failed, and the next operation
        // reports that.
        if self.stream.wait("drop results", &self.copied).is_err() {
            let _ = self.copied.synchronize();
        }
    }
}

/// The rows and the results of a launch on the GPU, and pinned memory for copies of results.
pub(super) struct Reports {
    rows: DeviceBuf,
    results: DeviceBuf,
    /// Pinned memory that is not in use.
    idle: Mutex<Vec<Report>>,
}

impl Reports {
    pub(super) fn new(device: &Arc<Device>) -> Result<Reports> {
        let what = "choices";
        Ok(Reports {
            rows: DeviceBuf::new(device, MAX_ROWS * ROW, what)?,
            results: DeviceBuf::new(device, result_bytes(MAX_ROWS, MAX_TOP as u32), what)?,
            idle: Mutex::default(),
        })
    }

    /// The arguments that sampling and scoring have in common. In the results, the lists of most probable tokens follow
    /// the choices.
    fn args(&self, logits: &CudaMat, rows: usize, max_top: u32) -> ffi::SampleArgs {
        let choices = self.results.at();
        ffi::SampleArgs {
            logits: logits.at(),
            rows: self.rows.at(),
            params: 0,
            biases: 0,
            seen: 0,
            draws: 0,
            last: 0,
            scratch: 0,
            masks: 0,
            choices,
            tops: choices + (rows * PAIR) as u64,
            vocab: logits.cols() as i32,
            seen_stride: 0,
            max_biases: 0,
            max_top: max_top as i32,
            mask_words: 0,
            unused: 0,
        }
    }

    /// Uploads `words` as the rows, launches a kernel, and begins to copy its results to the host.
    fn fetch(
        &self,
        be: &CudaBackend,
        words: &[u32],
        (seats, num_top): (Vec<u32>, Vec<u32>),
        launch: impl FnOnce(i32, cudarc::driver::sys::CUstream) -> i32,
    ) -> Result<Part> {
        be.device.bind()?;
        // SAFETY: callers launch at most `MAX_ROWS` rows.
        unsafe { be.staging().copy(&be.stream, self.rows.at(), &convert::bytes_of(words))? };
        be.launch("sample", seats.len(), launch)?;
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut report = match idle {
            Some(report) => report,
            None => {
                let memory = PinnedBuf::new(&be.device, result_bytes(MAX_ROWS, MAX_TOP as u32))?;
                Report { memory, copied: Event::new()?, stream: be.stream.clone() }
            }
        };
        let max_top = num_top.iter().copied().max().unwrap_or(0);
        let bytes = result_bytes(seats.len(), max_top);
        // SAFETY: the report is read or freed after `copied` only.
        unsafe { be.stream.copy_out(&mut report.memory.as_mut_slice()[..bytes], self.results.at())? };
        if let Err(error) = report.copied.record(&be.stream) {
            // Without the event, nothing else tells when the copy has ended.
            let _ = be.finish("sample");
            return Err(error);
        }
        Ok(Part { report, seats, num_top, max_top })
    }

    /// Waits for results, and appends them to `out`.
    pub(super) fn collect(
        &self,
        be: &CudaBackend,
        pending: CudaPending,
        out: &mut Vec<Sampled>,
    ) -> Result<()> {
        for part in pending.parts {
            be.comm.wait_for("collect", &part.report.copied)?;
            part.read(out);
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(part.report);
        }
        Ok(())
    }
}

fn result_bytes(rows: usize, max_top: u32) -> usize {
    rows * PAIR * (1 + max_top as usize)
}

/// The results of one launch, which may still be on their way to the host.
struct Part {
    report: Report,
    seats: Vec<u32>,
    num_top: Vec<u32>,
    max_top: u32,
}

impl Part {
    fn read(&self, out: &mut Vec<Sampled>) {
        let pairs: Vec<(u32, f32)> = self
            .report
            .memory
            .as_slice()
            .chunks_exact(PAIR)
            .take(self.seats.len() * (1 + self.max_top as usize))
            .map(|b| {
                (u32::from_le_bytes([b[0], b[1], b[2], b[3]]), f32::from_le_bytes([b[4], b[5], b[6], b[7]]))
            })
            .collect();
        let (choices, tops) = pairs.split_at(self.seats.len());
        for (i, (&(token, logprob), &seat)) in choices.iter().zip(&self.seats).enumerate() {
            let top = tops.iter().skip(i * self.max_top as usize).take(self.num_top[i] as usize);
            out.push(Sampled { seat, token, logprob, top: top.copied().collect() });
        }
    }
}

/// Results on their way to the host.
#[derive(Default)]
pub struct CudaPending {
    parts: Vec<Part>,
}
