//! How long the device waits between decode steps, by its own clock. Reported in the debug log.

use std::collections::HashMap;

use kernels::Backend;

/// Steps that one report covers.
const REPORTED: usize = 256;

/// The times at which a step began and ended on the device.
pub(super) struct Marks<B: Backend> {
    pub(super) begin: B::Mark,
    pub(super) end: B::Mark,
    /// Rows of a decode step; none for a step with prompts.
    pub(super) rows: Option<usize>,
}

/// Waits between neighbouring decode steps of the same number of rows.
pub(super) struct Idle<B: Backend> {
    /// Whether anybody reads it, and the device can tell.
    on: bool,
    last: Option<Marks<B>>,
    /// By the number of rows.
    waits: HashMap<usize, Waits>,
}

/// What is not reported yet of one number of rows, in seconds.
#[derive(Default)]
struct Waits {
    gaps: Vec<f64>,
    /// Spent in the steps after them.
    busy: f64,
}

impl<B: Backend> Idle<B> {
    /// Measures if the debug log is on.
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

    /// The next step follows no other: the wait before it is nobody's fault.
    pub(super) fn interrupt(&mut self) {
        self.last = None;
    }

    /// What cannot be measured is not tried again: the log is no reason to stop serving.
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
    /// Reports when there are enough.
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
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
        time::{Duration, Instant},
    };

    use kernels::{DType, cpu::CpuBackend};
    use tracing::Level;

    use super::*;

    /// A log that a test reads.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged of steps (milliseconds of the gap before, of the step, rows), with interruptions (none).
    fn logged(steps: impl IntoIterator<Item = Option<(u64, u64, usize)>>) -> String {
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_max_level(Level::DEBUG).with_writer(move || writer.clone());
        tracing::subscriber::with_default(subscriber.with_ansi(false).finish(), || {
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
        });
        String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
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
