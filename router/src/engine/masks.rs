//! The masks of constrained sequences. Their rows are planned like any others, and their steps are sent without masks:
//! the mask of a row depends on the token before it, which comes while the row's step already runs. It is computed then,
//! and the masks of a step are sent together once the last of them is there.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    mem,
    sync::Arc,
    time::Instant,
};

use scheduler::RequestId;

use crate::grammar::mask_workers::{Begin, MaskError, MaskWorkers, Results, Seat, Wanted};

/// The masks that the steps in flight need.
pub(super) struct Masks {
    workers: Arc<MaskWorkers>,
    results: Arc<Results>,
    sequences: HashMap<RequestId, Constrained>,
    /// Steps whose masks have not been sent.
    steps: BTreeMap<u64, StepMasks>,
}

/// A constrained sequence.
struct Constrained {
    seat: Seat,
    /// Until its first mask is wanted.
    begin: Option<Begin>,
    /// Steps with a sampled row of it, oldest first. All tokens before the row of the first one are known.
    steps: VecDeque<u64>,
    /// Whether the first of them has its mask.
    masked: bool,
    /// Tokens since its last mask.
    tokens: Vec<u32>,
}

/// The masks of one step.
#[derive(Default)]
struct StepMasks {
    missing: usize,
    masks: Vec<Mask>,
    /// Time at which the last token came that one of the masks depends on.
    since: Option<Instant>,
}

/// The tokens that a sequence may go on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mask {
    pub(crate) sequence: RequestId,
    /// `None` where nobody will read the token: the sequence has ended.
    pub(crate) allowed: Option<Vec<u8>>,
}

/// A step's masks, complete.
pub(super) struct Complete {
    pub(super) step: u64,
    pub(super) masks: Vec<Mask>,
    /// Time since the last token that the masks depend on.
    pub(super) since: Option<Instant>,
}

impl Masks {
    pub(super) fn new(workers: Arc<MaskWorkers>) -> Masks {
        let (sequences, steps) = (HashMap::new(), BTreeMap::new());
        Masks { workers, results: Arc::default(), sequences, steps }
    }

    /// A constrained sequence has been submitted.
    pub(super) fn begin(&mut self, id: RequestId, begin: Begin) {
        if let Some(seat) = self.workers.seat(id) {
            let (begin, steps, tokens) = (Some(begin), VecDeque::new(), Vec::new());
            self.sequences.insert(id, Constrained { seat, begin, steps, masked: false, tokens });
        }
    }

    /// Whether a sequence is constrained.
    pub(super) fn constrain(&self, id: RequestId) -> bool {
        self.sequences.contains_key(&id)
    }

    /// A step has been planned in which a token of the sequence is sampled.
    pub(super) fn planned(&mut self, step: u64, id: RequestId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.steps.entry(step).or_default().missing += 1;
        sequence.steps.push_back(step);
        if sequence.steps.len() == 1 {
            self.want(id, step);
        }
    }

    /// A token of the sequence has been sampled, and it goes on.
    pub(super) fn sampled(&mut self, id: RequestId, token: u32) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.tokens.push(token);
        sequence.steps.pop_front();
        sequence.masked = false;
        if let Some(&step) = sequence.steps.front() {
            self.want(id, step);
        }
    }

    fn want(&mut self, id: RequestId, step: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let (tokens, begin) = (mem::take(&mut sequence.tokens), sequence.begin.take());
        sequence.seat.want(Wanted { sequence: id, step, tokens, begin }, &self.results);
        self.steps.entry(step).or_default().since = Some(Instant::now());
    }

    /// The sequence has ended. Its rows in flight may be sampled in any way.
    pub(super) fn end(&mut self, id: RequestId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        for step in sequence.steps.into_iter().skip(usize::from(sequence.masked)) {
            self.fill(step, Mask { sequence: id, allowed: None });
        }
    }

    fn fill(&mut self, step: u64, mask: Mask) {
        if let Some(masks) = self.steps.get_mut(&step) {
            masks.masks.push(mask);
        }
    }

    /// Waits until masks have been computed.
    pub(super) async fn computed(&self) {
        self.results.added.notified().await;
    }

    /// Takes the masks that have been computed. Returns the sequences that cannot go on.
    pub(super) fn collect(&mut self) -> Vec<(RequestId, MaskError)> {
        let mut failed = Vec::new();
        for computed in self.results.take() {
            let (id, step) = (computed.sequence, computed.step);
            // Otherwise it has ended, and its row does not need the mask any more.
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            match computed.mask {
                Ok(allowed) => {
                    sequence.masked = true;
                    self.fill(step, Mask { sequence: id, allowed: Some(allowed) });
                }
                Err(error) => failed.push((id, error)),
            }
        }
        failed
    }

    /// The steps all of whose masks are there, oldest first.
    pub(super) fn complete(&mut self) -> Vec<Complete> {
        let complete = self.steps.extract_if(.., |_, step| step.masks.len() >= step.missing);
        complete.map(|(step, StepMasks { masks, since, .. })| Complete { step, masks, since }).collect()
    }
}
