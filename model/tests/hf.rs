//! Model directories: what this program and others write can be read; what is not supported is refused with the field, its
//! value and what is accepted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;
use ulmus_conformance::reference::{golden, json};
use ulmus_cpu::Cpu;
use ulmus_model::hf::{self, HfModel, SpecialTokens};
use ulmus_model::{Generator, Layout, Model, ModelError, weights_from_safetensors, weights_to_safetensors};
use ulmus_plan::{ModelConfig, Multipliers, NormKind, WeightType};
use ulmus_types::ErrorKind;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 40,
        max_context_length: 32,
        num_transformer_layers: 3,
        model_dim: 16,
        head_dim: 4,
        num_gqa_groups: 2,
        qkv_multipliers: Multipliers::Layers(vec![0.5, 1.0]),
        ffn_multipliers: Multipliers::Layers(vec![0.5, 2.0]),
        ffn_dim_divisor: 8,
        rope_freq_constant: 10_000.0,
        norm: NormKind::Rms,
        share_input_output_layers: true,
    }
}

/// Values that every 16-bit type holds exactly.
fn weights() -> Vec<f32> {
    (0..Layout::new(&config()).parameters()).map(|i| (i % 255) as f32 / 128.0 - 1.0).collect()
}

fn directory() -> TempDir {
    let directory = TempDir::new().unwrap();
    hf::write(directory.path(), &config(), &weights(), SpecialTokens { bos: 3, eos: 4 }).unwrap();
    directory
}

type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn store(path: &Path, tensors: &[Stored]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// The weights as tensors of the type `dtype`.
fn stored(dtype: Dtype, encode: impl Fn(f32) -> Vec<u8>) -> Vec<Stored> {
    let weights = weights();
    let layout = Layout::new(&config());
    let bytes = |range: std::ops::Range<usize>| weights[range].iter().flat_map(|x| encode(*x)).collect();
    layout
        .tensors()
        .iter()
        .map(|t| (t.name.clone(), dtype, t.shape.clone(), bytes(t.range.clone())))
        .collect()
}

fn stored_f32() -> Vec<Stored> {
    stored(Dtype::F32, |x| x.to_le_bytes().to_vec())
}

/// The error of reading a directory with these weights.
fn refused(tensors: &[Stored]) -> String {
    let directory = directory();
    store(&directory.path().join("model.safetensors"), tensors);
    let error = hf::read(directory.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    error.to_string()
}

/// The error of reading a config with one field changed.
fn refused_config(key: &str, value: serde_json::Value) -> String {
    let directory = directory();
    let path = directory.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(&path, config.to_string()).unwrap();
    let error = hf::read(directory.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    error.to_string()
}

#[test]
fn what_is_written_can_be_read() {
    let read = hf::read(directory().path()).unwrap();
    assert_eq!(read.weights, weights());
    assert_eq!(read.tokens, SpecialTokens { bos: 3, eos: 4 });
    assert_eq!(read.config.layers(), config().layers());
    assert_eq!(read.config.parameters(), config().parameters());
    let again = TempDir::new().unwrap();
    hf::write(again.path(), &read.config, &read.weights, read.tokens).unwrap();
    assert_eq!(hf::read(again.path()).unwrap(), read);
}

#[test]
fn layer_norm_makes_a_type_of_its_own() {
    let (of, tokens) = (|norm| ModelConfig { norm, ..config() }, SpecialTokens::default());
    let text = |norm| hf::config_json(&of(norm), tokens, WeightType::F32);
    // The same mathematics has the same word.
    assert_eq!(text(NormKind::NaiveRms), text(NormKind::Rms));
    for (written, read, name) in [
        (NormKind::NaiveRms, NormKind::Rms, "OpenELM"),
        (NormKind::Layer, NormKind::Layer, "OpenELMLayerNorm"),
    ] {
        let directory = TempDir::new().unwrap();
        hf::write(directory.path(), &of(written), &weights(), tokens).unwrap();
        assert_eq!(hf::read(directory.path()).unwrap().config.norm, read);
        // The code beside it has the classes that the config names.
        let (module, code) = hf::MODELING;
        let file = |name| std::fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(file(module), code);
        let config: serde_json::Value = serde_json::from_str(&file("config.json")).unwrap();
        assert_eq!(config["architectures"][0], format!("{name}ForCausalLM"));
        let module = module.strip_suffix(".py").unwrap();
        for (auto, class) in [("AutoConfig", "Config"), ("AutoModelForCausalLM", "ForCausalLM")] {
            assert_eq!(config["auto_map"][auto], format!("{module}.{name}{class}"));
            assert!(code.contains(&format!("\nclass {name}{class}(")), "{name}{class}");
        }
        assert!(
            code.contains(&format!("model_type = {}\n", config["model_type"])),
            "{}",
            config["model_type"]
        );
    }
}

#[test]
fn the_published_field_layout_is_kept() {
    let (config, tokens) = hf::read_config(&golden("")).unwrap();
    assert_eq!(config.num_gqa_groups, 2);
    let written: serde_json::Value =
        serde_json::from_str(&hf::config_json(&config, tokens, WeightType::F32)).unwrap();
    let golden = json("config.json");
    for (key, value) in golden.as_object().unwrap() {
        let equal = match (value.as_f64(), written[key].as_f64()) {
            (Some(expected), Some(found)) => expected == found,
            _ => *value == written[key],
        };
        assert!(equal, "{key}: {} for {value}", written[key]);
    }
    let of_ours = ["auto_map"];
    let keys = written.as_object().unwrap().keys().filter(|key| !of_ours.contains(&key.as_str()));
    assert!(keys.eq(golden.as_object().unwrap().keys()));
}

#[test]
fn multipliers_may_be_a_number_a_pair_or_a_list() {
    let ffn_dims = |value: serde_json::Value| {
        let directory = directory();
        let path = directory.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["ffn_multipliers"] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let (config, _) = hf::read_config(directory.path()).unwrap();
        config.layers().iter().map(|layer| layer.ffn_dim).collect::<Vec<_>>()
    };
    assert_eq!(ffn_dims(serde_json::json!(2.0)), [32, 32, 32]);
    assert_eq!(ffn_dims(serde_json::json!([0.5, 2.0])), [8, 24, 32]);
    assert_eq!(ffn_dims(serde_json::json!([1, 0.5, 3])), [16, 8, 48]);
}

#[test]
fn half_precision_weights_are_read() {
    let f16s = stored(Dtype::F16, |x| f16::from_f32(x).to_le_bytes().to_vec());
    let bf16s = stored(Dtype::BF16, |x| bf16::from_f32(x).to_le_bytes().to_vec());
    for tensors in [f16s, bf16s] {
        let directory = directory();
        store(&directory.path().join("model.safetensors"), &tensors);
        assert_eq!(hf::read(directory.path()).unwrap().weights, weights());
    }
}

#[test]
fn a_copy_of_the_head_and_native_names_are_accepted() {
    let directory = directory();
    let mut tensors = stored_f32();
    let embedding = tensors[0].clone();
    for tensor in &mut tensors {
        tensor.0 = tensor.0.strip_prefix("transformer.").unwrap().to_owned();
    }
    tensors.push(("lm_head.weight".to_owned(), embedding.1, embedding.2, embedding.3));
    store(&directory.path().join("model.safetensors"), &tensors);
    assert_eq!(hf::read(directory.path()).unwrap().weights, weights());
}

#[test]
fn shards_are_put_together() {
    let directory = directory();
    std::fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    let tensors = stored_f32();
    let mut weight_map = BTreeMap::new();
    for (number, part) in tensors.chunks(9).enumerate() {
        let file = format!("model-{number:05}.safetensors");
        store(&directory.path().join(&file), part);
        weight_map.extend(part.iter().map(|tensor| (tensor.0.clone(), file.clone())));
    }
    let index = directory.path().join("model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({ "metadata": {}, "weight_map": weight_map }).to_string())
        .unwrap();
    assert_eq!(hf::read(directory.path()).unwrap().weights, weights());
    std::fs::write(&index, r#"{"weight_map": {"a": "../elsewhere.safetensors"}}"#).unwrap();
    assert!(hf::read(directory.path()).unwrap_err().to_string().contains("not a file of this directory"));
}

#[test]
fn one_file_comes_before_an_index() {
    let directory = directory();
    let index = directory.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "model-00000.safetensors"}}"#).unwrap();
    assert_eq!(hf::read(directory.path()).unwrap().weights, weights());
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_config() {
    let directory = directory();
    let path = directory.path().join("config.json");
    let config = std::fs::read(&path).unwrap();
    std::fs::write(&path, [b"\xef\xbb\xbf".as_slice(), &config].concat()).unwrap();
    assert_eq!(hf::read(directory.path()).unwrap().weights, weights());
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let tensors = stored_f32();
    assert!(
        refused(&tensors[..tensors.len() - 2])
            .contains("2 tensors are missing, the first is transformer.layers.2.attn_norm.weight")
    );
    let with = |change: &dyn Fn(&mut Stored)| {
        let mut tensors = tensors.clone();
        change(&mut tensors[3]);
        refused(&tensors)
    };
    assert!(with(&|t| t.0 = "transformer.layers.9.x".to_owned()).contains("layers.9.x does not belong"));
    assert!(
        with(&|t| t.2 = vec![2, 2]).contains("k_norm.weight has shape [2, 2], and the config asks for [4]")
    );
    assert!(with(&|t| t.1 = Dtype::I32).contains("type I32; F32, F16 and BF16 can be read"));
    let mut twice = tensors.clone();
    twice.push((
        tensors[1].0.replace("transformer.", ""),
        tensors[1].1,
        tensors[1].2.clone(),
        tensors[1].3.clone(),
    ));
    assert!(refused(&twice).contains("is there twice"));
}

#[test]
fn damaged_files_are_refused() {
    let layout = Layout::new(&config());
    let bytes = weights_to_safetensors(&layout, &weights()).unwrap();
    assert_eq!(weights_from_safetensors(&layout, &bytes).unwrap(), weights());
    let refused = |bytes: &[u8]| {
        let error = weights_from_safetensors(&layout, bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        error.to_string()
    };
    assert!(refused(&bytes[..bytes.len() - 1]).contains("its header describes"));
    assert!(refused(&bytes[..100]).contains("not a safetensors file"));
    assert!(refused(&[]).contains("not a safetensors file"));
    assert!(refused(&u64::MAX.to_le_bytes()).contains("its header would have"));
    assert!(matches!(weights_to_safetensors(&layout, &[0.0]), Err(ModelError::Tensors(_))));
}

#[test]
fn what_is_not_computed_is_refused_by_field() {
    for (key, value) in [
        ("model_type", "llama".into()),
        ("activation_fn_name", "gelu".into()),
        ("normalization_layer_name", "batch_norm".into()),
        ("ffn_with_glu", false.into()),
        ("normalize_qk_projections", false.into()),
    ] {
        let message = refused_config(key, value);
        assert!(message.contains("not supported") && message.contains(key), "{message}");
    }
    let heads = refused_config("num_query_heads", serde_json::json!([2, 4, 2]));
    assert!(heads.contains("num_query_heads is [2, 4, 2], but qkv_multipliers give [2, 4, 4]"), "{heads}");
    assert!(refused_config("head_dim", 5.into()).contains("head_dim"));
    assert!(refused_config("ffn_multipliers", serde_json::json!([1, 2, 3, 4])).contains("ffn_multipliers"));
    assert!(refused_config("vocab_size", serde_json::Value::Null).contains("config.json"));
    assert!(refused_config("vocab_size", 48.into()).contains("the config asks for [48, 16]"));
}

/// An untied head is a tensor of its own, and what logits are made with.
#[test]
fn an_untied_head_is_written_and_read() {
    let untied = ModelConfig { share_input_output_layers: false, ..config() };
    let layout = Layout::new(&untied);
    let head = layout.tensor("lm_head.weight").unwrap().range.clone();
    let mut weights: Vec<f32> =
        (0..layout.parameters()).map(|i| (i * 37 % 101) as f32 / 100.0 - 0.5).collect();
    let directory = TempDir::new().unwrap();
    hf::write(directory.path(), &untied, &weights, SpecialTokens::default()).unwrap();
    let read = hf::read(directory.path()).unwrap();
    assert!(!read.config.share_input_output_layers);
    assert!(read.weights == weights);
    let path = directory.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"share_input_output_layers\": false"), "{text}");
    // The same file is not that of a tied model, and a tied one has no head to untie.
    std::fs::write(
        &path,
        text.replace("\"share_input_output_layers\": false", "\"share_input_output_layers\": true"),
    )
    .unwrap();
    assert_eq!(hf::read(directory.path()).unwrap().weights, weights[..head.start]);
    let tied = self::directory();
    let path = tied.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("\"share_input_output_layers\": true", "\"share_input_output_layers\": false"),
    )
    .unwrap();
    let missing = hf::read(tied.path()).unwrap_err().to_string();
    assert!(missing.contains("1 tensors are missing, the first is lm_head.weight"), "{missing}");

    let logits = |config: &ModelConfig, weights: &[f32]| {
        let model = Model::new(Cpu::new(1), config, weights).unwrap();
        let mut generator = Generator::new(Arc::new(model), 8).unwrap();
        generator.feed(&[1, 2, 3]).unwrap().to_vec()
    };
    let of_tied = logits(&config(), &weights[..head.start]);
    assert_ne!(logits(&untied, &weights), of_tied);
    // With a copy of the embedding as its head, it is the tied model.
    let embedding = layout.tensors()[0].range.clone();
    weights.copy_within(embedding, head.start);
    assert_eq!(logits(&untied, &weights), of_tied);
}

#[test]
fn a_missing_directory_is_named() {
    let error = hf::read(Path::new("/nowhere/model")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().starts_with("cannot read /nowhere/model/config.json"));
    let HfModel { weights, .. } = hf::read(directory().path()).unwrap();
    assert!(!weights.is_empty());
}
