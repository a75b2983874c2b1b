//! A machine for pickles that can make tensors, dictionaries, lists and tuples, and nothing else. Its instructions are
//! those of pickle's protocol 2 that torch's `weights_only` knows (`torch/_weights_only_unpickler.py`).
//!
//! Objects lie in one list and name each other by their index: however deep they are nested, and whether or not they
//! hold themselves, nothing here recurses. Every step is counted, and makes one object at most.

mod globals;

use std::collections::{BTreeMap, HashMap};

use super::TorchError;
use globals::Global;
pub(super) use globals::Kind;

/// Most steps of one pickle; a tensor takes about fifty.
const MAX_STEPS: usize = 4 << 20;
/// Most axes of a tensor; those of models have up to five.
const MAX_AXES: usize = 8;

/// Index of an object.
pub(super) type Id = usize;

pub(super) enum Object<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, little-endian.
    Long(&'a [u8]),
    Float,
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage<'a>),
    Tensor(Box<Tensor<'a>>),
}

/// Elements that tensors share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) kind: Kind,
    pub(super) key: &'a str,
    /// Its own number of elements.
    pub(super) elements: u64,
    /// Where it begins, in elements of the storage that has the key: old files have storages within storages.
    pub(super) first: u64,
}

/// A view of a storage, not yet checked against it.
#[derive(Debug)]
pub(super) struct Tensor<'a> {
    pub(super) storage: Storage<'a>,
    /// Its first element in the storage.
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    /// For each axis, how many elements further the next one is.
    pub(super) strides: Vec<usize>,
}

/// The state of one pickle.
pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    steps: usize,
    objects: Vec<Object<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    kinds: HashMap<&'a str, Kind>,
}

type Result<T> = std::result::Result<T, TorchError>;

impl<'a> Machine<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Machine<'a> {
        Machine {
            bytes,
            at: 0,
            steps: 0,
            objects: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            kinds: HashMap::new(),
        }
    }

    /// A machine for the pickle behind this one.
    pub(super) fn following(&self) -> Machine<'a> {
        Machine { at: self.at, ..Machine::new(self.bytes) }
    }

    /// Where the next pickle begins.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn object(&self, id: Id) -> &Object<'a> {
        &self.objects[id]
    }

    /// The value of a text in a dictionary.
    pub(super) fn entry(&self, dict: Id, key: &str) -> Option<&Object<'a>> {
        let Object::Dict(entries) = self.object(dict) else { return None };
        let is_key = |id: Id| matches!(self.object(id), Object::Text(text) if *text == key);
        entries.iter().rev().find(|(id, _)| is_key(*id)).map(|(_, value)| self.object(*value))
    }

    /// The texts of a list.
    pub(super) fn texts(&self, list: Id) -> Result<Vec<&'a str>> {
        let Object::List(items) = self.object(list) else { return Err(self.fault("no list")) };
        items.iter().map(|item| self.text(*item)).collect()
    }

    /// What a storage that was met holds.
    pub(super) fn storage_kind(&self, key: &str) -> Option<Kind> {
        self.kinds.get(key).copied()
    }

    /// The tensors of a dictionary by their names. Other values are passed over.
    pub(super) fn tensors(&self, dict: Id) -> Result<BTreeMap<&'a str, &Tensor<'a>>> {
        let Object::Dict(entries) = self.object(dict) else { return Err(TorchError::NotADictionary) };
        let mut tensors = BTreeMap::new();
        for (key, value) in entries {
            if let (Object::Text(name), Object::Tensor(tensor)) = (self.object(*key), self.object(*value)) {
                tensors.insert(*name, &**tensor);
            }
        }
        Ok(tensors)
    }

    fn fault(&self, fault: &'static str) -> TorchError {
        TorchError::Pickle { fault, at: self.at }
    }

    /// Runs to the end of the pickle, and returns what it makes.
    pub(super) fn run(&mut self) -> Result<Id> {
        loop {
            self.charge(1)?;
            let [opcode] = self.array()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => drop(self.array::<1>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'q' | b'r' => self.put(opcode)?,
                b'h' | b'j' => self.get(opcode)?,
                b'a' | b'e' | b's' | b'u' | b'b' => self.fill(opcode)?,
                _ => {
                    let object = match opcode {
                        b']' | b'}' | b')' | b't' | 0x85..=0x87 => self.container(opcode)?,
                        b'c' => Object::Global(self.global()?),
                        b'Q' => self.storage()?,
                        b'R' => match self.call()? {
                            Made::New(object) => object,
                            Made::Same(id) => {
                                self.stack.push(id);
                                continue;
                            }
                        },
                        _ => self.scalar(opcode)?,
                    };
                    self.stack.push(self.objects.len());
                    self.objects.push(object);
                }
            }
        }
    }

    fn charge(&mut self, steps: usize) -> Result<()> {
        self.steps = self.steps.saturating_add(steps);
        if self.steps > MAX_STEPS { Err(TorchError::TooManySteps { limit: MAX_STEPS }) } else { Ok(()) }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(TorchError::Truncated { at: self.at })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// A text up to the end of its line.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|byte| *byte == b'\n').ok_or(TorchError::Truncated { at: self.at })?;
        let line = self.take(len + 1)?;
        str::from_utf8(&line[..len]).map_err(|_| self.fault("a name that is not UTF-8"))
    }

    fn pop(&mut self) -> Result<Id> {
        // What lies below a mark belongs to others.
        let bottom = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= bottom {
            return Err(self.fault("nothing on the stack"));
        }
        self.stack.pop().ok_or_else(|| self.fault("nothing on the stack"))
    }

    /// What was pushed since the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| self.fault("no mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn put(&mut self, opcode: u8) -> Result<()> {
        let slot = self.slot(opcode == b'q')?;
        let top = self.stack.last().copied().ok_or_else(|| self.fault("nothing on the stack"))?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn get(&mut self, opcode: u8) -> Result<()> {
        let slot = self.slot(opcode == b'h')?;
        let id =
            self.memo.get(&slot).copied().ok_or_else(|| self.fault("nothing was kept under this number"))?;
        self.stack.push(id);
        Ok(())
    }

    fn slot(&mut self, is_short: bool) -> Result<u32> {
        Ok(if is_short { self.array::<1>()?[0].into() } else { u32::from_le_bytes(self.array()?) })
    }

    /// Numbers and texts.
    fn scalar(&mut self, opcode: u8) -> Result<Object<'a>> {
        Ok(match opcode {
            b'N' => Object::None,
            0x88 => Object::Bool(true),
            0x89 => Object::Bool(false),
            b'K' => Object::Int(self.array::<1>()?[0].into()),
            b'M' => Object::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Object::Int(i32::from_le_bytes(self.array()?).into()),
            0x8a => {
                let [len] = self.array()?;
                integer(self.take(len.into())?)
            }
            b'G' => {
                self.take(8)?;
                Object::Float
            }
            b'X' | b'T' | b'U' => {
                let len = if opcode == b'U' {
                    self.array::<1>()?[0].into()
                } else {
                    u32::from_le_bytes(self.array()?) as usize
                };
                let text = self.take(len)?;
                Object::Text(str::from_utf8(text).map_err(|_| self.fault("a text that is not UTF-8"))?)
            }
            opcode => return Err(TorchError::Opcode { opcode, at: self.at - 1 }),
        })
    }

    /// Lists, dictionaries and tuples.
    fn container(&mut self, opcode: u8) -> Result<Object<'a>> {
        Ok(match opcode {
            b']' => Object::List(Vec::new()),
            b'}' => Object::Dict(Vec::new()),
            b')' => Object::Tuple(Vec::new()),
            b't' => Object::Tuple(self.pop_mark()?),
            _ => {
                let mut items = (0x84..opcode).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                items.reverse();
                Object::Tuple(items)
            }
        })
    }

    /// Puts what is on the stack into the object below.
    fn fill(&mut self, opcode: u8) -> Result<()> {
        let items = match opcode {
            b'e' | b'u' => self.pop_mark()?,
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => vec![self.pop()?],
        };
        let target = self.stack.last().copied().ok_or_else(|| self.fault("nothing to fill"))?;
        match (&mut self.objects[target], opcode) {
            (Object::List(list), b'a' | b'e') => list.extend(items),
            (Object::Dict(dict), b's' | b'u') if items.len().is_multiple_of(2) => {
                dict.extend(items.as_chunks().0.iter().map(|[key, value]| (*key, *value)));
            }
            // Attributes of a dictionary, such as the versions of its modules.
            (Object::Dict(_), b'b') => {}
            _ => return Err(self.fault("items for something that has none")),
        }
        Ok(())
    }

    fn int(&self, id: Id) -> Result<i64> {
        if let Object::Int(int) = self.object(id) { Ok(*int) } else { Err(self.fault("no integer")) }
    }

    fn text(&self, id: Id) -> Result<&'a str> {
        if let Object::Text(text) = self.object(id) { Ok(text) } else { Err(self.fault("no text")) }
    }

    fn tuple(&self, id: Id) -> Result<&[Id]> {
        if let Object::Tuple(items) = self.object(id) { Ok(items) } else { Err(self.fault("no tuple")) }
    }
}

/// What a call returns.
enum Made<'a> {
    New(Object<'a>),
    /// One of its arguments.
    Same(Id),
}

/// A little-endian integer in two's complement.
fn integer(bytes: &[u8]) -> Object<'_> {
    if bytes.len() > 8 {
        return Object::Long(bytes);
    }
    let is_negative = bytes.last().is_some_and(|last| *last >= 0x80);
    let mut wide = [if is_negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Object::Int(i64::from_le_bytes(wide))
}
