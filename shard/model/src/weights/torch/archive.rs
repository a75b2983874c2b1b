//! The format of torch 1.6 and later: a zip archive of a pickle and one entry for every storage, uncompressed.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    rc::Rc,
};

use zip::{CompressionMethod, ZipArchive};

use super::{Extent, MAX_PICKLE, Resolve, Storages, TorchError, pickle::Machine};
use crate::weights::tensor_file::Place;

/// Most bytes of a directory of entries. Each takes about a hundred; in memory it takes several times that.
const MAX_DIRECTORY: u64 = 16 << 20;

/// A file of which a limited number of bytes is read.
struct Limited<'a> {
    file: &'a File,
    left: Rc<Cell<u64>>,
}

impl Read for Limited<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get().checked_sub(to.len() as u64);
        self.left.set(left.ok_or_else(|| io::Error::other("the directory of entries is too long"))?);
        self.file.read(to)
    }
}

impl Seek for Limited<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

pub(super) fn read(
    file: &File,
    file_len: u64,
    resolve: &mut Resolve<'_>,
) -> Result<BTreeMap<String, Place>, TorchError> {
    let entries = entries(file)?;
    let pickle = entries.keys().find(|name| name.ends_with("/data.pkl"));
    let root = pickle.and_then(|name| name.strip_suffix("data.pkl"));
    let root = root.ok_or_else(|| TorchError::MissingEntry("data.pkl".into()))?;
    let entry = |name: &str| {
        let extent = entries.get(&format!("{root}{name}"));
        extent.map(|extent| extent.ok_or_else(|| TorchError::PackedEntry(name.into()))).transpose()
    };
    let content = |extent: Extent| {
        if extent.len > MAX_PICKLE {
            return Err(TorchError::TooLong { len: extent.len, limit: MAX_PICKLE });
        }
        if extent.start.checked_add(extent.len).is_none_or(|end| end > file_len) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let mut content = vec![0; extent.len as usize];
        file.read_exact_at(&mut content, extent.start)?;
        Ok(content)
    };
    // Older versions did not say, and ran on little-endian machines.
    if let Some(order) = entry("byteorder")?
        && content(order)? != b"little"
    {
        return Err(TorchError::BigEndian);
    }
    let pickle = entry("data.pkl")?.ok_or_else(|| TorchError::MissingEntry("data.pkl".into()))?;
    let pickle = content(pickle)?;
    let mut machine = Machine::new(&pickle);
    let state = machine.run()?;
    let tensors = machine.tensors(state)?;
    let mut storages = Storages::new();
    for tensor in tensors.values() {
        let key = tensor.storage.key;
        if !storages.contains_key(key) {
            let name = format!("data/{key}");
            let extent = entry(&name)?.ok_or(TorchError::MissingEntry(name))?;
            storages.insert(key.into(), extent);
        }
    }
    resolve(&tensors, &storages)
}

/// Where the content of every entry is; `None` for an entry that is not stored as it is.
fn entries(file: &File) -> Result<HashMap<String, Option<Extent>>, TorchError> {
    let left = Rc::new(Cell::new(MAX_DIRECTORY));
    let mut archive = ZipArchive::new(BufReader::new(Limited { file, left: left.clone() }))?;
    // Nothing is kept of what is read from here on.
    left.set(u64::MAX);
    let mut entries = HashMap::with_capacity(archive.len());
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i)?;
        let is_plain = entry.compression() == CompressionMethod::Stored && !entry.encrypted();
        let start = entry.data_start().filter(|_| is_plain);
        let name = String::from_utf8_lossy(entry.name_raw()).into_owned();
        entries.insert(name, start.map(|start| Extent { start, len: entry.size() }));
    }
    Ok(entries)
}
