//! Stored blocks to f32.
//!
//! The layouts are those of ggml's `block_*` structures; every formula is that of its `dequantize_row_*`.

mod k;

use half::{bf16, f16};

use crate::TensorType;

impl TensorType {
    /// The elements of stored blocks. Bytes behind the last whole block are left out.
    pub fn dequantize(self, blocks: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; blocks.len() / self.block_bytes() * self.block_elements()];
        let block = match self {
            TensorType::F32 => |b: &[u8], y: &mut [f32]| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            TensorType::F16 => |b: &[u8], y: &mut [f32]| y[0] = half(b),
            TensorType::BF16 => |b: &[u8], y: &mut [f32]| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            TensorType::Q4_0 => |b: &[u8], y: &mut [f32]| nibbles(&b[2..], 0, half(b), -8.0 * half(b), y),
            TensorType::Q4_1 => |b: &[u8], y: &mut [f32]| nibbles(&b[4..], 0, half(b), half(&b[2..]), y),
            TensorType::Q5_0 => {
                |b: &[u8], y: &mut [f32]| nibbles(&b[6..], fifths(&b[2..]), half(b), -16.0 * half(b), y)
            }
            TensorType::Q5_1 => {
                |b: &[u8], y: &mut [f32]| nibbles(&b[8..], fifths(&b[4..]), half(b), half(&b[2..]), y)
            }
            TensorType::Q8_0 => |b: &[u8], y: &mut [f32]| {
                let d = half(b);
                y.iter_mut().zip(&b[2..]).for_each(|(y, q)| *y = d * f32::from(*q as i8));
            },
            TensorType::Q2_K => k::q2,
            TensorType::Q3_K => k::q3,
            TensorType::Q4_K => k::q4,
            TensorType::Q5_K => k::q5,
            TensorType::Q6_K => k::q6,
        };
        for (b, y) in blocks.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_elements()))
        {
            block(b, y);
        }
        out
    }
}

/// The half-precision number at the start of `b`.
fn half(b: &[u8]) -> f32 {
    f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// One bit for each of 32 elements: the fifth bit of its quant.
fn fifths(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// 32 elements `d · q + m`: the low nibbles are the first 16 quants, the high ones the other 16, `fifths` their fifth
/// bits.
fn nibbles(quants: &[u8], fifths: u32, d: f32, m: f32, y: &mut [f32]) {
    for (i, q) in quants[..16].iter().enumerate() {
        let low = u32::from(q & 15) | (fifths >> i & 1) << 4;
        let high = u32::from(q >> 4) | (fifths >> (i + 16) & 1) << 4;
        y[i] = d * low as f32 + m;
        y[i + 16] = d * high as f32 + m;
    }
}
