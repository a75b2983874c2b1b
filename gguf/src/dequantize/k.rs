//! The K-quants: blocks of 256 elements, in groups of 16 or 32 with scales of their own.

use super::half;

/// 16 scales and minima of 4 bits, 2-bit quants, scale and minimum of the block.
pub(super) fn q2(b: &[u8], y: &mut [f32]) {
    let (scales, quants) = (&b[..16], &b[16..80]);
    let (d, min) = (half(&b[80..]), half(&b[82..]));
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let (scale, min) = (d * f32::from(scales[group] & 15), min * f32::from(scales[group] >> 4));
        let (quants, shift) = two_bits(quants, group);
        for (y, q) in y.iter_mut().zip(quants) {
            *y = scale * f32::from(q >> shift & 3) - min;
        }
    }
}

/// Third bits (inverted), 2-bit quants, 16 scales of 6 bits, scale of the block.
pub(super) fn q3(b: &[u8], y: &mut [f32]) {
    let (thirds, quants, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(&b[108..]);
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
        let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let scale = d * f32::from((low | high << 4) as i8 - 32);
        let (quants, shift) = two_bits(quants, group);
        let thirds = &thirds[16 * (group % 2)..];
        for ((y, q), third) in y.iter_mut().zip(quants).zip(thirds) {
            let offset = if third >> (group / 2) & 1 == 1 { 0 } else { 4 };
            *y = scale * f32::from((q >> shift & 3) as i8 - offset);
        }
    }
}

/// Where the 2-bit quants of a group of 16 are: 32 bytes hold 128 elements, 32 to each pair of bits.
fn two_bits(quants: &[u8], group: usize) -> (&[u8], usize) {
    let (half, pair) = (group / 8, group % 8 / 2);
    (&quants[32 * half + 16 * (group % 2)..][..16], 2 * pair)
}

/// Scale and minimum of the block, 8 scales and minima of 6 bits, 4-bit quants.
pub(super) fn q4(b: &[u8], y: &mut [f32]) {
    four_bits(b, &[0; 32], &b[16..144], y);
}

/// As [`q4`] with a fifth bit for every quant.
pub(super) fn q5(b: &[u8], y: &mut [f32]) {
    four_bits(b, &b[16..48], &b[48..176], y);
}

/// 8 groups of 32; two of them share 32 bytes of `quants`; bit g of `fifths[i]` belongs to element i of group g.
fn four_bits(b: &[u8], fifths: &[u8], quants: &[u8], y: &mut [f32]) {
    let (d, min) = (half(b), half(&b[2..]));
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, m) = six_bits(&b[4..16], group);
        let (scale, m) = (d * f32::from(scale), min * f32::from(m));
        let quants = &quants[32 * (group / 2)..][..32];
        for ((y, q), fifth) in y.iter_mut().zip(quants).zip(fifths) {
            let q = q >> (4 * (group % 2)) & 15 | (fifth >> group & 1) << 4;
            *y = scale * f32::from(q) - m;
        }
    }
}

/// Scale and minimum of a group, packed in 12 bytes: those of the last four groups have their upper two bits above
/// those of the first four.
fn six_bits(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let low = packed[group + 4];
    (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
}

/// Lower 4 bits, upper 2 bits, 16 signed scales, scale of the block.
pub(super) fn q6(b: &[u8], y: &mut [f32]) {
    let (lower, upper, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half(&b[208..]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        // 64 bytes of lower and 32 of upper bits hold 128 elements.
        let (half, quarter) = (group / 4, group % 4);
        let lower = &lower[64 * half + 32 * (quarter % 2)..][..32];
        let upper = &upper[32 * half..][..32];
        for (i, y) in y.iter_mut().enumerate() {
            let low = lower[i] >> (4 * (quarter / 2)) & 15;
            let high = upper[i] >> (2 * quarter) & 3;
            let scale = d * f32::from(scales[2 * group + i / 16] as i8);
            *y = scale * f32::from((low | high << 4) as i8 - 32);
        }
    }
}
