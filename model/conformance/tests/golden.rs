//! Tests parity with the reference implementation, on numbers that it computed in float32.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::ControlFlow;
use std::sync::Arc;

use ulmus_backend::{Backend, IGNORE, TrainingBackend, WeightFormat};
use ulmus_conformance::reference::{PAD, Tensors, batch, golden, json, largest_difference, mean_gradient};
use ulmus_conformance::relative_l2;
use ulmus_cpu::Cpu;
use ulmus_cuda::Cuda;
use ulmus_model::hf::{self, HfModel};
use ulmus_model::{BatchShape, Generator, Layout, MicroBatch, Model, Objective, Replica, State};
use ulmus_plan::{ModelConfig, Precision, Preset, TrainConfig};

/// Absolute tolerance for logits, which are about 4. The reference differs from a float64 implementation by 8e-6.
const LOGITS: f64 = 1e-4;
/// Absolute tolerance for losses, which are about 6.7.
const LOSS: f64 = 1e-5;
/// Relative tolerance for losses with bf16 products.
const BF16_LOSS: f64 = 0.01;
/// Tolerance for each tensor's gradient, as relative L2.
const GRADIENT: f64 = 1e-4;
/// Tolerance for 30 steps, in which rounding differences grow: absolute for losses, relative for norms.
const TRAINING: f64 = 1e-4;
const Z_LOSS: f64 = 1e-4;
/// The relative error of a product with operands rounded to bf16. Each has a relative error that is uniform up to 2^-9,
/// so this is √2 · 2^-8 / √12.
const BF16_PRODUCT: f64 = 1.6e-3;

/// Defines the same tests for every device. Tests in float32 without training also run on candle.
macro_rules! on_every_device {
    (candle too: $($everywhere:ident),+; $($test:ident),+ $(,)?) => {
        mod cpu {
            $(#[test]
            fn $everywhere() {
                super::$everywhere(&super::Cpu::new(2));
            })+

            $(#[test]
            fn $test() {
                super::$test(&super::Cpu::new(2));
            })+
        }

        mod cuda {
            $(#[test]
            #[ignore = "needs a GPU or the emulator: .ci/run cuda"]
            fn $everywhere() {
                super::$everywhere(&super::Cuda::new(0).unwrap());
            })+

            $(#[test]
            #[ignore = "needs a GPU or the emulator: .ci/run cuda"]
            fn $test() {
                super::$test(&super::Cuda::new(0).unwrap());
            })+
        }

        mod candle {
            $(#[test]
            fn $everywhere() {
                super::$everywhere(&ulmus_candle::Candle::processor());
            })+
        }
    };
}

on_every_device! {
    candle too: logits_of_every_position, greedy_text_of_the_initial_weights;
    logits_in_every_format,
    losses_and_gradients_without_padding,
    losses_and_gradients_with_padding,
    losses_and_gradients_with_bf16_products,
    thirty_steps_of_training_with_bf16_products,
    thirty_steps_of_training,
}

fn model() -> HfModel {
    // The golden directory has another name for the weights file, so config and weights are read separately.
    let (config, tokens) = hf::read_config(&golden("")).unwrap();
    let bytes = std::fs::read(golden("weights.safetensors")).unwrap();
    let weights = ulmus_model::weights_from_safetensors(&Layout::new(&config), &bytes).unwrap();
    HfModel { config, weights, tokens }
}

fn replica<B: TrainingBackend>(
    backend: &B,
    sequences: usize,
    length: usize,
    precision: Precision,
) -> Replica<B> {
    let HfModel { config, weights, .. } = model();
    let backend = backend.clone().with_precision(precision);
    let mut replica =
        Replica::new(backend, &config, BatchShape::new(sequences, length), Objective::next_token(Z_LOSS))
            .unwrap();
    let zeros = vec![0.0; weights.len()];
    replica.load_state(&State { weights, first_moment: zeros.clone(), second_moment: zeros }).unwrap();
    replica
}

fn full_batch() -> MicroBatch {
    let tensors = Tensors::open("forward.safetensors");
    batch(&tensors.shape("input_ids"), tensors.u32("input_ids"), &tensors.u32("targets"))
}

fn padded_batch() -> MicroBatch {
    let tensors = Tensors::open("padded.safetensors");
    batch(&tensors.shape("input_ids"), tensors.u32("input_ids"), &tensors.u32("targets"))
}

fn generator<B: Backend>(backend: &B, config: &ModelConfig, weights: &[f32]) -> Generator<B> {
    let model = Arc::new(Model::new(backend.clone(), config, weights).unwrap());
    Generator::new(model, 2 * config.max_context_length).unwrap()
}

#[test]
fn widths_of_every_layer_of_every_model() {
    let arch = json("arch.json");
    let golden_config = model().config;
    let names = [("OpenELM-270M", Preset::Openelm270m), ("OpenELM-450M", Preset::Openelm450m)];
    let names =
        names.into_iter().chain([("OpenELM-1_1B", Preset::Openelm1_1b), ("OpenELM-3B", Preset::Openelm3b)]);
    let models = names.map(|(name, preset)| (name, preset.config())).chain([("golden-a", golden_config)]);
    for (name, config) in models {
        let expected = &arch["models"][name];
        let numbers = |key: &str| -> Vec<u64> {
            expected[key].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).collect()
        };
        let layers = config.layers();
        assert_eq!(
            layers.iter().map(|l| l.q_heads as u64).collect::<Vec<_>>(),
            numbers("num_query_heads"),
            "{name}"
        );
        assert_eq!(
            layers.iter().map(|l| l.kv_heads as u64).collect::<Vec<_>>(),
            numbers("num_kv_heads"),
            "{name}"
        );
        assert_eq!(
            layers.iter().map(|l| l.ffn_dim as u64).collect::<Vec<_>>(),
            numbers("ffn_dims"),
            "{name}"
        );
        assert_eq!(config.parameters(), expected["total_parameters"].as_u64().unwrap(), "{name}");
        let multipliers: Vec<f64> =
            expected["ffn_multipliers"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(config.ffn_multipliers.expand(config.num_transformer_layers), multipliers, "{name}");
    }
}

#[test]
fn parameters_are_in_the_reference_order() {
    let arch = json("arch.json");
    let expected: Vec<String> = arch["native_parameter_order"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| format!("transformer.{}", name.as_str().unwrap()))
        .collect();
    let layout = Layout::new(&model().config);
    let names: Vec<&str> = layout.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, expected);
}

/// The tolerance is derived as for `every_format_is_close_to_float32` in `generate.rs`, for a model of four layers.
fn logits_in_every_format<B: Backend>(backend: &B) {
    let HfModel { config, weights, .. } = model();
    let tensors = Tensors::open("forward.safetensors");
    let (expected, batch) = (tensors.f32("logits"), full_batch());
    let text = batch.length * config.vocab_size;
    let expected = &expected[text - config.vocab_size..text];
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
    for (format, product) in [
        (WeightFormat::F32, 1e-6),
        (WeightFormat::F16, 1.4e-4),
        (WeightFormat::Bf16, BF16_PRODUCT),
        (WeightFormat::Q8_0, 6.8e-3),
    ] {
        let model = Model::in_format(backend.clone(), &config, &weights, format).unwrap();
        let mut generator = Generator::new(Arc::new(model), batch.length).unwrap();
        let logits = generator.feed(&batch.inputs[..batch.length]).unwrap();
        let error = squares(&mut logits.iter().zip(expected).map(|(a, b)| a - b));
        let error = (error / squares(&mut expected.iter().copied())).sqrt();
        let products = 4.0 * config.num_transformer_layers as f64 + 1.0;
        assert!(error <= 3.0 * products.sqrt() * product, "{format}: {error:.1e}");
    }
}

fn logits_of_every_position<B: Backend>(backend: &B) {
    let HfModel { config, weights, .. } = model();
    let tensors = Tensors::open("forward.safetensors");
    let expected = tensors.f32("logits");
    let batch = full_batch();
    let mut generator = generator(backend, &config, &weights);
    for (tokens, expected) in
        batch.inputs.chunks(batch.length).zip(expected.chunks(batch.length * config.vocab_size))
    {
        generator.reset();
        for (token, expected) in tokens.iter().zip(expected.chunks(config.vocab_size)) {
            let logits = generator.feed(&[*token]).unwrap();
            assert!(largest_difference(logits, expected) < LOGITS);
        }
        // The same text as one prompt.
        generator.reset();
        let last = generator.feed(tokens).unwrap();
        assert!(largest_difference(last, &expected[expected.len() - config.vocab_size..]) < LOGITS);
    }
}

fn losses_and_gradients_without_padding<B: TrainingBackend>(backend: &B) {
    let reference = &json("forward.json")["full"];
    let mut replica = replica(backend, 2, 64, Precision::F32);
    let (loss, gradient) = mean_gradient(&mut replica, &full_batch()).unwrap();
    let (ce, z) = (loss.mean_ce(), Z_LOSS * loss.mean_z());
    assert!((ce - reference["ce_loss"].as_f64().unwrap()).abs() < LOSS, "{ce}");
    assert!((z - reference["z_loss"].as_f64().unwrap()).abs() < LOSS, "{z}");
    assert!((ce + z - reference["total_loss"].as_f64().unwrap()).abs() < LOSS);
    let norm = reference["total_grad_norm"].as_f64().unwrap();
    assert!((replica.gradient_norm() / norm - 1.0).abs() < GRADIENT);
    let gradients = Tensors::open("grads.safetensors");
    for tensor in replica.layout().tensors() {
        let difference = relative_l2(&gradient[tensor.range.clone()], &gradients.f32(&tensor.name));
        assert!(difference < GRADIENT, "{}: {difference:e}", tensor.name);
    }
    // The loss is the same without a gradient, and when the text is scored.
    assert_eq!(replica.loss(&full_batch()).unwrap(), loss);
    let HfModel { config, weights, .. } = model();
    let mut generator = generator(backend, &config, &weights);
    let batch = full_batch();
    let mut scored = 0.0;
    for (tokens, targets) in batch.inputs.chunks(64).zip(batch.targets.chunks(64)) {
        generator.reset();
        scored += generator.score(tokens, targets).unwrap().iter().map(|x| f64::from(*x)).sum::<f64>();
    }
    assert!((scored / loss.valid as f64 - ce).abs() < LOSS);
}

fn losses_and_gradients_with_padding<B: TrainingBackend>(backend: &B) {
    let reference = &json("forward.json")["padded"];
    let tensors = Tensors::open("padded.safetensors");
    let mut replica = replica(backend, 3, 64, Precision::F32);
    let (loss, gradient) = mean_gradient(&mut replica, &padded_batch()).unwrap();
    assert_eq!(loss.valid, reference["valid_targets"].as_u64().unwrap());
    let (ce, z) = (loss.mean_ce(), Z_LOSS * loss.mean_z());
    assert!((ce - reference["ce_loss"].as_f64().unwrap()).abs() < LOSS, "{ce}");
    assert!((z - reference["z_loss_of_valid_positions_only"].as_f64().unwrap()).abs() < LOSS, "{z}");
    // The reference counts (ln V)² for each padded position, a constant that we leave out.
    let constant =
        Z_LOSS * reference["padded_targets"].as_f64().unwrap() / loss.valid as f64 * 512f64.ln().powi(2);
    assert!((constant - reference["z_loss_constant_from_padded_positions"].as_f64().unwrap()).abs() < LOSS);
    assert!((ce + z + constant - reference["total_loss"].as_f64().unwrap()).abs() < LOSS);
    let norm = reference["total_grad_norm"].as_f64().unwrap();
    assert!((replica.gradient_norm() / norm - 1.0).abs() < GRADIENT);
    let embedding = &gradient[replica.layout().tensors()[0].range.clone()];
    let pad_row = &embedding[PAD as usize * 128..][..128];
    assert!(relative_l2(pad_row, &tensors.f32("embedding_grad_pad_row")) < GRADIENT);
    let sampled: Vec<f32> = embedding.iter().step_by(embedding.len() / 2048).take(2048).copied().collect();
    assert!(relative_l2(&sampled, &tensors.f32("embedding_grad_sample")) < GRADIENT);
}

/// Rounding errors of products are independent, so their squares add up: over the 4 products of each layer and the
/// head's in the forward pass, and twice as many in the backward pass. The tolerance is three standard deviations.
fn losses_and_gradients_with_bf16_products<B: TrainingBackend>(backend: &B) {
    let reference = &json("forward.json")["full"];
    let mut replica = replica(backend, 2, 64, Precision::Bf16);
    let (loss, gradient) = mean_gradient(&mut replica, &full_batch()).unwrap();
    let expected = reference["ce_loss"].as_f64().unwrap();
    assert!((loss.mean_ce() / expected - 1.0).abs() < BF16_LOSS, "{}", loss.mean_ce());
    let products: f64 = 3.0 * (4.0 * model().config.num_transformer_layers as f64 + 1.0);
    // On a device with activations of two bytes, the values between products are rounded, too.
    let in_two_bytes = replica.backend().activation_bytes() == 2;
    let roundings = if in_two_bytes { 2.0 } else { 1.0 };
    let tolerance = 3.0 * (roundings * products).sqrt() * BF16_PRODUCT;
    let gradients = Tensors::open("grads.safetensors");
    for tensor in replica.layout().tensors() {
        let difference = relative_l2(&gradient[tensor.range.clone()], &gradients.f32(&tensor.name));
        assert!(difference < tolerance, "{}: {difference:e} of {tolerance:e}", tensor.name);
        // With float32 products, the difference would be much smaller.
        assert!(difference > GRADIENT, "{}: {difference:e}", tensor.name);
    }
}

/// Trains the golden run, and returns the replica after 30 steps.
fn train<B: TrainingBackend>(
    backend: &B,
    precision: Precision,
    check: impl Fn(usize, &serde_json::Value, f64, f64, f64, u64),
) -> Replica<B> {
    let record = json("train.json");
    let tensors = Tensors::open("train_batches.safetensors");
    let shape = tensors.shape("input_ids");
    let (inputs, targets) = (tensors.u32("input_ids"), tensors.u32("targets"));
    let positions = shape[1] * shape[2];
    let recipe = TrainConfig { iterations: 30, warmup: 5, ..TrainConfig::default() };
    let mut replica = replica(backend, shape[1], shape[2], precision);
    for (step, expected) in record["steps"].as_array().unwrap().iter().enumerate() {
        let part = step * positions..(step + 1) * positions;
        let batch = batch(&shape[1..], inputs[part.clone()].to_vec(), &targets[part]);
        let (loss, _) = mean_gradient(&mut replica, &batch).unwrap();
        let norm = replica.update(&recipe, expected["lr"].as_f64().unwrap(), step as u64).unwrap();
        let ignored = batch.targets.iter().filter(|target| **target == IGNORE).count() as f64;
        let constant = Z_LOSS * ignored / loss.valid as f64 * 512f64.ln().powi(2);
        let total = loss.mean_ce() + Z_LOSS * loss.mean_z() + constant;
        check(step, expected, loss.mean_ce(), total, norm, loss.valid);
    }
    replica
}

fn thirty_steps_of_training_with_bf16_products<B: TrainingBackend>(backend: &B) {
    train(backend, Precision::Bf16, |step, expected, ce, _, _, _| {
        let expected = expected["ce_loss"].as_f64().unwrap();
        assert!((ce / expected - 1.0).abs() < BF16_LOSS, "step {step}: {ce} for {expected}");
    });
}

fn thirty_steps_of_training<B: TrainingBackend>(backend: &B) {
    let replica = train(backend, Precision::F32, |step, expected, ce, total, norm, valid| {
        let number = |key: &str| expected[key].as_f64().unwrap();
        assert_eq!(valid, expected["valid_targets"].as_u64().unwrap());
        assert!((ce - number("ce_loss")).abs() < TRAINING, "step {step}: {ce}");
        assert!((total - number("total_loss")).abs() < TRAINING, "step {step}: {total}");
        assert!((norm / number("grad_norm_before_clip") - 1.0).abs() < TRAINING, "step {step}: {norm}");
    });
    let record = json("train.json");
    let state = replica.state();
    for (key, values) in [
        ("final_weight_stats", &state.weights),
        ("final_exp_avg_stats", &state.first_moment),
        ("final_exp_avg_sq_stats", &state.second_moment),
    ] {
        for tensor in replica.layout().tensors() {
            let values = &values[tensor.range.clone()];
            let l2 = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let expected = record[key][&tensor.name]["l2"].as_f64().unwrap();
            assert!((l2 / expected - 1.0).abs() < 5e-4, "{key} {}: {l2} for {expected}", tensor.name);
        }
    }
    let finals = Tensors::open("train_final.safetensors");
    for tensor in replica.layout().tensors() {
        let values = &state.weights[tensor.range.clone()];
        let difference = if finals.has(&tensor.name) {
            relative_l2(values, &finals.f32(&tensor.name))
        } else {
            let sample: Vec<f32> =
                values.iter().step_by((values.len() / 4096).max(1)).take(4096).copied().collect();
            relative_l2(&sample, &finals.f32(&format!("{}@sample", tensor.name)))
        };
        assert!(difference < 1e-4, "{}: {difference:e}", tensor.name);
    }
    let decayed: Vec<&str> =
        record["decayed"].as_array().unwrap().iter().map(|x| x.as_str().unwrap()).collect();
    let ours: Vec<&str> =
        replica.layout().tensors().iter().filter(|t| t.decays()).map(|t| t.name.as_str()).collect();
    assert_eq!(ours, decayed);
    // The greedy text of the trained model agrees token for token.
    let config = model().config;
    for run in json("generate_trained.json")["runs"].as_object().unwrap().values() {
        assert_greedy(&mut generator(backend, &config, &state.weights), run);
    }
}

fn assert_greedy<B: Backend>(generator: &mut Generator<B>, expected: &serde_json::Value) {
    let tokens = |key: &str| -> Vec<u32> {
        expected[key].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    };
    let (expected, mut made) = (tokens("generated"), Vec::new());
    generator
        .generate(&tokens("prompt"), expected.len(), None, |token| {
            made.push(token);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(made, expected);
}

fn greedy_text_of_the_initial_weights<B: Backend>(backend: &B) {
    let HfModel { config, weights, .. } = model();
    let record = json("generate_initial.json");
    assert_greedy(&mut generator(backend, &config, &weights), &record);
    let tensors = Tensors::open("generate_initial.safetensors");
    let tokens = |key: &str| -> Vec<u32> {
        record[key].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    };
    let mut generator = generator(backend, &config, &weights);
    let mut logits = generator.feed(&tokens("prompt")).unwrap().to_vec();
    for (token, expected) in
        tokens("generated").iter().zip(tensors.f32("step_logits").chunks(config.vocab_size))
    {
        assert!(largest_difference(&logits, expected) < LOGITS);
        logits = generator.feed(&[*token]).unwrap().to_vec();
    }
}

#[test]
fn learning_rates_of_the_published_recipes() {
    let lrs = [
        ("OpenELM-270M", 0.0053),
        ("OpenELM-450M", 0.0039),
        ("OpenELM-1_1B", 0.0024),
        ("OpenELM-3B", 0.0012),
    ];
    let schedule = json("schedule.json");
    for (name, max_lr) in lrs {
        let recipe = TrainConfig { max_lr, min_lr: max_lr / 10.0, ..TrainConfig::default() };
        for row in schedule["models"][name].as_array().unwrap() {
            let lr = recipe.learning_rate(row["iteration"].as_u64().unwrap());
            assert_eq!(lr, row["lr_used"].as_f64().unwrap(), "{name} {row}");
        }
    }
}
