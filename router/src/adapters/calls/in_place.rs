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
pub(super) fn is_gone(error: &io::Error) -> bool {
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
pub(super) fn stamp(file: &File) -> io::Result<Option<Stamp>> {
    let data = file.metadata()?;
    Ok(data.is_file().then(|| Stamp::of(&data)))
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
        process::Command,
    };

    use sources::{Reference, SourceSettings, Sources};

    use super::*;

    const CONFIG: &str = "adapter_config.json";
    const WEIGHTS: &str = "adapter_model.safetensors";

    /// Hashes the adapter "one" of a folder after something has happened to it.
    async fn hash_after(change: fn(&Path)) -> Result<Fetched, CallError> {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("one");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(CONFIG), "{}").unwrap();
        fs::write(folder.join(WEIGHTS), "weights").unwrap();
        fs::write(root.path().join("elsewhere"), "weights").unwrap();
        let settings = SourceSettings::from_env(Some(root.path().into()), Vec::new());
        let reference = Reference::parse("local", "one").unwrap();
        let found = Sources::new(settings).unwrap().lookup(&reference, None).await.unwrap();
        change(&folder);
        hash(&found, found.in_place.as_deref().unwrap())
    }

    #[tokio::test]
    async fn only_the_files_that_were_found_are_hashed() {
        let untouched = hash_after(|_| {}).await.unwrap();
        let same = hash_after(|folder| fs::write(folder.join("README.md"), "more").unwrap()).await.unwrap();
        assert_eq!(untouched, same);
        assert_eq!(untouched.bytes, 9);
        type Change = (&'static str, fn(&Path));
        let changes: [Change; 13] = [
            ("rewritten", |folder| fs::write(folder.join(WEIGHTS), "weight2").unwrap()),
            ("written as it was", |folder| fs::write(folder.join(WEIGHTS), "weights").unwrap()),
            ("longer", |folder| fs::write(folder.join(WEIGHTS), "weights and more").unwrap()),
            ("empty", |folder| fs::write(folder.join(WEIGHTS), "").unwrap()),
            ("other configuration", |folder| fs::write(folder.join(CONFIG), "[]").unwrap()),
            ("removed", |folder| fs::remove_file(folder.join(WEIGHTS)).unwrap()),
            ("replaced", |folder| {
                fs::write(folder.join("new"), "weights").unwrap();
                fs::rename(folder.join("new"), folder.join(WEIGHTS)).unwrap();
            }),
            ("a link to another file", |folder| {
                fs::remove_file(folder.join(WEIGHTS)).unwrap();
                symlink(folder.with_file_name("elsewhere"), folder.join(WEIGHTS)).unwrap();
            }),
            ("a link to itself", |folder| {
                fs::remove_file(folder.join(WEIGHTS)).unwrap();
                symlink(WEIGHTS, folder.join(WEIGHTS)).unwrap();
            }),
            ("a folder", |folder| {
                fs::remove_file(folder.join(WEIGHTS)).unwrap();
                fs::create_dir(folder.join(WEIGHTS)).unwrap();
            }),
            ("a pipe", |folder| {
                fs::remove_file(folder.join(WEIGHTS)).unwrap();
                assert!(Command::new("mkfifo").arg(folder.join(WEIGHTS)).status().unwrap().success());
            }),
            ("the folder is a link", |folder| {
                fs::rename(folder, folder.with_file_name("two")).unwrap();
                symlink("two", folder).unwrap();
            }),
            ("the folder is gone", |folder| fs::remove_dir_all(folder).unwrap()),
        ];
        for (what, change) in changes {
            let hashed = hash_after(change).await;
            assert!(matches!(hashed, Err(CallError::Fault(Fault::Changed))), "{what}: {hashed:?}");
        }
        let forbidden = |folder: &Path| {
            // Another ctime, whoever may read it.
            fs::set_permissions(folder.join(WEIGHTS), fs::Permissions::from_mode(0o000)).unwrap();
        };
        assert!(hash_after(forbidden).await.is_err());
    }
}
