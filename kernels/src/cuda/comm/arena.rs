//! Memory that the ranks' GPUs map from each other; `peers.cuh` says how messages lie in it.

use std::{
    hash::{BuildHasher, RandomState},
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use cudarc::driver::sys::{self, CUipcMem_flags, CUipcMemHandle};

use crate::{
    Error, Group, PeerFault, Result,
    cuda::{
        device::{Device, DeviceBuf, PinnedBuf, Stream},
        ffi::{MAX_RANKS, PeerArgs},
    },
};

/// Bytes of an arena, which the boxes share: 32 MiB a message with two ranks, 4.5 MiB with eight.
const ARENA: usize = 64 << 20;
/// Boxes begin at multiples of so many bytes.
const ALIGN: usize = 256;
/// Bytes of a `Control` and of a `Host` in `peers.cuh`.
const CONTROL: usize = 16;
/// A byte of memory that has no message.
const EMPTY: u8 = 0xff;

/// What a rank tells the others of its arena.
struct Offer {
    /// Names the process: addresses are the same within one.
    process: u64,
    address: u64,
    /// `None` if the driver gives no handle for it.
    handle: Option<CUipcMemHandle>,
}

const OFFER: usize = 17 + size_of::<CUipcMemHandle>();

fn this_process() -> u64 {
    static NAME: OnceLock<u64> = OnceLock::new();
    *NAME.get_or_init(|| RandomState::new().hash_one(std::process::id()))
}

impl Offer {
    fn new(memory: &DeviceBuf) -> Offer {
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the memory is a whole allocation.
        let code = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, memory.at()) };
        let handle = code.result().is_ok().then_some(handle);
        Offer { process: this_process(), address: memory.at(), handle }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.process.to_le_bytes(), self.address.to_le_bytes()].concat();
        bytes.push(u8::from(self.handle.is_some()));
        let handle = self.handle.map_or([0; 64], |handle| handle.reserved);
        bytes.extend(handle.iter().map(|c| c.cast_unsigned()));
        bytes
    }

    fn of(bytes: &[u8]) -> Result<Offer> {
        let wrong = Error::Shape { op: "map arenas", what: "bytes", got: bytes.len(), expected: OFFER };
        let (Some((process, rest)), true) = (bytes.split_first_chunk::<8>(), bytes.len() == OFFER) else {
            return Err(wrong);
        };
        let Some((address, rest)) = rest.split_first_chunk::<8>() else { return Err(wrong) };
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        handle.reserved.iter_mut().zip(&rest[1..]).for_each(|(to, from)| *to = from.cast_signed());
        Ok(Offer {
            process: u64::from_le_bytes(*process),
            address: u64::from_le_bytes(*address),
            handle: (rest[0] == 1).then_some(handle),
        })
    }
}

/// Another rank's arena, as this process maps it.
struct Mapped {
    at: u64,
    device: Arc<Device>,
    /// False for an arena of this very process.
    is_foreign: bool,
}

impl Mapped {
    /// `None` if this GPU cannot reach the memory.
    fn open(device: &Arc<Device>, offer: &Offer) -> Option<Mapped> {
        if offer.process == this_process() {
            return Some(Mapped { at: offer.address, device: device.clone(), is_foreign: false });
        }
        let (mut at, flags) = (0, CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32);
        // SAFETY: the handle came from the other process, which keeps the memory as long as the group lives.
        let code = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut at, offer.handle?, flags) };
        code.result().ok()?;
        Some(Mapped { at, device: device.clone(), is_foreign: true })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.is_foreign {
            // SAFETY: opened by `open`; `Arena` has waited for the work that uses it.
            let _ = self.device.bind().map(|()| unsafe { sys::cuIpcCloseMemHandle(self.at) });
        }
    }
}

/// This rank's arena, and those of the others.
pub(super) struct Arena {
    group: Arc<Group>,
    args: PeerArgs,
    /// Whose kernels use the arenas.
    stream: Arc<Stream>,
    /// A `Host` of `peers.cuh`: the rank that was waited for in vain, and for how long kernels wait.
    host: PinnedBuf,
    _control: DeviceBuf,
    _others: Vec<Mapped>,
    _own: DeviceBuf,
}

impl Arena {
    /// Maps the arenas of all ranks on all of them. `None`: some rank cannot reach another one's memory.
    pub(super) fn map(
        group: &Arc<Group>,
        device: &Arc<Device>,
        stream: &Arc<Stream>,
    ) -> Result<Option<Arena>> {
        let (rank, ranks) = (group.rank(), group.ranks());
        if ranks > MAX_RANKS {
            return Ok(None);
        }
        device.bind()?;
        let what = "memory for other ranks";
        let own = DeviceBuf::filled(device, ARENA, EMPTY, what)?;
        let offers = group.exchange(&Offer::new(&own).bytes())?;
        let mut others = Vec::new();
        let mut arenas = [0; MAX_RANKS];
        arenas[rank] = own.at();
        for (peer, offer) in offers.iter().enumerate().filter(|&(peer, _)| peer != rank) {
            if let Some(mapped) = Mapped::open(device, &Offer::of(offer)?) {
                arenas[peer] = mapped.at;
                others.push(mapped);
            }
        }
        if !agree(group, others.len() + 1 == ranks)? {
            return Ok(None);
        }
        let control = DeviceBuf::zeroed(device, CONTROL, what)?;
        let host = PinnedBuf::new(device, CONTROL)?;
        let args = PeerArgs {
            arenas,
            control: control.at(),
            host: host.address(),
            box_bytes: (ARENA / (2 * (ranks - 1).max(1)) / ALIGN * ALIGN) as u64,
            rank: rank as i32,
            ranks: ranks as i32,
        };
        let (group, stream) = (group.clone(), stream.clone());
        let arena = Arena { group, stream, args, host, _control: control, _others: others, _own: own };
        arena.wait_as_the_group();
        Ok(Some(arena))
    }

    /// Arguments of kernels that use the arenas.
    pub(super) fn args(&self) -> PeerArgs {
        self.args
    }

    /// From now on kernels wait for other ranks no longer than `patience`, those of graphs that were captured before as
    /// well.
    pub(super) fn wait_within(&self, patience: Duration) {
        self.host.second_double_word().store(nanoseconds(patience), Ordering::Relaxed);
    }

    /// From now on kernels wait for other ranks as long as the group does now.
    pub(super) fn wait_as_the_group(&self) {
        self.wait_within(self.group.patience());
    }

    /// Bytes of the largest message.
    pub(super) fn most_bytes(&self) -> usize {
        self.args.box_bytes as usize
    }

    /// The rank that a kernel has waited for in vain.
    pub(super) fn lost(&self) -> Option<usize> {
        (self.host.word().load(Ordering::Acquire) as usize).checked_sub(1)
    }

    /// Has kernels wait no longer, because a rank is lost.
    pub(super) fn give_up(&self, rank: usize) {
        self.host.word().store(rank as u32 + 1, Ordering::Release);
    }

    /// Fails if a kernel has waited for a rank in vain.
    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        let Some(rank) = self.lost() else { return Ok(()) };
        let fault = match self.group.lost() {
            Some(ended) if ended == rank => PeerFault::Ended,
            _ => PeerFault::Late(self.group.patience()),
        };
        Err(Error::Peer { op, rank, fault })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Kernels may use the memory still. A failure is the device's end.
        let _ = self.stream.synchronize();
    }
}

/// Whether something holds on every rank.
pub(super) fn agree(group: &Group, holds: bool) -> Result<bool> {
    let all = group.exchange(&[u8::from(holds)])?;
    Ok(all.iter().all(|bytes| bytes == &[1]))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_read_as_it_was_sent() {
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        handle.reserved.iter_mut().enumerate().for_each(|(i, byte)| *byte = 2 * i as i8 - 64);
        for handle in [Some(handle), None] {
            let offer = Offer { process: 0x1234_5678_9abc_def0, address: u64::MAX - 7, handle };
            let got = Offer::of(&offer.bytes()).unwrap();
            assert_eq!((got.process, got.address), (offer.process, offer.address));
            assert_eq!(got.handle.map(|handle| handle.reserved), handle.map(|handle| handle.reserved));
        }
        for bytes in [0, 8, 16, OFFER - 1, OFFER + 1] {
            assert!(Offer::of(&vec![0; bytes]).is_err(), "{bytes} bytes");
        }
    }
}
