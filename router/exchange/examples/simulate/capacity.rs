//! How many adapters of a mix fit one GPU.

use std::fmt;

use super::{
    costs::Server,
    ours,
    report::Figures,
    workload::{Arrivals, Workload},
};

/// The largest number of adapters that is tried.
const MOST: usize = 1 << 16;

/// A number of adapters that was tried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tried {
    adapters: usize,
    figures: Figures,
    fits: bool,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tried { adapters, figures, fits } = self;
        let (p99, tokens, failed) = (figures.p99, figures.tokens_per_second, figures.failed);
        let fits = if *fits { "fit" } else { "do not fit" };
        write!(
            f,
            "{adapters:>6} adapters: wait p99 {p99:.3} s, {tokens:.0} tokens/s, {failed} failed: {fits}"
        )
    }
}

/// Finds the largest number of adapters whose requests wait at most `slo` seconds for their first tokens, at the 99th
/// percentile, and none of which fail. Each adapter is asked for as often as one of the load is. Exact to a twentieth.
pub(crate) fn largest(
    workload: &Workload,
    server: &Server,
    slo: f64,
    report: &mut dyn FnMut(Tried),
) -> usize {
    let mut fits = |adapters: usize| {
        let growth = adapters as f64 / workload.adapters as f64;
        let arrivals = match workload.arrivals {
            Arrivals::Open { rate, cv } => Arrivals::Open { rate: rate * growth, cv },
            closed @ Arrivals::Closed { .. } => closed,
        };
        let figures = ours::run(&Workload { adapters, arrivals, ..workload.clone() }, server).figures();
        let fits = figures.p99 <= slo && figures.failed == 0;
        report(Tried { adapters, figures, fits });
        fits
    };
    let (mut fit, mut too_many) = (0, 16);
    while fits(too_many) {
        fit = too_many;
        if fit >= MOST {
            return fit;
        }
        too_many *= 2;
    }
    while too_many - fit > (fit / 20).max(1) {
        let middle = fit.midpoint(too_many);
        if fits(middle) {
            fit = middle;
        } else {
            too_many = middle;
        }
    }
    fit
}
