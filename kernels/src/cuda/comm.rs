//! Sums over the ranks of a model, and columns of all ranks.
//!
//! Where GPUs can reach each other's memory, kernels of our own sum through it (`csrc/peers.cuh`); NCCL does where they
//! cannot, and for messages that it is faster with.

mod arena;
mod bands;
mod nccl;
mod start;

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use super::{
    CudaBackend, CudaMat,
    device::{Device, DeviceBuf, Event, Stream, launched},
    ffi::{self, PeerArgs, SinkArgs},
    norm, unsupported,
};
use crate::{DType, Error, Group, Matrix, PeerFault, Result};
use arena::{Arena, agree};
use bands::{Bands, Way};
use nccl::Nccl;

/// How matrices travel between the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// The fastest way that the GPUs have, which is timed at the start.
    #[default]
    Fastest,
    /// NCCL alone.
    Nccl,
}

/// Bytes of memory in which NCCL finds 16-bit elements.
const SCRATCH: usize = 32 << 20;

/// A matrix of f32 that is summed.
#[derive(Clone, Copy)]
struct Message {
    at: u64,
    rows: usize,
    cols: usize,
}

impl Message {
    fn of(x: &CudaMat) -> Message {
        Message { at: x.at(), rows: x.rows(), cols: x.cols() }
    }

    /// Bytes of an element on its way through the ranks' memory: see `lorax_reduce`.
    fn element(&self, model: DType) -> usize {
        if model == DType::Bf16 && self.cols.is_multiple_of(8) { 2 } else { 4 }
    }

    fn bytes(&self, model: DType) -> usize {
        self.rows * self.cols * self.element(model)
    }

    /// Parts of so many rows, and the first row of each.
    fn parts(self, rows: usize) -> impl Iterator<Item = (usize, Message)> {
        (0..self.rows).step_by(rows.max(1)).map(move |first| {
            let at = self.at + (first * self.cols * 4) as u64;
            (first, Message { at, rows: rows.min(self.rows - first), ..self })
        })
    }
}

/// Columns of ranks side by side.
#[derive(Clone, Copy)]
struct Shares {
    /// Of all ranks but the last.
    share: usize,
    last: usize,
}

impl Shares {
    /// The columns of all ranks, of which a rank has `own` of `all`.
    fn new(rank: usize, ranks: usize, own: usize, all: usize) -> Result<Shares> {
        let is_last = rank + 1 == ranks;
        let share = if is_last { all.saturating_sub(own) / (ranks - 1).max(1) } else { own };
        let last = all.saturating_sub((ranks - 1) * share);
        let (is_whole, has_some) = (!is_last || last == own, last > 0 && (share > 0 || ranks == 1));
        if is_whole && has_some {
            return Ok(Shares { share, last });
        }
        let (op, what) = ("gather_columns", "columns of y");
        Err(Error::Shape { op, what, got: all, expected: ranks * own })
    }

    fn widest(self) -> usize {
        self.share.max(self.last)
    }
}

/// NCCL and its scratch memory.
struct Library {
    nccl: Nccl,
    scratch: DeviceBuf,
}

/// The ways between this rank and the others.
pub(super) struct Comm {
    group: Arc<Group>,
    arena: Option<Arena>,
    library: Option<Library>,
    /// Why there is no library, where one was looked for.
    no_library: Option<String>,
    bands: Bands,
    dtype: DType,
    /// Whether the GPUs of all ranks run the kernels for Hopper.
    hopper: bool,
    /// Where the kernels run that wait for other ranks; none with one rank.
    stream: Option<Arc<Stream>>,
    /// The rank that was waited for in vain.
    gave_up: OnceLock<(usize, PeerFault)>,
}

impl Comm {
    /// Of a group of one rank.
    pub(super) fn alone(dtype: DType, hopper: bool) -> Comm {
        let bands = Bands::only(Way::OneShot);
        let group = Arc::new(Group::alone());
        Comm {
            group,
            arena: None,
            library: None,
            no_library: None,
            bands,
            dtype,
            hopper,
            stream: None,
            gave_up: OnceLock::new(),
        }
    }

    /// Finds the ways to the other ranks. Every rank calls this at the same time.
    pub(super) fn join(
        group: Arc<Group>,
        transport: Transport,
        (device, stream): (&Arc<Device>, &Arc<Stream>),
        (dtype, hopper): (DType, bool),
    ) -> Result<Comm> {
        // A rank that sums by another kernel than the others would wait for what they do not send.
        let mut comm = Comm::alone(dtype, agree(&group, hopper)?);
        (comm.group, comm.stream) = (group.clone(), Some(stream.clone()));
        if transport == Transport::Fastest {
            if group.ranks() == 1 {
                return Ok(comm);
            }
            comm.arena = Arena::map(&group, device, stream)?;
            if comm.arena.is_some() && !agree(&group, comm.probe(device, stream)?)? {
                comm.arena = None;
            }
        }
        // Two ranks could send no fewer bytes than one shot does.
        if comm.arena.is_none() || group.ranks() > 2 {
            match Nccl::join(&group, device)? {
                Ok(nccl) => {
                    let scratch = DeviceBuf::new(device, SCRATCH, "memory for NCCL")?;
                    comm.library = Some(Library { nccl, scratch });
                }
                Err(reason) => comm.no_library = Some(reason),
            }
        }
        comm.bands = comm.choose(device, stream)?;
        Ok(comm)
    }

    /// The ways, for a log.
    pub(super) fn describe(&self) -> String {
        let nccl = self.library.as_ref().map(|library| format!("NCCL {}", library.nccl.version()));
        match (&self.arena, nccl) {
            (None, None) => "one rank".into(),
            (None, Some(nccl)) => nccl,
            (Some(_), nccl) => {
                let nccl = nccl.or(self.no_library.clone().map(|reason| format!("no NCCL ({reason})")));
                let also = nccl.map_or(String::new(), |nccl| format!(", {nccl}"));
                format!("memory that the GPUs map from each other{also}; {}", self.bands)
            }
        }
    }

    pub(super) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Whether sums over the ranks are those of one.
    fn is_alone(&self) -> bool {
        self.arena.is_none() && self.library.is_none()
    }

    /// `x = Σ x`
    pub(super) fn all_reduce(&self, be: &CudaBackend, x: &mut CudaMat) -> Result<()> {
        x.expect_wide("all_reduce")?;
        if self.is_alone() {
            return Ok(());
        }
        self.launch(be, x.rows(), || self.sum(&be.stream, Message::of(x), &SinkArgs::default()))
    }

    /// Adds the sums of products over the ranks to a stream, and norms it.
    pub(super) fn add(&self, be: &CudaBackend, products: &CudaMat, to: norm::Added<'_>) -> Result<()> {
        if self.is_alone() {
            return norm::add(be, products, to);
        }
        let sink = norm::sink(products, to)?;
        self.launch(be, products.rows(), || self.sum(&be.stream, Message::of(products), &sink))
    }

    /// Arguments of a kernel that sums so many rows itself, if that is the fastest way. `None` with one rank.
    pub(super) fn fused(&self, rows: usize, cols: usize) -> Option<PeerArgs> {
        let bytes = Message { at: 0, rows, cols }.bytes(self.dtype);
        let arena = self.arena.as_ref().filter(|_| self.dtype == DType::Bf16)?;
        arena.wait_as_the_group();
        let fits = bytes <= arena.most_bytes();
        (fits && self.bands.way(bytes) == Way::OneShot).then(|| arena.args())
    }

    /// Whether all ranks run the kernels for Hopper.
    pub(super) fn hopper(&self) -> bool {
        self.hopper
    }

    /// Whether products can go to the stream by a kernel that takes these rows as a whole.
    pub(super) fn can_fuse(&self, rows: usize, cols: usize) -> bool {
        self.is_alone() || self.fused(rows, cols).is_some()
    }

    /// `y[i] = x₀[i] ‖ x₁[i] ‖ …`
    pub(super) fn gather_columns(&self, be: &CudaBackend, x: &CudaMat, y: &mut CudaMat) -> Result<()> {
        let op = "gather_columns";
        x.expect_wide(op)?;
        y.expect_wide(op)?;
        y.resize(op, x.rows())?;
        let (rank, ranks) = (self.group.rank(), self.group.ranks());
        let shares = Shares::new(rank, ranks, x.cols(), y.cols())?;
        let (from, to) = (Message::of(x), Message::of(y));
        self.launch(be, x.rows(), || self.gather(&be.stream, from, to, shares))
    }

    /// Waits for work that may wait for other ranks.
    pub(super) fn wait_for(&self, op: &'static str, event: &Event) -> Result<()> {
        if self.is_alone() {
            return event.synchronize();
        }
        let since = Instant::now();
        while !event.reached()? {
            if let Some((rank, fault)) = self.missing(since) {
                self.give_up(rank, fault);
                return Err(Error::Peer { op, rank, fault });
            }
            std::hint::spin_loop();
        }
        self.check(op)
    }

    /// The rank for which nobody needs to wait any more.
    fn missing(&self, since: Instant) -> Option<(usize, PeerFault)> {
        if let Some(rank) = self.group.lost() {
            return Some((rank, PeerFault::Ended));
        }
        // Our kernels give up by themselves and know for whom they have waited. NCCL's do neither.
        let (patience, another) = (self.group.patience(), usize::from(self.group.rank() == 0));
        let is_late = self.library.is_some() && since.elapsed() > 2 * patience;
        is_late.then_some((another, PeerFault::Late(2 * patience)))
    }

    /// Whether another rank is lost, so that nothing needs to be waited for any more.
    pub(super) fn is_broken(&self) -> bool {
        self.group.lost().is_some() || self.arena.as_ref().is_some_and(|arena| arena.lost().is_some())
    }

    /// Fails if work that is done has waited for another rank in vain.
    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        self.arena.as_ref().map_or(Ok(()), |arena| arena.check(op))
    }

    /// Ends all waits on the device.
    fn give_up(&self, rank: usize, fault: PeerFault) {
        let _ = self.gave_up.set((rank, fault));
        if let Some(arena) = &self.arena {
            arena.give_up(rank);
        }
        if let Some(library) = &self.library {
            library.nccl.abort();
        }
    }

    /// Launches unless a captured step is replayed, and counts what `run` says that it has launched.
    fn launch(&self, be: &CudaBackend, rows: usize, run: impl FnOnce() -> Result<usize>) -> Result<()> {
        if let Some(&(rank, fault)) = self.gave_up.get() {
            // A captured step has the library's communicator, which is freed.
            return Err(Error::Peer { op: "launch", rank, fault });
        }
        // A replayed step, too, waits as long as the group does now.
        self.arena.iter().for_each(Arena::wait_as_the_group);
        if rows == 0 || !be.is_launching() {
            return Ok(());
        }
        be.device.bind()?;
        let launches = run()?;
        (0..launches).for_each(|_| be.count_launch());
        Ok(())
    }

    /// Sums a message the way of its size; returns the launches.
    fn sum(&self, on: &Stream, message: Message, to: &SinkArgs) -> Result<usize> {
        self.sum_by(self.bands.way(message.bytes(self.dtype)), on, message, to)
    }

    fn sum_by(&self, way: Way, on: &Stream, message: Message, to: &SinkArgs) -> Result<usize> {
        match (way, &self.arena, &self.library) {
            (Way::OneShot | Way::TwoShots, Some(arena), _) => {
                let shots = if way == Way::OneShot { 1 } else { 2 };
                self.sum_in(arena, on, (message, shots), to)
            }
            (_, _, Some(library)) => self.sum_with(library, on, message, to),
            _ => Err(unsupported(format!("a sum over {} ranks", self.group.ranks()))),
        }
    }

    /// Through the ranks' memory.
    fn sum_in(
        &self,
        arena: &Arena,
        on: &Stream,
        (message, shots): (Message, i32),
        to: &SinkArgs,
    ) -> Result<usize> {
        let rows = arena.most_bytes() / (message.cols * message.element(self.dtype));
        if rows == 0 {
            return Err(unsupported(format!("a sum of {} columns", message.cols)));
        }
        let (args, elem, mut launches) = (arena.args(), ffi::elem(self.dtype), 0);
        for (first, part) in message.parts(rows) {
            let to = to.behind(first, part.cols, self.dtype);
            let (rows, cols) = (part.rows as i32, part.cols as i32);
            // SAFETY: the matrices have so many rows and columns, and the message fits into a box.
            launched("all_reduce", unsafe {
                ffi::lorax_reduce(&raw const args, &raw const to, elem, part.at, rows, cols, shots, on.raw())
            })?;
            launches += 1;
        }
        Ok(launches)
    }

    /// With NCCL.
    fn sum_with(&self, library: &Library, on: &Stream, message: Message, to: &SinkArgs) -> Result<usize> {
        let elem = ffi::elem(self.dtype);
        let mut launches = match self.dtype {
            DType::Bf16 => library.sum_in_half(on, message)?,
            _ => {
                let count = message.rows * message.cols;
                // SAFETY: the matrix has so many elements of f32.
                unsafe { library.nccl.all_reduce(message.at, count, DType::F32, on)? };
                1
            }
        };
        if to.stream != 0 {
            let (rows, cols) = (message.rows as i32, message.cols as i32);
            // SAFETY: the matrices have so many rows and columns.
            launched("add", unsafe {
                ffi::lorax_add_norm(elem, message.at, &raw const *to, rows, cols, on.raw())
            })?;
            launches += 1;
        }
        Ok(launches)
    }

    /// Puts the columns of all ranks side by side; returns the launches.
    fn gather(&self, on: &Stream, x: Message, y: Message, shares: Shares) -> Result<usize> {
        let op = "gather_columns";
        let bytes_of_row = 4 * shares.widest();
        let room = match (&self.arena, &self.library) {
            (Some(arena), _) => arena.most_bytes() / bytes_of_row,
            (None, Some(_)) => SCRATCH / (bytes_of_row * (self.group.ranks() + 1)),
            (None, None) => x.rows,
        };
        if room == 0 {
            return Err(unsupported(format!("a share of {} columns", shares.widest())));
        }
        let mut launches = 0;
        for ((_, x), (_, y)) in x.parts(room).zip(y.parts(room)) {
            let (rows, Shares { share, last }) = (x.rows as i32, shares);
            let (share, last) = (share as i32, last as i32);
            // SAFETY: the matrices have so many rows and columns; the message fits into a box or the scratch memory.
            launches += unsafe {
                match (&self.arena, &self.library) {
                    (Some(arena), _) => {
                        let args = arena.args();
                        let (args, on) = (&raw const args, on.raw());
                        launched(op, ffi::lorax_gather_columns(args, x.at, y.at, rows, share, last, on))?;
                        1
                    }
                    (None, Some(library)) => library.gather(on, (x, y), shares, self.group.ranks())?,
                    (None, None) => {
                        launched(op, ffi::lorax_join_columns(x.at, y.at, rows, share, last, 1, on.raw()))?;
                        1
                    }
                }
            };
        }
        Ok(launches)
    }
}

impl Drop for Comm {
    /// Waits for kernels that use what is freed now, but no longer than for other ranks.
    fn drop(&mut self) {
        let Some(stream) = self.stream.take().filter(|_| !self.is_alone()) else { return };
        if self.gave_up.get().is_none() {
            let _ = stream.mark().and_then(|event| self.wait_for("end", &event));
        }
    }
}

impl Library {
    /// Sums a message whose elements travel as bf16.
    fn sum_in_half(&self, on: &Stream, message: Message) -> Result<usize> {
        let (op, dtype) = ("all_reduce", DType::Bf16);
        let (elem, rows, mut launches) = (ffi::elem(dtype), SCRATCH / (2 * message.cols), 0);
        if rows == 0 {
            return Err(unsupported(format!("a sum of {} columns", message.cols)));
        }
        for (_, part) in message.parts(rows) {
            let (scratch, count) = (self.scratch.at(), part.rows * part.cols);
            // SAFETY: the part has so many elements, and the scratch memory has room for them.
            unsafe {
                launched(op, ffi::lorax_convert(elem, 0, part.at, scratch, count, on.raw()))?;
                self.nccl.all_reduce(scratch, count, dtype, on)?;
                launched(op, ffi::lorax_convert(elem, 1, scratch, part.at, count, on.raw()))?;
            }
            launches += 3;
        }
        Ok(launches)
    }

    /// One part of [`Comm::gather`].
    ///
    /// # Safety
    /// The scratch memory has room for the widest share once more than there are ranks.
    unsafe fn gather(
        &self,
        on: &Stream,
        (x, y): (Message, Message),
        shares: Shares,
        ranks: usize,
    ) -> Result<usize> {
        let (op, width) = ("gather_columns", shares.widest());
        let (rows, cols, count) = (x.rows as i32, x.cols as i32, x.rows * width);
        let (padded, all) = (self.scratch.at(), self.scratch.at() + (4 * count) as u64);
        let (share, last, ranks) = (shares.share as i32, shares.last as i32, ranks as i32);
        // SAFETY: the caller's promise.
        unsafe {
            launched(op, ffi::lorax_pad_columns(x.at, padded, rows, cols, width as i32, on.raw()))?;
            self.nccl.all_gather(padded, all, count, on)?;
            launched(op, ffi::lorax_join_columns(all, y.at, rows, share, last, ranks, on.raw()))?;
        }
        Ok(3)
    }
}

#[cfg(test)]
mod tests;
