//! Merges of A and B, each for itself (`peft/utils/merge_utils.py`). Sums are taken in the order of the parts and in
//! f32, so that signs are elected as PEFT elects them.

use std::iter;

use nalgebra::DMatrix;

use super::{
    mask::Mask,
    recipe::{Elementwise, MajoritySign, Recipe},
};

/// Bytes that are in use at most for each element of A and B of all parts, and of the result: the value as it was read
/// and the pruned one; the sum, and a magnitude of one part.
pub(super) const PASSING: [usize; 2] = [8, 8];

/// A and B of one part, as its file has them.
pub(super) struct Factors {
    /// The number of the part.
    pub(super) part: usize,
    /// Rows of A, columns of B.
    pub(super) lora_rank: usize,
    /// The weight of the part.
    pub(super) weight: f64,
    /// The scale of the delta.
    pub(super) scale: f32,
    /// A, row-major.
    pub(super) a: Vec<f32>,
    /// B, row-major.
    pub(super) b: Vec<f32>,
}

impl Factors {
    /// Weight times scale.
    pub(super) fn factor(&self) -> f64 {
        self.weight * f64::from(self.scale)
    }

    /// `scale · B · A`, row-major, or column-major.
    fn delta(&self, is_transposed: bool) -> Vec<f32> {
        let rank = self.lora_rank;
        let (inputs, outputs) = (self.a.len() / rank, self.b.len() / rank);
        let left = DMatrix::from_row_slice(outputs, rank, &self.b);
        let right = DMatrix::from_row_slice(rank, inputs, &self.a);
        let delta = left * right * self.scale;
        // nalgebra's matrices are column-major.
        if is_transposed { delta.as_slice().to_vec() } else { delta.transpose().as_slice().to_vec() }
    }
}

/// The exact sum of all deltas: the rows of all A below each other, and the columns of all B beside each other.
pub(super) fn beside(factors: &[Factors]) -> [Vec<f32>; 2] {
    let scaled = |factors: &Factors| {
        let factor = factors.factor() as f32;
        factors.a.iter().map(move |x| x * factor).collect::<Vec<_>>()
    };
    let a = factors.iter().flat_map(scaled).collect();
    let rows = factors.first().map_or(0, |first| first.b.len() / first.lora_rank);
    let row = |row: usize| {
        factors.iter().flat_map(move |Factors { b, lora_rank, .. }| &b[row * lora_rank..][..*lora_rank])
    };
    [a, (0..rows).flat_map(row).copied().collect()]
}

/// Merges A and B element by element. `path` is that of their module.
pub(super) fn elementwise(
    way: Elementwise,
    factors: &[Factors],
    recipe: &Recipe,
    path: &str,
) -> [Vec<f32>; 2] {
    ["lora_A", "lora_B"].map(|tensor| {
        let is_a = tensor == "lora_A";
        let tensors = factors.iter().map(|factors| {
            // The sign goes to A alone, because it would cancel itself in the product.
            let sign = if is_a && factors.factor() < 0.0 { -1.0 } else { 1.0 };
            let weight = (factors.factor().abs().sqrt() * sign) as f32;
            (factors.part, weight, if is_a { factors.a.clone() } else { factors.b.clone() })
        });
        merged(way, tensors, recipe, &format!("{path}.{tensor}"))
    })
}

/// Merges whole deltas element by element, in the order in which a file stores the weight: `[outputs, inputs]`, or the
/// other way round.
pub(super) fn whole(
    way: Elementwise,
    factors: &[Factors],
    is_transposed: bool,
    recipe: &Recipe,
    path: &str,
) -> Vec<f32> {
    let deltas =
        factors.iter().map(|factors| (factors.part, factors.weight as f32, factors.delta(is_transposed)));
    merged(way, deltas, recipe, &format!("{path}.delta"))
}

/// Merges tensors: the number of each one's part, its weight, and its elements.
fn merged(
    way: Elementwise,
    tensors: impl Iterator<Item = (usize, f32, Vec<f32>)>,
    recipe: &Recipe,
    name: &str,
) -> Vec<f32> {
    let density = recipe.density.unwrap_or(1.0);
    let pruned = |(part, weight, values): (usize, f32, Vec<f32>)| {
        let values = match way {
            Elementwise::Linear => values,
            Elementwise::Ties | Elementwise::MagnitudePrune => largest(&values, density),
            Elementwise::DareLinear | Elementwise::DareTies => {
                random(&values, &Mask::new(recipe.seed, part, name, density), density)
            }
        };
        (weight, values)
    };
    let tensors: Vec<(f32, Vec<f32>)> = tensors.map(pruned).collect();
    match way {
        Elementwise::Ties | Elementwise::DareTies => disjoint(&tensors, recipe.majority_sign),
        Elementwise::Linear | Elementwise::DareLinear | Elementwise::MagnitudePrune => sum(&tensors),
    }
}

/// The weighted sum.
fn sum(tensors: &[(f32, Vec<f32>)]) -> Vec<f32> {
    let len = tensors.first().map_or(0, |(_, values)| values.len());
    (0..len).map(|i| tensors.iter().map(|(weight, values)| values[i] * weight).sum()).collect()
}

/// The average of the weighted elements that have the elected sign.
fn disjoint(tensors: &[(f32, Vec<f32>)], majority: MajoritySign) -> Vec<f32> {
    let len = tensors.first().map_or(0, |(_, values)| values.len());
    let merged = |i: usize| {
        let values = tensors.iter().map(|(weight, values)| (values[i], values[i] * weight));
        let balance: f32 = match majority {
            MajoritySign::Total => values.clone().map(|(x, _)| x).sum(),
            MajoritySign::Frequency => values.clone().map(|(x, _)| sign(x)).sum(),
        };
        let elected = if balance >= 0.0 { 1.0 } else { -1.0 };
        let agreeing = values.filter(|(x, _)| sign(*x) == elected);
        let (sum, count) = agreeing.fold((0.0, 0.0), |(sum, count), (_, x)| (sum + x, count + 1.0));
        sum / f32::max(count, 1.0)
    };
    (0..len).map(merged).collect()
}

/// The sign, which is 0 for 0.
fn sign(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

/// Keeps the elements with the largest magnitudes, and replaces all others by 0. Of equal ones, the first are kept; PEFT
/// leaves open which.
fn largest(values: &[f32], density: f64) -> Vec<f32> {
    let count = (density * values.len() as f64) as usize;
    if count == 0 {
        return vec![0.0; values.len()];
    }
    let mut magnitudes: Vec<f32> = values.iter().map(|x| x.abs()).collect();
    let (_, bound, above) = magnitudes.select_nth_unstable_by(values.len() - count, f32::total_cmp);
    let bound = *bound;
    let mut room = count - above.iter().filter(|magnitude| **magnitude > bound).count();
    let mut keep = |x: f32| match x.abs() {
        magnitude if magnitude > bound => x,
        magnitude if magnitude == bound && room > 0 => {
            room -= 1;
            x
        }
        _ => 0.0,
    };
    values.iter().map(|x| keep(*x)).collect()
}

/// Keeps the elements of a mask, divided by the density, and replaces all others by 0.
fn random(values: &[f32], mask: &Mask, density: f64) -> Vec<f32> {
    if density >= 1.0 {
        return values.to_vec();
    }
    let kept = |(i, x): (usize, &f32)| if mask.keeps(i) { x / density as f32 } else { 0.0 };
    iter::zip(0.., values).map(kept).collect()
}
