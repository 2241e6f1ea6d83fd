//! Conversion between the flat vector and safetensors with Hugging Face names.
//!
//! A reader takes every tensor of the layout exactly once, from one file or several, in float32, float16 or bfloat16.
//! Names without the prefix `transformer.`, as the reference writes them, are accepted, and a copy of a tied embedding under
//! `lm_head.weight` is ignored. Anything else is refused by name. Tensors are read one at a time, so a
//! file is never in memory as a whole.

use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensorError};
use ulmus_plan::WeightType;

use crate::error::ModelError;
use crate::params::{Layout, Tensor};

/// Bytes of the header's length, at the start of a file.
const LENGTH_BYTES: u64 = 8;
/// The longest header that the format allows.
const LONGEST_HEADER: u64 = 100_000_000;
/// The name of an untied head.
const HEAD: &str = "lm_head.weight";
/// Elements converted at a time.
const CHUNK: usize = 1 << 18;

/// Encodes the flat vector as one safetensors file.
///
/// # Errors
/// [`ModelError::Tensors`] if there is not one value per parameter.
pub fn weights_to_safetensors(layout: &Layout, weights: &[f32]) -> Result<Vec<u8>, ModelError> {
    layout.check_len(weights)?;
    safetensors::serialize(views(layout, weights)?, Some(metadata())).map_err(|error| refused(&error))
}

/// Encodes the flat vector as one safetensors file, with values rounded to a type of floats.
///
/// # Errors
/// [`ModelError::Tensors`] if there is not one value per parameter, if one is too large for the type, or if that is none of floats.
pub fn weights_to_safetensors_as(
    layout: &Layout,
    weights: &[f32],
    dtype: WeightType,
) -> Result<Vec<u8>, ModelError> {
    layout.check_len(weights)?;
    let (stored, rounded): (Dtype, Vec<u16>) = match dtype {
        WeightType::F32 => return weights_to_safetensors(layout, weights),
        WeightType::F16 => {
            (Dtype::F16, weights.iter().map(|weight| f16::from_f32(*weight).to_bits()).collect())
        }
        WeightType::Bf16 => {
            (Dtype::BF16, weights.iter().map(|weight| bf16::from_f32(*weight).to_bits()).collect())
        }
        WeightType::Q8_0 => return Err(ModelError::Tensors("q8_0 is no type of floats".to_owned())),
    };
    let is_finite = |bits: u16| match stored {
        Dtype::F16 => f16::from_bits(bits).is_finite(),
        _ => bf16::from_bits(bits).is_finite(),
    };
    if let Some(at) = rounded.iter().position(|bits| !is_finite(*bits)) {
        let problem = format!("the weight {} is too large for {stored:?}; write another dtype", weights[at]);
        return Err(ModelError::Tensors(problem));
    }
    let view = |tensor: &Tensor| {
        let bytes = bytemuck::cast_slice(&rounded[tensor.range.clone()]);
        TensorView::new(stored, tensor.shape.clone(), bytes).map(|view| (tensor.name.clone(), view))
    };
    let views: Result<Vec<_>, _> = layout.tensors().iter().map(view).collect();
    let bytes = views.and_then(|views| safetensors::serialize(views, Some(metadata())));
    bytes.map_err(|error| refused(&error))
}

/// Decodes the flat vector from one safetensors file.
///
/// # Errors
/// [`ModelError::Tensors`] if the file does not hold exactly the tensors of this layout.
pub fn weights_from_safetensors(layout: &Layout, bytes: &[u8]) -> Result<Vec<f32>, ModelError> {
    let mut reader = WeightReader::new(layout, Names::MODEL);
    reader.read(Cursor::new(bytes)).map_err(|problem| ModelError::Tensors(problem.into_text()))?;
    reader.finish().map_err(ModelError::Tensors)
}

/// Views of all tensors with their names, for the writers of the crate `safetensors`.
pub(crate) fn views<'a>(
    layout: &'a Layout,
    weights: &'a [f32],
) -> Result<Vec<(&'a str, TensorView<'a>)>, ModelError> {
    let view = |tensor: &'a Tensor| {
        let bytes = bytemuck::cast_slice(&weights[tensor.range.clone()]);
        TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).map(|view| (tensor.name.as_str(), view))
    };
    layout.tensors().iter().map(view).collect::<Result<_, _>>().map_err(|error| refused(&error))
}

/// The metadata without which transformers does not load a file.
#[expect(clippy::disallowed_types, reason = "safetensors asks for it; one entry has one order")]
pub(crate) fn metadata() -> std::collections::HashMap<String, String> {
    std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())])
}

/// Adds an entry to the metadata of a file: the library takes them without an order, and would write several in any.
pub(crate) fn with_note(file: &[u8], key: &str, value: &str) -> Result<Vec<u8>, ModelError> {
    let problem = |error: &dyn std::fmt::Display| ModelError::Tensors(error.to_string());
    let (_, start) = read_header(&mut Cursor::new(file)).map_err(|found| problem(&found.into_text()))?;
    let (header, tensors) = file.split_at(start as usize);
    let header = &header[LENGTH_BYTES as usize..];
    let mut header: serde_json::Value = serde_json::from_slice(header).map_err(|error| problem(&error))?;
    header["__metadata__"][key] = value.into();
    let mut header = header.to_string().into_bytes();
    // The format wants tensors to begin at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header, tensors].concat())
}

fn refused(error: &SafeTensorError) -> ModelError {
    ModelError::Tensors(error.to_string())
}

// Stored tensors are little-endian, and slices are cast to bytes without conversion.
const _: () = assert!(cfg!(target_endian = "little"), "big-endian machines are not supported");

/// Why weights cannot be read from a file, in a sentence that does not name the file.
#[derive(Debug)]
pub(crate) enum Problem {
    /// There are too few bytes or too many.
    Damaged(String),
    /// The contents are not what this program reads.
    Format(String),
}

impl Problem {
    /// The error of the file at `path`.
    pub(crate) fn of(self, path: &Path) -> ModelError {
        match self {
            Self::Damaged(problem) => ModelError::Damaged { path: path.to_owned(), problem },
            Self::Format(problem) => ModelError::format(path, problem),
        }
    }

    fn into_text(self) -> String {
        let (Self::Damaged(text) | Self::Format(text)) = self;
        text
    }
}

impl From<String> for Problem {
    fn from(problem: String) -> Self {
        Self::Format(problem)
    }
}

/// How a file names tensors, and how messages name what they belong to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    /// The name without what writers add or leave out, as that of the layout without `transformer.`.
    pub plain: fn(&str) -> String,
    /// What all tensors of a file belong to.
    pub of: &'static str,
    /// What decides on their shapes.
    pub asks: &'static str,
}

impl Names {
    /// Those of a whole model.
    pub(crate) const MODEL: Self = Self {
        plain: |name| without_prefix(name).to_owned(),
        of: "an OpenELM of this config",
        asks: "the config",
    };
}

/// A name without the prefix that the reference leaves out.
pub(crate) fn without_prefix(name: &str) -> &str {
    name.strip_prefix("transformer.").unwrap_or(name)
}

/// Collects the flat vector from one or several files.
#[derive(Debug)]
pub(crate) struct WeightReader<'a> {
    layout: &'a Layout,
    names: Names,
    weights: Vec<f32>,
    /// Whether each tensor of the layout has been read.
    seen: Vec<bool>,
}

impl<'a> WeightReader<'a> {
    pub(crate) fn new(layout: &'a Layout, names: Names) -> Self {
        let seen = vec![false; layout.tensors().len()];
        Self { layout, names, weights: vec![0.0; layout.parameters()], seen }
    }

    /// Reads all tensors of one file, and answers with its header.
    pub(crate) fn read(&mut self, mut file: impl Read + Seek) -> Result<Metadata, Problem> {
        let (metadata, start) = read_header(&mut file)?;
        for name in metadata.offset_keys() {
            if name == HEAD && self.layout.tensor(HEAD).is_none() {
                continue;
            }
            let info = metadata.info(&name).ok_or_else(|| "the header contradicts itself".to_owned())?;
            let is_read = [Dtype::F32, Dtype::F16, Dtype::BF16].contains(&info.dtype);
            if !is_read {
                let dtype = info.dtype;
                return Err(format!("tensor {name} has type {dtype:?}; F32, F16 and BF16 can be read").into());
            }
            let values = self.claim(&name, &info.shape)?;
            let failed = |error: io::Error| format!("cannot read tensor {name}: {error}");
            file.seek(SeekFrom::Start(start + info.data_offsets.0 as u64)).map_err(failed)?;
            read_values(&mut file, info.dtype, values).map_err(failed)?;
        }
        Ok(metadata)
    }

    /// The place of a tensor's values, which can be claimed once.
    pub(crate) fn claim(&mut self, name: &str, shape: &[usize]) -> Result<&mut [f32], String> {
        let index = self.layout.place(self.names, name, shape)?;
        if std::mem::replace(&mut self.seen[index], true) {
            return Err(format!("tensor {name} is there twice"));
        }
        Ok(&mut self.weights[self.layout.tensors()[index].range.clone()])
    }

    /// The flat vector, if every tensor has been read.
    pub(crate) fn finish(self) -> Result<Vec<f32>, String> {
        let missing: Vec<&str> = (self.layout.tensors().iter().zip(&self.seen))
            .filter(|(_, seen)| !**seen)
            .map(|(tensor, _)| tensor.name.as_str())
            .collect();
        match missing.first() {
            None => Ok(self.weights),
            Some(first) => Err(format!("{} tensors are missing, the first is {first}", missing.len())),
        }
    }
}

/// Reads the header and finds where the data begins; checks that the file is as long as its header says.
fn read_header(file: &mut (impl Read + Seek)) -> Result<(Metadata, u64), Problem> {
    let not_safetensors = |why: &dyn std::fmt::Display| format!("this is not a safetensors file: {why}");
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length).map_err(|error| not_safetensors(&error))?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER {
        return Err(not_safetensors(&format!("its header would have {length} bytes")).into());
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(|error| not_safetensors(&error))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| not_safetensors(&error))?;
    let start = LENGTH_BYTES + length;
    let expected = start + metadata.data_len() as u64;
    let found = file.seek(SeekFrom::End(0)).map_err(|error| not_safetensors(&error))?;
    if found != expected {
        return Err(Problem::Damaged(format!(
            "the file has {found} bytes and its header describes {expected}"
        )));
    }
    Ok((metadata, start))
}

/// Reads little-endian numbers of the type `dtype`, which is F32, F16 or BF16.
pub(crate) fn read_values(file: &mut impl Read, dtype: Dtype, values: &mut [f32]) -> io::Result<()> {
    let size = dtype.bitsize() / 8;
    let mut bytes = vec![0; CHUNK.min(values.len()) * size];
    for values in values.chunks_mut(CHUNK) {
        let bytes = &mut bytes[..values.len() * size];
        file.read_exact(bytes)?;
        let widen: fn(u16) -> f32 = match dtype {
            Dtype::F16 => |bits| f16::from_bits(bits).to_f32(),
            Dtype::BF16 => |bits| bf16::from_bits(bits).to_f32(),
            _ => {
                bytemuck::cast_slice_mut(values).copy_from_slice(bytes);
                continue;
            }
        };
        for (value, pair) in values.iter_mut().zip(bytes.chunks_exact(2)) {
            *value = widen(u16::from_le_bytes([pair[0], pair[1]]));
        }
    }
    Ok(())
}

impl Layout {
    /// The index of the tensor that a file calls `name`, which must have this shape.
    pub(crate) fn place(&self, names: Names, name: &str, shape: &[usize]) -> Result<usize, String> {
        let Names { plain, of, asks } = names;
        let wanted = plain(name);
        let index = self.tensors().iter().position(|tensor| without_prefix(&tensor.name) == wanted);
        let index = index.ok_or_else(|| format!("tensor {name} does not belong to {of}"))?;
        let tensor = &self.tensors()[index];
        if shape == tensor.shape {
            Ok(index)
        } else {
            Err(format!("tensor {name} has shape {shape:?}, and {asks} asks for {:?}", tensor.shape))
        }
    }
}
