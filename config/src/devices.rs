//! What a shard's build can compute on.

use serde::{Deserialize, Serialize};

/// The GPUs that a shard's build can use on this machine. `lorax-shard --devices` prints them as JSON, because the
/// launcher has no CUDA itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// The visible GPUs, in the order in which the ranks get them.
    pub gpus: Vec<Gpu>,
    /// The reason that there are none, or fewer than the machine has.
    pub missing: Option<String>,
}

/// Among how many ranks a model can be divided. `lorax-shard --divides` prints it as JSON, because the launcher reads no
/// models itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Division {
    /// The most ranks, up to those that were asked for.
    pub ranks: usize,
    /// Why it is not as many as were asked for.
    pub refused: Option<String>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// The name of its model.
    pub name: String,
    /// Its address on the PCI bus, in the driver's spelling, such as `0000:3B:00.0`.
    pub pci: String,
}
