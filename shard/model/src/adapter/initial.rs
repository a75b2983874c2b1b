//! Initializations that take a part out of the base model's weight and train it. PEFT repeats them when it loads an
//! adapter, whose A and B then replace that part (`peft/tuners/lora/layer.py`). A delta of twice the rank beside the
//! whole weight gives the same: `W - s · B₀ · A₀ + s · B · A = W + s · [B, -B₀] · [A; A₀]`.

use kernels::HostTensor;

use super::{
    AdapterError,
    base::BaseWeights,
    change::{beside, stacked},
    config::Target,
};
use crate::decoder::{Kind, Module};

/// How A₀ and B₀ are computed from a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Initial {
    /// The first columns of Q and rows of R, `W = Q · R` (Büyükakyüz, 2024).
    Olora,
}

/// The smallest share of a column that must remain after those before it are projected out, so that it counts as
/// independent.
const INDEPENDENT: f64 = 1e-5;

/// The most multiplications that all weights of an adapter may take: about a minute of one core.
const MAX_WORK: usize = 1 << 38;

/// Refuses initializations that cannot be repeated exactly, or that would take too long.
pub(super) fn check(targets: &[Target], is_tied: bool) -> Result<(), AdapterError> {
    let refuse = |why: &str| Err(AdapterError::Initialization(format!("olora, of {why},")));
    let mut work = 0_usize;
    for Target { module, lora_rank, .. } in targets.iter().filter(|target| target.initial.is_some()) {
        match module.kind {
            // PEFT initializes deltas of tables as usual.
            Kind::Lookup => continue,
            // PEFT decomposes the weight as it is stored, and trains nothing that could be loaded again.
            _ if module.transposed => return refuse("transposed weights"),
            // PEFT takes the part out of the embedding table, too.
            Kind::Head if is_tied => return refuse("an output projection that is the embedding table"),
            _ => work = work.saturating_add(lora_rank.saturating_mul(module.inputs * module.outputs)),
        }
    }
    if work > MAX_WORK { refuse("weights of this size at this rank") } else { Ok(()) }
}

/// A and B, extended by A₀ and -B₀.
pub(super) fn extended(
    initial: Initial,
    module: &Module,
    [a, b]: [HostTensor<'static>; 2],
    base: &BaseWeights<'_>,
) -> Result<(HostTensor<'static>, HostTensor<'static>), AdapterError> {
    let Initial::Olora = initial;
    let (q, r) = first_of_qr(module, a.rows, base)?;
    let negative: Vec<f32> = q.iter().map(|x| -x).collect();
    Ok((stacked(&a, &r), beside(&b, &negative)))
}

/// The first `count` columns of Q `[outputs, count]` and rows of R `[count, inputs]`. Their product is the projection
/// of the weight onto the span of its first columns, whatever the signs are.
fn first_of_qr(
    module: &Module,
    count: usize,
    base: &BaseWeights<'_>,
) -> Result<(Vec<f32>, Vec<f32>), AdapterError> {
    let dependent =
        || AdapterError::Initialization("olora, of a weight whose first columns are dependent,".into());
    if count > module.inputs.min(module.outputs) {
        return Err(dependent());
    }
    let mut columns = vec![vec![0.0; module.outputs]; count];
    base.each_row(module, |i, row| {
        columns.iter_mut().zip(row).for_each(|(column, x)| column[i] = f64::from(*x));
    })?;
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for i in 0..count {
        let (before, rest) = columns.split_at_mut(i);
        let column = &mut rest[0];
        let whole = dot(column, column).sqrt();
        // Gram-Schmidt is applied twice, to remove rounding errors (Giraud et al., 2005).
        for _ in 0..2 {
            for other in &*before {
                let along = dot(other, column);
                column.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let left = dot(column, column).sqrt();
        if left <= INDEPENDENT * whole {
            return Err(dependent());
        }
        column.iter_mut().for_each(|x| *x /= left);
    }
    let mut r = vec![0.0; count * module.inputs];
    base.each_row(module, |i, row| {
        for (r, column) in r.chunks_exact_mut(module.inputs).zip(&columns) {
            r.iter_mut().zip(row).for_each(|(r, x)| *r += column[i] * f64::from(*x));
        }
    })?;
    let q = (0..module.outputs).flat_map(|i| columns.iter().map(move |column| column[i] as f32)).collect();
    Ok((q, r.into_iter().map(|x| x as f32).collect()))
}
