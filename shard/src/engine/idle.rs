//! Measures how long the device is idle between decode steps, by its own clock, and reports it in the debug log.

use std::collections::HashMap;

use kernels::Backend;

/// The number of steps that one report covers.
const REPORTED: usize = 256;

/// The times at which a step began and ended on the device.
pub(super) struct Marks<B: Backend> {
    pub(super) begin: B::Mark,
    pub(super) end: B::Mark,
    /// The rows of a decode step; `None` for a step with prompts.
    pub(super) rows: Option<usize>,
}

/// The idle times between consecutive decode steps of the same number of rows.
pub(super) struct Idle<B: Backend> {
    /// Whether the debug log is on and the device can measure.
    on: bool,
    last: Option<Marks<B>>,
    /// The measurements that have not been reported yet, by the number of rows.
    waits: HashMap<usize, Waits>,
}

/// Measurements of steps of one number of rows, in seconds.
#[derive(Default)]
struct Waits {
    /// The idle time before each step.
    gaps: Vec<f64>,
    /// The sum of the times that the steps took.
    busy: f64,
}

impl<B: Backend> Idle<B> {
    /// Begins to measure if the debug log is on.
    pub(super) fn new() -> Idle<B> {
        Idle { on: tracing::enabled!(tracing::Level::DEBUG), last: None, waits: HashMap::new() }
    }

    /// Notes a step that has ended.
    pub(super) fn note(&mut self, ops: &B, marks: Marks<B>) {
        if !self.on {
            return;
        }
        let last = self.last.take().filter(|last| last.rows == marks.rows);
        if let Some((last, rows)) = last.zip(marks.rows) {
            let gap = ops.seconds_between(&last.end, &marks.begin);
            let times = gap.and_then(|gap| Ok((gap, ops.seconds_between(&marks.begin, &marks.end)?)));
            if let Some((gap, busy)) = self.measured(times) {
                self.waits.entry(rows).or_default().add(rows, gap, busy);
            }
        }
        self.last = Some(marks);
    }

    /// The next step does not directly follow another one, so the idle time before it does not count.
    pub(super) fn interrupt(&mut self) {
        self.last = None;
    }

    /// Stops measuring after the first failure, which is logged: a figure for the log is no reason to stop serving.
    fn measured<T>(&mut self, result: kernels::Result<T>) -> Option<T> {
        result
            .inspect_err(|error| {
                self.on = false;
                tracing::warn!("the waits between decode steps are not measured any more: {error}");
            })
            .ok()
    }
}

impl Waits {
    /// Adds one step, and writes a report when there are [`REPORTED`].
    fn add(&mut self, rows: usize, gap: f64, busy: f64) {
        self.gaps.push(gap);
        self.busy += busy;
        if self.gaps.len() == REPORTED {
            self.report(rows);
            *self = Waits::default();
        }
    }

    fn report(&mut self, rows: usize) {
        self.gaps.sort_by(f64::total_cmp);
        let micros = |share: usize| self.gaps[(self.gaps.len() - 1) * share / 100] * 1e6;
        let idle: f64 = self.gaps.iter().sum();
        tracing::debug!(
            rows,
            step_ms = self.busy * 1e3 / self.gaps.len() as f64,
            gap_us_p50 = micros(50),
            gap_us_p99 = micros(99),
            idle_share = idle / (idle + self.busy),
            "between decode steps"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kernels::{DType, cpu::CpuBackend};
    use tracing::Level;

    use super::*;

    /// Returns what is logged of these steps: milliseconds of the gap before, milliseconds of the step, and its rows.
    /// `None` is an interruption.
    fn logged(steps: impl IntoIterator<Item = Option<(u64, u64, usize)>>) -> String {
        telemetry::testing::logged(Level::DEBUG, || {
            let ops = CpuBackend::new(DType::F32, 1).unwrap();
            let mut idle = Idle::new();
            let mut now = Instant::now();
            for step in steps {
                let Some((gap, busy, rows)) = step else {
                    idle.interrupt();
                    continue;
                };
                let begin = now + Duration::from_millis(gap);
                now = begin + Duration::from_millis(busy);
                idle.note(&ops, Marks { begin, end: now, rows: Some(rows) });
            }
        })
    }

    #[test]
    fn a_report_is_of_one_number_of_rows() {
        let few = vec![Some((2, 6, 4)); 1 + REPORTED / 2];
        let many = vec![Some((1, 19, 64)); 1 + REPORTED];
        let log = logged([few.clone(), many, few].concat());
        let lines: Vec<_> = log.lines().collect();
        assert_eq!(lines.len(), 2, "{log}");
        assert!(lines[0].contains("rows=64 step_ms=19") && lines[0].contains("gap_us_p99=1000"), "{log}");
        assert!(lines[1].contains("rows=4 step_ms=6") && lines[1].contains("idle_share=0.25"), "{log}");
    }

    #[test]
    fn an_interruption_is_no_wait() {
        let steps = [vec![Some((2, 6, 4)); REPORTED], vec![None], vec![Some((5000, 6, 4)), Some((2, 6, 4))]];
        let log = logged(steps.concat());
        assert!(log.contains("rows=4 step_ms=6") && log.contains("idle_share=0.25"), "{log}");
    }
}
