//! The parts of a model that is split, as `llama-gguf-split` writes them: `NAME-00001-of-00003.gguf` and so on, each a
//! whole GGUF file with the number of the part (`split.no`, from 0) and of parts (`split.count`), of which the first has
//! all other metadata and the number of all tensors (`split.tensors.count`).

use std::path::{Path, PathBuf};

use super::{Header, get};
use crate::{Error, Result};

const ENDING: &str = ".gguf";

/// Number of a part, from 1, and of all parts; a file without them is a whole one.
fn number(header: &Header) -> Result<(u32, u32)> {
    let count = get::<u32>(&header.metadata, "split.count")?.unwrap_or(1).max(1);
    let index = get::<u32>(&header.metadata, "split.no")?.unwrap_or(0);
    Ok((index.saturating_add(1), count))
}

/// Reads the headers of the parts behind the first one, if there are any.
pub(super) fn other_parts(first: &Header) -> Result<Vec<Header>> {
    let (part, count) = number(first)?;
    if part != 1 {
        return Err(Error::NotTheFirst { part, count });
    }
    let mut others = Vec::new();
    for part in 2..=count {
        let path = sibling(&first.path, part, count)?;
        let header = Header::read(path.clone(), others.len() + 1).and_then(|header| match number(&header)? {
            found if found == (part, count) => Ok(header),
            (part, count) => Err(Error::OtherPart { part, count }),
        });
        others.push(header.map_err(|source| Error::Part { path, source: Box::new(source) })?);
    }
    let found = others.iter().fold(first.tensors.len(), |sum, part| sum + part.tensors.len());
    match get::<u32>(&first.metadata, "split.tensors.count")? {
        Some(expected) if expected as usize != found => {
            Err(Error::PartTensors { found, expected: expected as usize })
        }
        _ => Ok(others),
    }
}

/// The file of a part, beside the first one.
fn sibling(first: &Path, part: u32, count: u32) -> Result<PathBuf> {
    let name = first.file_name().unwrap_or_default().to_string_lossy();
    let ending = name.get(name.len().saturating_sub(ENDING.len())..).unwrap_or_default();
    let end = |part: u32| format!("-{part:05}-of-{count:05}{ending}");
    match name.strip_suffix(&end(1)).filter(|_| ending.eq_ignore_ascii_case(ENDING)) {
        Some(stem) => Ok(first.with_file_name(format!("{stem}{}", end(part)))),
        None => Err(Error::PartName { name: name.into_owned(), count }),
    }
}
