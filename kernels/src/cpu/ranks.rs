//! The collectives of CPU ranks, over memory that they share.
//!
//! Every rank has a buffer of two chunks, which all ranks map. For each chunk of a matrix, a rank writes its elements
//! into its buffer, publishes how many chunks it has written, waits until all others have written as many, and reads all
//! buffers in the order of the ranks: so all compute the same sums, bit for bit. A chunk is overwritten by the next but
//! one, and by then all ranks have read it: they have written the one between.

use std::{
    ops::Range,
    os::fd::AsFd,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::*, fence},
    },
    thread,
    time::Instant,
};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
    thread::futex,
};

use crate::{Error, Group, PeerFault, Result};

/// The number of elements of a chunk, which stays in a core's cache.
const CHUNK: usize = 1 << 15;
/// The number of times that a waiting rank looks before it yields its core.
const SPINS: u32 = 200;
/// The number of times that it yields before it sleeps. There may be fewer cores than ranks.
const YIELDS: u32 = 20;
/// How long it sleeps before it looks whether the other rank has ended.
const SLEEP: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// The memory of one rank, which the others read.
#[repr(C, align(128))]
struct Buffer {
    /// The number of chunks that the rank has written, which wraps around.
    written: AtomicU32,
    /// The number of ranks that sleep until this rank has written a chunk.
    sleepers: AtomicU32,
    chunks: [Chunk; 2],
}

/// Elements of a matrix, and what all ranks must agree on.
#[repr(C, align(128))]
struct Chunk {
    /// Of what operation and how many rows and columns the chunk is.
    what: [u32; 3],
    elements: [f32; CHUNK],
}

/// A mapped [`Buffer`].
struct Mapped(NonNull<Buffer>);

// SAFETY: the buffer is shared memory, whose parts are read and written as the counters say.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(fd: impl AsFd) -> rustix::io::Result<Mapped> {
        let (size, access) = (size_of::<Buffer>(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping, wherever the system has room.
        let memory = unsafe { mmap(std::ptr::null_mut(), size, access, MapFlags::SHARED, fd, 0)? };
        NonNull::new(memory.cast()).map(Mapped).ok_or(rustix::io::Errno::NOMEM)
    }

    fn written(&self) -> &AtomicU32 {
        // SAFETY: the mapping is as large as a buffer, and lives as long as this.
        unsafe { &(*self.0.as_ptr()).written }
    }

    fn sleepers(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { &(*self.0.as_ptr()).sleepers }
    }

    /// The place of the chunk with a number.
    fn chunk(&self, number: u32) -> *mut Chunk {
        // SAFETY: as above; this makes no reference, because another process may write to the other chunk.
        unsafe { (&raw mut (*self.0.as_ptr()).chunks).cast::<Chunk>().add(number as usize % 2) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: from `mmap` with this size. Fails for no mapping that it made.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), size_of::<Buffer>()) };
    }
}

/// The ranks of a model on CPUs of one machine.
pub(super) struct Ranks {
    group: Arc<Group>,
    /// By rank, this one included.
    buffers: Vec<Mapped>,
    /// The number of chunks that all ranks have exchanged, which wraps around.
    chunks: u32,
}

impl Ranks {
    /// Shares memory with the other ranks.
    pub(super) fn new(group: Arc<Group>) -> Result<Ranks> {
        let failed = |error: rustix::io::Errno| Error::Group {
            rank: group.rank(),
            what: "cannot share memory with the other ranks",
            source: error.into(),
        };
        let own = memfd_create("rank", MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&own, size_of::<Buffer>() as u64).map_err(failed)?;
        let fds = group.exchange_fd(own.as_fd())?;
        let buffers = fds.iter().map(|fd| Mapped::new(fd.as_ref().unwrap_or(&own)).map_err(failed));
        Ok(Ranks { buffers: buffers.collect::<Result<_>>()?, group, chunks: 0 })
    }

    /// Replaces `x` by its sum over all ranks.
    pub(super) fn all_reduce(&mut self, x: &mut [f32]) -> Result<()> {
        let len = x.len() as u32;
        for part in x.chunks_mut(CHUNK) {
            self.exchange(
                "all_reduce",
                [1, len, part.len() as u32],
                part,
                |part, rank, elements| match rank {
                    0 => part.copy_from_slice(&elements[..part.len()]),
                    _ => part.iter_mut().zip(elements).for_each(|(sum, x)| *sum += x),
                },
            )?;
        }
        Ok(())
    }

    /// Copies the columns of all ranks' `x` into `y`, in rows of `cols` columns. All ranks but the last have as many.
    pub(super) fn gather_columns(
        &mut self,
        (x, own): (&[f32], usize),
        (y, cols): (&mut [f32], usize),
    ) -> Result<()> {
        let (op, rows) = ("gather_columns", y.len() / cols.max(1));
        let columns = self.columns(op, own, cols)?;
        let widest = columns.iter().map(ExactSizeIterator::len).max().unwrap_or(1);
        // A row of a vocabulary may be longer than a chunk.
        let (width, height) = (widest.min(CHUNK), (CHUNK / widest).max(1));
        for top in (0..rows).step_by(height) {
            let height = height.min(rows - top);
            for left in (0..widest).step_by(width) {
                let of = |rank: usize| left.min(columns[rank].len())..(left + width).min(columns[rank].len());
                let mine = of(self.group.rank());
                let pack = |elements: &mut [f32]| {
                    for (row, to) in elements.chunks_exact_mut(width).take(height).enumerate() {
                        to[..mine.len()].copy_from_slice(&x[(top + row) * own..][mine.clone()]);
                    }
                };
                let what = [2, y.len() as u32, (top * widest + left) as u32];
                self.exchange_with(op, what, pack, |rank, elements| {
                    let of = of(rank);
                    for (row, from) in elements.chunks_exact(width).take(height).enumerate() {
                        let to = (top + row) * cols + columns[rank].start + of.start;
                        y[to..to + of.len()].copy_from_slice(&from[..of.len()]);
                    }
                })?;
            }
        }
        Ok(())
    }

    /// The columns of every rank, of which this one has `own`: all ranks but the last have as many.
    fn columns(&self, op: &'static str, own: usize, cols: usize) -> Result<Vec<Range<usize>>> {
        let (rank, ranks) = (self.group.rank(), self.group.ranks());
        let last = rank + 1 == ranks;
        let most = if last { cols.saturating_sub(own) / (ranks - 1).max(1) } else { own };
        let first_of_last = most * (ranks - 1);
        let expected = if last { cols - first_of_last.min(cols) } else { most };
        if own != expected || first_of_last > cols {
            return Err(Error::Shape { op, what: "columns of a rank", got: own, expected });
        }
        let ends = (1..ranks).map(|rank| rank * most).chain([cols]);
        Ok(ends.enumerate().map(|(rank, end)| rank * most..end).collect())
    }

    /// Exchanges a chunk: `read` is called with the elements of each rank in their order.
    fn exchange<T: AsMut<[f32]> + ?Sized>(
        &mut self,
        op: &'static str,
        what: [u32; 3],
        own: &mut T,
        mut read: impl FnMut(&mut [f32], usize, &[f32]),
    ) -> Result<()> {
        let own = own.as_mut();
        let chunk = self.write(what, |elements| elements[..own.len()].copy_from_slice(own));
        self.read(op, what, chunk, |rank, elements| read(own, rank, elements))
    }

    /// As [`Self::exchange`], where `pack` writes the elements of this rank.
    fn exchange_with(
        &mut self,
        op: &'static str,
        what: [u32; 3],
        pack: impl FnOnce(&mut [f32]),
        read: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let chunk = self.write(what, pack);
        self.read(op, what, chunk, read)
    }

    /// Writes the next chunk of this rank, and returns its number.
    fn write(&mut self, what: [u32; 3], pack: impl FnOnce(&mut [f32])) -> u32 {
        let (number, own) = (self.chunks, &self.buffers[self.group.rank()]);
        self.chunks = number.wrapping_add(1);
        // SAFETY: all ranks have read what the chunk had before, because they have written the chunk between.
        let chunk = unsafe { &mut *own.chunk(number) };
        chunk.what = what;
        pack(&mut chunk.elements);
        own.written().store(self.chunks, Release);
        // Either a rank that goes to sleep sees the number, or this rank sees that it sleeps.
        fence(SeqCst);
        if own.sleepers().load(Relaxed) > 0 {
            // Fails for no address in a mapping.
            let _ = futex::wake(own.written(), futex::Flags::empty(), u32::MAX >> 1);
        }
        number
    }

    /// Waits for the chunk of every rank, and reads it.
    fn read(
        &self,
        op: &'static str,
        what: [u32; 3],
        number: u32,
        mut read: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let since = Instant::now();
        for (rank, buffer) in self.buffers.iter().enumerate() {
            self.wait(op, (rank, buffer), number.wrapping_add(1), since)?;
            // SAFETY: the rank has written the chunk, and does not write to it before this rank has written the next.
            let chunk = unsafe { &*buffer.chunk(number) };
            if chunk.what != what {
                return Err(Error::Peer { op, rank, fault: PeerFault::Differs });
            }
            read(rank, &chunk.elements);
        }
        Ok(())
    }

    /// Waits until a rank has written `count` chunks.
    fn wait(
        &self,
        op: &'static str,
        (rank, buffer): (usize, &Mapped),
        count: u32,
        since: Instant,
    ) -> Result<()> {
        let mut looks = 0;
        loop {
            let written = buffer.written().load(Acquire);
            if written.wrapping_sub(count) as i32 >= 0 {
                return Ok(());
            }
            looks += 1;
            if looks < SPINS {
                std::hint::spin_loop();
            } else if looks < SPINS + YIELDS {
                thread::yield_now();
            } else {
                self.group.check(op, rank, since)?;
                buffer.sleepers().fetch_add(1, SeqCst);
                // Returns at once if another chunk was written in between.
                let _ = futex::wait(buffer.written(), futex::Flags::empty(), written, Some(&SLEEP));
                buffer.sleepers().fetch_sub(1, Relaxed);
            }
        }
    }
}
