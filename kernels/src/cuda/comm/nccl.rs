//! NCCL's collectives. The library is opened at run time.
//!
//! cudarc has the library's types. Its loader looks for the names of other libraries of NVIDIA, of which NCCL has none
//! without its development package, and panics where a function is missing. So the few functions are looked up here.

use std::{
    ffi::{c_int, c_void},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use cudarc::{
    driver::sys::CUstream,
    nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId},
};
use libloading::Library;

use crate::{
    DType, Error, Group, Result,
    cuda::{
        device::{Device, Stream},
        ffi::pointer,
    },
};

/// The names of the library: of a package for running programs, and of one for building them.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version that is used, as the library counts: 2.18.
const OLDEST: c_int = 21_800;
/// Bytes of a unique id.
const ID_BYTES: usize = size_of::<ncclUniqueId>();

/// The library's functions. They return 0, or one of its errors.
struct Api {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> c_int,
    destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        CUstream,
    ) -> c_int,
    all_gather: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclComm_t,
        CUstream,
    ) -> c_int,
    version: c_int,
    /// What the functions are in.
    _library: Library,
}

fn checked(op: &'static str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Device { op, library: "NCCL", code }) }
}

/// 2.28.3, of 22803.
fn dotted(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

impl Api {
    /// Opens the library. Errors: why it cannot be used, in words.
    fn open() -> std::result::Result<Api, String> {
        let mut reasons = Vec::new();
        for name in NAMES {
            // SAFETY: the library's initializers have no requirements.
            match unsafe { Library::new(name) } {
                Ok(library) => return Api::of(library, name),
                Err(error) => reasons.push(format!("{name}: {}", cause(&error))),
            }
        }
        Err(format!("NCCL cannot be loaded ({})", reasons.join("; ")))
    }

    fn of(library: Library, name: &str) -> std::result::Result<Api, String> {
        // SAFETY: the types are those of the library's header, which all versions since 2.18 share.
        unsafe {
            let get_version: unsafe extern "C" fn(*mut c_int) -> c_int =
                symbol(&library, name, "ncclGetVersion")?;
            let mut version = 0;
            let code = get_version(&raw mut version);
            if code != 0 {
                return Err(format!("{name} does not tell its version: error {code}"));
            }
            accept(name, version)?;
            Ok(Api {
                get_unique_id: symbol(&library, name, "ncclGetUniqueId")?,
                init_rank: symbol(&library, name, "ncclCommInitRank")?,
                destroy: symbol(&library, name, "ncclCommDestroy")?,
                abort: symbol(&library, name, "ncclCommAbort")?,
                all_reduce: symbol(&library, name, "ncclAllReduce")?,
                all_gather: symbol(&library, name, "ncclAllGather")?,
                version,
                _library: library,
            })
        }
    }
}

/// Refuses an old library.
fn accept(name: &str, version: c_int) -> std::result::Result<(), String> {
    if version >= OLDEST {
        return Ok(());
    }
    Err(format!("{name} is NCCL {}, older than {}", dotted(version), dotted(OLDEST)))
}

/// What the loader says, without the name that it repeats.
fn cause(error: &libloading::Error) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    text.split_once(": ").map_or(text.clone(), |(_, cause)| cause.to_owned())
}

/// A function of the library.
///
/// # Safety
/// `F` is the function's type.
unsafe fn symbol<F: Copy>(library: &Library, file: &str, name: &str) -> std::result::Result<F, String> {
    // SAFETY: the caller's promise.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|function| *function).map_err(|_| format!("{file} has no function {name}"))
}

/// This rank in NCCL's communicator of the group.
pub(super) struct Nccl {
    api: Api,
    communicator: ncclComm_t,
    group: Arc<Group>,
}

// SAFETY: calls are made by one thread at a time, that of the steps.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

/// A communicator on its way from the thread that made it.
struct Made(Api, ncclComm_t, c_int);

// SAFETY: the library lets other threads use a communicator.
unsafe impl Send for Made {}

impl Nccl {
    /// Makes the communicator, on all ranks or on none. The inner error says in words on which rank the library cannot
    /// be used, and why; the outer one is a failure.
    pub(super) fn join(
        group: &Arc<Group>,
        device: &Arc<Device>,
    ) -> Result<std::result::Result<Nccl, String>> {
        let api = Api::open();
        let said = api.as_ref().err().cloned().unwrap_or_default();
        let all = group.exchange(said.as_bytes())?;
        if let Some((rank, reason)) = all.iter().enumerate().find(|(_, reason)| !reason.is_empty()) {
            return Ok(Err(format!("rank {rank}: {}", String::from_utf8_lossy(reason))));
        }
        let api = match api {
            Ok(api) => api,
            Err(reason) => return Ok(Err(reason)),
        };
        let id = shared_id(&api, group)?;
        let Made(api, communicator, code) = init(api, id, group, device)?;
        // Two ranks on one GPU are refused, for example.
        let codes = group.exchange(&code.to_le_bytes())?;
        if let Some((rank, code)) = codes.iter().enumerate().find(|(_, code)| **code != [0; 4]) {
            let code = code.iter().rev().fold(0_u32, |all, byte| all << 8 | u32::from(*byte));
            return Ok(Err(format!("rank {rank}: ncclCommInitRank returned {code}")));
        }
        Ok(Ok(Nccl { api, communicator, group: group.clone() }))
    }

    /// The library's version.
    pub(super) fn version(&self) -> String {
        dotted(self.api.version)
    }

    /// `x = Σ x` of `count` elements at an address.
    ///
    /// # Safety
    /// There are so many elements of that type.
    pub(super) unsafe fn all_reduce(&self, x: u64, count: usize, dtype: DType, on: &Stream) -> Result<()> {
        let (x, sum) = (pointer(x), ncclRedOp_t::ncclSum);
        // SAFETY: the caller's promise; both live.
        let code =
            unsafe { (self.api.all_reduce)(x, x, count, data_type(dtype), sum, self.communicator, on.raw()) };
        checked("all_reduce", code)
    }

    /// `y = x₀ ‖ x₁ ‖ …` of `count` f32 each.
    ///
    /// # Safety
    /// There are so many elements.
    pub(super) unsafe fn all_gather(&self, x: u64, y: u64, count: usize, on: &Stream) -> Result<()> {
        let kind = ncclDataType_t::ncclFloat32;
        // SAFETY: the caller's promise; both live.
        let code = unsafe {
            (self.api.all_gather)(pointer(x), pointer(y), count, kind, self.communicator, on.raw())
        };
        checked("gather_columns", code)
    }

    /// Ends the library's kernels, which would wait for a lost rank for ever.
    pub(super) fn abort(&self) {
        // SAFETY: the communicator lives; nothing more is launched on it.
        let _ = unsafe { (self.api.abort)(self.communicator) };
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // What a rank's end leaves behind ends with the process: `abort` may have destroyed it already.
        if self.group.lost().is_none() {
            // SAFETY: made by `join`.
            let _ = unsafe { (self.api.destroy)(self.communicator) };
        }
    }
}

fn data_type(dtype: DType) -> ncclDataType_t {
    match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::Bf16 => ncclDataType_t::ncclBfloat16,
        DType::F16 => ncclDataType_t::ncclFloat16,
    }
}

/// The name of a new communicator, which rank 0 thinks of.
fn shared_id(api: &Api, group: &Group) -> Result<ncclUniqueId> {
    let mut id = ncclUniqueId { internal: [0; ID_BYTES] };
    if group.rank() == 0 {
        // SAFETY: writes the id.
        checked("name NCCL's communicator", unsafe { (api.get_unique_id)(&raw mut id) })?;
    }
    let own: Vec<u8> = id.internal.iter().map(|c| c.cast_unsigned()).collect();
    let all = group.exchange(&own)?;
    for (to, from) in id.internal.iter_mut().zip(&all[0]) {
        *to = from.cast_signed();
    }
    Ok(id)
}

/// Makes the communicator on a thread of its own: the library waits for the other ranks without end.
fn init(api: Api, id: ncclUniqueId, group: &Arc<Group>, device: &Arc<Device>) -> Result<Made> {
    let (rank, ranks, device) = (group.rank() as c_int, group.ranks() as c_int, device.clone());
    let (sender, made) = mpsc::sync_channel(1);
    thread::Builder::new().name("nccl-init".into()).spawn(move || {
        let mut communicator: ncclComm_t = std::ptr::null_mut();
        let bound = device.bind();
        // SAFETY: the id is that of rank 0, and the communicator's place lives.
        let code = unsafe { (api.init_rank)(&raw mut communicator, ranks, id, rank) };
        let _ = sender.send(bound.map(|()| Made(api, communicator, code)));
    })?;
    let (since, other) = (Instant::now(), usize::from(group.rank() == 0));
    loop {
        if let Ok(made) = made.recv_timeout(Duration::from_millis(20)) {
            return made;
        }
        group.check("join NCCL's communicator", other, since)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_library_counts() {
        for (version, name) in
            [(21_800, "2.18.0"), (22_803, "2.28.3"), (23_012, "2.30.12"), (2_708, "0.27.8")]
        {
            assert_eq!(dotted(version), name);
        }
    }

    #[test]
    fn an_old_library_is_refused_by_name_and_version() {
        for version in [21_800, 21_805, 22_803, 30_000] {
            accept("libnccl.so.2", version).unwrap();
        }
        for (version, text) in [(21_799, "2.17.99"), (21_003, "2.10.3"), (2_708, "0.27.8"), (0, "0.0.0")] {
            let error = accept("libnccl.so.2", version).unwrap_err();
            assert_eq!(error, format!("libnccl.so.2 is NCCL {text}, older than 2.18.0"));
        }
    }

    #[test]
    fn a_missing_library_and_function_are_named() {
        // SAFETY: the C library is loaded already.
        let libc = unsafe { Library::new("libc.so.6") }.unwrap();
        let error = Api::of(libc, "libc.so.6").err().unwrap();
        assert_eq!(error, "libc.so.6 has no function ncclGetVersion");
        // SAFETY: there is no such library.
        let error = unsafe { Library::new("libnccl-of-no-machine.so.2") }.unwrap_err();
        assert_eq!(cause(&error), "cannot open shared object file: No such file or directory");
    }
}
