//! Requests, tokens and waiting times of adapters and of tenants. Of each kind few are shown by name.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::named::OTHER;

/// Time in which the heat of what is not used falls to a half.
const HALF_LIFE: Duration = Duration::from_secs(600);

/// How much hotter than one that is shown another one must be to take its place, so that two do not change places all
/// the time.
const ADVANTAGE: f64 = 1.5;

/// Figures of one adapter, of one tenant, or of all: requests, prompt tokens, generated tokens, microseconds in the
/// queue.
pub(crate) type Figures = [u64; 4];

/// What was used, and how much.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    figures: [AtomicU64; 4],
    heat: Mutex<Heat>,
    /// The part of the figures that is shown under `other` as long as this usage exists.
    folded: Mutex<Figures>,
}

impl Usage {
    /// A request has begun.
    pub(crate) fn begin(&self) {
        self.figures[0].fetch_add(1, Relaxed);
        locked(&self.heat).add(Instant::now());
    }

    /// A sequence has begun to run, after a time in the queue.
    pub(crate) fn started(&self, prompt: usize, queued: Duration) {
        self.figures[1].fetch_add(prompt as u64, Relaxed);
        self.figures[3].fetch_add(queued.as_micros() as u64, Relaxed);
    }

    /// A token has been generated.
    pub(crate) fn token(&self) {
        self.figures[2].fetch_add(1, Relaxed);
    }

    /// The requests that have begun, and the tokens that were generated.
    pub(crate) fn requests_and_tokens(&self) -> (u64, u64) {
        let [requests, _, tokens, _] = self.figures();
        (requests, tokens)
    }

    fn figures(&self) -> Figures {
        self.figures.each_ref().map(|figure| figure.load(Relaxed))
    }
}

/// The number of requests, of which older ones count less.
#[derive(Debug, Default)]
struct Heat {
    value: f64,
    at: Option<Instant>,
}

impl Heat {
    fn now(&self, now: Instant) -> f64 {
        let Some(at) = self.at else { return 0.0 };
        let lives = now.saturating_duration_since(at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.value * 0.5f64.powf(lives)
    }

    fn add(&mut self, now: Instant) {
        (self.value, self.at) = (self.now(now) + 1.0, Some(now));
    }
}

/// How tenants have used the server.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    all: Arc<Usage>,
    /// By the names that the operator has given them.
    named: Mutex<HashMap<String, Arc<Usage>>>,
}

impl Tenants {
    /// What a request of a tenant counts for.
    pub(crate) fn of(&self, name: &str) -> [Arc<Usage>; 2] {
        let mut named = locked(&self.named);
        let usage = match named.get(name) {
            Some(usage) => usage.clone(),
            None => named.entry(name.into()).or_default().clone(),
        };
        [usage, self.all.clone()]
    }

    pub(super) fn all(&self) -> Arc<Usage> {
        self.all.clone()
    }

    /// Those that can be shown by name: one that is called as the others are together cannot.
    pub(super) fn named(&self) -> Vec<(Name, Arc<Usage>)> {
        let named = locked(&self.named);
        let named = named.iter().filter(|(name, _)| *name != OTHER);
        named.map(|(name, usage)| (vec![("tenant", name.clone())], usage.clone())).collect()
    }
}

/// The labels under which a usage is shown.
pub(crate) type Name = Vec<(&'static str, String)>;

/// Those that are shown by name, and the others together. No figure ever falls while its series exists.
#[derive(Debug, Default)]
pub(super) struct Top {
    shown: HashMap<Name, Shown>,
    other: Figures,
}

#[derive(Debug)]
struct Shown {
    usage: Arc<Usage>,
    /// The figures that have been shown under `other`, before it was shown by name.
    base: Figures,
}

impl Top {
    /// Chooses at most `limit` of all, the hottest ones, and returns their figures and those of the others. `all` has the
    /// figures of all together.
    pub(super) fn update(
        &mut self,
        limit: usize,
        mut found: Vec<(Name, Arc<Usage>)>,
        all: &Usage,
    ) -> (Vec<(Name, Figures)>, Figures) {
        let now = Instant::now();
        let is_shown = |name: &Name, usage: &Arc<Usage>| {
            self.shown.get(name).is_some_and(|shown| Arc::ptr_eq(&shown.usage, usage))
        };
        let heat = |(name, usage): &(Name, Arc<Usage>)| {
            locked(&usage.heat).now(now) * if is_shown(name, usage) { ADVANTAGE } else { 1.0 }
        };
        let mut names = HashSet::new();
        found.retain(|(name, _)| names.insert(name.clone()));
        found.sort_by_cached_key(|found| std::cmp::Reverse(heat(found).to_bits()));
        let rest = found.split_off(limit.min(found.len()));
        for (_, usage) in &rest {
            *locked(&usage.folded) = usage.figures();
        }
        let mut before = std::mem::take(&mut self.shown);
        for (name, usage) in found {
            let kept = before.remove(&name).filter(|shown| Arc::ptr_eq(&shown.usage, &usage));
            let new = || Shown { base: *locked(&usage.folded), usage: usage.clone() };
            self.shown.insert(name, kept.unwrap_or_else(new));
        }
        let figures = |shown: &Shown| subtract(shown.usage.figures(), shown.base);
        let named: Vec<_> = self.shown.iter().map(|(name, shown)| (name.clone(), figures(shown))).collect();
        // Read last, so that it is not less than the sum of the others.
        let rest = named.iter().fold(all.figures(), |rest, (_, figures)| subtract(rest, *figures));
        for (shown, rest) in self.other.iter_mut().zip(rest) {
            *shown = rest.max(*shown);
        }
        (named, self.other)
    }
}

fn subtract(from: Figures, figures: Figures) -> Figures {
    std::array::from_fn(|index| from[index].saturating_sub(figures[index]))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(index: usize) -> Name {
        vec![("adapter", format!("a{index}"))]
    }

    #[test]
    fn series_never_fall_and_add_up_whoever_is_shown() {
        let (all, usages) = (Usage::default(), [(); 40].map(|()| Arc::new(Usage::default())));
        let (mut top, mut shown) = (Top::default(), HashMap::<Name, Figures>::new());
        let (mut other, mut left) = (Figures::default(), 0);
        let mut state = 1u64;
        for round in 0..400 {
            // More in each round, so that those of late are the hottest.
            for _ in 0..30 + 4 * round {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                // Other adapters are hot in each round.
                let index = (((state >> 33) % 8) as usize + round / 10) % usages.len();
                for usage in [&all, &*usages[index]] {
                    usage.begin();
                    usage.started(3, Duration::from_micros(7));
                    usage.token();
                }
            }
            let found =
                usages.iter().enumerate().map(|(index, usage)| (name(index), usage.clone())).collect();
            let (named, rest) = top.update(5, found, &all);
            assert_eq!(named.len(), 5);
            let sum =
                named.iter().fold(rest, |sum, (_, figures)| std::array::from_fn(|i| sum[i] + figures[i]));
            assert_eq!(sum, all.figures(), "round {round}");
            assert!(rest.iter().zip(other).all(|(now, before)| *now >= before), "round {round}");
            other = rest;
            let named: HashMap<_, _> = named.into_iter().collect();
            for (name, figures) in &named {
                let before = shown.get(name).copied().unwrap_or_default();
                assert!(figures.iter().zip(before).all(|(now, before)| *now >= before), "{name:?}");
            }
            left += shown.keys().filter(|name| !named.contains_key(*name)).count();
            shown = named;
        }
        assert!(left > 15, "{left} have left");
    }

    #[test]
    fn what_was_never_among_the_others_is_shown_whole() {
        let (all, usage) = (Usage::default(), Arc::new(Usage::default()));
        for _ in 0..3 {
            all.begin();
            usage.begin();
        }
        let found = vec![(name(1), usage.clone()), (name(1), Arc::default())];
        let (named, other) = Top::default().update(2, found, &all);
        assert_eq!((named, other), (vec![(name(1), [3, 0, 0, 0])], [0; 4]));
        let (named, other) = Top::default().update(0, vec![(name(1), usage)], &all);
        assert_eq!((named, other), (vec![], [3, 0, 0, 0]));
    }
}
