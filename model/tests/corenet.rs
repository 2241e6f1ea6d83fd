//! Checkpoints of CoreNet: what torch.save writes is read, and whatever asks for more, or is not whole, is refused before
//! anything is allocated.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use ulmus_model::hf::{self, SpecialTokens};
use ulmus_model::{Layout, ModelError, corenet, weights_to_safetensors};
use ulmus_plan::{LayerDims, ModelConfig, Preset, WeightType};
use ulmus_types::ErrorKind;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

const AVERAGE: &str = "checkpoint_average.pt";
const TRAINING: &str = "training_checkpoint_epoch_0_iter_49999.pt";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/corenet").join(name)
}

/// The weights that `corenet_fixtures.py` has stored.
fn weights() -> Vec<f32> {
    (0..704).map(|i| ((i * 37 % 251) as f32 - 125.0) / 128.0).collect()
}

type Files = BTreeMap<String, Vec<u8>>;

/// The files of an archive.
fn unpacked(name: &str) -> Files {
    let mut archive = ZipArchive::new(Cursor::new(fs::read(golden(name)).unwrap())).unwrap();
    let count = archive.len();
    let file = |index| {
        let mut entry = archive.by_index(index).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (entry.name().unwrap().into_owned(), bytes)
    };
    (0..count).map(file).collect()
}

fn packed(files: &Files) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in files {
        archive.start_file(name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// The error of reading these bytes.
fn refused(bytes: &[u8]) -> ModelError {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.pt");
    fs::write(&path, bytes).unwrap();
    let error = corenet::read(&path).unwrap_err();
    assert!(error.to_string().contains("model.pt"), "{error}");
    error
}

/// The message of refusing the average with one file changed. `kind` says whether it is wrong or damaged.
fn refused_with(file: &str, kind: ErrorKind, change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut files = unpacked(AVERAGE);
    let (_, bytes) = files.iter_mut().find(|(name, _)| name.ends_with(file)).unwrap();
    change(bytes);
    let error = refused(&packed(&files));
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

fn replace(bytes: &mut Vec<u8>, from: &[u8], to: &[u8]) {
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes.splice(at..at + from.len(), to.iter().copied());
}

#[test]
fn weights_and_training_checkpoints_are_read() {
    for name in [AVERAGE, TRAINING] {
        let model = corenet::read(&golden(name)).unwrap();
        assert_eq!(model.weights, weights(), "{name}");
        assert_eq!(model.tokens, SpecialTokens { bos: 1, eos: 2 });
        assert_eq!((model.config.vocab_size, model.config.model_dim, model.config.head_dim), (10, 8, 2));
        let dims = [(2, 1, 4), (4, 2, 8)];
        assert_eq!(
            model.config.layers(),
            dims.map(|(q_heads, kv_heads, ffn_dim)| LayerDims { q_heads, kv_heads, ffn_dim })
        );
    }
}

#[test]
fn a_published_shape_is_recognised() {
    // Shapes alone, in storages without bytes: the file is refused for them only once its shape is known.
    let published = ModelConfig { vocab_size: 32_128, ..Preset::Openelm270m.config() };
    let layout = Layout::new(&published);
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let int = |value: usize| [b"J", &(value as i32).to_le_bytes()[..]].concat();
    let mut pickle = b"\x80\x02}".to_vec();
    for (key, tensor) in layout.tensors().iter().enumerate() {
        let mut stride = tensor.range.len();
        pickle.extend(text(tensor.name.strip_prefix("transformer.").unwrap()));
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        pickle.extend(
            [text("storage"), b"ctorch\nBFloat16Storage\n".to_vec(), text(&key.to_string())].concat(),
        );
        pickle.extend([text("cpu"), int(tensor.range.len()), b"tQ".to_vec(), int(0), b"(".to_vec()].concat());
        pickle.extend(tensor.shape.iter().flat_map(|size| int(*size)));
        pickle.extend(b"t(");
        for size in &tensor.shape {
            stride /= size;
            pickle.extend(int(stride));
        }
        pickle.extend(b"t\x89ccollections\nOrderedDict\n)RtRs");
    }
    pickle.push(b'.');
    let mut files = Files::from([("m/data.pkl".to_owned(), pickle)]);
    files.extend((0..layout.tensors().len()).map(|key| (format!("m/data/{key}"), Vec::new())));
    let error = refused(&packed(&files)).to_string();
    assert!(error.contains("m/data/0 has 0 bytes, and 41123840 elements of 2 bytes"), "{error}");
}

#[test]
fn a_config_beside_a_checkpoint_says_what_tensors_do_not_show() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.pt");
    fs::copy(golden(AVERAGE), &path).unwrap();
    let config = ModelConfig {
        rope_freq_constant: 500.0,
        max_context_length: 64,
        ..corenet::read(&path).unwrap().config
    };
    let beside = folder.path().join("config.json");
    fs::write(&beside, hf::config_json(&config, SpecialTokens { bos: 3, eos: 4 }, WeightType::F32)).unwrap();
    let model = corenet::read(&path).unwrap();
    assert_eq!((model.config.rope_freq_constant, model.config.max_context_length), (500.0, 64));
    assert_eq!((model.tokens, model.weights), (SpecialTokens { bos: 3, eos: 4 }, weights()));

    let other = ModelConfig { vocab_size: 12, ..config };
    fs::write(&beside, hf::config_json(&other, SpecialTokens::default(), WeightType::F32)).unwrap();
    let error = corenet::read(&path).unwrap_err().to_string();
    assert!(
        error.contains("token_embeddings.weight has shape [10, 8], and the config asks for [12, 8]"),
        "{error}"
    );
}

#[test]
fn nothing_is_executed() {
    let call = b"cposix\nsystem\nX\x04\0\0\0true\x85R";
    let said = refused_with("data.pkl", ErrorKind::InvalidInput, |pickle| {
        pickle.splice(2..2, call.iter().copied());
    });
    assert!(said.contains("asks for posix.system") && said.contains("nothing is executed"), "{said}");
}

#[test]
fn tensors_that_are_not_what_they_claim_are_refused() {
    let wrong = ErrorKind::InvalidInput;
    // The embedding's strides, (8, 1), and its storage of 80 elements.
    let strides =
        refused_with("data.pkl", wrong, |pickle| replace(pickle, b"K\x08K\x01\x86", b"K\x01K\x08\x86"));
    assert!(
        strides.contains("tensor token_embeddings.weight has shape [10, 8] with strides [1, 8]"),
        "{strides}"
    );
    let short = refused_with("data.pkl", wrong, |pickle| replace(pickle, b"KPtq", b"K\x4ftq"));
    assert!(short.contains("80 elements from 0 on in a storage of 79"), "{short}");
    let dtype = refused_with("data.pkl", wrong, |pickle| replace(pickle, b"FloatStorage", b"LongStorage"));
    assert!(dtype.contains("elements of type Long; Float, Half and BFloat16 can be read"), "{dtype}");
    let name =
        refused_with("data.pkl", wrong, |pickle| replace(pickle, b"layers.1.ffn_norm", b"layers.1.fan_norm"));
    assert!(name.contains("layers.1.fan_norm.weight does not belong"), "{name}");
    let embedding =
        refused_with("data.pkl", wrong, |pickle| replace(pickle, b"token_embeddings", b"token_embeddingx"));
    assert!(embedding.contains("no tensor token_embeddings.weight"), "{embedding}");
    // The second tensor's storage is that of the first.
    let shared =
        refused_with("data.pkl", wrong, |pickle| replace(pickle, b"X\x01\0\0\x001", b"X\x01\0\0\x000"));
    assert!(shared.contains("shares its storage"), "{shared}");
}

#[test]
fn a_head_is_a_second_name_of_the_embedding_or_refused() {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let with_head = |storage: &str, len: u8| {
        let head = [
            text("lm_head.weight"),
            b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
            text("storage"),
            b"ctorch\nFloatStorage\n".to_vec(),
            text(storage),
            text("cpu"),
            [b"K", &[len][..], b"tQK\0K\x0aK\x08\x86K\x08K\x01\x86\x89ccollections\nOrderedDict\n)RtRs."]
                .concat(),
        ];
        let mut files = unpacked(AVERAGE);
        let (_, pickle) = files.iter_mut().find(|(name, _)| name.ends_with("data.pkl")).unwrap();
        assert_eq!(pickle.pop(), Some(b'.'));
        pickle.extend(head.concat());
        packed(&files)
    };
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.pt");
    fs::write(&path, with_head("0", 80)).unwrap();
    assert_eq!(corenet::read(&path).unwrap().weights, weights());
    assert!(corenet_error(&with_head("9", 128)).contains("lm_head.weight does not belong"));
}

#[test]
fn storages_that_are_missing_or_short_are_damage() {
    let damaged = ErrorKind::Corrupt;
    let short = refused_with("data/0", damaged, |bytes| bytes.truncate(316));
    assert!(short.contains("data/0 has 316 bytes, and 80 elements of 4 bytes are described"), "{short}");
    let missing =
        refused_with("data.pkl", damaged, |pickle| replace(pickle, b"X\x01\0\0\x000", b"X\x01\0\0\0x"));
    assert!(missing.contains("data/x, which is not there"), "{missing}");
    let cut = refused(&fs::read(golden(AVERAGE)).unwrap()[..5000]);
    assert_eq!(cut.kind(), damaged, "{cut}");
    // A number that changed after its checksum was computed.
    let mut bytes = fs::read(golden(AVERAGE)).unwrap();
    let first = weights()[0].to_le_bytes();
    let at = bytes.windows(4).position(|window| window == first).unwrap();
    bytes[at] ^= 1;
    let changed = refused(&bytes);
    assert_eq!(changed.kind(), damaged, "{changed}");
    assert!(changed.to_string().contains("tensor token_embeddings.weight"), "{changed}");
}

#[test]
fn archives_of_another_kind_are_refused() {
    let files = unpacked(AVERAGE);
    let good = packed(&files);
    // An entry that claims to expand: its method in both of its headers, of which the archive's directory counts.
    let at = good.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    let mut bomb = good.clone();
    bomb[at + 10] = 8;
    assert!(refused(&bomb).to_string().contains("is compressed or encrypted"));
    let mut long = good.clone();
    long[at + 24..at + 28].copy_from_slice(&(1_u32 << 30).to_le_bytes());
    assert!(refused(&long).to_string().contains("is compressed or encrypted"));
    // Two entries with the bytes of one.
    let places: Vec<usize> = good
        .windows(4)
        .enumerate()
        .filter(|(_, window)| *window == b"PK\x01\x02")
        .map(|(at, _)| at)
        .collect();
    let [first, second] = [places[0], places[1]];
    let mut shared = good.clone();
    let place = good[first + 42..first + 46].to_vec();
    shared[second + 42..second + 46].copy_from_slice(&place);
    assert!(corenet_error(&shared).contains("share bytes"), "{}", corenet_error(&shared));

    let order = refused_with("byteorder", ErrorKind::InvalidInput, |order| *order = b"big".to_vec());
    assert!(order.contains("big-endian"), "{order}");
    let without: Files = files.into_iter().filter(|(name, _)| !name.ends_with("data.pkl")).collect();
    assert!(corenet_error(&packed(&without)).contains("without data.pkl"));
    let old = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.";
    assert!(corenet_error(old).contains("before 1.6"));
    let layout = Layout::new(&corenet::read(&golden(AVERAGE)).unwrap().config);
    assert!(
        corenet_error(&weights_to_safetensors(&layout, &weights()).unwrap()).contains("not a checkpoint")
    );
    assert!(corenet_error(b"").contains("not a checkpoint"));
}

fn corenet_error(bytes: &[u8]) -> String {
    refused(bytes).to_string()
}
