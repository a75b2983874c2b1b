//! Adapters that are read where they lie: the router hashes their files, and tells the shards which files these were.

use std::{fs::File, io, path::Path};

use exchange::{Content, Fault, Fetched};
use rustix::{
    fs::{Mode, OFlags, open, openat},
    io::Errno,
};
use sources::{Found, Stamp};

use super::error::CallError;

/// Hashes the files of a folder whose links have been followed. They are opened relative to the folder itself, so that
/// nobody can put another one in its place. Fails if they are not those that were found: a link may lead to a file, but
/// only to the one that it led to when it was checked whether this may be read.
pub(super) fn hash(found: &Found, folder: &Path) -> Result<Fetched, CallError> {
    match read(found, folder) {
        Ok(Some(fetched)) => Ok(fetched),
        Ok(None) => Err(Fault::Changed.into()),
        // It was there when it was found, or its size has changed while it was read.
        Err(error) if is_gone(&error) => Err(Fault::Changed.into()),
        Err(error) => Err(error.into()),
    }
}

/// Returns whether an error of reading says that a file is not what it was.
fn is_gone(error: &io::Error) -> bool {
    let loops = error.raw_os_error() == Some(Errno::LOOP.raw_os_error());
    let kinds = [
        io::ErrorKind::NotFound,
        io::ErrorKind::NotADirectory,
        io::ErrorKind::StaleNetworkFileHandle,
        io::ErrorKind::UnexpectedEof,
        io::ErrorKind::InvalidData,
    ];
    loops || kinds.contains(&error.kind())
}

fn read(found: &Found, folder: &Path) -> io::Result<Option<Fetched>> {
    // Opening a pipe must not wait for whoever writes to it.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let folder = open(folder, flags | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    let files = found.files.iter().map(|file| {
        let open = openat(&folder, &*file.name, flags, Mode::empty())?;
        Ok((&*file.name, File::from(open)))
    });
    let files = files.collect::<io::Result<Vec<_>>>()?;
    let are_those_found = || {
        let stamps = files.iter().map(|(_, file)| stamp(file)).collect::<io::Result<Vec<_>>>()?;
        io::Result::Ok(stamps.iter().zip(&found.files).all(|(stamp, file)| *stamp == file.stamp))
    };
    if !are_those_found()? {
        return Ok(None);
    }
    let named: Vec<_> = files.iter().map(|(name, file)| (*name, file)).collect();
    let content = Content(store::content_of(&named)?);
    // Somebody may have written while they were read.
    Ok(are_those_found()?.then_some(Fetched { content, bytes: found.bytes }))
}

/// The stamp of a plain file.
fn stamp(file: &File) -> io::Result<Option<Stamp>> {
    let data = file.metadata()?;
    Ok(data.is_file().then(|| Stamp::of(&data)))
}
