//! The second and third state of a step: launches its sampling, and collects its results.

use std::{mem, slice, time::Instant};

use kernels::{Backend, SampleRow, Sampled};
use model::decoder::Classes;

use super::{
    idle::Marks,
    pass::{Forwarded, HiddenRows, Sample},
    pooling,
    state::{Place, State, StepError},
};
use crate::step::{Output, Refusal, StepResult};

/// A step that has been launched completely, and whose results have not been collected.
pub(super) struct Launched<B: Backend> {
    id: u64,
    started: Instant,
    samples: Vec<Sample>,
    rounds: Vec<Round<B>>,
    scored: Vec<(u64, usize, usize)>,
    scores: Option<B::Pending>,
    hidden: Vec<HiddenRows>,
    refused: Vec<Refusal>,
    /// The beginning and the end of the step on the device. The end is the fence for all results of the step.
    marks: Marks<B>,
    /// The end of the pass and the beginning of sampling, if sampling had to wait. The device is idle in between.
    pause: Option<(B::Mark, B::Mark)>,
}

/// Tokens that are being sampled: one for a sequence at most.
struct Round<B: Backend> {
    pending: B::Pending,
    /// The index of each of them among the step's samples.
    places: Vec<usize>,
}

/// The seat of a sequence that is sampled.
enum Taken {
    Seat(u32),
    /// The sequence is refused, and if it was not before, the router has to be told.
    Refused(Option<Refusal>),
}

impl<B: Backend> Launched<B> {
    /// When it arrived.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Whether its results are read from activations, so that the next pass must not overwrite these yet.
    pub(super) fn holds_activations(&self) -> bool {
        !self.hidden.is_empty()
    }
}

impl<B: Backend> State<B> {
    /// Launches scoring and sampling. Sequences whose masks allow no token, or whose arguments the device refuses, are
    /// refused.
    pub(super) fn launch_sampling(
        &mut self,
        mut forwarded: Forwarded<B>,
    ) -> kernels::Result<Result<Launched<B>, StepError>> {
        let pause = match forwarded.end.take() {
            Some(end) => Some((end, self.ops.mark()?)),
            None => None,
        };
        let scores = self.launch_scoring(&mut forwarded)?;
        let mut rounds = Vec::new();
        // Penalties and draws of a row count the tokens before it, given ones included. So each round samples one row
        // of a sequence.
        let most = forwarded.wanted.samples.iter().map(|sample| sample.nth + 1).max().unwrap_or(0);
        for nth in 0..most {
            match self.sample_round(&mut forwarded, nth)? {
                Ok(launched) => rounds.extend(launched),
                Err(error) => return Ok(Err(error)),
            }
        }
        let Forwarded { id, started, begin, rows, decodes, wanted, refused, .. } = forwarded;
        let decode_rows = (rows > 0 && decodes).then_some(rows);
        let marks = Marks { begin, end: self.ops.mark()?, rows: decode_rows };
        Ok(Ok(Launched {
            id,
            started,
            samples: wanted.samples,
            rounds,
            scored: wanted.scored,
            scores,
            hidden: wanted.hidden,
            refused,
            marks,
            pause,
        }))
    }

    /// Launches scoring of prompt tokens. If the device refuses its arguments, the sequences that asked for it are
    /// refused.
    fn launch_scoring(&mut self, forwarded: &mut Forwarded<B>) -> kernels::Result<Option<B::Pending>> {
        let wanted = &mut forwarded.wanted;
        if wanted.targets.is_empty() {
            return Ok(None);
        }
        match self.ops.score(&self.scratch.logits, &wanted.targets, wanted.num_top) {
            Ok(pending) => Ok(Some(pending)),
            Err(error) if error.is_argument() => {
                let scored = mem::take(&mut wanted.scored);
                let refused = scored.iter().map(|(sequence, ..)| self.refuse(*sequence, error.to_string()));
                forwarded.refused.extend(refused);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Launches sampling from the `nth` sampled row of each sequence that has one.
    fn sample_round(
        &mut self,
        forwarded: &mut Forwarded<B>,
        nth: usize,
    ) -> kernels::Result<Result<Vec<Round<B>>, StepError>> {
        let (mut rows, mut places, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for (place, sample) in forwarded.wanted.samples.iter().enumerate() {
            if sample.nth != nth {
                continue;
            }
            if sample.masked && matches!(forwarded.mask(sample), Some(None)) {
                refused.push(self.refuse(sample.sequence, "its grammar allows no token".into()));
                continue;
            }
            match self.take_seat(sample)? {
                Ok(Taken::Seat(seat)) => {
                    rows.push(SampleRow { row: sample.logit, seat });
                    places.push(place);
                }
                Ok(Taken::Refused(refusal)) => refused.extend(refusal),
                Err(error) => return Ok(Err(error)),
            }
        }
        forwarded.refused.append(&mut refused);
        self.sample_rows(forwarded, &rows, &places).map(Ok)
    }

    /// Launches sampling from `rows`, which are those of the samples at `places`. If the device refuses the arguments of
    /// this launch, each row is launched alone, so that only the sequences at fault are refused.
    fn sample_rows(
        &mut self,
        forwarded: &mut Forwarded<B>,
        rows: &[SampleRow],
        places: &[usize],
    ) -> kernels::Result<Vec<Round<B>>> {
        let samples = &forwarded.wanted.samples;
        let masks: Vec<_> =
            places.iter().map(|&place| forwarded.mask(&samples[place]).and_then(Option::as_ref)).collect();
        let logits = &self.scratch.logits;
        let launched = match masks.iter().any(Option::is_some) {
            _ if rows.is_empty() => return Ok(Vec::new()),
            true => self.ops.sample_masked(logits, rows, &masks, &mut self.sampler),
            false => self.ops.sample(logits, rows, &mut self.sampler),
        };
        match (launched, places) {
            (Ok(pending), _) => Ok(vec![Round { pending, places: places.into() }]),
            (Err(error), &[place]) if error.is_argument() => {
                let refusal = self.refuse(samples[place].sequence, error.to_string());
                forwarded.refused.push(refusal);
                Ok(Vec::new())
            }
            (Err(error), _) if error.is_argument() => {
                let mut rounds = Vec::new();
                for (row, place) in rows.iter().zip(places) {
                    rounds.append(&mut self.sample_rows(
                        forwarded,
                        slice::from_ref(row),
                        slice::from_ref(place),
                    )?);
                }
                Ok(rounds)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Makes sure that the sampler has counted the tokens before a row, and returns the seat.
    fn take_seat(&mut self, sample: &Sample) -> kernels::Result<Result<Taken, StepError>> {
        let Sample { sequence: id, position, seat_again, .. } = *sample;
        let Some(Place::Seated(sequence)) = self.sequences.get_mut(&id) else {
            return Ok(Ok(Taken::Refused(None)));
        };
        if seat_again {
            let Some((prompt, output)) = sequence.known(position + 1) else {
                return Ok(Err(StepError::UnknownToken { sequence: id, position }));
            };
            match self.ops.seat(&mut self.sampler, sequence.seat, &sequence.sampling, prompt, output) {
                Ok(()) => {}
                Err(error) if error.is_argument() => {
                    return Ok(Ok(Taken::Refused(Some(self.refuse(id, error.to_string())))));
                }
                Err(error) => return Err(error),
            }
        }
        sequence.sampled(position);
        Ok(Ok(Taken::Seat(sequence.seat)))
    }

    /// Whether the device has finished a step, including the copies of its results.
    pub(super) fn is_ready(&self, launched: &Launched<B>) -> bool {
        self.ops.reached(&launched.marks.end)
    }

    /// Waits for a step, and returns its results.
    pub(super) fn collect(&mut self, launched: Launched<B>) -> kernels::Result<StepResult> {
        let Launched { id, samples, rounds, scored, scores, hidden, refused, marks, pause, .. } = launched;
        let mut outputs = self.collect_tokens(&samples, rounds)?;
        let mut scores = self.choices(scores)?.into_iter();
        outputs.extend(scored.into_iter().map(|(sequence, position, count)| Output::PromptScores {
            sequence,
            position,
            tokens: scores.by_ref().take(count).collect(),
        }));
        if !hidden.is_empty() {
            outputs.append(&mut self.collect_hidden(hidden)?);
        }
        let seconds = |from, to| self.ops.seconds_between(from, to);
        let seconds = match &pause {
            None => seconds(&marks.begin, &marks.end)?,
            Some((end, begin)) => seconds(&marks.begin, end)? + seconds(begin, &marks.end)?,
        };
        match pause {
            None => self.idle.note(&self.ops, marks),
            Some(_) => self.idle.interrupt(),
        }
        Ok(StepResult { id, outputs, duration_us: (seconds * 1e6) as u64, refused })
    }

    /// Reads hidden states, with what the adapter of each sequence adds to them, and pools those that are to be pooled.
    fn collect_hidden(&mut self, hidden: Vec<HiddenRows>) -> kernels::Result<Vec<Output>> {
        let (states, classes): (Vec<_>, Vec<_>) =
            hidden.into_iter().partition(|wanted| !self.is_classified(wanted.sequence));
        let mut outputs = if classes.is_empty() { Vec::new() } else { self.collect_classes(classes)? };
        if states.is_empty() {
            return Ok(outputs);
        }
        let mut values = self.ops.download(&self.scratch.hidden)?;
        let width = self.model.decoder().hidden;
        for wanted in states {
            let Some(Place::Seated(sequence)) = self.sequences.get(&wanted.sequence) else { continue };
            let shift = self.hidden_shift(&sequence.members);
            let own = &mut values[wanted.start * width..(wanted.start + wanted.rows) * width];
            for row in own.chunks_exact_mut(width) {
                row.iter_mut().zip(shift.iter().flat_map(|shift| shift.iter())).for_each(|(x, d)| *x += d);
            }
            if let Some(Place::Seated(sequence)) = self.sequences.get_mut(&wanted.sequence) {
                outputs.extend(pooling::pool(sequence, &wanted, own, width));
            }
        }
        Ok(outputs)
    }

    /// Whether scores of classes are asked for of a sequence.
    fn is_classified(&self, sequence: u64) -> bool {
        match self.sequences.get(&sequence) {
            Some(Place::Seated(sequence)) => sequence.pooling.is_some_and(|pooling| pooling.classes),
            _ => false,
        }
    }

    /// Reads the logits of classes, and makes scores of them.
    fn collect_classes(&self, classified: Vec<HiddenRows>) -> kernels::Result<Vec<Output>> {
        let Some(classifier) = self.model.decoder().task.classifier() else { return Ok(Vec::new()) };
        let (logits, width) = (self.ops.download(&self.scratch.logits)?, classifier.labels.len());
        let output = |HiddenRows { sequence, position, start, rows }: HiddenRows| {
            let mut values = logits[start * width..(start + rows) * width].to_vec();
            values.chunks_exact_mut(width).for_each(|row| classifier.scores.apply(row));
            match classifier.classes {
                Classes::OfTokens => Output::HiddenStates { sequence, position, values },
                Classes::OfSequences => Output::Pooled { sequence, values },
            }
        };
        Ok(classified.into_iter().map(output).collect())
    }

    /// The sampled tokens in the order of their rows.
    fn collect_tokens(&mut self, samples: &[Sample], rounds: Vec<Round<B>>) -> kernels::Result<Vec<Output>> {
        let mut tokens: Vec<Option<Sampled>> = samples.iter().map(|_| None).collect();
        for Round { pending, places } in rounds {
            for (sampled, place) in self.choices(Some(pending))?.into_iter().zip(places) {
                tokens[place] = Some(sampled);
            }
        }
        let mut outputs = Vec::with_capacity(samples.len());
        for (&Sample { sequence: id, position, added_by, .. }, sampled) in samples.iter().zip(tokens) {
            let Some(sampled) = sampled else { continue };
            // The id may have been given to another sequence since.
            if let Some(Place::Seated(sequence)) = self.sequences.get_mut(&id)
                && sequence.added_by == added_by
            {
                sequence.collect(position, sampled.token);
            }
            outputs.push(Output::Token { sequence: id, sampled });
        }
        Ok(outputs)
    }

    /// Waits for sampled tokens or scores.
    fn choices(&self, pending: Option<B::Pending>) -> kernels::Result<Vec<Sampled>> {
        let mut out = Vec::new();
        pending.map_or(Ok(()), |pending| self.ops.collect(pending, &mut out))?;
        Ok(out)
    }
}
