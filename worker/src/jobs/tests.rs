//! Jobs on a run with 40 small files and synthetic weights.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use ulmus_backend::WeightFormat;
use ulmus_checkpoint::{Manifest, Store, commit, write_part};
use ulmus_cpu::Cpu;
use ulmus_evaluator::{continuations, load_model, load_tokenizer, perplexity, synthetic_weights};
use ulmus_model::{Layout, weights_to_safetensors};
use ulmus_run::TrainState;
use ulmus_run::results::Average;
use ulmus_types::{
    BadUnit, CheckpointId, CheckpointKind, Digest, ErrorKind, FileEntry, Generation, RunId, StageName, Step,
    Subject,
};

use super::base::Base;
use super::*;

/// A plan whose text is in a folder of 40 files. Tests override some of its keys.
const PLAN: &str = r#"
    [run]
    name = "small"
    [tokenizer]
    file = "TOKENIZER"
    [model]
    vocab_size = 640
    max_context_length = 64
    num_transformer_layers = 1
    model_dim = 32
    head_dim = 16
    num_gqa_groups = 1
    ffn_dim_divisor = 16
    [data]
    lanes = 1
    min_characters = 1
    min_tokens = 1
    holdout = 0.5
    [[data.source]]
    name = "texts"
    url = "TEXTS"
    files = ["*.txt"]
    text = "text"
    [train]
    iterations = 10
    warmup = 1
    sequences = 2
    micro_batch = 2
    [checkpoint]
    every = 10
    average = 1
    [evaluate]
    prompt = 4
    continuation = 4
    [benchmark]
    prompt = 2
    generate = 2
    runs = 1
"#;

/// A run in its own folder, and what its jobs told a person.
struct Fixture {
    run: Run,
    said: RefCell<Vec<String>>,
    home: TempDir,
    _runtime: Runtime,
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny").join(name)
}

impl Fixture {
    fn with_tokenizer(tokenizer: &Path, overrides: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let texts = home.path().join("texts");
        std::fs::create_dir(&texts).unwrap();
        for number in 0..40 {
            let text = format!("Text number {number} has some words. ").repeat(12);
            std::fs::write(texts.join(format!("{number:02}.txt")), text).unwrap();
        }
        let plan =
            PLAN.replace("TOKENIZER", tokenizer.to_str().unwrap()).replace("TEXTS", texts.to_str().unwrap());
        Self::of(home, &plan, overrides)
    }

    fn of(home: TempDir, plan: &str, overrides: &[&str]) -> Self {
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let plan = ulmus_plan::read(plan, &overrides).unwrap_or_else(|problems| panic!("{problems}"));
        let store = Store::create(home.path().join("run").to_str().unwrap()).unwrap();
        let runtime = Runtime::new().unwrap();
        let id = RunId::from_bytes([1; 16]);
        let run = Run::new(id, plan.into_iter().next().unwrap(), store, runtime.handle().clone());
        Self { run, said: RefCell::default(), home, _runtime: runtime }
    }

    fn new(overrides: &[&str]) -> Self {
        Self::with_tokenizer(&golden("tokenizer.model"), overrides)
    }

    fn work(&self, job: &Job) -> Result<Value, WorkerError> {
        let result = work(&self.run, &Cpu::new(1), 1, job, &|text| self.said.borrow_mut().push(text))?;
        let graph = self.run.plan.graph();
        let kind = graph.stage(job.stage()).unwrap().kind;
        results::check(&job.name(), kind, &result).unwrap_or_else(|error| panic!("{error}"));
        Ok(serde_json::from_str(&result).unwrap())
    }

    /// Does everything that comes before the jobs on finished models, with synthetic weights.
    fn train(&self) -> Value {
        let prepared = self.work(&job("prepare")).unwrap_or_else(|error| panic!("{error}"));
        let model = &self.run.plan.model;
        let file = weights_to_safetensors(&Layout::new(model), &synthetic_weights(model)).unwrap();
        let manifest = Average {
            checkpoints: vec![last()],
            files: [(paths::WEIGHTS.to_owned(), FileEntry::of(&file))].into(),
            weights: Digest::of(&file),
        };
        self.run.write(paths::AVERAGE, file).unwrap();
        self.run.write(paths::AVERAGE_MANIFEST, results::to_json(&manifest)).unwrap();
        prepared
    }
}

/// The job of a stage. If it reads checkpoints, it reads the last one.
fn job(stage: &str) -> Job {
    let reads = ["evaluate-last", "continuations"].contains(&stage);
    Job::new(stage.parse().unwrap(), Subject::Stage(if reads { vec![last()] } else { Vec::new() }))
}

fn last() -> CheckpointId {
    CheckpointId::new(StageName::pretraining(), Step::new(10), Generation::new(1))
}

#[test]
fn a_run_without_held_out_text_says_so_before_it_trains_and_is_finished() {
    for (overrides, before, why) in [
        (&["data.holdout=0", "train.held_out_every=0"][..], true, "data.holdout is 0"),
        (&["data.holdout=1e-9"], true, "none falls into the share data.holdout = 0.000000001"),
        (
            &["data.holdout=0", "train.held_out_every=0", "data.pack=corenet", "data.piece_words=8"],
            true,
            "data.holdout is 0",
        ),
        (&["evaluate.text=0"], false, "evaluate.text is 0"),
    ] {
        let fixture = Fixture::new(overrides);
        let prepared = fixture.train();
        assert_eq!(prepared["held_out"], !before);
        let said = fixture.said.take();
        assert_eq!(said.len(), usize::from(before), "{said:?}");
        for text in said {
            assert!(text.contains(why) && text.contains("larger data.holdout"), "{text}");
            assert_eq!(text.contains("train.held_out_every is 5000"), overrides.len() == 1, "{text}");
        }
        for job in [job("evaluate-average"), job("evaluate-last"), job("continuations")] {
            let result = fixture.work(&job).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(result.as_object().unwrap().len(), 1);
            assert!(result["skipped"].as_str().unwrap().contains(why), "{result}");
        }
        fixture.work(&job("export")).unwrap();
        fixture.work(&job("benchmark")).unwrap();
    }
    let fixture = Fixture::new(&[]);
    assert_eq!(fixture.train()["held_out"], true);
    assert!(fixture.work(&job("evaluate-average")).unwrap()["loss"].as_f64().unwrap() > 0.0);
    assert!(fixture.said.take().is_empty());
}

#[test]
fn a_unit_that_only_the_evaluation_needs_is_left_out_of_it() {
    let gone = |overrides: &[&str]| {
        let fixture = Fixture::new(&[&["data.unit=64KiB", "evaluate.text=256KiB"], overrides].concat());
        let path = |number: usize| fixture.home.path().join(format!("texts/{number:02}.txt"));
        // Two of these files do not fit in one unit.
        for number in 0..40 {
            std::fs::write(path(number), format!("Text number {number} has some words. ").repeat(1700))
                .unwrap();
        }
        fixture.train();
        (0..40).step_by(3).for_each(|number| std::fs::remove_file(path(number)).unwrap());
        fixture
    };
    let fixture = gone(&[]);
    let result = fixture.work(&job("evaluate-average")).unwrap_or_else(|error| panic!("{error}"));
    let left_out = result["left_out"].as_array().unwrap();
    assert!(left_out.len() > 1 && result["documents"].as_u64().unwrap() > 0, "{result}");
    let first = left_out[0].as_str().unwrap();
    assert!(first.starts_with("unit 0 of source \"texts\" is skipped in the evaluation: "), "{first}");
    assert!(first.contains("00.txt"), "{first}");
    assert_eq!(json!(fixture.said.take()), result["left_out"]);
    let left_out = left_out.len();

    // The coordinator quarantines units as in training, up to its limit.
    let fixture = gone(&["data.on_bad_unit=quarantine", "data.max_bad_units=1"]);
    let unit = fixture.work(&job("evaluate-average")).unwrap_err().bad_unit().unwrap();
    assert_eq!(unit, BadUnit { source: "texts".to_owned(), unit: 0 });
    fixture.run.write("quarantine.json", json!([[unit, "it is gone"]]).to_string().into_bytes()).unwrap();
    let result = fixture.work(&job("evaluate-average")).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(result["left_out"].as_array().unwrap().len() + 1, left_out);
}

#[test]
fn a_damaged_average_is_never_used() {
    let fixture = Fixture::new(&[]);
    fixture.train();
    let whole = fixture.run.read(paths::AVERAGE).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [flipped, whole[..whole.len() - 4].to_vec()] {
        fixture.run.write(paths::AVERAGE, damaged).unwrap();
        for job in [job("evaluate-average"), job("export"), job("benchmark")] {
            let error = fixture.work(&job).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().starts_with("average/model.safetensors is damaged"), "{error}");
        }
    }
    fixture.run.write(paths::AVERAGE, whole.clone()).unwrap();
    fixture.work(&job("evaluate-average")).unwrap();
    let manifest = fixture.run.read(paths::AVERAGE_MANIFEST).unwrap();
    for (path, contents) in [(paths::AVERAGE, &whole), (paths::AVERAGE_MANIFEST, &manifest)] {
        fixture.run.wait(fixture.run.store.delete(path)).unwrap();
        assert_eq!(fixture.work(&job("export")).unwrap_err().kind(), ErrorKind::Corrupt, "{path} is gone");
        fixture.run.write(path, contents.clone()).unwrap();
    }
    fixture.run.write(paths::AVERAGE_MANIFEST, b"{".to_vec()).unwrap();
    let error = fixture.work(&job("export")).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("average/manifest.json"));
}

#[test]
fn a_tokenizer_that_the_model_has_no_room_for_is_refused_before_training() {
    for rows in [512, 300] {
        let error = Fixture::new(&[&format!("model.vocab_size={rows}")]).work(&job("prepare")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let text = error.to_string();
        assert!(text.contains(&format!("513 rows of model.vocab_size = {rows}; set it to 640")), "{text}");
    }
}

/// A byte-level tokenizer with one special token, which ends documents. It has none that begins them.
fn without_bos() -> Value {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let spelt = |byte: u8| {
        if plain(byte) {
            return char::from(byte);
        }
        char::from_u32(256 + (0..byte).filter(|byte| !plain(*byte)).count() as u32).unwrap()
    };
    let vocab: serde_json::Map<_, _> =
        (0..=u8::MAX).map(|byte| (spelt(byte).to_string(), json!(byte))).collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false}],
        "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    })
}

#[test]
fn whatever_is_exported_can_be_loaded() {
    let fixture = tempfile::tempdir().unwrap();
    let without_bos_path = fixture.path().join("tokenizer.json");
    std::fs::write(&without_bos_path, without_bos().to_string()).unwrap();
    let json_named = ["tokenizer.bos=<s>", "tokenizer.eos=</s>"];
    for (tokenizer, overrides) in [
        (golden("tokenizer.model"), &["model.vocab_size=513"][..]),
        (golden("tokenizer.model"), &["model.vocab_size=4096"]),
        (golden("tokenizer.model"), &["model.vocab_size=1792", "tokenizer.bos=<unk>"]),
        (golden("tokenizer.json"), &["model.vocab_size=5003", json_named[0], json_named[1]]),
        (golden("tokenizer.json"), &["model.vocab_size=640", json_named[1], "model.norm=naive_rms"]),
        (without_bos_path.clone(), &["model.vocab_size=258", "model.max_context_length=12"]),
        (without_bos_path, &["model.vocab_size=10000", "model.rope_freq_constant=1e300"]),
        // Multipliers that need more than two decimals.
        (
            golden("tokenizer.model"),
            &[
                "model.num_transformer_layers=2",
                "model.model_dim=320",
                "model.ffn_dim_divisor=1",
                "model.ffn_multipliers=0.3333",
                "model.qkv_multipliers=0.777",
            ],
        ),
        (
            golden("tokenizer.model"),
            &[
                "model.num_transformer_layers=3",
                "model.model_dim=320",
                "model.ffn_dim_divisor=1",
                "model.ffn_multipliers=[0.3333, 1.1111, 0.7777]",
                "model.qkv_multipliers=[0.3333, 1.1111]",
            ],
        ),
    ] {
        let fixture = Fixture::with_tokenizer(&tokenizer, overrides);
        fixture.train();
        fixture.work(&job("export")).unwrap_or_else(|error| panic!("{overrides:?}: {error}"));
        let folder = fixture.home.path().join("run/export");
        let loaded = load_model(&folder, Cpu::new(1), WeightFormat::F32);
        let loaded = loaded.unwrap_or_else(|error| panic!("{overrides:?}: {error}"));
        assert_eq!(loaded.model.config().layers(), fixture.run.plan.model.layers(), "{overrides:?}");
        let tokenizer = load_tokenizer(&folder, &loaded);
        let tokenizer = tokenizer.unwrap_or_else(|error| panic!("{overrides:?}: {error}"));
        assert_eq!(tokenizer.digest(), fixture.run.tokenizer().unwrap().digest());
        let texts = ["Some words.".to_owned()];
        continuations(&loaded.model, &tokenizer, &texts, 4, 4).unwrap();
        assert!(perplexity(&loaded.model, &tokenizer, &texts, 12).unwrap().loss > 0.0);
    }
}

/// Stores the fixture's synthetic weights as the checkpoint `id`.
fn store_checkpoint(run: &Run, id: CheckpointId) {
    let weights = run.read(paths::AVERAGE).unwrap();
    let state =
        TrainState { step: id.step(), tokens: 321, quantum: 0.0, cursors: Vec::new(), quarantine: [].into() };
    run.wait(async {
        let mut files = BTreeMap::new();
        for (name, contents) in [(paths::WEIGHTS, weights), (paths::STATE, state.to_json())] {
            files.insert(name.to_owned(), write_part(&run.store, id, name, contents).await.unwrap());
        }
        let digest = run.plan.digest();
        let (kind, run_id) = (CheckpointKind::Milestone, Some(run.id));
        let manifest =
            Manifest { checkpoint: id, kind, run: run_id, plan_digest: digest, state_digest: digest, files };
        commit(&run.store, &manifest).await.unwrap();
    });
}

#[test]
fn a_model_from_elsewhere_is_read_from_where_it_is() {
    let fixture = Fixture::new(&[]);
    fixture.train();
    let run = &fixture.run;
    store_checkpoint(run, last());
    let read = |address: &str| Base::read(run, address);
    // A run finds the others beside it, of which here the only one is itself.
    for address in ["run:run/10", "run:run/average"] {
        let base = read(address).unwrap();
        assert_eq!(base.model.config, run.plan.model, "{address}");
        assert_eq!(base.model.weights, synthetic_weights(&run.plan.model), "{address}");
        let (tokenizer, adds_bos) = base.tokenizer(None).unwrap();
        assert_eq!((tokenizer.digest(), adds_bos), (run.tokenizer().unwrap().digest(), true));
    }
    let folder = golden("");
    let base = read(folder.to_str().unwrap()).unwrap();
    assert_eq!(base.model.config.vocab_size, 512);
    assert_eq!(base.tokenizer(None).unwrap().0.pieces(), 512);
    let checkpoint = folder.join("../corenet/checkpoint_average.pt");
    let base = read(checkpoint.to_str().unwrap()).unwrap();
    assert_eq!(base.model.config.vocab_size, 10);
    assert!(base.tokenizer(None).unwrap_err().to_string().contains("neither tokenizer.model nor"));
    let other = base.tokenizer(Some(&golden("tokenizer.model"))).unwrap_err().to_string();
    assert!(other.contains("512 pieces"), "{other}");

    for (address, said) in [
        ("run:run/11", "no checkpoint after step 11"),
        ("run:run/last", "it has 10, average; write one of these"),
        ("run:run", "write run:run/average, or a step"),
        ("run:other/average", "other is not a folder on this machine"),
        ("run:../average", "run:.."),
        ("nowhere/model", "nowhere/model is not a model folder"),
    ] {
        let error = read(address).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{address}: {error}");
        assert!(error.to_string().contains(said), "{address}: {error}");
    }
    fixture.run.wait(fixture.run.store.delete(paths::AVERAGE_MANIFEST)).unwrap();
    let error = read("run:run/average").map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("there is no average in"), "{error}");
    assert!(error.contains("it has 10; write one of these"), "{error}");
    std::fs::remove_file(fixture.home.path().join("run").join(paths::PLAN)).unwrap();
    let error = read("run:run/average").map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("plan.resolved.toml is lost"), "{error}");
}

#[test]
fn an_export_has_what_transformers_and_people_need() {
    for (norm, class) in [("naive_rms", "OpenELMForCausalLM"), ("layer", "OpenELMLayerNormForCausalLM")] {
        let fixture = Fixture::new(&[&format!("model.norm={norm}")]);
        fixture.train();
        store_checkpoint(&fixture.run, last());
        let listed = fixture.work(&job("export")).unwrap();
        let folder = fixture.home.path().join("run/export");
        let file = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
        for name in std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name()) {
            assert_eq!(listed["files"][name.to_str().unwrap()].is_object(), name != "README.md", "{name:?}");
        }
        let config: Value = serde_json::from_str(&file("config.json")).unwrap();
        assert_eq!(config["auto_map"]["AutoModelForCausalLM"], format!("modeling_openelm.{class}"));
        assert!(file("modeling_openelm.py").contains(&format!("class {class}(")));
        let tokenizer: Value = serde_json::from_str(&file("tokenizer_config.json")).unwrap();
        let expected = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true,
            "clean_up_tokenization_spaces": false, "model_max_length": 64,
        });
        assert_eq!(tokenizer, expected);
        let card = file("README.md");
        for said in [
            "# small\n",
            "for 10 steps of 2 sequences of up to 64 tokens",
            "Its weights are those after step 10.",
            "trained on 321 tokens",
            "| texts | 40 files, 14760 bytes | BLAKE3 of",
        ] {
            assert!(card.contains(said), "{said} in {card}");
        }
        assert!(!card.contains(fixture.home.path().to_str().unwrap()), "{card}");
    }
}

#[test]
fn what_says_how_a_tokenizer_is_used_goes_with_it() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    std::fs::copy(golden("tokenizer.model"), path("named.model")).unwrap();
    std::fs::write(path("chat_template.jinja"), "its own").unwrap();
    let fixture = Fixture::with_tokenizer(&path("named.model"), &[]);
    fixture.work(&job("prepare")).unwrap();
    assert_eq!(fixture.run.read("chat_template.jinja").unwrap(), b"its own");

    // A base whose vocabulary has no row for padding, and calls its tokens by other names.
    let home = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden(name), home.path().join(name)).unwrap();
    }
    let json = std::fs::read_to_string(golden("tokenizer.json")).unwrap();
    let json = json.replace("\"<s>\"", "\"[begin]\"").replace("\"</s>\"", "\"[end]\"");
    std::fs::write(home.path().join("tokenizer.json"), json).unwrap();
    let names = json!({"bos_token": "[begin]", "eos_token": {"content": "[end]"}}).to_string();
    std::fs::write(home.path().join("tokenizer_config.json"), names).unwrap();
    std::fs::write(home.path().join("rows.jsonl"), json!({"text": "a b"}).to_string()).unwrap();
    let (model, rows) =
        (home.path().display().to_string(), home.path().join("rows.jsonl").display().to_string());
    let stage = "name = \"it\"\nof = \"base\"\nmax_length = 64\nbatch = 8\nwarmup = 0";
    let shape = crate::base_shape(&model, "").unwrap();
    let plan = format!("[base]\nmodel = {model:?}\n[[tune]]\n{stage}\n[[tune.data]]\nurl = {rows:?}\n");
    let shape = ulmus_plan::shape_overrides(&shape);
    let fixture = Fixture::of(home, &plan, &shape.iter().map(String::as_str).collect::<Vec<_>>());
    let prepared = fixture.work(&job("prepare")).unwrap();
    assert_eq!(prepared["pieces"], 512);
    assert_eq!(fixture.run.plan.model.vocab_size, 512);
    assert_eq!(fixture.run.tokenizer().unwrap().special_names(), ("[begin]", "[end]"));
    assert_eq!(fixture.work(&job("it-examples")).unwrap()["kept"], 1);
}

#[test]
fn a_stage_begins_from_another_folder_only_with_the_run_s_tokenizer_and_finite_weights() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    // The same pieces in another file are the same tokenizer.
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(golden(name), path(name)).unwrap();
    }
    let home = tempfile::tempdir().unwrap();
    let rows = home.path().join("rows.jsonl");
    std::fs::write(&rows, json!({"text": "a b"}).to_string()).unwrap();
    let (base, of) = (golden("").display().to_string(), place.path().display().to_string());
    let stage = format!("name = \"it\"\nof = {of:?}\nmax_length = 64\nbatch = 8\nwarmup = 0");
    let plan = format!("[base]\nmodel = {base:?}\n[[tune]]\n{stage}\n[[tune.data]]\nurl = {rows:?}\n");
    let shape = ulmus_plan::shape_overrides(&crate::base_shape(&base, "").unwrap());
    let fixture = Fixture::of(home, &plan, &shape.iter().map(String::as_str).collect::<Vec<_>>());
    fixture.work(&job("prepare")).unwrap();
    let made = fixture.work(&job("it-examples")).unwrap();
    let weights = Base::read(&fixture.run, &of).unwrap().model.weights;
    assert_eq!(made["elsewhere"]["of"], Digest::of(bytemuck::cast_slice(&weights)).to_string());
    let refused = |told: &str| {
        let error = fixture.work(&job("it-examples")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains("tune it: ") && error.to_string().contains(told), "{error}");
    };

    let whole = std::fs::read_to_string(path("tokenizer.json")).unwrap();
    let mut other: Value = serde_json::from_str(&whole).unwrap();
    let vocabulary = other["model"]["vocab"].as_object_mut().unwrap();
    let (one, two) = (vocabulary["ic"].clone(), vocabulary["ot"].clone());
    vocabulary.insert("ic".to_owned(), two);
    vocabulary.insert("ot".to_owned(), one);
    std::fs::write(path("tokenizer.json"), other.to_string()).unwrap();
    refused("has another tokenizer than the run");
    std::fs::write(path("tokenizer.json"), "{").unwrap();
    refused("tokenizer.json");
    std::fs::write(path("tokenizer.json"), whole).unwrap();

    let model = &fixture.run.plan.model;
    let mut wrong = weights;
    wrong[7] = f32::NAN;
    std::fs::write(path("model.safetensors"), weights_to_safetensors(&Layout::new(model), &wrong).unwrap())
        .unwrap();
    refused("1 of ");
}
