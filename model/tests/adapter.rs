//! Tests what training an adapter must and must not do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use ulmus_backend::{IGNORE, Quantum};
use ulmus_conformance::relative_l2;
use ulmus_cpu::Cpu;
use ulmus_model::peft::{self, Adapter};
use ulmus_model::{
    AdapterShape, BatchShape, Layout, LossSum, MicroBatch, ModelError, Objective, Replica, State, StatePart,
    Sums, Tensor,
};
use ulmus_plan::{AdapterConfig, AdapterKind, ModelConfig, Multipliers, TuneConfig};
use ulmus_types::Digest;

const LENGTH: usize = 20;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 97,
        num_transformer_layers: 3,
        model_dim: 48,
        head_dim: 12,
        num_gqa_groups: 2,
        ffn_multipliers: Multipliers::Uniform(2.0),
        ffn_dim_divisor: 20,
        ..ModelConfig::default()
    }
}

/// The weights of a base model.
fn base(config: &ModelConfig) -> Vec<f32> {
    let shape = BatchShape::new(1, 1);
    let mut replica = Replica::new(Cpu::new(1), config, shape, Objective::next_token(0.0)).unwrap();
    replica.initialise(3);
    replica.state().weights
}

fn adapter(kind: AdapterKind, targets: &[&str], dropout: f64) -> AdapterConfig {
    let targets = targets.iter().map(|target| (*target).to_owned()).collect();
    AdapterConfig { kind, targets, dropout, rank: 4, alpha: 6.0, ..AdapterConfig::default() }
}

const EVERYTHING: &[&str] = &["all-linear", "token_embeddings"];

/// Adapters of all kinds, with and without noise.
fn adapters() -> Vec<AdapterConfig> {
    vec![
        adapter(AdapterKind::Lora, EVERYTHING, 0.0),
        adapter(AdapterKind::Lora, EVERYTHING, 0.3),
        adapter(AdapterKind::Dora, &["all-linear"], 0.0),
        adapter(AdapterKind::Dora, &["all-linear"], 0.3),
    ]
}

fn replica_of(
    config: &ModelConfig,
    adapter: &AdapterConfig,
    shape: BatchShape,
    objective: Objective,
    threads: usize,
) -> Replica<Cpu> {
    let adapter = AdapterShape::new(config, adapter).unwrap();
    let mut replica =
        Replica::with_adapter(Cpu::new(threads), config, &adapter, 11, shape, objective).unwrap();
    replica.load_base(base(config).chunks(5000)).unwrap();
    replica.initialise(7);
    replica
}

fn replica(adapter: &AdapterConfig) -> Replica<Cpu> {
    replica_of(&config(), adapter, BatchShape::new(2, LENGTH), Objective::next_token(1e-4), 2)
}

/// Moves an adapter away from its beginning, at which half of its gradients are 0.
fn disturb(replica: &mut Replica<Cpu>) {
    let mut weights = replica.state().weights;
    for (index, weight) in weights.iter_mut().enumerate() {
        *weight += 0.05 * ((index * 7919 % 1009) as f32 / 504.5 - 1.0);
    }
    replica.write_state(StatePart::Weights, 0, &weights);
}

fn batch(seed: usize) -> MicroBatch {
    let tokens =
        |seed: usize| (0..2 * LENGTH).map(|i| ((i * i * 3 + i * 31 + seed * 17) % 97) as u32).collect();
    MicroBatch { number: 40, ..MicroBatch::of_whole_documents(2, LENGTH, tokens(seed), tokens(seed + 1)) }
}

fn gradient(replica: &Replica<Cpu>) -> Vec<f32> {
    let mut gradient = vec![f32::NAN; replica.trainable().parameters()];
    replica.read_gradient(0, &mut gradient);
    gradient
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Along the gradient of each tensor, the loss changes as the gradient says; except those of DoRA's two matrices, in which
/// norms count as constants.
#[test]
fn gradients_are_those_of_the_loss() {
    for adapter in adapters() {
        let is_dora = adapter.kind == AdapterKind::Dora;
        let mut replica = replica(&adapter);
        disturb(&mut replica);
        let objective = *replica.objective();
        let value = |loss: &LossSum| loss.ce + objective.mean_z_loss(loss) * loss.valid as f64;
        replica.forward_backward(&batch(1)).unwrap();
        let (gradient, weights) = (gradient(&replica), replica.state().weights);
        let layout = replica.layout().clone();
        let checked = |tensor: &&Tensor| !is_dora || tensor.name.contains("magnitude");
        for Tensor { name, range, .. } in layout.tensors().iter().filter(checked) {
            let slope = &gradient[range.clone()];
            let square: f64 = slope.iter().map(|x| f64::from(*x).powi(2)).sum();
            let step = 0.004 / square.sqrt();
            let mut at = |sign: f64| {
                let moved = weights[range.clone()].iter().zip(slope);
                let moved: Vec<f32> =
                    moved.map(|(weight, slope)| weight + (sign * step * f64::from(*slope)) as f32).collect();
                replica.write_state(StatePart::Weights, range.start, &moved);
                value(&replica.forward_backward(&batch(1)).unwrap())
            };
            let difference = (at(1.0) - at(-1.0)) / (2.0 * step);
            at(0.0);
            assert!(
                (difference / square - 1.0).abs() < 0.02,
                "{name}: {difference} for {square}, {adapter:?}"
            );
        }
    }
}

/// With the norms of LoRA's matrices as its magnitudes, DoRA is LoRA, and so are the gradients in which norms are constants.
#[test]
fn dora_with_the_present_norms_is_lora() {
    let config = config();
    for dropout in [0.0, 0.3] {
        let lora = adapter(AdapterKind::Lora, &["all-linear"], dropout);
        let mut plain = replica(&lora);
        disturb(&mut plain);
        let values = plain.state().weights;
        let shape = AdapterShape::new(&config, &lora).unwrap();
        let merged = shape.merge(&config, base(&config), &values).unwrap();

        let mut scaled = replica(&adapter(AdapterKind::Dora, &["all-linear"], dropout));
        let layout = scaled.layout().clone();
        for Tensor { name, range, .. } in layout.tensors() {
            let own: Vec<f32> = match name.strip_suffix("lora_magnitude_vector") {
                None => values[plain.layout().tensor(name).unwrap().range.clone()].to_vec(),
                Some(module) => {
                    let matrix = Layout::new(&config).tensor(&format!("{module}weight")).unwrap().clone();
                    let rows = merged[matrix.range].chunks(matrix.shape[1]);
                    let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    rows.map(|row| norm(row) as f32).collect()
                }
            };
            scaled.write_state(StatePart::Weights, range.start, &own);
        }
        let losses = [&mut plain, &mut scaled].map(|replica| replica.forward_backward(&batch(1)).unwrap().ce);
        assert!((losses[0] / losses[1] - 1.0).abs() < 1e-6, "{losses:?}");
        let (expected, found) = (gradient(&plain), gradient(&scaled));
        for Tensor { name, range, .. } in plain.layout().tensors() {
            let found = &found[layout.tensor(name).unwrap().range.clone()];
            let difference = relative_l2(found, &expected[range.clone()]);
            assert!(difference < 1e-4, "{name}: {difference:e}");
        }
    }
}

/// A new adapter changes no bit of any score, so that the margins of preferences begin at exactly 0.
#[test]
fn a_new_adapter_changes_nothing() {
    let config = config();
    let shape = BatchShape::new(2, LENGTH);
    let mut plain = Replica::new(Cpu::new(1), &config, shape, Objective::Answers { z_loss: 0.0 }).unwrap();
    let zeros = vec![0.0; plain.layout().parameters()];
    let state = State { weights: base(&config), first_moment: zeros.clone(), second_moment: zeros };
    plain.load_state(&state).unwrap();
    let expected = plain.score(&batch(1)).unwrap();
    for adapter in adapters() {
        let mut replica = replica(&adapter);
        assert_eq!(replica.score(&batch(1)).unwrap(), expected, "{adapter:?}");
        disturb(&mut replica);
        assert_ne!(replica.score(&batch(1)).unwrap(), expected, "{adapter:?}");
    }
}

/// The state, the gradient and everything that is summed over workers hold the adapter, and nothing else.
#[test]
fn only_an_adapter_is_trained_kept_and_sent() {
    let config = config();
    for adapter in adapters() {
        let mut replica = replica(&adapter);
        let shape = AdapterShape::new(&config, &adapter).unwrap();
        let elements = shape.layout().parameters();
        assert!(elements * 10 < Layout::new(&config).parameters() * 4);
        assert_eq!(replica.layout(), shape.layout());
        assert!(StatePart::ALL.into_iter().all(|part| replica.part_len(part) == elements));
        let plain =
            Replica::new(Cpu::new(1), &config, BatchShape::new(2, LENGTH), Objective::next_token(0.0))
                .unwrap();
        let saved = 12 * (Layout::new(&config).parameters() - elements) as u64;
        assert!(replica.planned_bytes() < plain.planned_bytes() + 4 * elements as u64 + 300_000 - saved);

        let quantum = Quantum::new(2 * LENGTH as u64, 1);
        let mut sums = Sums::new(replica.backend(), replica.trainable()).unwrap();
        let before = replica.state();
        let mut reduced = 0;
        let loss = replica.add_gradient(&batch(1), &mut sums, &quantum, |_, range| reduced += range.len());
        assert_eq!((reduced, sums.values().len()), (elements, elements));
        replica.set_mean_gradient(&sums, 0..elements, &quantum, loss.unwrap().valid);
        replica.update(&TuneConfig::default(), 1e-3, 0).unwrap();
        let after = replica.state();
        assert!(before.weights != after.weights && after.first_moment.iter().any(|x| *x != 0.0));

        // The state moves to another replica of the same base.
        let mut other = self::replica(&adapter);
        other.load_state(&after).unwrap();
        assert_eq!(other.state_hash(), replica.state_hash());
        assert_eq!(other.loss(&batch(2)).unwrap(), replica.loss(&batch(2)).unwrap());
        let short = State { weights: vec![0.0; 3], ..after };
        assert!(matches!(other.load_state(&short), Err(ModelError::Tensors(_))));
        assert!(matches!(other.load_base([[0.0; 3]]), Err(ModelError::Tensors(_))));
    }
}

#[test]
fn recomputed_layers_and_threads_change_no_bit() {
    for adapter in adapters() {
        let run = |recompute: bool, threads: usize| {
            let shape = BatchShape { sequences: 2, length: LENGTH, recompute };
            let mut replica = replica_of(&config(), &adapter, shape, Objective::next_token(1e-4), threads);
            disturb(&mut replica);
            let loss = replica.forward_backward(&batch(1)).unwrap();
            (loss, bits(&gradient(&replica)))
        };
        let expected = run(false, 1);
        assert!(run(false, 3) == expected && run(true, 2) == expected, "{adapter:?}");
    }
}

/// The gradient ends at the lowest adapter, wherever that is, and is the same as far as it goes.
#[test]
fn what_is_below_the_lowest_adapter_is_left_out() {
    for kind in [AdapterKind::Lora, AdapterKind::Dora] {
        let mut whole = replica(&adapter(kind, &["all-linear"], 0.2));
        let number = |name: &str| {
            let modules = AdapterShape::new(&config(), &adapter(kind, &["all-linear"], 0.2)).unwrap();
            modules.modules().iter().position(|module| module.name.ends_with(name)).unwrap()
        };
        assert_eq!(number("layers.1.ffn.proj_1"), 6);
        disturb(&mut whole);
        for (target, others) in [
            ("layers.2.ffn.proj_2", &["layers.2.ffn.proj_2"][..]),
            ("layers.1.ffn.proj_1", &["layers.1.ffn.proj_1", "layers.2.attn.qkv_proj"]),
            ("layers.1.attn.out_proj", &["layers.1.attn.out_proj", "layers.2.ffn.proj_1"]),
            ("layers.0.attn.qkv_proj", &["layers.0.attn.qkv_proj"]),
        ] {
            // Without noise, because its stream is that of the adapter's number.
            let mut some = replica(&adapter(kind, others, 0.0));
            let mut all = replica(&adapter(kind, &["all-linear"], 0.0));
            // All other adapters change nothing, so the loss is the same.
            disturb(&mut some);
            let (own, values) = (some.layout().clone(), some.state().weights);
            for tensor in own.tensors() {
                let place = all.layout().tensor(&tensor.name).unwrap().range.start;
                all.write_state(StatePart::Weights, place, &values[tensor.range.clone()]);
            }
            assert_eq!(some.forward_backward(&batch(1)).unwrap(), all.forward_backward(&batch(1)).unwrap());
            let (found, expected) = (gradient(&some), gradient(&all));
            for tensor in own.tensors() {
                let place = all.layout().tensor(&tensor.name).unwrap().range.clone();
                let (found, expected) = (&found[tensor.range.clone()], &expected[place]);
                assert!(found.iter().any(|x| *x != 0.0), "{target}: {}", tensor.name);
                assert_eq!(bits(found), bits(expected), "{target}: {}", tensor.name);
            }
        }
    }
}

/// What dropout leaves out depends on the number of a sequence and on the seed, not on the batch it is in.
#[test]
fn noise_follows_the_number_of_a_sequence() {
    let adapter = adapter(AdapterKind::Lora, &["all-linear"], 0.4);
    let mut replica = replica(&adapter);
    disturb(&mut replica);
    let together = replica.forward_backward(&batch(1)).unwrap();
    let again = replica.forward_backward(&batch(1)).unwrap();
    assert_eq!(together, again);
    let row = |sequence: usize, number: u64| {
        let MicroBatch { inputs, targets, .. } = batch(1);
        let part = |all: Vec<u32>| all[sequence * LENGTH..(sequence + 1) * LENGTH].to_vec();
        MicroBatch { number, ..MicroBatch::of_whole_documents(1, LENGTH, part(inputs), part(targets)) }
    };
    let mut apart = LossSum::default();
    for (sequence, number) in [(0, 40), (1, 41)] {
        apart += replica.forward_backward(&row(sequence, number)).unwrap();
    }
    assert!((apart.ce - together.ce).abs() < 1e-9 * together.ce, "{} {}", apart.ce, together.ce);
    let other = replica.forward_backward(&MicroBatch { number: 41, ..batch(1) }).unwrap();
    assert!((other.ce - together.ce).abs() > 1e-4);
    // Losses that are only measured, and preferences, are without noise.
    let quiet = self::adapter(AdapterKind::Lora, &["all-linear"], 0.0);
    let mut silent = self::replica(&quiet);
    disturb(&mut silent);
    assert_eq!(replica.loss(&batch(1)).unwrap(), silent.forward_backward(&batch(1)).unwrap());
}

#[test]
fn targets_are_names_ends_of_names_or_an_expression() {
    let count = |targets: &[&str]| {
        AdapterShape::new(&config(), &adapter(AdapterKind::Lora, targets, 0.0))
            .map(|shape| shape.modules().len())
    };
    for (targets, expected) in [
        (&["all-linear"][..], 12),
        (&["qkv_proj", "attn.qkv_proj"], 3),
        (&["layers.1.ffn.proj_2"], 1),
        (&["transformer.layers.1.ffn.proj_2"], 1),
        (&["token_embeddings"], 1),
        (EVERYTHING, 13),
        (&[r".*layers\.[02]\.(attn\.qkv_proj|ffn\.proj_2)"], 4),
    ] {
        assert_eq!(count(targets).unwrap(), expected, "{targets:?}");
    }
    for (targets, problem) in [
        (&["q_proj"][..], "target \"q_proj\" matches no module; there are transformer.token_embeddings"),
        (&["proj_1", "roj_2"], "transformer.layers.0 to transformer.layers.2"),
        (&["lm_head"], "\"all-linear\""),
        (&["("], "no regular expression"),
        (&[], "no targets"),
    ] {
        let error = count(targets).unwrap_err();
        assert_eq!(error.kind(), ulmus_types::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(problem), "{error}");
    }
    let refused = |change: &dyn Fn(&mut AdapterConfig)| {
        let mut config = adapter(AdapterKind::Dora, &["all-linear"], 0.0);
        change(&mut config);
        AdapterShape::new(&self::config(), &config).unwrap_err().to_string()
    };
    assert!(refused(&|config| config.targets.push("token_embeddings".to_owned())).contains("no DoRA"));
    assert!(refused(&|config| config.dropout = 1.0).contains("below 1"));
    assert!(refused(&|config| config.rank = 0).contains("rank 0"));
    assert!(refused(&|config| _ = config.rank_pattern.insert("q".to_owned(), 2)).contains("\"q\""));
    let ambiguous = refused(&|config| {
        config.rank_pattern = [("proj_1".to_owned(), 2), ("ffn.proj_1".to_owned(), 3)].into();
    });
    assert!(ambiguous.contains("two values"), "{ambiguous}");
}

#[test]
fn patterns_and_scales_are_those_of_peft() {
    let config = AdapterConfig {
        rank_pattern: [("proj_2".to_owned(), 9)].into(),
        alpha_pattern: [(r"layers\.1\.ffn\.proj_2".to_owned(), 3.0)].into(),
        rank_stabilised: true,
        ..adapter(AdapterKind::Lora, &["all-linear"], 0.0)
    };
    let shape = AdapterShape::new(&self::config(), &config).unwrap();
    for module in shape.modules() {
        let (rank, alpha) = match module.name.as_str() {
            "transformer.layers.1.ffn.proj_2" => (9, 3.0),
            name if name.ends_with("proj_2") => (9, 6.0),
            _ => (4, 6.0),
        };
        assert_eq!((module.rank, module.scale), (rank, alpha / (rank as f64).sqrt()), "{}", module.name);
    }
}

/// A trained adapter of the test's base.
fn trained(config: &AdapterConfig) -> Adapter {
    let mut replica = replica(config);
    disturb(&mut replica);
    let shape = AdapterShape::new(&self::config(), config).unwrap();
    Adapter { shape, weights: replica.state().weights, base: None }
}

#[test]
fn files_hold_an_adapter_as_it_was() {
    for config in adapters() {
        let directory = tempfile::tempdir().unwrap();
        let Adapter { shape, weights, .. } = trained(&config);
        peft::write(directory.path(), &shape, &weights, "base").unwrap();
        let back = peft::read(directory.path(), &self::config()).unwrap();
        assert_eq!((bits(&back.weights), back.shape.modules()), (bits(&weights), shape.modules()));
        assert_eq!((back.shape.config().dropout, back.base), (config.dropout, None));
        let base = Some(Digest::of(b"weights"));
        let tensors = peft::to_safetensors(&shape, &weights, base).unwrap();
        assert_eq!(tensors, peft::to_safetensors(&shape, &weights, base).unwrap());
        assert!(safetensors::SafeTensors::deserialize(&tensors).is_ok());
        std::fs::write(directory.path().join(peft::WEIGHTS), tensors).unwrap();
        assert_eq!(peft::read(directory.path(), &self::config()).unwrap(), Adapter { base, ..back });
    }
}

#[test]
fn what_an_adapter_cannot_be_is_refused_with_what_differs() {
    let directory = tempfile::tempdir().unwrap();
    let Adapter { shape, weights, .. } = trained(&adapter(AdapterKind::Lora, EVERYTHING, 0.0));
    peft::write(directory.path(), &shape, &weights, "base").unwrap();
    let message = |model: &ModelConfig| peft::read(directory.path(), model).unwrap_err().to_string();
    let wider = ModelConfig { vocab_size: 98, ..config() };
    assert!(message(&wider).contains("lora_embedding_A has shape [4, 97]"), "{}", message(&wider));
    let shallower = ModelConfig { num_transformer_layers: 2, ..config() };
    assert!(message(&shallower).contains("does not belong to an adapter"), "{}", message(&shallower));
    let deeper = ModelConfig { num_transformer_layers: 4, ..config() };
    assert!(message(&deeper).contains("tensors are missing"), "{}", message(&deeper));

    let path = directory.path().join(peft::CONFIG);
    let original: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut changed = original.clone();
        changed[key] = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        peft::read(directory.path(), &config())
    };
    for (key, value) in [
        ("bias", "all".into()),
        ("fan_in_fan_out", true.into()),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("init_lora_weights", "pissa".into()),
        ("layers_to_transform", serde_json::json!([1])),
        ("peft_type", "IA3".into()),
        ("some_future_field", 3.into()),
    ] {
        let message = with(key, value).unwrap_err().to_string();
        assert!(message.contains("not supported") && message.contains(key), "{message}");
    }
    for (key, value) in [
        ("some_future_field", serde_json::Value::Null),
        ("other", false.into()),
        ("list", serde_json::json!([])),
        ("peft_version", "0.99".into()),
        ("init_lora_weights", "gaussian".into()),
        ("target_modules", serde_json::json!(".*(proj|proj_.|embeddings)")),
    ] {
        assert!(with(key, value).is_ok(), "{key}");
    }
    assert!(
        with("target_modules", serde_json::json!(["no_such"])).unwrap_err().to_string().contains("no module")
    );
}

/// CoreNet writes the same tensors under other names.
#[test]
fn corenet_s_names_are_accepted() {
    let directory = tempfile::tempdir().unwrap();
    for kind in
        [adapter(AdapterKind::Lora, EVERYTHING, 0.0), adapter(AdapterKind::Dora, &["all-linear"], 0.0)]
    {
        let Adapter { shape, weights, .. } = trained(&kind);
        peft::write(directory.path(), &shape, &weights, "base").unwrap();
        let path = directory.path().join(peft::WEIGHTS);
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let renamed = file.tensors().into_iter().map(|(name, view)| {
            let name = name.strip_prefix("base_model.model.transformer.").unwrap();
            let name = name.strip_suffix(".weight").unwrap_or(name);
            let end = if name.ends_with("_A") && !name.contains("embedding") || name.ends_with("lora_B") {
                ".lora.weight"
            } else {
                ".lora"
            };
            (format!("{name}{end}"), view)
        });
        std::fs::write(&path, safetensors::serialize(renamed, None).unwrap()).unwrap();
        assert_eq!(bits(&peft::read(directory.path(), &config()).unwrap().weights), bits(&weights));
    }
}

fn sequence(length: usize, seed: usize) -> (Vec<u32>, Vec<u32>) {
    let tokens =
        |seed: usize| (0..length).map(|i| ((i * i + i * 29 + seed * 13) % 97) as u32).collect::<Vec<_>>();
    let targets = tokens(seed + 5).into_iter().enumerate();
    (tokens(seed), targets.map(|(i, target)| if i < length / 3 { IGNORE } else { target }).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// The score of a sequence has the same bits whatever else is in its batch, and whatever that was planned for.
    #[test]
    fn a_sequence_has_the_same_bits_in_any_shape(
        length in 1usize..90,
        padding in 0usize..60,
        others in 0usize..3,
        seed in 0usize..50,
    ) {
        let config = config();
        let (inputs, targets) = sequence(length, seed);
        let score = |place: usize, count: usize, width: usize, shape: BatchShape| {
            let mut batch = MicroBatch::of_whole_documents(count, width, Vec::new(), Vec::new());
            for row in 0..count {
                let (mut own, mut aims) = if row == place {
                    (inputs.clone(), targets.clone())
                } else {
                    sequence(width, seed + row + 1)
                };
                own.resize(width, 0);
                aims.resize(width, IGNORE);
                batch.inputs.extend(own);
                batch.targets.extend(aims);
            }
            batch.doc_starts = vec![0; batch.inputs.len()];
            let adapter = adapter(AdapterKind::Dora, &["all-linear"], 0.0);
            let mut replica = replica_of(&config, &adapter, shape, Objective::Answers { z_loss: 0.0 }, 2);
            disturb(&mut replica);
            replica.score(&batch).unwrap()[place]
        };
        let alone = score(0, 1, length, BatchShape::new(1, length));
        prop_assert_eq!(alone.tokens as usize, length - length / 3);
        let width = length + padding;
        let most = BatchShape::new(others + 2, width + 7);
        let beside = score(others, others + 1, width, most);
        prop_assert_eq!(alone.log_probability.to_bits(), beside.log_probability.to_bits());
    }
}
