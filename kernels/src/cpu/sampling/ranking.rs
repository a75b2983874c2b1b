//! Tokens in descending order of a score, which are sorted lazily.

/// The number of scores of a stripe. They are 16 apart, so that vector lanes find the maxima of 16 neighbouring
/// stripes.
const STRIPE: usize = 16;
const LANES: usize = 16;
/// The number of tokens that are sorted at first, and the factor by which it grows if they do not suffice.
const FIRST: usize = 256;
const GROWTH: usize = 16;

/// Scratch memory for a ranking.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    maxima: Vec<f32>,
    cut: Vec<f32>,
    keys: Vec<u64>,
}

/// The tokens with a score above negative infinity, in descending order; equal ones are ordered by id. NaN is no score.
pub(super) struct Ranking<'a> {
    scores: &'a [f32],
    /// The greatest score of every stripe.
    maxima: &'a mut Vec<f32>,
    cut: &'a mut Vec<f32>,
    /// The best tokens as [`key`]s, ascending.
    keys: &'a mut Vec<u64>,
    /// Whether `keys` has all tokens of the ranking.
    whole: bool,
}

impl<'a> Ranking<'a> {
    /// A ranking of all tokens by their scores.
    pub(super) fn new(scores: &'a [f32], buffers: &'a mut Buffers) -> Ranking<'a> {
        let Buffers { maxima, cut, keys } = buffers;
        keys.clear();
        maxima.clear();
        for group in scores.chunks(STRIPE * LANES) {
            maxima.extend_from_slice(&lane_maxima(group));
        }
        Ranking { scores, maxima, cut, keys, whole: false }
    }

    /// A ranking of some of the tokens.
    pub(super) fn among(
        tokens: impl Iterator<Item = u32>,
        scores: &'a [f32],
        buffers: &'a mut Buffers,
    ) -> Ranking<'a> {
        let Buffers { maxima, cut, keys } = buffers;
        keys.clear();
        keys.extend(tokens.map(|token| key(token, scores[token as usize])));
        keys.sort_unstable();
        Ranking { scores, maxima, cut, keys, whole: true }
    }

    /// The token at a place, if there is one.
    pub(super) fn get(&mut self, place: usize) -> Option<u32> {
        if place >= self.keys.len() && !self.whole {
            self.sort((place + 1).max(FIRST).max(GROWTH * self.keys.len()));
        }
        self.keys.get(place).map(|key| *key as u32)
    }

    /// The first `count` tokens, or all.
    pub(super) fn first(&mut self, count: usize) -> impl Iterator<Item = u32> {
        if let Some(last) = count.checked_sub(1) {
            self.get(last);
        }
        self.keys.iter().take(count).map(|key| *key as u32)
    }

    /// Sorts at least the `count` best tokens, or all.
    fn sort(&mut self, count: usize) {
        self.keys.clear();
        let least = self.reached(count);
        if least > f32::NEG_INFINITY {
            self.collect(least);
        } else {
            let scored = (0..).zip(self.scores).filter(|(_, score)| **score > f32::NEG_INFINITY);
            self.keys.extend(scored.map(|(token, score)| key(token, *score)));
            if count < self.keys.len() {
                self.keys.select_nth_unstable(count);
                self.keys.truncate(count);
            } else {
                self.whole = true;
            }
        }
        self.keys.sort_unstable();
    }

    /// A score that at least `count` tokens reach, and not many more: the maxima of `count` other stripes are as great.
    /// Negative infinity if there are too few stripes for that.
    fn reached(&mut self, count: usize) -> f32 {
        if count >= self.maxima.len() / 2 {
            return f32::NEG_INFINITY;
        }
        self.cut.clone_from(self.maxima);
        *self.cut.select_nth_unstable_by(count, |a, b| b.total_cmp(a)).1
    }

    /// Collects all tokens that reach a score.
    fn collect(&mut self, least: f32) {
        for (stripe, _) in self.maxima.iter().enumerate().filter(|(_, max)| **max >= least) {
            let start = stripe / LANES * LANES * STRIPE + stripe % LANES;
            let end = self.scores.len().min(start + LANES * STRIPE);
            for token in (start..end).step_by(LANES) {
                if self.scores[token] >= least {
                    self.keys.push(key(token as u32, self.scores[token]));
                }
            }
        }
    }
}

/// The greatest score of each lane, without the NaNs.
pub(super) fn lane_maxima(scores: &[f32]) -> [f32; LANES] {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    let raise = |(max, x): (&mut f32, &f32)| *max = if *x > *max { *x } else { *max };
    chunks.iter().for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(raise));
    lanes.iter_mut().zip(rest).for_each(raise);
    lanes
}

/// A key that sorts by descending score, then by ascending id, which is its lower half.
fn key(token: u32, score: f32) -> u64 {
    let bits = score.to_bits();
    let descending = if score.is_sign_negative() { bits } else { !bits & 0x7fff_ffff };
    u64::from(descending) << 32 | u64::from(token)
}
