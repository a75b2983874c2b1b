//! Sums over the ranks of a model, and columns of all ranks.
//!
//! Where GPUs can reach each other's memory, kernels of our own sum through it (`csrc/peers.cuh`); NCCL does where they
//! cannot, and for messages that it is faster with.

mod arena;
mod bands;
mod nccl;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use super::{
    BACKEND, CudaBackend, CudaMat,
    device::{Device, DeviceBuf, Event, Stream, launched},
    ffi::{self, PeerArgs, SinkArgs},
    graph, norm, unsupported,
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

/// How long ranks wait for each other when they try each other's memory.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of memory in which NCCL finds 16-bit elements.
const SCRATCH: usize = 32 << 20;
/// Columns of the matrices that are summed at the start.
const COLS: usize = 4096;
/// Bytes of such a matrix of f32.
const TRIAL: usize = bands::LARGEST * 2;
/// Sums of one timed graph, and how often it is replayed.
const TIMED: usize = 8;
const REPLAYS: usize = 3;

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

    /// Bytes of an element on its way: see `lorax_reduce`.
    fn element(&self) -> usize {
        if self.cols.is_multiple_of(8) { 2 } else { 4 }
    }

    fn bytes(&self) -> usize {
        self.rows * self.cols * self.element()
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
    /// Where the kernels run that wait for other ranks; none with one rank.
    stream: Option<Arc<Stream>>,
    /// The rank that was waited for in vain.
    gave_up: OnceLock<(usize, PeerFault)>,
}

impl Comm {
    /// Of a group of one rank.
    pub(super) fn alone(dtype: DType) -> Comm {
        let bands = Bands::only(Way::OneShot);
        let group = Arc::new(Group::alone());
        Comm {
            group,
            arena: None,
            library: None,
            no_library: None,
            bands,
            dtype,
            stream: None,
            gave_up: OnceLock::new(),
        }
    }

    /// Finds the ways to the other ranks. Every rank calls this at the same time.
    pub(super) fn join(
        group: Arc<Group>,
        transport: Transport,
        (device, stream): (&Arc<Device>, &Arc<Stream>),
        dtype: DType,
    ) -> Result<Comm> {
        let mut comm = Comm::alone(dtype);
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
        let message = Message { at: 0, rows, cols };
        let arena = self.arena.as_ref()?;
        let fits = message.bytes() <= arena.most_bytes();
        arena.wait_as_the_group();
        (fits && self.bands.way(message.bytes()) == Way::OneShot).then(|| arena.args())
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
        self.sum_by(self.bands.way(message.bytes()), on, message, to)
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
        let rows = arena.most_bytes() / (message.cols * message.element());
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
        let (op, elem) = ("all_reduce", ffi::elem(self.dtype));
        let (rows, mut launches) = (SCRATCH / (2 * message.cols), 0);
        if rows == 0 {
            return Err(unsupported(format!("a sum of {} columns", message.cols)));
        }
        for (_, part) in message.parts(rows) {
            let (scratch, count) = (library.scratch.at(), part.rows * part.cols);
            // SAFETY: the part has so many elements, and the scratch memory has room for them.
            unsafe {
                launched(op, ffi::lorax_convert(elem, 0, part.at, scratch, count, on.raw()))?;
                library.nccl.all_reduce(scratch, count, self.dtype, on)?;
                launched(op, ffi::lorax_convert(elem, 1, scratch, part.at, count, on.raw()))?;
            }
            launches += 3;
        }
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

// ---- at the start ----

/// What rank r adds at an element: a small integer, so that sums are exact.
fn trial(rank: usize, element: usize) -> f32 {
    (rank as f32 + 1.0) * (element % 7) as f32 - 3.0
}

impl Comm {
    /// Whether sums through the ranks' memory are right: writes to memory of other GPUs can get lost where the machine's
    /// settings do not allow for them.
    fn probe(&self, device: &Arc<Device>, on: &Stream) -> Result<bool> {
        let Some(arena) = &self.arena else { return Ok(false) };
        let (rows, ranks) = (16, self.group.ranks());
        let expected: Vec<f32> =
            (0..rows * COLS).map(|i| (0..ranks).map(|rank| trial(rank, i)).sum()).collect();
        let own: Vec<u8> = (0..rows * COLS).flat_map(|i| trial(self.group.rank(), i).to_le_bytes()).collect();
        let x = DeviceBuf::new(device, own.len(), "a trial")?;
        let message = Message { at: x.at(), rows, cols: COLS };
        let mut sums = vec![0; own.len()];
        // Nobody allocates any more, which the driver may delay while kernels of this process wait for others.
        self.group.barrier(self.group.patience())?;
        arena.wait_within(PROBE_PATIENCE);
        // Both halves of the arenas, and each once more, when it was emptied.
        for shots in [1, 1, 2, 2] {
            // SAFETY: the buffer has as many bytes; both copies are waited for.
            unsafe { on.copy_in(x.at(), &own)? };
            let to = SinkArgs::default();
            self.sum_in(arena, on, (message, shots), &to)?;
            // SAFETY: as above.
            unsafe { on.copy_out(&mut sums, x.at())? };
            on.synchronize()?;
            let sums = super::convert::to_f32(DType::F32, &sums);
            if arena.lost().is_some() || sums != expected {
                return Ok(false);
            }
        }
        arena.wait_as_the_group();
        Ok(true)
    }

    /// The way of every size: the only one there is, or what rank 0 finds fastest.
    fn choose(&self, device: &Arc<Device>, on: &Stream) -> Result<Bands> {
        let ways = match (&self.arena, &self.library) {
            (None, None) => {
                let reason = self.no_library.as_deref().unwrap_or_default();
                let missing = format!(
                    "the GPUs of the ranks cannot reach each other's memory, and without that NCCL is needed: {reason}"
                );
                return Err(Error::Unavailable { backend: BACKEND, missing });
            }
            (None, Some(_)) => return Ok(Bands::only(Way::Nccl)),
            (Some(_), _) if self.group.ranks() == 2 => return Ok(Bands::only(Way::OneShot)),
            (Some(_), None) => vec![Way::OneShot, Way::TwoShots],
            (Some(_), Some(_)) => vec![Way::OneShot, Way::TwoShots, Way::Nccl],
        };
        let x = DeviceBuf::zeroed(device, TRIAL, "a trial")?;
        let measured = Bands::measure(&ways, |way, bytes| self.seconds(way, bytes, x.at(), on))?;
        let said = self.group.exchange(&measured.bytes())?;
        Bands::of(&said[0])
    }

    /// Seconds of one sum of so many bytes in a captured step.
    fn seconds(&self, way: Way, bytes: usize, x: u64, on: &Stream) -> Result<f64> {
        let message = Message { at: x, rows: bytes / (2 * COLS), cols: COLS };
        let sum = || self.sum_by(way, on, message, &SinkArgs::default()).map(|_| ());
        // Loads the kernels, which a capture must not.
        sum()?;
        let (from, to) = (Event::timed()?, Event::timed()?);
        to.record(on)?;
        self.wait_for("time sums", &to)?;
        let graph = graph::capture(on, || (0..TIMED).try_for_each(|_| sum()))?;
        graph::launch(on, &graph)?;
        from.record(on)?;
        (0..REPLAYS).try_for_each(|_| graph::launch(on, &graph))?;
        to.record(on)?;
        self.wait_for("time sums", &to)?;
        Ok(to.seconds_since(&from)? / (TIMED * REPLAYS) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_knows_the_columns_of_all() {
        for (ranks, share, last) in
            [(1, 0, 7), (2, 5, 5), (2, 5, 1), (2, 3, 9), (4, 10, 7), (8, 1, 1), (8, 16_032, 16_040)]
        {
            let all = (ranks - 1) * share + last;
            for rank in 0..ranks {
                let own = if rank + 1 == ranks { last } else { share };
                let got = Shares::new(rank, ranks, own, all).unwrap();
                assert_eq!((got.share, got.last), (share, last), "rank {rank} of {ranks}");
            }
        }
        for (rank, ranks, own, all) in
            [(0, 1, 7, 8), (0, 2, 5, 5), (1, 2, 5, 5), (1, 3, 5, 10), (2, 3, 5, 14), (0, 2, 0, 4)]
        {
            assert!(Shares::new(rank, ranks, own, all).is_err(), "{own} of {all} on rank {rank} of {ranks}");
        }
    }

    #[test]
    fn a_message_goes_in_parts_of_whole_rows() {
        let message = Message { at: 1000, rows: 10, cols: 8 };
        let parts: Vec<_> = message.parts(4).map(|(first, part)| (first, part.at, part.rows)).collect();
        assert_eq!(parts, [(0, 1000, 4), (4, 1128, 4), (8, 1256, 2)]);
        assert_eq!((message.bytes(), Message { cols: 9, ..message }.bytes()), (160, 360));
        assert_eq!(Message { rows: 0, ..message }.parts(4).count(), 0);
    }
}
