//! NCCL's collectives. The library is opened at run time.
//!
//! cudarc has the library's types. Its loader looks for the names of other libraries of NVIDIA, of which NCCL has none
//! without its development package, and panics where a function is missing. So the few functions are looked up here.

use std::{
    ffi::{c_int, c_void},
    sync::{
        Arc,
        atomic::{AtomicPtr, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use cudarc::{
    driver::sys::CUstream,
    nccl::sys::{ncclComm, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId},
};
use libloading::Library;

use crate::{
    DType, Error, Group, PeerFault, Result,
    cuda::{
        device::{Device, Stream},
        ffi::pointer,
    },
};

/// The names of the library: of a package for running programs, and of one for building them.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version that is used, as the library counts: 2.18.
const OLDEST: c_int = 21_800;
/// How often a rank looks for what the others have told.
const POLL: Duration = Duration::from_millis(5);
/// Where the ranks tell each other how making the communicator has ended: a place that is no slot of adapters.
const PLACE: u64 = u64::MAX;
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
    /// Null once it was aborted, which frees it.
    communicator: AtomicPtr<ncclComm>,
    group: Arc<Group>,
}

// SAFETY: calls are made by one thread at a time, that of the steps.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

/// A communicator on its way from the thread that made it, or the library's error.
struct Made(Api, std::result::Result<ncclComm_t, c_int>);

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
        // Names this attempt.
        let about =
            id.internal.iter().fold(0_u64, |hash, c| hash.rotate_left(7) ^ u64::from(c.cast_unsigned()));
        let made = init(api, id, group, device)?;
        settle(group, about, &made)
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
        let (op, x, sum) = ("all_reduce", pointer(x), ncclRedOp_t::ncclSum);
        let communicator = self.communicator(op)?;
        // SAFETY: the caller's promise; both live.
        let code =
            unsafe { (self.api.all_reduce)(x, x, count, data_type(dtype), sum, communicator, on.raw()) };
        checked(op, code)
    }

    /// `y = x₀ ‖ x₁ ‖ …` of `count` f32 each.
    ///
    /// # Safety
    /// There are so many elements.
    pub(super) unsafe fn all_gather(&self, x: u64, y: u64, count: usize, on: &Stream) -> Result<()> {
        let (op, kind) = ("gather_columns", ncclDataType_t::ncclFloat32);
        let communicator = self.communicator(op)?;
        // SAFETY: the caller's promise; both live.
        let code =
            unsafe { (self.api.all_gather)(pointer(x), pointer(y), count, kind, communicator, on.raw()) };
        checked(op, code)
    }

    /// The communicator. Errors: it was aborted.
    fn communicator(&self, op: &'static str) -> Result<ncclComm_t> {
        let communicator = self.communicator.load(Ordering::Acquire);
        if !communicator.is_null() {
            return Ok(communicator);
        }
        let rank = self.group.lost().unwrap_or_else(|| another(&self.group));
        Err(Error::Peer { op, rank, fault: PeerFault::Ended })
    }

    /// Ends the library's kernels, which would wait for a lost rank for ever, and frees the communicator.
    pub(super) fn abort(&self) {
        let communicator = self.communicator.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !communicator.is_null() {
            // SAFETY: made by `init`; nobody finds it any more.
            let _ = unsafe { (self.api.abort)(communicator) };
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // Destroying waits for the kernels, and for the other ranks.
        if self.group.lost().is_some() {
            self.abort();
        }
        let communicator = *self.communicator.get_mut();
        if !communicator.is_null() {
            // SAFETY: made by `init`, and not aborted.
            let _ = unsafe { (self.api.destroy)(communicator) };
        }
    }
}

/// A rank that is not this one.
fn another(group: &Group) -> usize {
    usize::from(group.rank() == 0)
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

/// Begins to make the communicator, on a thread of its own: the library waits for the other ranks without end.
fn init(api: Api, id: ncclUniqueId, group: &Arc<Group>, device: &Arc<Device>) -> Result<Receiver<Made>> {
    let (rank, ranks, device) = (group.rank() as c_int, group.ranks() as c_int, device.clone());
    let (sender, made) = mpsc::sync_channel(1);
    thread::Builder::new().name("nccl-init".into()).spawn(move || {
        let mut communicator: ncclComm_t = std::ptr::null_mut();
        let code = match device.bind() {
            // SAFETY: the id is that of rank 0, and the communicator's place lives.
            Ok(()) => unsafe { (api.init_rank)(&raw mut communicator, ranks, id, rank) },
            Err(_) => NO_DEVICE,
        };
        let _ = sender.send(Made(api, if code == 0 { Ok(communicator) } else { Err(code) }));
    })?;
    Ok(made)
}

/// What a rank tells that cannot use its GPU on the thread that makes the communicator; as `ncclUnhandledCudaError`.
const NO_DEVICE: c_int = 1;

/// Waits until all ranks have made the communicator, or until one has failed: then the library, which does not tell the
/// others, leaves them waiting. Those do not wait for their threads any more, and none uses the library.
fn settle(
    group: &Arc<Group>,
    about: u64,
    made: &Receiver<Made>,
) -> Result<std::result::Result<Nccl, String>> {
    let since = Instant::now();
    let mut own = None;
    loop {
        if own.is_none()
            && let Ok(Made(api, result)) = made.recv_timeout(POLL)
        {
            group.post(PLACE, about, &result.err().unwrap_or(0).to_le_bytes())?;
            own = result.ok().map(|communicator| Nccl {
                api,
                communicator: AtomicPtr::new(communicator),
                group: group.clone(),
            });
        }
        let codes = group.posted_so_far(PLACE, about);
        // Two ranks on one GPU are refused, for example.
        if let Some((rank, code)) = first_failure(&codes) {
            own.iter().for_each(Nccl::abort);
            return Ok(Err(format!("rank {rank}: ncclCommInitRank returned {code}")));
        }
        let missing = codes.iter().position(Option::is_none);
        match (missing, own.take()) {
            (None, Some(nccl)) => return Ok(Ok(nccl)),
            (_, nccl) => own = nccl,
        }
        let waits_for = missing.unwrap_or_else(|| another(group));
        if let Err(error) = group.check("join NCCL's communicator", waits_for, since) {
            // Destroying would wait for the rank.
            own.iter().for_each(Nccl::abort);
            return Err(error);
        }
        if own.is_some() {
            thread::park_timeout(POLL);
        }
    }
}

/// The first rank that has told an error, and the error.
fn first_failure(codes: &[Option<Arc<[u8]>>]) -> Option<(usize, c_int)> {
    let code = |bytes: &Arc<[u8]>| c_int::from_le_bytes(bytes[..].try_into().unwrap_or([0xff; 4]));
    let mut told = codes.iter().enumerate().filter_map(|(rank, bytes)| Some((rank, code(bytes.as_ref()?))));
    told.find(|(_, code)| *code != 0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::cuda::comm::tests::{PATIENCE, ranks};

    /// Calls of `abort` and of `destroy`, by the number that stands for the communicator.
    static ABORTED: [AtomicUsize; 32] = [const { AtomicUsize::new(0) }; 32];
    static DESTROYED: [AtomicUsize; 32] = [const { AtomicUsize::new(0) }; 32];

    unsafe extern "C" fn count_abort(communicator: ncclComm_t) -> c_int {
        ABORTED[communicator as usize].fetch_add(1, Ordering::Relaxed);
        0
    }

    unsafe extern "C" fn count_destroy(communicator: ncclComm_t) -> c_int {
        DESTROYED[communicator as usize].fetch_add(1, Ordering::Relaxed);
        0
    }

    unsafe extern "C" fn no_id(_: *mut ncclUniqueId) -> c_int {
        1
    }

    unsafe extern "C" fn no_init(_: *mut ncclComm_t, _: c_int, _: ncclUniqueId, _: c_int) -> c_int {
        1
    }

    unsafe extern "C" fn no_sum(
        _: *const c_void,
        _: *mut c_void,
        _: usize,
        _: ncclDataType_t,
        _: ncclRedOp_t,
        _: ncclComm_t,
        _: CUstream,
    ) -> c_int {
        1
    }

    unsafe extern "C" fn no_gather(
        _: *const c_void,
        _: *mut c_void,
        _: usize,
        _: ncclDataType_t,
        _: ncclComm_t,
        _: CUstream,
    ) -> c_int {
        1
    }

    /// A library that only counts.
    fn counting() -> Api {
        Api {
            get_unique_id: no_id,
            init_rank: no_init,
            destroy: count_destroy,
            abort: count_abort,
            all_reduce: no_sum,
            all_gather: no_gather,
            version: OLDEST,
            // SAFETY: the C library is loaded already.
            _library: unsafe { Library::new("libc.so.6") }.unwrap(),
        }
    }

    /// The communicator that a number stands for.
    fn numbered(number: usize) -> ncclComm_t {
        number as ncclComm_t
    }

    fn counts(number: usize) -> (usize, usize) {
        let of = |counts: &[AtomicUsize]| counts[number].load(Ordering::Relaxed);
        (of(&ABORTED), of(&DESTROYED))
    }

    #[test]
    fn a_communicator_is_aborted_or_destroyed_once() {
        for (number, aborts, is_lost) in [
            (1, 0, false),
            (2, 1, false),
            (3, 2, false),
            (4, 3, false),
            (5, 0, true),
            (6, 1, true),
            (7, 2, true),
        ] {
            let mut groups = ranks(2, |group| group);
            let other = groups.pop();
            let group = groups.remove(0);
            if is_lost {
                drop(other);
                while group.lost().is_none() {
                    thread::yield_now();
                }
            }
            let communicator = AtomicPtr::new(numbered(number));
            let nccl = Nccl { api: counting(), communicator, group };
            assert_eq!(nccl.communicator("sum").unwrap(), numbered(number));
            (0..aborts).for_each(|_| nccl.abort());
            let after = nccl.communicator("sum");
            assert_eq!(after.is_err(), aborts > 0, "nothing is launched with what was freed");
            drop(nccl);
            let expected = if aborts > 0 || is_lost { (1, 0) } else { (0, 1) };
            assert_eq!(counts(number), expected, "{aborts} aborts, lost: {is_lost}");
        }
    }

    #[test]
    fn ranks_fall_back_together_when_one_cannot_make_the_communicator() {
        // The results of the ranks: a code, or `None` for one that the library keeps waiting.
        let cases: [&[Option<c_int>]; 10] = [
            &[Some(0), Some(0)],
            &[Some(5), None],
            &[None, Some(5)],
            &[Some(0), Some(2)],
            &[Some(3), Some(0)],
            &[None, None, Some(1)],
            &[Some(0), None, Some(-1)],
            &[Some(7), Some(7), Some(7)],
            &[None, Some(6), None, None],
            &[Some(0), Some(0), Some(0), Some(0)],
        ];
        for (case, codes) in cases.into_iter().enumerate() {
            let number = 10 + case;
            let since = Instant::now();
            let settled = ranks(codes.len(), |group| {
                let (sender, made) = mpsc::sync_channel(1);
                if let Some(code) = codes[group.rank()] {
                    let result = if code == 0 { Ok(numbered(number)) } else { Err(code) };
                    let _ = sender.send(Made(counting(), result));
                }
                let settled = settle(&group, 9, &made).unwrap().map(drop);
                drop(sender);
                (settled, group)
            });
            let failed = codes
                .iter()
                .enumerate()
                .find_map(|(rank, code)| Some((rank, (*code).filter(|code| *code != 0)?)));
            for (settled, _) in &settled {
                match failed {
                    None => assert!(settled.is_ok(), "{codes:?}"),
                    Some(_) if codes.iter().flatten().filter(|code| **code != 0).count() > 1 => {
                        assert!(settled.as_ref().unwrap_err().ends_with("ncclCommInitRank returned 7"));
                    }
                    Some((rank, code)) => {
                        let reason = format!("rank {rank}: ncclCommInitRank returned {code}");
                        assert_eq!(*settled, Err(reason), "{codes:?}");
                    }
                }
            }
            let made = codes.iter().filter(|code| **code == Some(0)).count();
            let (aborted, destroyed) = counts(number);
            assert_eq!(aborted + destroyed, made, "{codes:?}: no communicator is left");
            assert_eq!(if failed.is_some() { destroyed } else { aborted }, 0, "{codes:?}");
            assert!(since.elapsed() < PATIENCE / 2, "{codes:?}: nobody waits for a thread that hangs");
        }
    }

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
