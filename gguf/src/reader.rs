//! Reads the header of a file: numbers, texts and metadata values, each checked against the bytes that are left.

use std::io::Read;

use crate::{Error, Result, Value};

/// Most bytes that a header may take; the largest in use (a vocabulary of 256,000 tokens with merges) takes 20 MB.
const MAX_HEADER: u64 = 256 << 20;

/// Type code of an array in metadata.
const ARRAY: u32 = 9;

/// A header being read. Failures of the operating system are kept apart from those of the content by `fail`.
pub(crate) struct Reader<'a, R> {
    inner: R,
    offset: u64,
    end: u64,
    fail: &'a dyn Fn(std::io::Error) -> Error,
}

impl<'a, R: Read> Reader<'a, R> {
    /// A reader at the start of a file of `len` bytes.
    pub(crate) fn new(inner: R, len: u64, fail: &'a dyn Fn(std::io::Error) -> Error) -> Self {
        Self { inner, offset: 0, end: len.min(MAX_HEADER), fail }
    }

    /// Bytes read so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    fn bytes<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        self.expect(what, N as u64)?;
        let mut buffer = [0; N];
        self.fill(&mut buffer)?;
        Ok(buffer)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.inner.read_exact(buffer).map_err(self.fail)?;
        self.offset += buffer.len() as u64;
        Ok(())
    }

    /// Fails unless `needed` more bytes are left.
    fn expect(&self, what: &'static str, needed: u64) -> Result<()> {
        let available = self.end - self.offset;
        if needed <= available {
            return Ok(());
        }
        Err(Error::Truncated { what, offset: self.offset, needed, available })
    }

    pub(crate) fn magic(&mut self) -> Result<[u8; 4]> {
        self.bytes("the magic")
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    /// A number of things that take at least `min_bytes` each in what is left of the header.
    pub(crate) fn count(&mut self, what: &'static str, min_bytes: u64) -> Result<usize> {
        let count = self.u64(what)?;
        self.expect(what, count.saturating_mul(min_bytes))?;
        Ok(count as usize)
    }

    pub(crate) fn text(&mut self, what: &'static str) -> Result<String> {
        let mut buffer = vec![0; self.count(what, 1)?];
        let offset = self.offset;
        self.fill(&mut buffer)?;
        String::from_utf8(buffer).map_err(|_| Error::Utf8 { offset })
    }

    /// A type code and the value that follows it.
    pub(crate) fn value(&mut self, key: &str) -> Result<Value> {
        match self.u32("a value type")? {
            ARRAY => self.array(key),
            code => self.scalar(key, code),
        }
    }

    fn scalar(&mut self, key: &str, code: u32) -> Result<Value> {
        const WHAT: &str = "a metadata value";
        Ok(match code {
            0 => Value::Int(u8::from_le_bytes(self.bytes(WHAT)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.bytes(WHAT)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.bytes(WHAT)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.bytes(WHAT)?).into()),
            4 => Value::Int(u32::from_le_bytes(self.bytes(WHAT)?).into()),
            5 => Value::Int(i32::from_le_bytes(self.bytes(WHAT)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes(WHAT)?).into()),
            7 => match self.bytes::<1>(WHAT)? {
                [value @ (0 | 1)] => Value::Bool(value == 1),
                [value] => return Err(Error::Bool { key: key.into(), value }),
            },
            8 => Value::Str(self.text(WHAT)?),
            10 => Value::Int(u64::from_le_bytes(self.bytes(WHAT)?).into()),
            11 => Value::Int(i64::from_le_bytes(self.bytes(WHAT)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.bytes(WHAT)?)),
            code => return Err(Error::ValueType { key: key.into(), code }),
        })
    }

    fn array(&mut self, key: &str) -> Result<Value> {
        let code = self.u32("an element type")?;
        let size = match code {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => return Err(Error::ValueType { key: key.into(), code }),
        };
        let count = self.count("an array", size)?;
        let mut array = match code {
            6 | 12 => Value::Floats(Vec::with_capacity(count)),
            7 => Value::Bools(Vec::with_capacity(count)),
            8 => Value::Strs(Vec::with_capacity(count)),
            _ => Value::Ints(Vec::with_capacity(count)),
        };
        for _ in 0..count {
            match (&mut array, self.scalar(key, code)?) {
                (Value::Floats(all), Value::Float(x)) => all.push(x as f32),
                (Value::Bools(all), Value::Bool(x)) => all.push(x),
                (Value::Strs(all), Value::Str(x)) => all.push(x),
                // Saturation is harmless: arrays are read as 32 bits, which neither value fits.
                (Value::Ints(all), Value::Int(x)) => all.push(i64::try_from(x).unwrap_or(i64::MAX)),
                _ => return Err(Error::ValueType { key: key.into(), code }),
            }
        }
        Ok(array)
    }
}
