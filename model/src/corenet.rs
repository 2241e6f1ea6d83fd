//! CoreNet's checkpoints, `.pt`: what `torch.save` writes of a dictionary of tensors.
//!
//! Such a file is a zip archive of a pickle, which describes the tensors, and one file of numbers per tensor. Neither
//! executes anything here: the pickle is read by [`pickle`](crate::pickle), and the archive must store its files as they
//! are. Sizes are compared with each other and with the file before anything is allocated, so a file takes memory in
//! proportion to its length, whatever it claims.
//!
//! Checkpoints of weights are dictionaries of tensors; training checkpoints hold such a dictionary under a key. Neither
//! says what the model looks like, so its shape is that of the tensors, or that of a `config.json` beside the file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use safetensors::Dtype;
use ulmus_plan::{LayerDims, ModelConfig, Multipliers, NormKind, Preset};
use ulmus_types::Problems;
use zip::{CompressionMethod, ZipArchive};

use crate::error::ModelError;
use crate::hf::{self, HfModel, SpecialTokens};
use crate::params::Layout;
use crate::pickle::{Dict, Pickle, Tensor};
use crate::tensors::{Names, Problem, WeightReader, read_values, without_prefix};

/// The longest pickle that is read, in bytes. Of a training checkpoint of the largest published model it has about 300 kB.
const LONGEST_PICKLE: u64 = 4 << 20;
/// Where training checkpoints keep the weights.
const KEYS_OF_WEIGHTS: [&str; 3] = ["model_state_dict", "state_dict", "model"];
/// How files of torch.save begin that are older than its archives.
const OLD_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// The embedding's name.
const EMBEDDING: &str = "token_embeddings.weight";

type Archive = ZipArchive<BufReader<File>>;

/// Reads a checkpoint. The tokenizer's special tokens are those of a `config.json` beside it, or else those of the
/// published models; so are base of the rotary embedding and length of the context, which tensors do not show.
///
/// # Errors
/// [`ModelError::File`] if it cannot be read; [`ModelError::Damaged`] if it is cut or its checksums are wrong;
/// [`ModelError::Format`] if it is not a checkpoint of an OpenELM, or asks for anything to be executed.
pub fn read(path: &Path) -> Result<HfModel, ModelError> {
    let beside = path.with_file_name("config.json");
    let stated =
        if beside.is_file() { Some(hf::read_config(path.parent().unwrap_or(Path::new("")))?) } else { None };
    let file = File::open(path).map_err(ModelError::file("read", path))?;
    let mut archive = open(file).map_err(|problem| problem.of(path))?;
    read_archive(&mut archive, stated).map_err(|problem| problem.of(path))
}

fn read_archive(
    archive: &mut Archive,
    stated: Option<(ModelConfig, SpecialTokens)>,
) -> Result<HfModel, Problem> {
    let (folder, pickle) = read_pickle(archive)?;
    let pickle = Pickle::read(&pickle)?;
    let mut tensors: Vec<(&str, &Tensor)> = weights_of(pickle.dict()?)?.tensors().collect();
    // The head is the embedding, and some programs name it too.
    let embedding =
        tensors.iter().find(|(name, _)| without_prefix(name) == EMBEDDING).map(|(_, tensor)| *tensor);
    tensors.retain(|(name, tensor)| *name != "lm_head.weight" || Some(*tensor) != embedding);
    let (config, tokens) = match stated {
        Some(stated) => stated,
        None => (shape_of(&tensors)?, SpecialTokens::default()),
    };
    let layout = Layout::new(&config);
    let sources = sources(archive, &folder, &layout, &tensors)?;
    let mut reader = WeightReader::new(&layout, Names::MODEL);
    for (name, source) in &sources {
        let values = reader.claim(name, &source.shape)?;
        let mut file = archive.by_index(source.entry).map_err(|error| damaged(&error))?;
        let failed = |error: io::Error| Problem::Damaged(format!("tensor {name}: {error}"));
        io::copy(&mut file.by_ref().take(source.begin), &mut io::sink()).map_err(failed)?;
        read_values(&mut file, source.dtype, values).map_err(failed)?;
        // The checksum is that of the whole file.
        io::copy(&mut file, &mut io::sink()).map_err(failed)?;
    }
    Ok(HfModel { weights: reader.finish()?, config, tokens })
}

/// Opens the archive, whose files must be stored as they are and each in its own place.
fn open(mut file: File) -> Result<Archive, Problem> {
    let mut begin = [0; OLD_MAGIC.len()];
    let read = file.read(&mut begin).unwrap_or(0);
    if begin == OLD_MAGIC {
        return refuse(
            "it is in the format that PyTorch had before 1.6; load it in PyTorch and save it again",
        );
    }
    if !begin[..read].starts_with(b"PK") {
        return refuse(
            "it is not a checkpoint that torch.save has written; name a model folder, or a .pt file of CoreNet",
        );
    }
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|error| damaged(&error))?;
    for index in 0..archive.len() {
        let entry = archive.by_index_data(index).map_err(|error| damaged(&error))?;
        if entry.compression() != CompressionMethod::Stored
            || entry.encrypted()
            || entry.size() != entry.compressed_size()
        {
            let name = String::from_utf8_lossy(entry.name_raw());
            return refuse(format!(
                "{name} in it is compressed or encrypted; torch.save stores files as they are"
            ));
        }
    }
    // From here on no entry is longer than the archive, and all of them together are not.
    if archive.has_overlapping_entries().map_err(|error| damaged(&error))? {
        return refuse("files in it share bytes; torch.save gives each a place of its own");
    }
    Ok(archive)
}

/// The name of the archive's only folder, and the pickle in it.
fn read_pickle(archive: &mut Archive) -> Result<(String, Vec<u8>), Problem> {
    let folder = archive.file_names_raw().find_map(|name| {
        let folder = std::str::from_utf8(name).ok()?.strip_suffix("/data.pkl")?;
        (!folder.contains('/')).then(|| folder.to_owned())
    });
    let Some(folder) = folder else {
        return refuse("it is an archive without data.pkl; name a file that torch.save has written");
    };
    let order = read_entry(archive, &format!("{folder}/byteorder"), 16)?;
    if order.is_some_and(|order| order.trim_ascii() != b"little") {
        return refuse("its numbers are big-endian; save it again on another machine");
    }
    let pickle = read_entry(archive, &format!("{folder}/data.pkl"), LONGEST_PICKLE)?;
    Ok((folder, pickle.unwrap_or_default()))
}

/// A file of the archive as a whole, if it is there and has at most `most` bytes.
fn read_entry(archive: &mut Archive, name: &str, most: u64) -> Result<Option<Vec<u8>>, Problem> {
    let Some(index) = archive.index_for_name(name) else { return Ok(None) };
    let mut entry = archive.by_index(index).map_err(|error| damaged(&error))?;
    if entry.size() > most {
        return refuse(format!("{name} in it has {} bytes, and at most {most} are read", entry.size()));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(|error| Problem::Damaged(format!("{name} in it: {error}")))?;
    Ok(Some(bytes))
}

/// The dictionary of weights: the whole checkpoint, or what a training checkpoint has under a key.
fn weights_of(checkpoint: Dict<'_>) -> Result<Dict<'_>, String> {
    let inner = || KEYS_OF_WEIGHTS.into_iter().find_map(|key| checkpoint.dict(key));
    let weights = if checkpoint.tensors().next().is_some() { Some(checkpoint) } else { inner() };
    weights.filter(|weights| weights.tensors().next().is_some()).ok_or_else(|| {
        format!(
            "it has no tensors, neither by themselves nor under one of {}; save model.state_dict()",
            KEYS_OF_WEIGHTS.join(", ")
        )
    })
}

/// Where the numbers of one tensor are.
struct Source {
    /// The index of the archive's file.
    entry: usize,
    /// Bytes before the first number.
    begin: u64,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// Finds the numbers of every tensor, and checks that all sizes agree and that the tensors are those of the model.
fn sources<'a>(
    archive: &Archive,
    folder: &str,
    layout: &Layout,
    tensors: &[(&'a str, &Tensor)],
) -> Result<Vec<(&'a str, Source)>, Problem> {
    let mut used = BTreeSet::new();
    let mut sources = Vec::new();
    for (name, tensor) in tensors {
        let in_tensor = |problem: String| format!("tensor {name} has {problem}");
        layout.place(Names::MODEL, name, &tensor.shape)?;
        let (dtype, elements) =
            (tensor.storage.element.dtype().map_err(in_tensor)?, tensor.elements().map_err(in_tensor)?);
        let file = format!("{folder}/data/{}", tensor.storage.key);
        let Some(entry) = archive.index_for_name(&file) else {
            return Err(Problem::Damaged(format!("tensor {name} is in {file}, which is not there")));
        };
        // A storage that served many tensors would be read, and counted, as often.
        if !used.insert(entry) {
            return refuse(format!("tensor {name} shares its storage with another one; save tensor.clone()"));
        }
        let element = tensor.storage.element.bytes();
        let expected = tensor.storage.len.checked_mul(element);
        let found = archive.by_index_data(entry).map_err(|error| damaged(&error))?.size();
        if expected != Some(found) {
            let len = tensor.storage.len;
            let problem =
                format!("{file} has {found} bytes, and {len} elements of {element} bytes are described");
            return Err(Problem::Damaged(problem));
        }
        let begin = elements.start * element;
        sources.push((*name, Source { entry, begin, dtype, shape: tensor.shape.clone() }));
    }
    Ok(sources)
}

/// The shape of the model that has these tensors.
fn shape_of(tensors: &[(&str, &Tensor)]) -> Result<ModelConfig, String> {
    let shapes: BTreeMap<&str, &[usize]> =
        tensors.iter().map(|(name, tensor)| (without_prefix(name), &tensor.shape[..])).collect();
    let shape = |name: &str| {
        shapes.get(name).copied().ok_or_else(|| {
            let other =
                shapes.keys().next().map_or_else(String::new, |key| format!(", but for instance {key}"));
            format!("it has no tensor {name}{other}; it is to be an OpenELM as CoreNet saves it")
        })
    };
    let matrix = |name: &str| match shape(name)? {
        [rows, columns] => Ok([*rows, *columns]),
        other => Err(format!("tensor {name} has shape {other:?}, and is to be a matrix")),
    };
    let [vocab_size, model_dim] = matrix(EMBEDDING)?;
    let has_layer = |i: &usize| shapes.contains_key(format!("layers.{i}.attn_norm.weight").as_str());
    let layers = (0..shapes.len()).take_while(has_layer).count();
    let head_dim = shape("layers.0.attn.q_norm.weight")?.first().copied().unwrap_or_default();
    let mut dims = Vec::new();
    for i in 0..layers {
        let [_, q_dim] = matrix(&format!("layers.{i}.attn.out_proj.weight"))?;
        let [rows, _] = matrix(&format!("layers.{i}.attn.qkv_proj.weight"))?;
        let [_, ffn_dim] = matrix(&format!("layers.{i}.ffn.proj_2.weight"))?;
        let heads = |width: usize| width.checked_div(head_dim).unwrap_or_default();
        let (q_heads, kv_heads) = (heads(q_dim), heads(rows.saturating_sub(q_dim) / 2));
        dims.push(LayerDims { q_heads, kv_heads, ffn_dim });
    }
    config_of(vocab_size, model_dim, head_dim, &dims).ok_or_else(|| {
        "its tensors have sizes that no config.json of an OpenELM describes; put one beside it if you have it".to_owned()
    })
}

/// The config of a model with these widths. What tensors do not show is as in the published models.
fn config_of(
    vocab_size: usize,
    model_dim: usize,
    head_dim: usize,
    dims: &[LayerDims],
) -> Option<ModelConfig> {
    let mut published = Preset::ALL.into_iter().map(|preset| ModelConfig { vocab_size, ..preset.config() });
    if let Some(config) =
        published.find(|it| (it.model_dim, it.head_dim) == (model_dim, head_dim) && it.layers() == dims)
    {
        return Some(config);
    }
    let first = dims.first().filter(|first| first.kv_heads > 0 && model_dim > 0)?;
    let relative = |width: fn(&LayerDims, usize) -> usize| {
        let of = |dims| width(dims, head_dim) as f64 / model_dim as f64;
        // A list of two values would be a range, whose ends are rounded.
        if dims.iter().all(|dims| of(dims) == of(first)) {
            Multipliers::Uniform(of(first))
        } else {
            Multipliers::Layers(dims.iter().map(of).collect())
        }
    };
    let config = ModelConfig {
        vocab_size,
        max_context_length: 2048,
        num_transformer_layers: dims.len(),
        model_dim,
        head_dim,
        num_gqa_groups: first.q_heads / first.kv_heads,
        qkv_multipliers: relative(|dims, head_dim| dims.q_heads * head_dim),
        ffn_multipliers: relative(|dims, _| dims.ffn_dim),
        ffn_dim_divisor: dims.iter().fold(0, |divisor, dims| common_divisor(divisor, dims.ffn_dim)),
        rope_freq_constant: 10_000.0,
        norm: NormKind::Rms,
        share_input_output_layers: true,
    };
    let mut problems = Problems::new();
    config.check("model", &mut problems);
    (problems.is_empty() && config.layers() == dims).then_some(config)
}

/// The greatest number that divides both.
fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

fn damaged(error: &zip::result::ZipError) -> Problem {
    Problem::Damaged(format!("its archive cannot be read: {error}"))
}

fn refuse<T>(problem: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Format(problem.into()))
}
