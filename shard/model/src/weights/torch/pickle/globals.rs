//! The names that a pickle may use, and what they do.

use kernels::DType;

use super::{Id, MAX_AXES, Machine, Made, Object, Result, Storage, Tensor};
use crate::weights::{tensor_file::ElementType, torch::TorchError};

/// A class or a function of Python.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::weights::torch) enum Global {
    OrderedDict,
    Size,
    RebuildTensor,
    RebuildParameter,
    Storage(Kind),
}

/// What the elements of a storage are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::weights::torch) struct Kind {
    /// torch's name of the element's type.
    name: &'static str,
    /// Bytes of an element.
    pub(in crate::weights::torch) size: u64,
}

/// torch's classes of storages.
const STORAGES: [(&str, Kind); 10] = [
    ("DoubleStorage", Kind { name: "float64", size: 8 }),
    ("FloatStorage", Kind { name: "float32", size: 4 }),
    ("HalfStorage", Kind { name: "float16", size: 2 }),
    ("BFloat16Storage", Kind { name: "bfloat16", size: 2 }),
    ("LongStorage", Kind { name: "int64", size: 8 }),
    ("IntStorage", Kind { name: "int32", size: 4 }),
    ("ShortStorage", Kind { name: "int16", size: 2 }),
    ("CharStorage", Kind { name: "int8", size: 1 }),
    ("ByteStorage", Kind { name: "uint8", size: 1 }),
    ("BoolStorage", Kind { name: "bool", size: 1 }),
];

impl Kind {
    pub(in crate::weights::torch) fn element_type(self) -> ElementType {
        match self.name {
            "float64" => ElementType::F64,
            "float32" => ElementType::Known(DType::F32),
            "float16" => ElementType::Known(DType::F16),
            "bfloat16" => ElementType::Known(DType::Bf16),
            other => ElementType::Other(other.into()),
        }
    }
}

impl<'a> Machine<'a> {
    /// Reads a name and looks it up.
    pub(super) fn global(&mut self) -> Result<Global> {
        let (module, name) = (self.line()?, self.line()?);
        let storage = || STORAGES.iter().find(|(class, _)| *class == name);
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch", "Size") => Ok(Global::Size),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
            ("torch", _) if let Some((_, kind)) = storage() => Ok(Global::Storage(*kind)),
            _ => Err(TorchError::Global(format!("{module}.{name}"))),
        }
    }

    /// A storage by its persistent id: ("storage", class, key, device, elements), and in old files a view of another one,
    /// (key, first element, elements), or none.
    pub(super) fn storage(&mut self) -> Result<Object<'a>> {
        let id = self.pop()?;
        let (class, key, elements, view) = match *self.tuple(id)? {
            [tag, class, key, _, elements] if self.text(tag)? == "storage" => (class, key, elements, None),
            [tag, class, key, _, elements, view] if self.text(tag)? == "storage" => {
                (class, key, elements, Some(view))
            }
            _ => return Err(self.fault("a persistent id that is no storage")),
        };
        let &Object::Global(Global::Storage(kind)) = self.object(class) else {
            return Err(self.fault("a storage of no known class"));
        };
        let (key, mut elements, mut first) = (self.text(key)?, self.count(elements)?, 0);
        if let Some(view) = view.filter(|view| !matches!(self.object(*view), Object::None)) {
            let &[_, offset, len] = self.tuple(view)? else {
                return Err(self.fault("a view of a storage that is none"));
            };
            (first, elements) = (self.count(offset)?, self.count(len)?);
        }
        if *self.kinds.entry(key).or_insert(kind) != kind {
            return Err(self.fault("a storage of two classes"));
        }
        Ok(Object::Storage(Storage { kind, key, elements, first }))
    }

    /// Calls a function with a tuple of arguments.
    pub(super) fn call(&mut self) -> Result<Made<'a>> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.tuple(arguments)?;
        let &Object::Global(global) = self.object(function) else {
            return Err(self.fault("a call of something that is no function"));
        };
        match (global, arguments) {
            (Global::OrderedDict, []) => Ok(Made::New(Object::Dict(Vec::new()))),
            (Global::OrderedDict, &[items]) => self.dictionary(items).map(Made::New),
            (Global::Size, &[axes]) => self.tuple(axes).map(|_| Made::Same(axes)),
            // Whether gradients are wanted, hooks and metadata do not change what is computed.
            (Global::RebuildTensor, &[storage, offset, shape, strides, _, _, ..]) => {
                self.tensor([storage, offset, shape, strides]).map(Made::New)
            }
            (Global::RebuildParameter, &[tensor, _, _])
                if matches!(self.object(tensor), Object::Tensor(_)) =>
            {
                Ok(Made::Same(tensor))
            }
            _ => Err(self.fault("a call with other arguments than expected")),
        }
    }

    /// A dictionary of a list of pairs, as Python 2 wrote it.
    fn dictionary(&mut self, items: Id) -> Result<Object<'a>> {
        let Object::List(list) = self.object(items) else { return Err(self.fault("no list")) };
        let pairs = list.iter().map(|item| match self.object(*item) {
            Object::Tuple(pair) | Object::List(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            _ => Err(self.fault("no pair")),
        });
        // One list can be copied any number of times, so that its items are counted before they are.
        let len = list.len();
        let pairs = if self.steps + len > super::MAX_STEPS { Ok(Vec::new()) } else { pairs.collect() };
        self.charge(len)?;
        pairs.map(Object::Dict)
    }

    fn tensor(&self, [storage, offset, shape, strides]: [Id; 4]) -> Result<Object<'a>> {
        let &Object::Storage(storage) = self.object(storage) else { return Err(self.fault("no storage")) };
        let (shape, strides) = (self.counts(shape)?, self.counts(strides)?);
        if shape.len() != strides.len() {
            return Err(self.fault("a tensor whose shape and strides are not of one length"));
        }
        Ok(Object::Tensor(Box::new(Tensor { storage, offset: self.count(offset)?, shape, strides })))
    }

    fn count(&self, id: Id) -> Result<u64> {
        u64::try_from(self.int(id)?).map_err(|_| self.fault("a negative number"))
    }

    fn counts(&self, id: Id) -> Result<Vec<usize>> {
        let axes = self.tuple(id)?;
        if axes.len() > MAX_AXES {
            return Err(self.fault("a tensor of too many axes"));
        }
        axes.iter().map(|axis| self.count(*axis).map(|axis| axis as usize)).collect()
    }
}
