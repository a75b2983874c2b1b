//! An open file, or several that make up one.

mod split;

use std::{
    collections::HashMap,
    fs::File,
    io::BufReader,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    Error, FromValue, PartOfTensor, Result, TensorInfo, TensorType, Value,
    reader::Reader,
    tensor::{Data, RawTensor},
};

/// Where tensors are aligned to unless the metadata says otherwise.
const DEFAULT_ALIGNMENT: u32 = 32;

/// An open GGUF file: its metadata and tensor index are in memory, tensors are read when asked for. It may be split into
/// several files, of which the first has the metadata.
#[derive(Debug)]
pub struct Gguf {
    files: Vec<(PathBuf, File)>,
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

/// A file's header.
struct Header {
    path: PathBuf,
    file: File,
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
}

impl Header {
    /// Reads the header of one of several files.
    fn read(path: PathBuf, index: usize) -> Result<Self> {
        let fail = |source| Error::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        let mut reader = Reader::new(BufReader::new(&file), len, &fail);

        let (tensors, pairs) = counts(&mut reader)?;
        let metadata = metadata(&mut reader, pairs)?;
        let raw = (0..tensors).map(|_| raw_tensor(&mut reader)).collect::<Result<Vec<_>>>()?;

        let alignment = get::<u32>(&metadata, "general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT).into();
        if !u64::is_power_of_two(alignment) {
            return Err(Error::Alignment { alignment });
        }
        let start = reader.offset().next_multiple_of(alignment);
        let data = Data { start, len: len.saturating_sub(start), alignment };
        let tensors = raw.into_iter().map(|t| t.check(&data, index)).collect::<Result<Vec<_>>>()?;
        Ok(Self { path, file, metadata, tensors })
    }
}

impl Gguf {
    /// Opens a file and reads its header. Opens the other parts of a file that is split, too.
    ///
    /// Errors: a file is not there, is no GGUF, is truncated, has tensors of a type that is not read here, or is another
    /// part than its name says.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let first = Header::read(path.as_ref().to_owned(), 0)?;
        let others = split::other_parts(&first)?;
        let Header { path, file, metadata, mut tensors } = first;
        let mut files = vec![(path, file)];
        for part in others {
            files.push((part.path, part.file));
            tensors.extend(part.tensors);
        }
        let mut by_name = HashMap::new();
        for (i, t) in tensors.iter().enumerate() {
            if by_name.insert(t.name.clone(), i).is_some() {
                return Err(Error::DuplicateTensor { tensor: t.name.clone() });
            }
        }
        Ok(Self { files, metadata, tensors, by_name })
    }

    /// A metadata value: `get::<&str>`, and so on for `u32`, `f32`, `bool`, `&[String]`, `&[f32]`, `Vec<i32>`.
    ///
    /// Errors: the value is of another type. An absent key is none.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        get(&self.metadata, key)
    }

    /// As [`Self::get`], but an absent key is an error.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| Error::MissingKey { key: key.into() })
    }

    /// All metadata, in no order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// All tensors, in the order of the file, and of one part after the other.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|i| &self.tensors[*i])
    }

    /// The elements of a tensor as f32, in the order of the file: row-major for the reversed dims.
    ///
    /// Errors: no tensor of that name, or the file cannot be read any more.
    pub fn dequantize(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.require_tensor(name)?;
        Ok(tensor.ty.dequantize(&self.blocks(name, 0..tensor.rows(), 0..tensor.cols())?))
    }

    /// The stored blocks of a part of a tensor, row after row. Only these are read from the file.
    ///
    /// Errors: no tensor of that name, rows or columns that it does not have, columns that are not whole blocks, or the
    /// file cannot be read any more.
    pub fn blocks(&self, name: &str, rows: Range<usize>, cols: Range<usize>) -> Result<Vec<u8>> {
        let tensor = self.require_tensor(name)?;
        let part =
            || PartOfTensor { rows: rows.clone(), cols: cols.clone(), shape: [tensor.rows(), tensor.cols()] };
        let lies_within = |range: &Range<usize>, len: usize| range.start <= range.end && range.end <= len;
        if !lies_within(&rows, tensor.rows()) || !lies_within(&cols, tensor.cols()) {
            return Err(Error::NoSuchPart { tensor: name.into(), part: part() });
        }
        let block = tensor.ty.block_elements();
        if !cols.start.is_multiple_of(block) || !cols.end.is_multiple_of(block) {
            return Err(Error::CutBlocks { tensor: name.into(), part: part(), ty: tensor.ty });
        }
        let bytes_of = |elements: usize| elements / block * tensor.ty.block_bytes();
        let (row, begin, len) = (bytes_of(tensor.cols()), bytes_of(cols.start), bytes_of(cols.len()));
        let (path, file) = &self.files[tensor.file];
        let mut out = vec![0; rows.len() * len];
        let read = |to: &mut [u8], row_index: usize| {
            let at = tensor.offset + (row_index * row + begin) as u64;
            file.read_exact_at(to, at).map_err(|source| Error::Io { path: path.clone(), source })
        };
        if len == row {
            read(&mut out, rows.start)?;
        } else if len > 0 {
            out.chunks_exact_mut(len).zip(rows).try_for_each(|(to, row_index)| read(to, row_index))?;
        }
        Ok(out)
    }

    fn require_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| Error::MissingTensor { tensor: name.into() })
    }
}

fn get<'a, T: FromValue<'a>>(metadata: &'a HashMap<String, Value>, key: &str) -> Result<Option<T>> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    T::from_value(value).map(Some).ok_or_else(|| Error::WrongType {
        key: key.into(),
        found: value.describe(),
        expected: T::EXPECTED,
    })
}

/// Numbers of tensors and of metadata pairs, after the magic and the version.
fn counts<R: std::io::Read>(reader: &mut Reader<'_, R>) -> Result<(usize, usize)> {
    let found = reader.magic()?;
    if &found != b"GGUF" {
        return Err(Error::Magic { found });
    }
    let version = reader.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(Error::Version { version });
    }
    // The least that one takes: a name of no bytes, one axis, a type and an offset; a key and a value of one byte.
    Ok((reader.count("the number of tensors", 32)?, reader.count("the number of metadata pairs", 13)?))
}

fn metadata<R: std::io::Read>(reader: &mut Reader<'_, R>, pairs: usize) -> Result<HashMap<String, Value>> {
    let mut metadata = HashMap::new();
    for _ in 0..pairs {
        let key = reader.text("a metadata key")?;
        let value = reader.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(Error::DuplicateKey { key });
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn raw_tensor<R: std::io::Read>(reader: &mut Reader<'_, R>) -> Result<RawTensor> {
    let name = reader.text("a tensor's name")?;
    let axes = reader.u32("a tensor's number of axes")?;
    if !(1..=4).contains(&axes) {
        return Err(Error::TensorAxes { tensor: name, axes });
    }
    let dims = (0..axes).map(|_| reader.u64("a tensor's axis")).collect::<Result<_>>()?;
    let code = reader.u32("a tensor's type")?;
    let Some(ty) = TensorType::from_code(code) else {
        return Err(Error::TensorType { tensor: name, code });
    };
    Ok(RawTensor { name, dims, ty, offset: reader.u64("a tensor's offset")? })
}
