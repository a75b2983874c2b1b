//! Where things are in the folder, and how files are made.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder, File, OpenOptions},
    hash::{BuildHasher, RandomState},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::error::optional;

/// Paths below the folder of a store.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) root: PathBuf,
}

impl Layout {
    pub(crate) fn version_file(&self) -> PathBuf {
        self.root.join("VERSION")
    }

    /// The lock of the whole folder.
    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// A small file on its way to its place. There is one, because it is written while the folder is locked.
    pub(crate) fn new_file(&self) -> PathBuf {
        self.root.join("new")
    }

    pub(crate) fn contents(&self) -> PathBuf {
        self.root.join("contents")
    }

    pub(crate) fn entry(&self, content: &[u8; 32]) -> PathBuf {
        self.contents().join(hex(content))
    }

    pub(crate) fn partial(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub(crate) fn removing(&self) -> PathBuf {
        self.root.join("removing")
    }

    pub(crate) fn versions(&self) -> PathBuf {
        self.root.join("versions")
    }

    pub(crate) fn version(&self, version: &[u8; 32]) -> PathBuf {
        self.versions().join(hex(version))
    }

    pub(crate) fn references(&self) -> PathBuf {
        self.root.join("references")
    }

    pub(crate) fn reference(&self, reference: &[u8; 16]) -> PathBuf {
        self.references().join(hex(reference))
    }

    /// Puts a small file in its place, whole or not at all. The folder must be locked.
    pub(crate) fn put(&self, path: &Path, text: &str) -> io::Result<()> {
        let new = self.new_file();
        optional(fs::remove_file(&new))?;
        create(&new)?.write_all(text.as_bytes())?;
        fs::rename(new, path)
    }
}

/// In an entry or a partial adapter: the lock of who uses or writes it.
pub(crate) const LOCK: &str = "lock";
/// In an entry: its [`crate::entry::Entry`].
pub(crate) const RECORD: &str = "entry.json";
/// In an entry or a partial adapter: the adapter's files.
pub(crate) const FILES: &str = "files";

/// A new file that its owner alone may read.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// A new folder that its owner alone may enter.
pub(crate) fn create_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Makes what was written into a folder survive a loss of power.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A name for something that takes `bytes` bytes: the name is the reservation.
pub(crate) fn sized_name(bytes: u64) -> String {
    // A fresh state is seeded by the system's random numbers.
    format!("{:016x}-{bytes}", RandomState::new().hash_one(bytes))
}

/// The bytes in a name that [`sized_name`] has made.
pub(crate) fn size_in(name: &str) -> Option<u64> {
    let (random, bytes) = name.split_once('-')?;
    (random.len() == 16 && random.bytes().all(|b| b.is_ascii_hexdigit())).then(|| bytes.parse().ok())?
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What [`hex`] has written: lower case, and of the right length.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f').then(|| (b as char).to_digit(16)).flatten();
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

/// The names in a folder, as far as they are text; none if it is not there.
pub(crate) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let Some(found) = optional(fs::read_dir(folder))? else { return Ok(Vec::new()) };
    found.filter_map(|item| item.map(|item| item.file_name().into_string().ok()).transpose()).collect()
}

/// The contents of a small file, if it is there and is text; a larger one is not ours.
pub(crate) fn small_text(path: &Path) -> io::Result<Option<String>> {
    const MOST: u64 = 1 << 20;
    let Some(file) = optional(File::open(path))? else { return Ok(None) };
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MOST), &mut bytes)?;
    Ok(String::from_utf8(bytes).ok())
}

/// Removes a folder and what is in it. That others remove it at the same time is no error.
pub(crate) fn remove(folder: &Path) -> io::Result<()> {
    optional(fs::remove_dir_all(folder)).map(drop)
}
