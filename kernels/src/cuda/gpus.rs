//! The GPUs that this process sees, without opening them.

use std::ffi::CStr;

use cudarc::driver::{
    result,
    sys::{self, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR},
};

use super::{
    device::{count, failed, handle},
    unsupported,
};
use crate::{DType, Error, Result};

/// An environment variable for tests on fewer GPUs than ranks: how many ranks take turns on each GPU, instead of 1.
const RANKS_PER_GPU: &str = "LORAX_RANKS_PER_GPU";

/// Bytes of a GPU's address with its NUL, at most.
const ADDRESS: usize = 32;

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// The name of its model.
    pub name: String,
    /// Its address on the PCI bus, such as `0000:3B:00.0`.
    pub pci: String,
}

/// Lists the GPUs of as many ranks as there can be, those with which [`CudaBackend::new`](super::CudaBackend::new) can
/// compute in `dtype`, up to the first with which it cannot; then the reason comes with them.
pub fn gpus(dtype: DType) -> (Vec<Gpu>, Option<Error>) {
    let mut gpus = Vec::new();
    let missing = count().and_then(|count| {
        (0..count * ranks_per_gpu()).try_for_each(|rank| {
            gpus.push(gpu(dtype, ordinal_of(rank))?);
            Ok(())
        })
    });
    (gpus, missing.err())
}

fn ranks_per_gpu() -> usize {
    let number = std::env::var(RANKS_PER_GPU).ok().and_then(|number| number.parse().ok());
    number.unwrap_or(1).max(1)
}

/// The GPU of a rank.
pub(super) fn ordinal_of(rank: usize) -> usize {
    rank / ranks_per_gpu()
}

/// The GPU `ordinal`. Errors: what the machine lacks to compute with it in `dtype`.
pub(super) fn gpu(dtype: DType, ordinal: usize) -> Result<Gpu> {
    if dtype == DType::F32 {
        return Err(unsupported("float32 (use bfloat16 or float16)".into()));
    }
    let device = handle(ordinal, count()?)?;
    let name = result::device::get_name(device).map_err(failed("device name"))?;
    // SAFETY: the driver has given the handle.
    let major =
        unsafe { result::device::get_attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) };
    let major = major.map_err(failed("device attribute"))?;
    if major < 8 {
        return Err(unsupported(format!("{name} (compute capability {major}, below 8)")));
    }
    let mut address = [0_u8; ADDRESS];
    // SAFETY: the driver writes at most as many bytes, the last of them a NUL.
    unsafe { sys::cuDeviceGetPCIBusId(address.as_mut_ptr().cast(), ADDRESS as i32, device) }
        .result()
        .map_err(failed("device address"))?;
    let pci = CStr::from_bytes_until_nul(&address).unwrap_or_default().to_string_lossy().into_owned();
    Ok(Gpu { name, pci })
}
