//! The files of an adapter that say how texts become its tokens.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    sync::Arc,
};

use exchange::{Content, Fault};
use rustix::fs::{Mode, OFlags, open, openat};
use sources::{Found, Reference, TEXT_FILES, is_of_text};

use super::{Shared, error::CallError, in_place};
use crate::tokenizer::TextFiles;

/// Most bytes of all of them together. The largest tokenizer.json of a published model has half as many.
const MOST: u64 = 64 << 20;

/// The files of adapters that this server has read or copied.
#[derive(Clone)]
pub(in crate::adapters) struct Files(pub(super) Arc<Shared>);

impl Files {
    /// Reads those of a content. `None` if they are not on this machine any more. Blocks.
    pub(in crate::adapters) fn text(
        &self,
        content: Content,
        adapter: &Reference,
    ) -> Result<Option<TextFiles>, Fault> {
        self.0.text(content).map_err(|error| match error {
            CallError::Fault(Fault::Invalid(cause)) => {
                Fault::Invalid(format!("adapter \"{adapter}\": {cause}").into())
            }
            error => error.fault(adapter),
        })
    }
}

impl Shared {
    fn text(&self, content: Content) -> Result<Option<TextFiles>, CallError> {
        let found = self.version_in_place(content).and_then(|version| self.found(version));
        if let Some(found) = found
            && let Some(folder) = &found.in_place
            && let Some(files) = in_folder(&found, folder)?
        {
            return Ok(Some(files));
        }
        let Some(store) = &self.means.store else { return Ok(None) };
        let Some(hold) = store.hold(content.0)? else { return Ok(None) };
        let mut reader = Reader::default();
        for name in TEXT_FILES {
            match open_in(hold.folder(), name) {
                Ok(file) => reader.read(name, &file)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(reader.files))
    }
}

/// The files of a folder in which an adapter is read; `None` if they are not those that were hashed.
fn in_folder(found: &Found, folder: &Path) -> Result<Option<TextFiles>, CallError> {
    let mut reader = Reader::default();
    for file in found.files.iter().filter(|file| is_of_text(&file.name)) {
        let opened = match open_in(folder, &file.name) {
            Ok(opened) => opened,
            Err(error) if in_place::is_gone(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let is_that_found = || Ok::<_, io::Error>(in_place::stamp(&opened)? == file.stamp);
        if !is_that_found()? {
            return Ok(None);
        }
        reader.read(&file.name, &opened)?;
        if !is_that_found()? {
            return Ok(None);
        }
    }
    Ok(Some(reader.files))
}

/// Opens a file below a folder that is no link. Opening a pipe does not wait.
fn open_in(folder: &Path, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let folder = open(folder, flags | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    Ok(File::from(openat(&folder, name, flags, Mode::empty())?))
}

/// Reads files as long as there is room for them.
#[derive(Default)]
struct Reader {
    files: TextFiles,
    bytes: u64,
}

impl Reader {
    fn read(&mut self, name: &str, file: &File) -> Result<(), CallError> {
        let mut content = Vec::new();
        let room = MOST - self.bytes;
        let bytes = file.take(room + 1).read_to_end(&mut content)? as u64;
        if bytes > room {
            let cause =
                format!("{name}: the files of its tokenizer may have {MOST} bytes together, and have more");
            return Err(Fault::Invalid(cause.into()).into());
        }
        self.bytes += bytes;
        self.files.insert(name.to_owned(), content);
        Ok(())
    }
}
