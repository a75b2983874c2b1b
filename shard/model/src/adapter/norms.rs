//! Trained biases of norms (`bias: all`). No backend changes a norm for an adapter. But a vector d that is added after
//! a norm reaches only the projections that read it, and `W · (x + d) = W · x + W · d`: `W · d` becomes a bias of each
//! of them. What is reported of the last norm's output itself, hidden states, has d added to it.

use super::{AdapterError, base::BaseWeights, change::Change, values::Values};
use crate::{
    Decoder,
    decoder::{Kind, Module, Part, Wiring},
};

const READERS_OF_ATTENTION_NORM: [Part; 4] = [Part::Q, Part::K, Part::V, Part::Qkv];
const READERS_OF_MLP_NORM: [Part; 3] = [Part::Gate, Part::Up, Part::GateUp];

/// Whether a projection reads the stream through a norm.
fn reads(module: &Module, norm: &Module, decoder: &Decoder) -> bool {
    let shares = |layer: usize| decoder.layers[layer].wiring == Wiring::Parallel { shared_norm: true };
    let of_attention = READERS_OF_ATTENTION_NORM.contains(&module.part);
    let of_mlp = READERS_OF_MLP_NORM.contains(&module.part);
    module.layer == norm.layer
        && match norm.part {
            Part::AttentionNorm => of_attention || of_mlp && norm.layer.is_some_and(shares),
            // The stream itself is normed there.
            Part::MlpNorm => {
                of_mlp && norm.layer.is_some_and(|i| decoder.layers[i].wiring != Wiring::PostNorm)
            }
            Part::Norm => module.part == Part::Head,
            _ => false,
        }
}

/// Moves the changes of norms to the projections that read them.
pub(super) fn spread(
    changes: &mut [Change],
    decoder: &Decoder,
    values: &Values,
    base: &BaseWeights<'_>,
) -> Result<(), AdapterError> {
    let mut shifts = Vec::new();
    for change in changes.iter_mut().filter(|change| matches!(change.module.kind, Kind::Norm(_))) {
        let Some(name) = change.take_bias() else { continue };
        let own = values.vector(&name, change.module.outputs)?;
        let shift: Vec<f32> = own.iter().zip(base.bias(&change.module)?).map(|(x, y)| x - y).collect();
        if shift.iter().any(|x| *x != 0.0) {
            change.shift = (change.module.part == Part::Norm).then(|| shift.clone());
            shifts.push((change.module.clone(), name, shift));
        }
    }
    if shifts.is_empty() {
        return Ok(());
    }
    let mut by_layer = std::collections::HashMap::<_, Vec<_>>::new();
    for (i, change) in changes.iter().enumerate() {
        by_layer.entry(change.module.layer).or_default().push(i);
    }
    for (norm, name, shift) in shifts {
        let mut is_read = false;
        for &i in by_layer.get(&norm.layer).into_iter().flatten() {
            let change = &mut changes[i];
            if !reads(&change.module, &norm, decoder) {
                continue;
            }
            // The resulting bias would have to be scaled by gains that only the device has, or computed from replaced
            // rows, or from a weight without what OLoRA has taken out of it.
            if change.has_magnitude() || change.has_rows() || change.has_initial() {
                let value =
                    format!("all, with a trained {name} in front of a changed {},", change.module.path);
                return Err(AdapterError::Unsupported { field: "bias".into(), value });
            }
            change.shift = Some(shift.clone());
            is_read = true;
        }
        if !is_read {
            let value = format!("all, with a trained {name},");
            return Err(AdapterError::Unsupported { field: "bias".into(), value });
        }
    }
    Ok(())
}
