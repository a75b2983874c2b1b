//! How long the device waits between decode steps, by its own clock. Measured for those who read the debug log: marks
//! are small work of their own.

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
    last: Option<Marks<B>>,
    /// Seconds.
    gaps: Vec<f64>,
    busy: f64,
}

impl<B: Backend> Idle<B> {
    /// One that measures, if the debug log is on.
    pub(super) fn new() -> Option<Idle<B>> {
        tracing::enabled!(tracing::Level::DEBUG).then(|| Idle { last: None, gaps: Vec::new(), busy: 0.0 })
    }

    /// Notes a step that has ended.
    pub(super) fn note(&mut self, ops: &B, marks: Marks<B>) -> kernels::Result<()> {
        if let Some(last) = self.last.take().filter(|last| marks.rows.is_some() && last.rows == marks.rows) {
            self.gaps.push(ops.seconds_between(&last.end, &marks.begin)?);
            self.busy += ops.seconds_between(&marks.begin, &marks.end)?;
        }
        if self.gaps.len() == REPORTED {
            self.report(marks.rows.unwrap_or(0));
        }
        self.last = Some(marks);
        Ok(())
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
        self.gaps.clear();
        self.busy = 0.0;
    }
}
