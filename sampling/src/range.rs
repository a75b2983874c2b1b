//! Ranges of numbers.

use std::fmt;

/// A range of finite numbers. Its text says what a number has to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Range {
    least: f64,
    /// Whether `least` itself is outside.
    open: bool,
    most: f64,
}

impl Range {
    /// From `least` up.
    pub(crate) const fn at_least(least: f64) -> Range {
        Range { least, open: false, most: f64::MAX }
    }

    /// From `least` to `most`.
    pub(crate) const fn within(least: f64, most: f64) -> Range {
        Range { least, open: false, most }
    }

    /// Above `least`, to `most`.
    pub(crate) const fn above_to(least: f64, most: f64) -> Range {
        Range { least, open: true, most }
    }

    pub(crate) fn contains(&self, value: f64) -> bool {
        // Bounds are written in decimal, and numbers are f32.
        let (least, most) = (f64::from(self.least as f32), f64::from(self.most as f32));
        value.is_finite() && value <= most && if self.open { value > least } else { value >= least }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { least, open, most } = *self;
        match (least, most) {
            (0.0, f64::MAX) => write!(f, "must be non-negative and finite"),
            (_, f64::MAX) => write!(f, "must be >= {least:?}"),
            _ if open => write!(f, "must be > {least:?} and <= {most:?}"),
            _ => write!(f, "must be >= {least:?} and <= {most:?}"),
        }
    }
}
