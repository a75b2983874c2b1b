//! A GPU, and its resources as the driver hands them out: streams, events, device memory and pinned host memory. Each is
//! released on drop.

use std::{
    ffi::c_void,
    ptr::NonNull,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU32, AtomicU64},
    },
};

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};

use super::{BACKEND, comm::Comm};
use crate::{Error, Result};

/// Makes an error of a failure that the driver reports during `op`.
pub(super) fn failed(op: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| Error::Device { op, library: "CUDA driver", code: e.0 as i32 }
}

/// Makes a result of the code that a launcher of `csrc` has returned during `op`.
pub(super) fn launched(op: &'static str, code: i32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Device { op, library: "CUDA runtime", code }) }
}

fn lacks(missing: String) -> Error {
    Error::Unavailable { backend: BACKEND, missing }
}

/// Starts the driver, and returns the number of visible GPUs. Errors: what the machine lacks.
pub(super) fn count() -> Result<usize> {
    // SAFETY: opening the driver's library runs its initializers only.
    if !unsafe { sys::is_culib_present() } {
        return Err(lacks("no NVIDIA driver (libcuda) on this machine".into()));
    }
    result::init().map_err(|e| lacks(format!("the NVIDIA driver does not start: {e:?}")))?;
    Ok(result::device::get_count().map_err(failed("count devices"))? as usize)
}

/// GPU `ordinal` of `count`.
pub(super) fn handle(ordinal: usize, count: usize) -> Result<sys::CUdevice> {
    if ordinal >= count {
        return Err(lacks(format!("device {ordinal} of {count}")));
    }
    result::device::get(ordinal as i32).map_err(failed("open device"))
}

/// Bytes of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that no process uses.
    pub free: usize,
    /// All bytes of the GPU.
    pub total: usize,
}

/// One GPU, through its primary context, which is kept until the process ends: kernels are loaded into it once.
pub(super) struct Device {
    context: sys::CUcontext,
    handle: sys::CUdevice,
}

// SAFETY: a context may be made current on any thread; the driver's calls are thread safe.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Opens GPU `ordinal`. Errors: what the machine lacks.
    pub(super) fn open(ordinal: usize) -> Result<Arc<Device>> {
        let handle = handle(ordinal, count()?)?;
        // SAFETY: `handle` came from the driver.
        let context = unsafe { result::primary_ctx::retain(handle) }.map_err(failed("open device"))?;
        let device = Arc::new(Device { context, handle });
        device.bind()?;
        Ok(device)
    }

    /// Makes this GPU the calling thread's.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("bind"))
    }

    pub(super) fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32> {
        // SAFETY: `handle` came from the driver.
        unsafe { result::device::get_attribute(self.handle, attribute) }.map_err(failed("device attribute"))
    }

    pub(super) fn name(&self) -> Result<String> {
        result::device::get_name(self.handle).map_err(failed("device name"))
    }

    pub(super) fn memory(&self) -> Result<DeviceMemory> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(failed("device memory"))?;
        Ok(DeviceMemory { free, total })
    }

    /// Keeps memory that is freed in stream order for the next allocation, instead of handing it back.
    pub(super) fn keep_freed_memory(&self) -> Result<()> {
        let most = u64::MAX;
        // SAFETY: the pool is the device's own, and the attribute is a u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.handle).map_err(failed("memory pool"))?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw const most).cast_mut().cast::<c_void>())
                .result()
                .map_err(failed("memory pool"))
        }
    }
}

/// A queue of work on the GPU.
pub(super) struct Stream {
    raw: sys::CUstream,
    device: Arc<Device>,
    /// The other ranks, if its work may wait for them.
    comm: OnceLock<Weak<Comm>>,
}

// SAFETY: a stream may be used from any thread; the driver's calls are thread safe.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(device: &Arc<Device>) -> Result<Stream> {
        device.bind()?;
        let raw =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("stream"))?;
        Ok(Stream { raw, device: device.clone(), comm: OnceLock::new() })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// From now on the work of this stream may wait for other ranks.
    pub(super) fn waits_for(&self, comm: &Arc<Comm>) {
        let _ = self.comm.set(Arc::downgrade(comm));
    }

    /// Waits for an event of this stream's work, but not for ranks that are lost.
    pub(super) fn wait(&self, op: &'static str, event: &Event) -> Result<()> {
        match self.comm.get().and_then(Weak::upgrade) {
            Some(comm) => comm.wait_for(op, event),
            None => event.synchronize(),
        }
    }

    /// An event behind all work so far.
    pub(super) fn mark(&self) -> Result<Event> {
        self.device.bind()?;
        let event = Event::new()?;
        event.record(self)?;
        Ok(event)
    }

    /// Waits until all work so far is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("synchronize"))
    }

    /// Makes all later work of this stream wait for the work that was ahead of an event when it was recorded.
    pub(super) fn wait_for(&self, event: &Event) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }.map_err(failed("wait for an event"))
    }

    /// Copies pinned memory to the GPU, in stream order.
    ///
    /// # Safety
    /// `from` is not written or freed before the copy ended, and `to` has room.
    pub(super) unsafe fn copy_in(&self, to: u64, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_async(to, from, self.raw) }.map_err(failed("copy to the device"))
    }

    /// Copies from the GPU to pinned memory, in stream order.
    ///
    /// # Safety
    /// `to` is not used or freed before the copy ended, and `from` holds as many bytes.
    pub(super) unsafe fn copy_out(&self, to: &mut [u8], from: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(to, from, self.raw) }.map_err(failed("copy from the device"))
    }

    /// Sets memory to zero, in stream order.
    ///
    /// # Safety
    /// The memory is allocated.
    pub(super) unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.set(at, 0, bytes) }
    }

    /// Sets every byte of memory, in stream order.
    ///
    /// # Safety
    /// The memory is allocated.
    unsafe fn set(&self, at: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(at, byte, bytes, self.raw) }.map_err(failed("set memory"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created by `new`; the driver ends its work first.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

/// A point in the order of a stream's work.
pub(super) struct Event {
    raw: sys::CUevent,
}

// SAFETY: an event may be used from any thread; the driver's calls are thread safe.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new() -> Result<Event> {
        Event::with(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event that notes the time, for [`Self::seconds_since`].
    pub(super) fn timed() -> Result<Event> {
        Event::with(sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with(flags: sys::CUevent_flags) -> Result<Event> {
        Ok(Event { raw: result::event::create(flags).map_err(out_of_memory(0, "an event"))? })
    }

    /// Seconds on the GPU's clock since it reached an earlier event. Both are timed and reached.
    pub(super) fn seconds_since(&self, earlier: &Event) -> Result<f64> {
        // SAFETY: both live.
        let millis = unsafe { result::event::elapsed(earlier.raw, self.raw) };
        Ok(f64::from(millis.map_err(failed("time between events"))?) * 1e-3)
    }

    /// Moves the event to the present end of a stream.
    pub(super) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        unsafe { result::event::record(self.raw, stream.raw) }.map_err(failed("record an event"))
    }

    /// Whether the work before it is done.
    pub(super) fn reached(&self) -> Result<bool> {
        // SAFETY: the event lives.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(e) => Err(failed("query an event")(e)),
        }
    }

    /// Waits until the work before it is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("wait for the device"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by `new`.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// A second stream, for work that may run beside some of the work of a first one.
pub(super) struct Branch {
    stream: Stream,
    forked: Event,
    joined: Event,
}

impl Branch {
    pub(super) fn new(device: &Arc<Device>) -> Result<Branch> {
        Ok(Branch { stream: Stream::new(device)?, forked: Event::new()?, joined: Event::new()? })
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Makes what is launched on this branch from now on run after all that has been launched on `trunk`.
    pub(super) fn fork(&self, trunk: &Stream) -> Result<()> {
        self.forked.record(trunk)?;
        self.stream.wait_for(&self.forked)
    }

    /// Makes what is launched on `trunk` from now on run after all that has been launched on this branch.
    pub(super) fn join(&self, trunk: &Stream) -> Result<()> {
        self.joined.record(&self.stream)?;
        trunk.wait_for(&self.joined)
    }
}

fn out_of_memory(bytes: usize, what: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| match e {
        DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => Error::OutOfMemory { bytes, what },
        e => failed(what)(e),
    }
}

/// Device memory, allocated once and freed on drop.
pub(super) struct DeviceBuf {
    at: u64,
    bytes: usize,
    device: Arc<Device>,
}

impl DeviceBuf {
    /// Memory of unknown contents.
    pub(super) fn new(device: &Arc<Device>, bytes: usize, what: &'static str) -> Result<DeviceBuf> {
        device.bind()?;
        // SAFETY: the context is current.
        let at = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(out_of_memory(bytes, what))?;
        Ok(DeviceBuf { at, bytes, device: device.clone() })
    }

    /// Memory set to zero before this returns.
    pub(super) fn zeroed(device: &Arc<Device>, bytes: usize, what: &'static str) -> Result<DeviceBuf> {
        DeviceBuf::filled(device, bytes, 0, what)
    }

    /// Memory whose every byte is set before this returns.
    pub(super) fn filled(
        device: &Arc<Device>,
        bytes: usize,
        byte: u8,
        what: &'static str,
    ) -> Result<DeviceBuf> {
        let buffer = DeviceBuf::new(device, bytes, what)?;
        // This has a stream of its own, because waiting for the whole device would spoil a capture by another thread.
        let stream = Stream::new(device)?;
        // SAFETY: the memory has just been allocated.
        unsafe { stream.set(buffer.at, byte, bytes)? };
        stream.synchronize()?;
        Ok(buffer)
    }

    /// The address on the device.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuf {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; the driver waits for work that uses it.
        let _ = self.device.bind().map(|()| unsafe { result::free_sync(self.at) });
    }
}

/// Device memory from the driver's pool: allocated and freed in stream order, without waiting for the device.
pub(super) struct PoolBuf {
    at: u64,
    owner: Arc<Stream>,
}

impl PoolBuf {
    /// Memory that work on `stream` may use from now on. Dropping it frees it behind the work that `owner` has then.
    pub(super) fn new(
        stream: &Stream,
        owner: &Arc<Stream>,
        bytes: usize,
        what: &'static str,
    ) -> Result<PoolBuf> {
        stream.device.bind()?;
        // SAFETY: the stream lives.
        let at =
            unsafe { result::malloc_async(stream.raw, bytes.max(1)) }.map_err(out_of_memory(bytes, what))?;
        Ok(PoolBuf { at, owner: owner.clone() })
    }

    /// The address on the device.
    pub(super) fn at(&self) -> u64 {
        self.at
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        let stream = &self.owner;
        // SAFETY: allocated by `new`; all work that uses it is ahead of this in the stream.
        let _ = stream.device.bind().map(|()| unsafe { result::free_async(self.at, stream.raw) });
    }
}

/// Page-locked host memory, which the GPU can copy from and to while the CPU goes on.
pub(super) struct PinnedBuf {
    at: NonNull<u8>,
    bytes: usize,
    device: Arc<Device>,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for PinnedBuf {}
// SAFETY: shared references only read.
unsafe impl Sync for PinnedBuf {}

impl PinnedBuf {
    /// Zeroed memory.
    pub(super) fn new(device: &Arc<Device>, bytes: usize) -> Result<PinnedBuf> {
        const WHAT: &str = "pinned host memory";
        device.bind()?;
        // SAFETY: the context is current.
        let at = unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) };
        let at = at.map_err(out_of_memory(bytes, WHAT))?.cast::<u8>();
        let at = NonNull::new(at).ok_or(Error::OutOfMemory { bytes, what: WHAT })?;
        // SAFETY: just allocated, of that size.
        unsafe { at.write_bytes(0, bytes) };
        Ok(PinnedBuf { at, bytes, device: device.clone() })
    }

    /// Its address, which is the same on the device.
    pub(super) fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// The first word, which the device may write at any time.
    pub(super) fn word(&self) -> &AtomicU32 {
        // SAFETY: initialized by `new`, aligned to pages and longer; all accesses are by this function or the device.
        unsafe { AtomicU32::from_ptr(self.at.as_ptr().cast()) }
    }

    /// Bytes 8 to 16, which the device may read at any time. The memory has that many.
    pub(super) fn second_double_word(&self) -> &AtomicU64 {
        assert!(self.bytes >= 16, "16 bytes");
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.at.as_ptr().add(8).cast()) }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: initialized by `new`, of that size.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl Drop for PinnedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`. Its owners wait for copies from and to it before they drop it: `Report`, `Stage` and
        // `Loading` hold it together with an event that follows the copy.
        let _ = self.device.bind().map(|()| unsafe { result::free_host(self.at.as_ptr().cast()) });
    }
}
