//! Low-rank deltas as the backends see them: sites that they attach to, and the parts that they are made of.

/// One linear operation that low-rank deltas can attach to. A fused projection (q, k, v or gate, up) is one site with
/// several slices: all slices read the same input, each writes its own range of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraSite {
    /// Width of the input.
    pub inputs: usize,
    /// Width of each slice of the output, in order.
    pub outputs: Vec<usize>,
}

/// The delta of one slice of one site: `y += x · Aᵀ · Bᵀ`.
#[derive(Debug, Clone)]
pub struct LoraPart {
    /// Index of the site.
    pub site: usize,
    /// Slice of the site's output.
    pub slice: usize,
    /// Rows of A, columns of B. Any from 1.
    pub lora_rank: usize,
    /// A, row-major `[lora_rank, inputs]`.
    pub a: Vec<f32>,
    /// B with the adapter's scale folded in, row-major `[outputs[slice], lora_rank]`.
    pub b: Vec<f32>,
}
