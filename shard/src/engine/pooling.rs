//! Reports or pools the hidden states of sequences that ask for them in place of tokens.

use super::{pass::HiddenRows, sequence::Sequence};
use crate::step::{Output, Pooling, PoolingKind};

/// Adds the hidden states of rows of a sequence, each of `width` elements. Returns the output if there is one now: the
/// states themselves, or the pooled vector if the sequence's last row is among the rows.
pub(super) fn pool(
    sequence: &mut Sequence,
    rows: &HiddenRows,
    states: &[f32],
    width: usize,
) -> Option<Output> {
    let Pooling { kind, normalize, .. } = sequence.pooling?;
    let finish = |vector: &[f64]| {
        let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
        let divisor = if normalize && norm > 0.0 { norm } else { 1.0 };
        vector.iter().map(|x| (x / divisor) as f32).collect::<Vec<_>>()
    };
    let row = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let mut states = states.chunks(width);
    let (id, position) = (rows.sequence, rows.position);
    match kind {
        PoolingKind::None => {
            let values = states.flat_map(|state| finish(&row(state))).collect();
            return Some(Output::HiddenStates { sequence: id, position, values });
        }
        PoolingKind::First if position == 0 => sequence.pooled = states.next().map(row).unwrap_or_default(),
        PoolingKind::First => {}
        PoolingKind::Last => sequence.pooled = states.next_back().map(row).unwrap_or_default(),
        PoolingKind::Mean => {
            sequence.pooled.resize(width, 0.0);
            for state in states {
                sequence.pooled.iter_mut().zip(state).for_each(|(sum, &x)| *sum += f64::from(x));
            }
        }
    }
    if position + rows.rows < sequence.len() {
        return None;
    }
    if kind == PoolingKind::Mean {
        let count = sequence.len() as f64;
        sequence.pooled.iter_mut().for_each(|sum| *sum /= count);
    }
    Some(Output::Pooled { sequence: id, values: finish(&sequence.pooled) })
}
