//! Fused operations on matrices for every backend.
