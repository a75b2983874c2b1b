//! The matrices of an adapter, which a backend reads a few rows at a time straight into the memory where it keeps
//! adapters.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use kernels::{DType, HostTensor, MatrixSource};

use super::{
    AdapterError,
    rows::Replaced,
    values::{self, Values, is_zero},
};
use crate::weights;

/// A matrix of which parts can be taken.
pub(super) trait Cut: Sized {
    /// Some rows.
    fn rows(self, rows: &[Range<usize>]) -> Self;
    /// Some columns.
    fn columns(self, columns: Range<usize>) -> Self;
    /// Whether all elements are 0 or -0, of those that have been read.
    fn is_zero(&self) -> bool;
}

impl Cut for HostTensor<'static> {
    fn rows(self, rows: &[Range<usize>]) -> Self {
        weights::rows(&self, rows)
    }

    fn columns(self, columns: Range<usize>) -> Self {
        weights::columns(self, columns)
    }

    fn is_zero(&self) -> bool {
        is_zero(self)
    }
}

/// Says whether nobody waits for an adapter any more.
pub type IsCancelled<'a> = &'a (dyn Fn() -> bool + Sync);

/// A matrix of an adapter: rows and columns of a tensor, or of a matrix that is computed.
pub struct Matrix<'a> {
    whole: Whole<'a>,
    /// The rows, in their order.
    runs: Vec<Range<usize>>,
    columns: Range<usize>,
    /// Whether an element that is not zero has been read.
    is_changed: AtomicBool,
    is_cancelled: IsCancelled<'a>,
}

/// Where a whole matrix comes from.
pub(super) enum Whole<'a> {
    /// A tensor of a file whose rows are stored in one piece each.
    Stored { values: &'a Values, name: &'a str },
    /// A matrix that is computed.
    Made(Made<'a>),
    /// Rows that replace those of a table.
    Replaced(Replaced<'a>),
}

impl<'a> Matrix<'a> {
    /// All of a matrix `[rows, columns]`.
    pub(super) fn new(
        whole: Whole<'a>,
        [rows, columns]: [usize; 2],
        is_cancelled: IsCancelled<'a>,
    ) -> Matrix<'a> {
        Matrix {
            whole,
            runs: std::iter::once(0..rows).collect(),
            columns: 0..columns,
            is_changed: AtomicBool::new(false),
            is_cancelled,
        }
    }

    /// Reads all of it into memory of its own.
    pub(super) fn to_tensor(&self, dtype: DType) -> Result<HostTensor<'static>, AdapterError> {
        let [rows, cols] = self.shape();
        let mut data = vec![0; rows * cols * dtype.size()];
        self.read(0..rows, dtype, &mut data)?;
        Ok(HostTensor { dtype, rows, cols, data: data.into() })
    }

    fn count(&self) -> usize {
        self.runs.iter().map(ExactSizeIterator::len).sum()
    }

    /// The runs of the whole matrix's rows that some of these rows are.
    fn sources(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut first = 0;
        self.runs.iter().filter_map(move |run| {
            let (start, end) = (rows.start.max(first), rows.end.min(first + run.len()));
            let source = (start < end).then(|| run.start + start - first..run.start + end - first);
            first += run.len();
            source
        })
    }
}

impl Cut for Matrix<'_> {
    fn rows(mut self, rows: &[Range<usize>]) -> Self {
        self.runs = rows.iter().flat_map(|rows| self.sources(rows.clone())).collect();
        self
    }

    fn columns(self, columns: Range<usize>) -> Self {
        let first = self.columns.start;
        Matrix { columns: first + columns.start..first + columns.end, ..self }
    }

    fn is_zero(&self) -> bool {
        !self.is_changed.load(Ordering::Relaxed)
    }
}

impl MatrixSource for Matrix<'_> {
    type Error = AdapterError;

    fn shape(&self) -> [usize; 2] {
        [self.count(), self.columns.len()]
    }

    fn read(&self, rows: Range<usize>, dtype: DType, mut to: &mut [u8]) -> Result<(), AdapterError> {
        if (self.is_cancelled)() {
            return Err(AdapterError::Cancelled);
        }
        let (count, columns) = (rows.len(), || self.columns.clone());
        for source in self.sources(rows) {
            let own;
            (own, to) = to.split_at_mut(source.len() * self.columns.len() * dtype.size());
            let is_zero = match &self.whole {
                Whole::Stored { values, name } => values.fill((name, source, columns()), dtype, own)?,
                Whole::Replaced(replaced) => replaced.fill(source, dtype, own)?,
                Whole::Made(made) => {
                    let made = made.get()?;
                    let part = weights::columns(weights::rows(&made, &[source]), columns());
                    part.read(0..part.rows, dtype, own)?;
                    values::check(dtype, own).is_zero
                }
            };
            if !is_zero {
                self.is_changed.store(true, Ordering::Relaxed);
            }
        }
        if let Whole::Made(made) = &self.whole {
            made.has_read(count, self.count());
        }
        Ok(())
    }
}

/// A matrix that is computed when it is first read, and forgotten when all of it has been read.
pub(super) struct Made<'a> {
    make: Box<dyn Fn() -> Result<HostTensor<'static>, AdapterError> + Send + Sync + 'a>,
    state: Mutex<MadeState>,
}

#[derive(Default)]
struct MadeState {
    made: Option<Arc<HostTensor<'static>>>,
    /// Rows that have been read.
    read: usize,
}

impl<'a> Made<'a> {
    pub(super) fn new(
        make: impl Fn() -> Result<HostTensor<'static>, AdapterError> + Send + Sync + 'a,
    ) -> Made<'a> {
        Made { make: Box::new(make), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, MadeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The matrix. Who asks while it is computed waits.
    fn get(&self) -> Result<Arc<HostTensor<'static>>, AdapterError> {
        let made = &mut self.state().made;
        match made {
            Some(made) => Ok(made.clone()),
            None => Ok(made.insert(Arc::new((self.make)()?)).clone()),
        }
    }

    /// Tells that some of so many rows have been read.
    fn has_read(&self, rows: usize, all: usize) {
        let mut state = self.state();
        state.read += rows;
        if state.read >= all {
            *state = MadeState::default();
        }
    }
}

/// Two matrices that are computed together and read one after the other, or at the same time.
pub(super) struct Pair<'a> {
    make: Box<dyn Fn() -> Result<[HostTensor<'static>; 2], AdapterError> + Send + Sync + 'a>,
    left: Mutex<[Option<HostTensor<'static>>; 2]>,
}

impl<'a> Pair<'a> {
    /// Both matrices.
    pub(super) fn of(
        make: impl Fn() -> Result<[HostTensor<'static>; 2], AdapterError> + Send + Sync + 'a,
    ) -> [Made<'a>; 2] {
        let pair = Arc::new(Pair { make: Box::new(make), left: Mutex::default() });
        [0, 1].map(|which| {
            let pair = pair.clone();
            Made::new(move || pair.take(which))
        })
    }

    fn take(&self, which: usize) -> Result<HostTensor<'static>, AdapterError> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = left[which].take() {
            return Ok(made);
        }
        let [first, second] = (self.make)()?;
        let (own, other) = if which == 0 { (first, second) } else { (second, first) };
        left[1 - which] = Some(other);
        Ok(own)
    }
}
