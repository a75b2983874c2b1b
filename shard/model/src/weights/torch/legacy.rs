//! The format before torch 1.6: five pickles, then the storages one after the other, each behind its number of elements.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt};

use super::{
    Extent, MAX_PICKLE, Resolve, Storages, TorchError,
    pickle::{Machine, Object},
};
use crate::weights::tensor_file::Place;

/// torch's magic number, 0x1950a86a20f9469cfc6c.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Its version of the format.
const VERSION: i64 = 1001;

pub(super) fn read(
    file: &File,
    file_len: u64,
    resolve: &mut Resolve<'_>,
) -> Result<BTreeMap<String, Place>, TorchError> {
    let mut start = vec![0; file_len.min(MAX_PICKLE) as usize];
    file.read_exact_at(&mut start, 0)?;
    // A file of another format fails in the first pickle, in any way.
    let mut magic = Machine::new(&start);
    let is_magic =
        magic.run().is_ok_and(|id| matches!(magic.object(id), Object::Long(bytes) if *bytes == MAGIC));
    if !is_magic {
        return Err(TorchError::OtherFormat);
    }
    let mut version = magic.following();
    let id = version.run()?;
    if !matches!(version.object(id), Object::Int(VERSION)) {
        return Err(TorchError::OtherFormat);
    }
    let mut system = version.following();
    let id = system.run()?;
    if matches!(system.entry(id, "little_endian"), Some(Object::Bool(false))) {
        return Err(TorchError::BigEndian);
    }
    let mut machine = system.following();
    let state = machine.run()?;
    let tensors = machine.tensors(state)?;
    let mut keys = machine.following();
    let list = keys.run()?;
    let mut at = keys.position() as u64;
    let mut storages = Storages::new();
    for key in keys.texts(list)? {
        let Some(kind) = machine.storage_kind(key) else {
            return Err(TorchError::Pickle { fault: "a storage that no tensor has", at: at as usize });
        };
        let mut count = [0; 8];
        file.read_exact_at(&mut count, at)?;
        let len = u64::from_le_bytes(count).checked_mul(kind.size);
        let end = len.and_then(|len| len.checked_add(at + 8)).filter(|end| *end <= file_len);
        let (Some(len), Some(end)) = (len, end) else {
            return Err(TorchError::Pickle { fault: "a storage that is cut short", at: at as usize });
        };
        storages.insert(key.into(), Extent { start: at + 8, len });
        at = end;
    }
    resolve(&tensors, &storages)
}
