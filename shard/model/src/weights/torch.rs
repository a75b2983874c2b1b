//! The tensors of a file that `torch.save` wrote: `pytorch_model.bin`, `adapter_model.bin`.
//!
//! Such a file is a Python pickle, a program that may call any function of Python. Here it runs on a machine that can
//! make tensors and dictionaries and nothing else; like torch's own `weights_only`, it refuses all other names. Candle
//! has such a reader, but as a part of its whole tensor library; the crates that read pickles alone know neither
//! persistent ids nor names that become values.

mod archive;
mod error;
mod legacy;
mod pickle;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
};

pub use error::TorchError;
use pickle::{Storage, Tensor};

use super::tensor_file::Place;
use crate::{LoadError, Result};

/// The longest pickle that is read. A tensor takes some 150 bytes of it.
const MAX_PICKLE: u64 = 16 << 20;

/// The bytes of a storage in the file.
#[derive(Debug, Clone, Copy)]
struct Extent {
    start: u64,
    len: u64,
}

/// The places of storages by their keys.
type Storages = HashMap<String, Extent>;

/// Reads the places of all tensors of a file.
pub(super) fn places(path: &Path, file: &File) -> Result<BTreeMap<String, Place>> {
    read(file).map_err(|source| LoadError::Torch { path: path.into(), source })
}

fn read(file: &File) -> std::result::Result<BTreeMap<String, Place>, TorchError> {
    let len = file.metadata()?.len();
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic[..len.min(4) as usize], 0)?;
    let reader = if magic == *b"PK\x03\x04" { archive::read } else { legacy::read };
    reader(file, len, &mut |tensors, storages| {
        let place = |(name, tensor): (&str, &Tensor<'_>)| {
            let place = place(tensor, storages, len);
            Ok((name.to_owned(), place.map_err(|fault| TorchError::Tensor { name: name.into(), fault })?))
        };
        tensors.iter().map(|(name, tensor)| (*name, *tensor)).map(place).collect()
    })
}

/// A function that computes the places of tensors from those of their storages.
type Resolve<'f> = dyn FnMut(&BTreeMap<&str, &Tensor<'_>>, &Storages) -> std::result::Result<BTreeMap<String, Place>, TorchError>
    + 'f;

/// The place of a tensor. Errors: it is not within its storage, or the storage not within the file.
fn place(
    tensor: &Tensor<'_>,
    storages: &Storages,
    file_len: u64,
) -> std::result::Result<Place, &'static str> {
    let Tensor { storage: Storage { kind, key, elements, first }, offset, ref shape, ref strides } = *tensor;
    let extent = storages.get(key).ok_or("its storage is missing")?;
    let in_file = extent.start.checked_add(extent.len).is_some_and(|end| end <= file_len);
    let stored = first.checked_add(elements).and_then(|end| end.checked_mul(kind.size));
    if !in_file || stored.is_none_or(|bytes| bytes > extent.len) {
        return Err("its storage is cut short");
    }
    let count = shape.iter().try_fold(1u64, |count, axis| count.checked_mul(*axis as u64));
    let bytes = count.and_then(|count| count.checked_mul(kind.size));
    // An expanded tensor has several elements in the same place, so that it may have any number of elements.
    let bytes = bytes.filter(|bytes| *bytes <= file_len).ok_or("it is larger than the file")?;
    if bytes > 0 {
        let last = shape.iter().zip(strides).try_fold(offset, |at, (axis, stride)| {
            (*axis as u64 - 1).checked_mul(*stride as u64)?.checked_add(at)
        });
        if last.is_none_or(|last| last >= elements) {
            return Err("it reaches beyond its storage");
        }
    }
    // An empty tensor may have any offset, and is not read.
    let begin = if bytes > 0 { (first + offset) * kind.size } else { 0 };
    Ok(Place {
        ty: kind.element_type(),
        shape: shape.clone(),
        strides: strides.clone(),
        offset: extent.start + begin,
        bytes,
    })
}
