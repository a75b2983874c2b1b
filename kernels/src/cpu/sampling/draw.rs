//! Random draws from the filtered distribution.

use super::ranking::{Buffers, Ranking};
use crate::{
    SamplingParams,
    cpu::simd::{Kernel, Simd, Tier, run},
};

/// Scratch memory for a draw.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    by_logit: Buffers,
    by_closeness: Buffers,
    closeness: Vec<f32>,
}

/// Draw `index` of a sequence. The greatest logit must be finite.
pub(super) fn draw(
    params: &SamplingParams,
    index: u64,
    tier: Tier,
    logits: &[f32],
    scratch: &mut Scratch,
) -> u32 {
    let Scratch { by_logit, by_closeness, closeness } = scratch;
    let mut ranking = Ranking::new(logits, by_logit);
    let best = ranking.get(0).map_or(0.0, |token| logits[token as usize]);
    let weights = Weights { logits, best, temperature: params.temperature };
    let limit = Some(params.top_k as usize).filter(|k| (1..logits.len()).contains(k));
    let spread = match limit {
        Some(k) => weights.spread(ranking.first(k)),
        None => run(tier, Whole(weights)),
    };
    let mut kept = Kept { ranking, weights, len: limit.unwrap_or(logits.len()), mass: spread.mass };
    if params.typical_p < 1.0 {
        closeness.resize(logits.len(), 0.0);
        let close = |token: u32| spread.closeness(weights.depth(token));
        let ranking = if limit.is_some() {
            kept.tokens().for_each(|token| closeness[token as usize] = close(token));
            Ranking::among(kept.tokens(), closeness, by_closeness)
        } else {
            (0..).zip(closeness.iter_mut()).for_each(|(token, to)| *to = close(token));
            Ranking::new(closeness, by_closeness)
        };
        let mut typical = Kept { ranking, weights, len: kept.len, mass: kept.mass };
        typical.keep_mass(params.typical_p);
        let (len, mass) = (typical.len, typical.mass);
        kept = Kept { ranking: Ranking::among(typical.tokens(), logits, by_logit), weights, len, mass };
    }
    if params.top_p < 1.0 {
        kept.keep_mass(params.top_p);
    }
    if params.min_p > 0.0 {
        let least = params.min_p * kept.get(0).map_or(0.0, |best| best.1);
        kept.keep_while(|_, weight| weight >= least);
    }
    kept.at(uniform(params.seed, index))
}

/// The weights of tokens: their probabilities divided by that of the most probable token.
#[derive(Clone, Copy)]
struct Weights<'a> {
    logits: &'a [f32],
    best: f32,
    temperature: f32,
}

impl Weights<'_> {
    /// The difference of the greatest logit and a token's, after temperature; infinity for NaN.
    fn depth(&self, token: u32) -> f32 {
        let logit = self.logits[token as usize];
        if logit.is_nan() { f32::INFINITY } else { (self.best - logit) / self.temperature }
    }

    fn of(&self, token: u32) -> f32 {
        (-self.depth(token)).exp()
    }

    fn spread(&self, tokens: impl Iterator<Item = u32>) -> Spread {
        let mut spread = Spread::default();
        for token in tokens {
            let (depth, weight) = (self.depth(token).min(DEEPEST), self.of(token));
            spread.mass += f64::from(weight);
            spread.depth += f64::from(weight * depth);
        }
        spread
    }
}

/// Tokens of a greater depth have the weight 0, or one too small for a normal f32.
const DEEPEST: f32 = 88.0;

/// Sums over tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Spread {
    /// The sum of weights.
    mass: f64,
    /// The sum of weights times depths.
    depth: f64,
}

impl Spread {
    /// Minus the distance between a token's surprise and the entropy, by which typical sampling ranks tokens. Negative
    /// infinity for tokens deeper than [`DEEPEST`].
    fn closeness(&self, depth: f32) -> f32 {
        if depth > DEEPEST {
            return f32::NEG_INFINITY;
        }
        // The surprise is depth + ln mass, and the entropy is its mean.
        -(depth - (self.depth / self.mass) as f32).abs()
    }
}

/// The spread of all tokens.
struct Whole<'a>(Weights<'a>);

impl Kernel for Whole<'_> {
    type Output = Spread;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Spread {
        let Weights { logits, best, temperature } = self.0;
        let (chunks, rest) = logits.as_chunks::<16>();
        let mut spread = self.0.spread((logits.len() - rest.len()) as u32..logits.len() as u32);
        // Lanes are summed every 64 chunks, before they become much greater than what is added to them.
        for chunks in chunks.chunks(64) {
            // SAFETY: the caller's promise; every chunk has 16 lanes.
            unsafe {
                let (mut mass, mut depths) = (S::splat(0.0), S::splat(0.0));
                for chunk in chunks {
                    let above = S::add(S::load(chunk.as_ptr()), S::splat(-best));
                    let above = S::max(S::div(above, S::splat(temperature)), S::splat(-DEEPEST));
                    let weight = S::exp(above);
                    mass = S::add(mass, weight);
                    depths = S::fma(weight, above, depths);
                }
                spread.mass += f64::from(S::sum(mass));
                spread.depth -= f64::from(S::sum(depths));
            }
        }
        spread
    }
}

/// The tokens that filters keep: the first `len` of a ranking, with the total weight `mass`.
struct Kept<'a> {
    ranking: Ranking<'a>,
    weights: Weights<'a>,
    len: usize,
    mass: f64,
}

impl Kept<'_> {
    /// The token at a place of the ranking, and its weight.
    fn get(&mut self, place: usize) -> Option<(u32, f32)> {
        let token = self.ranking.get(place).filter(|_| place < self.len)?;
        Some((token, self.weights.of(token)))
    }

    fn tokens(&mut self) -> impl Iterator<Item = u32> {
        self.ranking.first(self.len)
    }

    /// Keeps the first token, and further ones while `more` is true for the total weight of those before it and its own
    /// weight.
    fn keep_while(&mut self, more: impl Fn(f64, f32) -> bool) {
        let (mut len, mut mass) = (0, 0.0);
        while let Some((_, weight)) = self.get(len)
            && (len == 0 || more(mass, weight))
        {
            len += 1;
            mass += f64::from(weight);
        }
        (self.len, self.mass) = (len, mass);
    }

    /// Keeps the smallest number of first tokens that together have this share of the mass.
    fn keep_mass(&mut self, share: f32) {
        let target = f64::from(share) * self.mass;
        self.keep_while(|mass, _| mass < target);
    }

    /// The token at which the cumulative weight exceeds a share of the mass in [0, 1).
    fn at(&mut self, share: f64) -> u32 {
        let target = share * self.mass;
        let (mut place, mut mass, mut last) = (0, 0.0, 0);
        while let Some((token, weight)) = self.get(place)
            && (place == 0 || weight > 0.0)
            && mass <= target
        {
            (place, last) = (place + 1, token);
            mass += f64::from(weight);
        }
        last
    }
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
