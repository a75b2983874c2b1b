//! Files as `torch.save` writes them, from pickles that a test puts together.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::Tensors;

/// A pickle being put together, by the names of pickle's instructions.
#[derive(Debug, Clone, Default)]
pub struct Pickle(pub Vec<u8>);

impl Pickle {
    /// An instruction without operands, or several.
    pub fn op(mut self, ops: &[u8]) -> Pickle {
        self.0.extend(ops);
        self
    }

    /// A text.
    pub fn text(self, text: &str) -> Pickle {
        self.op(b"X").op(&(text.len() as u32).to_le_bytes()).op(text.as_bytes())
    }

    /// An integer of 64 bits.
    pub fn int(self, int: i64) -> Pickle {
        self.op(&[0x8a, 8]).op(&int.to_le_bytes())
    }

    /// A tuple of integers.
    pub fn ints(self, ints: &[i64]) -> Pickle {
        ints.iter().fold(self.op(b"("), |pickle, int| pickle.int(*int)).op(b"t")
    }

    /// A class or a function.
    pub fn global(self, module: &str, name: &str) -> Pickle {
        self.op(format!("c{module}\n{name}\n").as_bytes())
    }

    /// A storage of a class of torch.
    pub fn storage(self, class: &str, key: &str, elements: i64) -> Pickle {
        self.op(b"(").text("storage").global("torch", class).text(key).text("cpu").int(elements).op(b"tQ")
    }

    /// A tensor in a storage of f32.
    pub fn tensor(self, (key, elements): (&str, i64), offset: i64, shape: &[i64], strides: &[i64]) -> Pickle {
        let storage = self.global("torch._utils", "_rebuild_tensor_v2").op(b"(");
        let view = storage.storage("FloatStorage", key, elements).int(offset).ints(shape).ints(strides);
        // No gradients, no hooks.
        view.op(&[0x89]).global("collections", "OrderedDict").op(b")RtR")
    }

    /// An empty dictionary.
    pub fn dictionary(self) -> Pickle {
        self.global("collections", "OrderedDict").op(b")R")
    }
}

/// Writes an archive of these entries.
pub fn write_archive(path: &Path, entries: &[(&str, &[u8])]) -> io::Result<()> {
    let mut archive = ZipWriter::new(File::create(path)?);
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, content) in entries {
        archive.start_file(format!("archive/{name}"), options)?;
        archive.write_all(content)?;
    }
    archive.finish()?;
    Ok(())
}

/// Writes what `torch.save` makes of tensors.
pub fn write_torch(path: &Path, tensors: &Tensors) -> io::Result<()> {
    let mut pickle = Pickle::default().op(&[0x80, 2]).dictionary().op(b"(");
    let mut storages = Vec::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let shape: Vec<i64> = tensor.shape.iter().map(|axis| *axis as i64).collect();
        let strides: Vec<i64> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        let storage = (&*i.to_string(), tensor.data.len() as i64);
        pickle = pickle.text(name).tensor(storage, 0, &shape, &strides);
        let data: Vec<u8> = tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect();
        storages.push((format!("data/{i}"), data));
    }
    let pickle = pickle.op(b"u.");
    let entries = storages.iter().map(|(name, data)| (name.as_str(), data.as_slice()));
    let all = [("data.pkl", pickle.0.as_slice()), ("byteorder", b"little")].into_iter().chain(entries);
    write_archive(path, &all.collect::<Vec<_>>())
}
