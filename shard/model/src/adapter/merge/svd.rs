//! The matrix of a given rank that is closest to a sum of deltas. The sum has a small rank R, that of all parts
//! together. So `ΔW = B · A` is decomposed without computing it: with `B = Q · R` and `Aᵀ = P · S`, the singular values
//! of ΔW are those of `R · Sᵀ`, which is a matrix of R × R, and its singular vectors are Q and P times that matrix's.

use nalgebra::DMatrix;

use super::{MergeError, Strategy, arithmetic::Factors, modules::MergedModule};

/// Bytes that are in use at most for each element of A and B of all parts, and of the result: the value as it was read,
/// and matrices of f64 before and after they are decomposed.
pub(super) const PASSING: [usize; 2] = [20, 20];

/// The most multiplications that all modules may take: about two minutes of one core.
const MAX_WORK: usize = 1 << 40;
/// The largest number of iterations, of which a matrix takes a few for each of its singular values.
const MAX_ITERATIONS: usize = 1 << 16;

/// Refuses merges that would take too long.
pub(super) fn check_work(modules: &[MergedModule]) -> Result<(), MergeError> {
    let work = |merged: &MergedModule| {
        let decomposed = merged.rank_sum.saturating_mul(merged.rank_sum).saturating_mul(16);
        let factors = merged.elements_read().saturating_mul(4);
        merged.rank_sum.saturating_mul(decomposed.saturating_add(factors))
    };
    let all = modules.iter().map(work).fold(0, usize::saturating_add);
    let ranks = modules.iter().map(|merged| merged.rank_sum).max().unwrap_or(0);
    if all > MAX_WORK { Err(MergeError::TooMuchWork { ranks }) } else { Ok(()) }
}

/// Bytes that are in use at most for each element of a whole delta: of every part, the value and the pruned one; once, the
/// merged value, the matrix of f64, and what it is decomposed into.
pub(super) const PASSING_WHOLE: [usize; 2] = [8, 36];

/// As [`check_work`], of whole deltas.
pub(super) fn check_whole_work(modules: &[MergedModule], strategy: Strategy) -> Result<(), MergeError> {
    let work = |merged: &MergedModule| {
        let least = merged.module.inputs.min(merged.module.outputs);
        // Iterations go through whole matrices again and again, in passes that are not blocked.
        merged.elements_whole().saturating_mul(least).saturating_mul(128)
    };
    match (modules.iter().map(work).fold(0, usize::saturating_add), strategy) {
        (all, Strategy::Dense(way)) if all > MAX_WORK => {
            let of = Strategy::Elementwise(way).name();
            Err(MergeError::TooMuchWhole { strategy: strategy.name(), of })
        }
        _ => Ok(()),
    }
}

/// As [`truncated`], of a whole matrix `[outputs, inputs]`, column-major.
pub(super) fn truncated_whole(
    outputs: usize,
    column_major: impl Iterator<Item = f32>,
    lora_rank: usize,
) -> Option<[Vec<f32>; 2]> {
    let values: Vec<f64> = column_major.map(f64::from).collect();
    let matrix = DMatrix::from_vec(outputs, values.len() / outputs, values);
    let decomposed = matrix.try_svd(true, true, f64::EPSILON, MAX_ITERATIONS)?;
    let (u, v_t) = (decomposed.u?, decomposed.v_t?);
    let scaled =
        u.columns(0, lora_rank) * DMatrix::from_diagonal(&decomposed.singular_values.rows(0, lora_rank));
    // Row-major A is the columns of its transposed matrix, and so is B.
    let (a, b) = (v_t.rows(0, lora_rank).transpose(), scaled.transpose());
    Some([a, b].map(|matrix| matrix.iter().map(|x| *x as f32).collect()))
}

/// A, the right singular vectors, and B, the left ones times the singular values, as in PEFT. `None` if the algorithm
/// does not converge.
pub(super) fn truncated(factors: &[Factors], lora_rank: usize) -> Option<[Vec<f32>; 2]> {
    let elements = |matrix: fn(&Factors) -> &[f32]| factors.iter().map(|factors| matrix(factors).len()).sum();
    let mut left = Vec::with_capacity(elements(|factors| &factors.b));
    let mut right = Vec::with_capacity(elements(|factors| &factors.a));
    for factors @ Factors { lora_rank, a, b, .. } in factors {
        let factor = factors.factor();
        let columns = b.len() / lora_rank;
        for row in 0..*lora_rank {
            left.extend((0..columns).map(|column| f64::from(b[column * lora_rank + row])));
        }
        right.extend(a.iter().map(|x| f64::from(*x) * factor));
    }
    let rank_sum: usize = factors.iter().map(|factors| factors.lora_rank).sum();
    // nalgebra's matrices are column-major.
    let left = DMatrix::from_vec(left.len() / rank_sum, rank_sum, left).qr();
    let right = DMatrix::from_vec(right.len() / rank_sum, rank_sum, right).qr();
    let core = (left.r() * right.r().transpose()).try_svd(true, true, f64::EPSILON, MAX_ITERATIONS)?;
    let (u, v_t) = (core.u?, core.v_t?);
    let scaled = u.columns(0, lora_rank) * DMatrix::from_diagonal(&core.singular_values.rows(0, lora_rank));
    let b = (left.q() * scaled).transpose();
    let a = right.q() * v_t.rows(0, lora_rank).transpose();
    Some([a, b].map(|matrix| matrix.iter().map(|x| *x as f32).collect()))
}
