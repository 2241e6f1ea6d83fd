//! The pickles of `torch.save`, read without executing anything.
//!
//! A pickle is a program for a small machine, which may call any function of Python. This reader has just the
//! instructions that dictionaries of tensors and plain values need, and two functions: [`Global`] lists them. Whatever
//! else a pickle asks for is refused by its name. Objects are kept in one list and refer to each other by their places
//! in it, so a program takes memory in proportion to its length, however it nests or shares what it makes.

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::Dtype;

/// The place of an object in [`Pickle`].
type Id = usize;

/// An object.
#[derive(Debug, Clone, PartialEq)]
enum Object {
    /// `None`, a truth value, or a float: nothing that a reader of weights asks for.
    Other,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List,
    /// A dictionary, ordered or not; pairs of key and value.
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(Tensor),
}

impl Object {
    fn kind(&self) -> &'static str {
        match self {
            Self::Other => "a plain value",
            Self::Int(_) => "a number",
            Self::Text(_) => "a text",
            Self::Tuple(_) => "a tuple",
            Self::List => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a function",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// The names of Python that may occur.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    /// `collections.OrderedDict`, called without arguments.
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensor,
    /// A class such as `torch.FloatStorage`, which names a type and is not called.
    StorageType(ElementType),
}

impl Global {
    fn of(module: &str, name: &str) -> Result<Self, String> {
        let of_storage = || name.strip_suffix("Storage").and_then(ElementType::of);
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch", _) => Self::StorageType(of_storage().ok_or_else(|| refused(module, name))?),
            _ => return Err(refused(module, name)),
        })
    }
}

fn refused(module: &str, name: &str) -> String {
    format!(
        "it asks for {module}.{name}, and only tensors in dictionaries are read, nothing is executed; save \
         model.state_dict() alone"
    )
}

/// The type of the elements of a storage, by the name that its class begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ElementType {
    name: &'static str,
    bytes: u64,
    dtype: Option<Dtype>,
}

impl ElementType {
    /// Every type of element. A training checkpoint may hold all of them, and weights are of the first three.
    const ALL: [Self; 10] = [
        Self { name: "Float", bytes: 4, dtype: Some(Dtype::F32) },
        Self { name: "Half", bytes: 2, dtype: Some(Dtype::F16) },
        Self { name: "BFloat16", bytes: 2, dtype: Some(Dtype::BF16) },
        Self { name: "Double", bytes: 8, dtype: None },
        Self { name: "Long", bytes: 8, dtype: None },
        Self { name: "Int", bytes: 4, dtype: None },
        Self { name: "Short", bytes: 2, dtype: None },
        Self { name: "Char", bytes: 1, dtype: None },
        Self { name: "Byte", bytes: 1, dtype: None },
        Self { name: "Bool", bytes: 1, dtype: None },
    ];

    fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name == name)
    }

    /// The type if weights can be of it.
    pub(crate) fn dtype(self) -> Result<Dtype, String> {
        let unread = || format!("elements of type {}; Float, Half and BFloat16 can be read", self.name);
        self.dtype.ok_or_else(unread)
    }

    /// Bytes of one element.
    pub(crate) fn bytes(self) -> u64 {
        self.bytes
    }
}

/// A run of elements in a file of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Storage {
    /// The name of its file in the archive's folder `data`.
    pub(crate) key: String,
    pub(crate) element: ElementType,
    /// Number of elements.
    pub(crate) len: u64,
}

/// A view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) storage: Storage,
    /// The first element.
    offset: u64,
    pub(crate) shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Tensor {
    /// The elements of the storage that are the tensor's, row by row.
    ///
    /// # Errors
    /// When the tensor is not contiguous, or its storage ends before it.
    pub(crate) fn elements(&self) -> Result<Range<u64>, String> {
        let mut len: u64 = 1;
        for (size, stride) in self.shape.iter().zip(&self.strides).rev() {
            // Where there is one element, it does not matter how far the next would be.
            if *size > 1 && *stride as u64 != len {
                return Err(format!(
                    "shape {:?} with strides {:?}, which is not contiguous; save tensor.contiguous()",
                    self.shape, self.strides
                ));
            }
            len = len.checked_mul(*size as u64).ok_or_else(|| format!("shape {:?}", self.shape))?;
        }
        let end = self.offset.checked_add(len).filter(|end| *end <= self.storage.len);
        let end = end.ok_or_else(|| {
            format!("{len} elements from {} on in a storage of {}", self.offset, self.storage.len)
        })?;
        Ok(self.offset..end)
    }
}

/// What a pickle describes.
#[derive(Debug)]
pub(crate) struct Pickle {
    objects: Vec<Object>,
    root: Id,
}

/// A dictionary in a pickle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dict<'a> {
    pickle: &'a Pickle,
    pairs: &'a [(Id, Id)],
}

impl Pickle {
    /// Reads a pickle.
    ///
    /// # Errors
    /// When it is cut, or holds anything but tensors and plain values.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, String> {
        Machine { bytes, objects: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: BTreeMap::new() }
            .run()
    }

    /// The dictionary that the pickle is.
    ///
    /// # Errors
    /// When it is something else.
    pub(crate) fn dict(&self) -> Result<Dict<'_>, String> {
        let root = &self.objects[self.root];
        self.dict_at(self.root).ok_or_else(|| {
            format!("it holds {}, not a dictionary of tensors; save model.state_dict()", root.kind())
        })
    }

    fn dict_at(&self, id: Id) -> Option<Dict<'_>> {
        match &self.objects[id] {
            Object::Dict(pairs) => Some(Dict { pickle: self, pairs }),
            _ => None,
        }
    }
}

impl<'a> Dict<'a> {
    /// The dictionary under a key.
    pub(crate) fn dict(self, key: &str) -> Option<Dict<'a>> {
        let (_, id) = self.texts().find(|(text, _)| *text == key)?;
        self.pickle.dict_at(id)
    }

    /// All tensors with their keys, in the order of the file.
    pub(crate) fn tensors(self) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        self.texts().filter_map(move |(key, id)| match &self.pickle.objects[id] {
            Object::Tensor(tensor) => Some((key, tensor)),
            _ => None,
        })
    }

    fn texts(self) -> impl Iterator<Item = (&'a str, Id)> {
        self.pairs.iter().filter_map(move |(key, id)| match &self.pickle.objects[*key] {
            Object::Text(text) => Some((text.as_str(), *id)),
            _ => None,
        })
    }
}

/// The state of a program that is being read.
struct Machine<'a> {
    /// The rest of the program.
    bytes: &'a [u8],
    objects: Vec<Object>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(mut self) -> Result<Pickle, String> {
        loop {
            let opcode = self.byte()?;
            match opcode {
                b'.' => {
                    let root = self.pop()?;
                    return Ok(Pickle { objects: self.objects, root });
                }
                0x80 => match self.byte()? {
                    2 => {}
                    other => {
                        return Err(format!(
                            "it has pickle protocol {other}, and torch.save writes 2 unless it is told otherwise; save it with \
                             that"
                        ));
                    }
                },
                b'(' => self.marks.push(self.stack.len()),
                b'N' | 0x88 | 0x89 => self.push(Object::Other),
                b'G' => {
                    self.take(8)?;
                    self.push(Object::Other);
                }
                b'K' => {
                    let value = self.byte()?;
                    self.push(Object::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push(Object::Int(value.into()));
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Object::Int(value.into()));
                }
                0x8a => {
                    let value = self.long()?;
                    self.push(Object::Int(value));
                }
                b'X' => {
                    let len = u32::from_le_bytes(self.array()?);
                    let text = self.take(len as usize)?;
                    let text = std::str::from_utf8(text).map_err(|error| format!("a text in it: {error}"))?;
                    self.push(Object::Text(text.to_owned()));
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Object::Global(Global::of(module, name)?));
                }
                b'q' => {
                    let place = self.byte()?;
                    self.remember(place.into())?;
                }
                b'r' => {
                    let place = u32::from_le_bytes(self.array()?);
                    self.remember(place)?;
                }
                b'h' => {
                    let place = self.byte()?;
                    self.recall(place.into())?;
                }
                b'j' => {
                    let place = u32::from_le_bytes(self.array()?);
                    self.recall(place)?;
                }
                b')' => self.push(Object::Tuple(Vec::new())),
                0x85..=0x87 => {
                    let from = self.stack.len().checked_sub((opcode - 0x84).into()).ok_or_else(cut)?;
                    let items = self.stack.split_off(from);
                    self.push(Object::Tuple(items));
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Object::Tuple(items));
                }
                b']' => self.push(Object::List),
                // Lists hold nothing that is asked for, so their items are left out.
                b'a' => {
                    self.pop()?;
                    self.top_is(|object| matches!(object, Object::List), "APPEND")?;
                }
                b'e' => {
                    self.since_mark()?;
                    self.top_is(|object| matches!(object, Object::List), "APPENDS")?;
                }
                b'}' => self.push(Object::Dict(Vec::new())),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set(&items)?;
                }
                // Attributes of a dictionary, such as the versions of a module's parameters.
                b'b' => {
                    self.pop()?;
                    self.top_is(|object| matches!(object, Object::Dict(_)), "BUILD")?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(Object::Storage(storage));
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let object = self.call(function, arguments)?;
                    self.push(object);
                }
                other => return Err(unknown(other)),
            }
        }
    }

    fn call(&self, function: Id, arguments: Id) -> Result<Object, String> {
        let arguments = self.tuple(arguments)?;
        match (&self.objects[function], arguments) {
            (Object::Global(Global::OrderedDict), []) => Ok(Object::Dict(Vec::new())),
            (Object::Global(Global::RebuildTensor), [storage, offset, shape, strides, ..]) => {
                let Object::Storage(storage) = &self.objects[*storage] else {
                    return Err("a tensor in it has no storage".to_owned());
                };
                let (shape, strides) = (self.sizes(*shape)?, self.sizes(*strides)?);
                if shape.len() != strides.len() {
                    return Err(format!("a tensor in it has shape {shape:?} and strides {strides:?}"));
                }
                let offset = self.size(*offset)? as u64;
                Ok(Object::Tensor(Tensor { storage: storage.clone(), offset, shape, strides }))
            }
            (object, arguments) => {
                Err(format!("it calls {} with {} arguments", object.kind(), arguments.len()))
            }
        }
    }

    /// The storage that a persistent id describes: the word "storage", class, key, device and number of elements.
    fn storage(&self, id: Id) -> Result<Storage, String> {
        if let [word, class, key, _, len] = self.tuple(id)?
            && let (Object::Text(word), Object::Global(Global::StorageType(element)), Object::Text(key)) =
                (&self.objects[*word], &self.objects[*class], &self.objects[*key])
            && word == "storage"
        {
            return Ok(Storage { key: key.clone(), element: *element, len: self.size(*len)? as u64 });
        }
        Err("it has a reference that does not describe a storage".to_owned())
    }

    fn tuple(&self, id: Id) -> Result<&[Id], String> {
        match &self.objects[id] {
            Object::Tuple(items) => Ok(items),
            other => Err(format!("it has {} where a tuple belongs", other.kind())),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, String> {
        self.tuple(id)?.iter().map(|id| self.size(*id)).collect()
    }

    fn size(&self, id: Id) -> Result<usize, String> {
        match &self.objects[id] {
            Object::Int(value) => {
                usize::try_from(*value).map_err(|_| format!("it has {value} where a size belongs"))
            }
            other => Err(format!("it has {} where a size belongs", other.kind())),
        }
    }

    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        if !items.len().is_multiple_of(2) {
            return Err("it has a key without a value".to_owned());
        }
        let Some(Object::Dict(pairs)) = self.stack.last().map(|id| &mut self.objects[*id]) else {
            return Err("it sets an item of something that is no dictionary".to_owned());
        };
        pairs.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn top_is(&self, is: impl Fn(&Object) -> bool, opcode: &str) -> Result<(), String> {
        let top = &self.objects[*self.stack.last().ok_or_else(cut)?];
        if is(top) { Ok(()) } else { Err(format!("it has {opcode} for {}", top.kind())) }
    }

    fn push(&mut self, object: Object) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack.pop().ok_or_else(cut)
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len()).ok_or_else(cut)?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, place: u32) -> Result<(), String> {
        self.memo.insert(place, *self.stack.last().ok_or_else(cut)?);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Result<(), String> {
        let id =
            self.memo.get(&place).ok_or_else(|| format!("it recalls object {place}, which it never made"))?;
        self.stack.push(*id);
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, String> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (array, rest) = self.bytes.split_first_chunk().ok_or_else(cut)?;
        self.bytes = rest;
        Ok(*array)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or_else(cut)?;
        self.bytes = rest;
        Ok(taken)
    }

    /// A number of a stated number of bytes.
    fn long(&mut self) -> Result<i64, String> {
        let len: usize = self.byte()?.into();
        let bytes = self.take(len)?;
        let Some(last) = bytes.last() else { return Ok(0) };
        let mut wide = [if last & 0x80 == 0 { 0 } else { 0xff }; 8];
        wide.get_mut(..len).ok_or_else(|| format!("it has a number of {len} bytes"))?.copy_from_slice(bytes);
        Ok(i64::from_le_bytes(wide))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.bytes.iter().position(|byte| *byte == b'\n').ok_or_else(cut)?;
        let line = self.take(end)?;
        self.byte()?;
        std::str::from_utf8(line).map_err(|error| format!("a name in it: {error}"))
    }
}

fn cut() -> String {
    "its pickle is cut or damaged; fetch it again from its origin".to_owned()
}

/// Why an instruction is refused. Those that make objects of other classes are called by their names.
fn unknown(opcode: u8) -> String {
    let name = match opcode {
        b'i' => "INST",
        b'o' => "OBJ",
        b'P' => "PERSID",
        b'B' | b'C' | 0x8e => "BYTES",
        0x81 => "NEWOBJ",
        0x82..=0x84 => "EXT",
        0x92 => "NEWOBJ_EX",
        0x93 => "STACK_GLOBAL",
        _ => "",
    };
    let space = if name.is_empty() { "" } else { " " };
    format!(
        "it has the pickle instruction {name}{space}{opcode:#04x}, and only tensors in dictionaries are read; save \
         model.state_dict() alone"
    )
}

#[cfg(test)]
mod tests;
