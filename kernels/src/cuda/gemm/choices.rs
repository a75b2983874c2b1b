//! Which of cuBLASLt's algorithms a product takes: the one that was fastest on this GPU.
//!
//! An algorithm is 64 opaque bytes, which the library lets its callers keep and use again with the same version of it
//! (cuBLAS documentation, `cublasLtMatmulAlgo_t`).

use std::{collections::BTreeMap, iter, sync::Arc};

use cudarc::cublaslt::sys;

use super::Shape;
use crate::{
    Result,
    cuda::device::{Device, DeviceBuf, Event, Stream},
};

/// Rows of the tiles that large steps are cut to.
const TILE_ROWS: usize = 128;
/// Rows from which on shapes that fill the same tiles share an algorithm.
const LARGE_ROWS: usize = 256;
/// Of an algorithm, beside the untimed first run.
const RUNS: usize = 3;
/// What another algorithm must save before it is taken in place of the one that cuBLASLt puts first.
const WORTH: f64 = 0.98;
/// More than the second-level cache of any GPU holds: weights come from memory in a step.
const FLUSHED: usize = 128 << 20;

/// The number of rows that stands for all that share algorithms with this one.
fn class(rows: usize) -> usize {
    rows.next_multiple_of(match rows {
        0..=64 => 8,
        65..=LARGE_ROWS => 16,
        _ => TILE_ROWS,
    })
}

/// One number of rows, up to `max_rows`, of every class.
pub(in crate::cuda) fn classes(max_rows: usize) -> Vec<usize> {
    let classes = iter::successors(Some(class(1)), |rows| Some(class(rows + 1)));
    classes.take_while(|rows| *rows <= max_rows).collect()
}

impl Shape {
    fn class(self) -> Shape {
        Shape { rows: class(self.rows), ..self }
    }
}

/// Algorithms by class of shapes.
#[derive(Default)]
pub(super) struct Choices(BTreeMap<Shape, [u64; 8]>);

impl Choices {
    pub(super) fn get(&self, shape: Shape) -> Option<sys::cublasLtMatmulAlgo_t> {
        self.0.get(&shape.class()).map(|&data| sys::cublasLtMatmulAlgo_t { data })
    }

    pub(super) fn insert(&mut self, shape: Shape, algorithm: sys::cublasLtMatmulAlgo_t) {
        self.0.insert(shape.class(), algorithm.data);
    }

    /// A line for each: rows, inputs, outputs, stride of the result, whether the result is f32, whether it is added to what is there, and the
    /// algorithm in hexadecimal digits.
    pub(super) fn to_text(&self) -> String {
        let line = |(shape, data): (&Shape, &[u64; 8])| {
            let Shape { rows, inputs, outputs, stride, wide, add } = shape;
            let words: String = data.iter().map(|word| format!(" {word:016x}")).collect();
            format!("{rows} {inputs} {outputs} {stride} {} {}{words}\n", u8::from(*wide), u8::from(*add))
        };
        self.0.iter().map(line).collect()
    }

    /// Adds what a text holds, but for lines that are not of that form.
    pub(super) fn add_text(&mut self, text: &str) {
        self.0.extend(text.lines().filter_map(line));
    }
}

fn line(text: &str) -> Option<(Shape, [u64; 8])> {
    let mut words = text.split(' ');
    let mut number = || words.next()?.parse().ok();
    let (rows, inputs, outputs, stride) = (number()?, number()?, number()?, number()?);
    let (wide, add) = (number()?, number()?);
    let mut data = [0; 8];
    for word in &mut data {
        let digits = words.next().filter(|digits| digits.len() == 16)?;
        *word = u64::from_str_radix(digits, 16).ok()?;
    }
    let shape = Shape { rows, inputs, outputs, stride, wide: wide != 0, add: add != 0 };
    words.next().is_none().then_some((shape, data))
}

/// Times launches on the GPU.
pub(super) struct Clock {
    start: Event,
    end: Event,
    /// None where memory has no room for it: then weights may come from the cache.
    flushed: Option<DeviceBuf>,
}

impl Clock {
    pub(super) fn new(device: &Arc<Device>) -> Result<Clock> {
        device.bind()?;
        let flushed = DeviceBuf::new(device, FLUSHED, "a flush of the cache").ok();
        Ok(Clock { start: Event::timed()?, end: Event::timed()?, flushed })
    }

    /// The first of `candidates`, unless another is faster by more than noise. `launch` returns an error for one that
    /// cannot run here; None if none can. A product that adds does so with every launch, which is why this is for
    /// the warm-up only.
    pub(super) fn fastest<T: Copy>(
        &self,
        stream: &Stream,
        candidates: &[T],
        launch: impl Fn(T) -> Result<()>,
    ) -> Result<Option<T>> {
        let mut best: Option<(T, f64)> = None;
        for &candidate in candidates {
            if launch(candidate).is_err() {
                continue;
            }
            let mut seconds = f64::INFINITY;
            for _ in 0..RUNS {
                if let Some(flushed) = &self.flushed {
                    // SAFETY: the buffer is that long, and holds nothing.
                    unsafe { stream.clear(flushed.at(), flushed.bytes())? };
                }
                self.start.record(stream)?;
                launch(candidate)?;
                self.end.record(stream)?;
                stream.wait("time products", &self.end)?;
                seconds = seconds.min(self.end.seconds_since(&self.start)?);
            }
            if best.is_none_or(|(_, least)| seconds < least * WORTH) {
                best = Some((candidate, seconds));
            }
        }
        Ok(best.map(|(candidate, _)| candidate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_survive_as_text() {
        let shape = Shape { rows: 500, inputs: 64, outputs: 96, stride: 96, wide: true, add: false };
        let mut choices = Choices::default();
        choices.insert(shape, sys::cublasLtMatmulAlgo_t { data: [1, 2, 3, u64::MAX, 5, 6, 7, 8] });
        let mut again = Choices::default();
        again.add_text("garbage\n1 2 3\n512 64 96 96 1 0 zz\n");
        again.add_text(choices.to_text().trim_end().trim_end_matches('8'));
        assert!(again.0.is_empty());
        again.add_text(&choices.to_text());
        assert_eq!(again.0, choices.0);
        // 385 to 512 rows fill the same four tiles.
        assert!(again.get(Shape { rows: 385, ..shape }).is_some());
        assert!(again.get(Shape { rows: 384, ..shape }).is_none());
        assert!(again.get(Shape { wide: false, ..shape }).is_none());
        assert!(again.get(Shape { add: true, ..shape }).is_none());
    }

    #[test]
    fn every_number_of_rows_is_of_a_class_that_is_met() {
        let met = classes(2048);
        assert!((1..=2048).all(|rows| met.contains(&class(rows))));
        assert!(met.is_sorted() && met.len() < 40);
        assert_eq!(classes(20), [8, 16]);
    }
}
