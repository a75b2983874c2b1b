//! The elements that DARE keeps. They are a function of the seed, the part's number, the tensor and the element, so
//! that a merge is the same wherever and whenever it is made.

/// 2⁶⁴ divided by the golden ratio, the step of SplitMix64.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea and Flood, 2014).
fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The mask of one tensor of one part.
///
/// The key begins as `mixed(seed + GAMMA)`. With the part's number and then with each byte of the tensor's name, it
/// becomes `mixed((key ^ x) + GAMMA)`. The element at index i of the row-major tensor is kept if the upper 53 bits of
/// `mixed(key + (i + 1) · GAMMA)`, as a fraction of 2⁵³, are below the density.
pub(super) struct Mask {
    key: u64,
    density: f64,
}

impl Mask {
    /// `tensor` is the path of the module in transformers' model, and `.lora_A` or `.lora_B`.
    pub(super) fn new(seed: u64, part: usize, tensor: &str, density: f64) -> Mask {
        let numbers = std::iter::once(part as u64).chain(tensor.bytes().map(u64::from));
        let first = mixed(seed.wrapping_add(GAMMA));
        let key = numbers.fold(first, |key, number| mixed((key ^ number).wrapping_add(GAMMA)));
        Mask { key, density }
    }

    /// Whether an element is kept.
    pub(super) fn keeps(&self, element: usize) -> bool {
        let number = mixed(self.key.wrapping_add((element as u64 + 1).wrapping_mul(GAMMA)));
        ((number >> 11) as f64) * (-53_f64).exp2() < self.density
    }
}
