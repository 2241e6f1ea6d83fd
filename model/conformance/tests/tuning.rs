//! Tests parity of fine-tuning with TRL and PEFT, on numbers that they computed in float32.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use ulmus_backend::{IGNORE, Quantum, TrainingBackend};
use ulmus_conformance::reference::{Tensors, largest_difference};
use ulmus_conformance::relative_l2;
use ulmus_cpu::Cpu;
use ulmus_cuda::Cuda;
use ulmus_model::hf::{self, HfModel};
use ulmus_model::peft::{self, Adapter};
use ulmus_model::{
    AdapterShape, Answer, BatchShape, Generator, Layout, LossSum, MicroBatch, Model, Objective, Preference,
    Replica, SequenceScore, State, Sums, Tensor,
};
use ulmus_plan::{AdapterConfig, PreferenceLoss, TuneConfig};

/// Absolute tolerance for log-probabilities of answers, which are up to 200 nats.
const LOG_PROBABILITY: f64 = 5e-4;
/// Absolute tolerance for losses.
const LOSS: f64 = 1e-5;
/// Relative tolerance for losses that are squares of large numbers.
const SQUARED_LOSS: f64 = 1e-4;
/// Relative tolerance for norms of gradients.
const NORM: f64 = 5e-5;
/// Tolerance for gradients, adapters and final weights, as relative L2.
const WEIGHTS: f64 = 1e-4;
/// Absolute tolerance for logits.
const LOGITS: f64 = 2e-4;
/// Absolute tolerance for the difference that merging makes to logits.
const MERGED: f64 = 2e-5;

/// Defines the same tests for every device.
macro_rules! on_every_device {
    ($($test:ident),+ $(,)?) => {
        mod cpu {
            $(#[test]
            fn $test() {
                super::$test(&super::Cpu::new(2));
            })+
        }

        mod cuda {
            $(#[test]
            #[ignore = "needs a GPU or the emulator: .ci/run cuda"]
            fn $test() {
                super::$test(&super::Cuda::new(0).unwrap());
            })+
        }
    };
}

on_every_device! {
    supervised_steps,
    preference_steps,
    preference_steps_of_an_adapter,
    adapters_train_as_in_peft,
}

/// The first entries of a list. A processor, and a GPU, take all; the emulator, which is slow, takes fewer.
fn first<'a, B: TrainingBackend>(backend: &B, of: &'a Value, on_emulator: usize) -> &'a [Value] {
    let list = list(of);
    if backend.describe().contains("Emulated") { &list[..on_emulator] } else { list }
}

/// A file of golden numbers. `ULMUS_GOLDEN` names the folder of the others, if tests do not run where they were built.
fn golden(name: &str) -> PathBuf {
    let folder = std::env::var_os("ULMUS_GOLDEN").map(|folder| Path::new(&folder).join(".."));
    folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")).join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(&format!("tune/{name}"))).unwrap()).unwrap()
}

fn tensors(name: &str) -> Tensors {
    Tensors::at(&golden(&format!("tune/{name}")))
}

fn model() -> HfModel {
    hf::read(&golden("tiny")).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    list(value).iter().map(number).collect()
}

fn indices(value: &Value) -> Vec<usize> {
    list(value).iter().map(|x| x.as_u64().unwrap() as usize).collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    list(value).iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// Token ids, and the label of each: itself, or nothing.
#[derive(Debug, Clone)]
struct Row {
    ids: Vec<u32>,
    labels: Vec<Option<u32>>,
}

impl Row {
    fn new(ids: &Value, labels: &Value) -> Self {
        let labels = list(labels).iter().map(|label| label.as_i64().filter(|label| *label != -100));
        Self { ids: tokens(ids), labels: labels.map(|label| label.map(|label| label as u32)).collect() }
    }

    /// A row of which everything is a label, except the first token, which nothing predicts.
    fn whole(ids: Vec<u32>) -> Self {
        Self { labels: ids.iter().map(|id| Some(*id)).collect(), ids }
    }

    fn answer(prompt: &Value, answer: &Value) -> Self {
        let (mut ids, answer) = (tokens(prompt), tokens(answer));
        let labels = vec![None; ids.len()].into_iter().chain(answer.iter().map(|id| Some(*id))).collect();
        ids.extend(answer);
        Self { ids, labels }
    }

    fn cut(mut self, length: usize) -> Self {
        self.ids.truncate(length);
        self.labels.truncate(length);
        self
    }
}

/// A micro-batch as long as its longest row.
fn batch(rows: &[&Row], number: u64) -> MicroBatch {
    let length = rows.iter().map(|row| row.ids.len() - 1).max().unwrap();
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for row in rows {
        let end = inputs.len() + length;
        inputs.extend(&row.ids[..row.ids.len() - 1]);
        targets.extend(row.labels[1..].iter().map(|label| label.unwrap_or(IGNORE)));
        inputs.resize(end, 0);
        targets.resize(end, IGNORE);
    }
    MicroBatch { number, ..MicroBatch::of_whole_documents(rows.len(), length, inputs, targets) }
}

fn replica<B: TrainingBackend>(backend: &B, shape: BatchShape, objective: Objective) -> Replica<B> {
    let HfModel { config, weights, .. } = model();
    let mut replica = Replica::new(backend.clone(), &config, shape, objective).unwrap();
    let zeros = vec![0.0; weights.len()];
    replica.load_state(&State { weights, first_moment: zeros.clone(), second_moment: zeros }).unwrap();
    replica
}

fn adapted<B: TrainingBackend>(
    backend: &B,
    adapter: &Adapter,
    shape: BatchShape,
    objective: Objective,
) -> Replica<B> {
    let HfModel { config, weights, .. } = model();
    let mut replica =
        Replica::with_adapter(backend.clone(), &config, &adapter.shape, 0, shape, objective).unwrap();
    replica.load_base([&weights]).unwrap();
    let (weights, zeros) = (adapter.weights.clone(), vec![0.0; adapter.weights.len()]);
    replica.load_state(&State { weights, first_moment: zeros.clone(), second_moment: zeros }).unwrap();
    replica
}

/// One update, through exact sums. Returns the losses, the norm of the mean gradient, and that gradient.
fn update<B: TrainingBackend>(
    replica: &mut Replica<B>,
    batches: &[MicroBatch],
    recipe: &TuneConfig,
    lr: f64,
    step: u64,
) -> (LossSum, f64, Vec<f32>) {
    let positions: usize = batches.iter().map(|batch| batch.inputs.len()).sum();
    let quantum = Quantum::new(positions as u64, batches.len() as u64);
    let mut sums = Sums::new(replica.backend(), replica.trainable()).unwrap();
    let mut loss = LossSum::default();
    for batch in batches {
        loss += replica.add_gradient(batch, &mut sums, &quantum, |_, _| {}).unwrap();
    }
    let parameters = replica.trainable().parameters();
    let divisor = replica.objective().divisor(&loss);
    replica.set_mean_gradient(&sums, 0..parameters, &quantum, divisor);
    let mut gradient = vec![0.0; parameters];
    replica.read_gradient(0, &mut gradient);
    (loss, replica.update(recipe, lr, step).unwrap(), gradient)
}

fn recipe(beta2: f64) -> TuneConfig {
    TuneConfig { beta2, ..TuneConfig::default() }
}

fn assert_near(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() < tolerance, "{what}: {found} for {expected}");
}

fn assert_final_weights(layout: &Layout, weights: &[f32], finals: &Tensors, run: &str, sample: usize) {
    for Tensor { name, range, .. } in layout.tensors() {
        let values = &weights[range.clone()];
        let whole = format!("{run}/{name}");
        let difference = if finals.has(&whole) {
            relative_l2(values, &finals.f32(&whole))
        } else {
            let step = (values.len() / sample).max(1);
            let sampled: Vec<f32> = values.iter().step_by(step).take(sample).copied().collect();
            relative_l2(&sampled, &finals.f32(&format!("{whole}@sample")))
        };
        assert!(difference < WEIGHTS, "{run} {name}: {difference:e}");
    }
}

fn supervised_steps<B: TrainingBackend>(backend: &B) {
    let finals = tensors("sft_final.safetensors");
    let file = json("sft.json");
    for run in first(backend, &file["runs"], 1) {
        let name = run["name"].as_str().unwrap();
        let rows: Vec<Row> =
            list(&run["tokens"]).iter().map(|row| Row::new(&row["ids"], &row["labels"]).cut(96)).collect();
        let mut replica = replica(backend, BatchShape::new(2, 96), Objective::Answers { z_loss: 0.0 });
        let steps = first(backend, &run["steps"], 3);
        for (step, expected) in steps.iter().enumerate() {
            let chosen: Vec<&Row> = indices(&expected["rows"]).into_iter().map(|row| &rows[row]).collect();
            let batches: Vec<MicroBatch> = chosen.chunks(2).map(|rows| batch(rows, 0)).collect();
            let lr = number(&expected["lr"]);
            let (loss, norm, _) = update(&mut replica, &batches, &recipe(0.999), lr, step as u64);
            let what = format!("{name}, step {step}");
            assert_eq!(loss.valid, expected["label_tokens"].as_u64().unwrap(), "{what}");
            assert_near(&what, replica.objective().mean_loss(&loss), number(&expected["loss"]), LOSS);
            assert_near(&what, norm / number(&expected["grad_norm"]), 1.0, NORM);
        }
        if steps.len() == list(&run["steps"]).len() {
            assert_final_weights(replica.layout(), &replica.state().weights, &finals, name, 1024);
        }
    }
}

/// The chosen and the rejected answer of a pair.
type Pair = [Row; 2];

fn preference(run: &Value) -> Preference {
    let loss: PreferenceLoss = serde_json::from_value(run["loss_type"].clone()).unwrap();
    let label_smoothing = run["label_smoothing"].as_f64().unwrap_or(0.0);
    Preference { loss, beta: number(&run["beta"]), label_smoothing, length_normalised: false }
}

fn pair_batches(pairs: &[Pair], chosen: &[usize]) -> Vec<MicroBatch> {
    let rows: Vec<&Row> = chosen.iter().flat_map(|index| &pairs[*index]).collect();
    rows.chunks(4).map(|rows| batch(rows, 0)).collect()
}

/// Compares steps on pairs with the record of a run; answers whether these were all steps.
fn compare_preference_steps<B: TrainingBackend>(
    replica: &mut Replica<B>,
    pairs: &[Pair],
    run: &Value,
    what: &str,
) -> bool {
    let steps = first(replica.backend(), &run["steps"], 3).len();
    // The reference is the model at its beginning, by its own forward pass.
    let references: Vec<[f64; 2]> = (0..pairs.len())
        .map(|index| {
            let scores = replica.score(&pair_batches(pairs, &[index])[0]).unwrap();
            [scores[0].log_probability, scores[1].log_probability]
        })
        .collect();
    for (step, expected) in list(&run["steps"])[..steps].iter().enumerate() {
        let what = format!("{what}, step {step}");
        let chosen = indices(&expected["rows"]);
        let mut batches = pair_batches(pairs, &chosen);
        for (at, row) in chosen.iter().enumerate() {
            for (side, key) in ["chosen", "rejected"].into_iter().enumerate() {
                let reference = numbers(&expected[format!("reference_{key}")])[at];
                assert_near(
                    &format!("{what}, reference"),
                    references[*row][side],
                    reference,
                    LOG_PROBABILITY,
                );
                batches[at / 2].references.push(references[*row][side]);
            }
        }
        let policy = batches.iter().flat_map(|batch| replica.score(batch).unwrap()).collect::<Vec<_>>();
        for (at, answers) in policy.chunks(2).enumerate() {
            for (side, key) in ["chosen", "rejected"].into_iter().enumerate() {
                let expected = numbers(&expected[format!("policy_{key}")])[at];
                assert_near(
                    &format!("{what}, policy"),
                    answers[side].log_probability,
                    expected,
                    LOG_PROBABILITY,
                );
            }
        }
        let lr = number(&expected["lr"]);
        let (loss, norm, _) = update(replica, &batches, &recipe(0.999), lr, step as u64);
        let objective = *replica.objective();
        assert_eq!(loss.pairs.count, 4, "{what}");
        assert_near(&what, objective.mean_loss(&loss), number(&expected["loss"]), LOSS);
        if let Some(losses) = expected["losses"].as_array() {
            let mean = losses.iter().map(number).sum::<f64>() / losses.len() as f64;
            assert_near(&what, objective.mean_loss(&loss), mean, LOSS);
        }
        // Beyond its margin, the hinge loss of every pair is 0 and has no gradient.
        let expected_norm = number(&expected["grad_norm"]);
        assert_near(&what, norm, expected_norm, (NORM * expected_norm).max(f64::MIN_POSITIVE));
        let metrics: Vec<(&str, f64)> =
            objective.metric_names().iter().copied().zip(objective.metrics(&loss)).collect();
        // Before the first rate above 0, the model is its own reference, to the bit.
        if step < 2 {
            let at_rest: Vec<f64> = metrics[..4].iter().map(|(_, value)| *value).collect();
            assert_eq!(at_rest, [0.0; 4], "{what}");
        }
        for (name, value) in metrics {
            let beta = number(&run["beta"]);
            let tolerance =
                if name.starts_with("rewards") { LOG_PROBABILITY * beta } else { LOG_PROBABILITY };
            if let Some(logged) = expected["logged"][name].as_f64() {
                assert_near(&format!("{what}, {name}"), value, logged, tolerance.max(1e-6));
            }
        }
    }
    steps == list(&run["steps"]).len()
}

fn preference_steps<B: TrainingBackend>(backend: &B) {
    let old = json("dpo.json");
    let finals = tensors("dpo_final.safetensors");
    let pairs: Vec<Pair> = list(&old["tokens"]["keep_end"])
        .iter()
        .map(|row| {
            ["chosen", "rejected"]
                .map(|side| Row::new(&row[format!("{side}_input_ids")], &row[format!("{side}_labels")]))
        })
        .collect();
    for run in first(backend, &old["runs"], 1) {
        let name = format!("dpo_{}_{}", run["loss_type"].as_str().unwrap(), run["beta"]);
        let objective = Objective::Preferences(preference(run));
        let mut replica = replica(backend, BatchShape::new(4, 96), objective);
        if compare_preference_steps(&mut replica, &pairs, run, &name) {
            assert_final_weights(replica.layout(), &replica.state().weights, &finals, &name, 512);
        }
    }
    let new = json("dpo_current.json");
    for run in first(backend, &new["runs"], 0) {
        let data = run["data"].as_str().unwrap();
        let objective = Objective::Preferences(preference(run));
        let mut replica = replica(backend, BatchShape::new(4, 96), objective);
        compare_preference_steps(&mut replica, &current_pairs(&new, data), run, data);
    }
}

fn current_pairs(file: &Value, data: &str) -> Vec<Pair> {
    let side = |row: &Value, key: &str| Row::answer(&row["prompt_ids"], &row[key]).cut(96);
    list(&file["tokens"][data])
        .iter()
        .map(|row| ["chosen_ids", "rejected_ids"].map(|key| side(row, key)))
        .collect()
}

fn preference_steps_of_an_adapter<B: TrainingBackend>(backend: &B) {
    let file = json("dpo_current.json");
    let (run, stored) = (&file["lora_run"], tensors("dpo_lora.safetensors"));
    let config = AdapterConfig { rank: 4, alpha: 8.0, ..AdapterConfig::default() };
    let shape = AdapterShape::new(&model().config, &config).unwrap();
    let mut weights = vec![0.0; shape.layout().parameters()];
    for Tensor { name, range, .. } in shape.layout().tensors() {
        weights[range.clone()].copy_from_slice(&stored.f32(&format!("initial/{name}")));
    }
    let objective = Objective::Preferences(preference(run));
    let mut replica =
        adapted(backend, &Adapter { shape, weights, base: None }, BatchShape::new(4, 96), objective);
    let pairs = current_pairs(&file, run["data"].as_str().unwrap());
    if compare_preference_steps(&mut replica, &pairs, run, "LoRA") {
        assert_final_weights(replica.layout(), &replica.state().weights, &stored, "final", 1024);
    }
}

#[test]
fn losses_of_pairs() {
    let file = json("losses.json");
    let sides =
        |key: &str| [numbers(&file[format!("{key}_chosen")]), numbers(&file[format!("{key}_rejected")])];
    let (policy, reference) = (sides("policy"), sides("reference"));
    let mut compared = 0;
    for case in list(&file["cases"]).iter().filter(|case| case["loss_type"] != "kto_pair") {
        let preference = preference(case);
        let count = policy[0].len();
        for pair in 0..count {
            let answer = |side: usize| Answer {
                policy: SequenceScore { log_probability: policy[side][pair], tokens: 1 },
                reference: reference[side][pair],
            };
            let found = preference.pair(answer(0), answer(1));
            let at = |key: &str| numbers(&case[key])[pair];
            let what = format!("{} at pair {pair}", case["loss_type"]);
            assert_near(&what, found.loss, at("losses"), LOSS.max(SQUARED_LOSS * at("losses").abs()));
            for (slope, key) in [(found.chosen, "chosen"), (found.rejected, "rejected")] {
                let expected = at(&format!("d_mean_d_policy_{key}"));
                assert_near(&what, slope / count as f64, expected, 1e-6_f64.max(1e-5 * expected.abs()));
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 8 * 8);
}

#[test]
fn losses_of_pairs_as_computed_today() {
    let file = json("dpo_current.json");
    let inputs = &file["loss_values_inputs"];
    let side = |key: &str, pair: usize| Answer {
        policy: SequenceScore {
            log_probability: numbers(&inputs[format!("policy_{key}")])[pair],
            tokens: tokens(&inputs[format!("{key}_tokens")])[pair].into(),
        },
        reference: numbers(&inputs[format!("reference_{key}")])[pair],
    };
    let mut compared = 0;
    for case in list(&file["loss_values"]) {
        let (loss, length_normalised) = match case["loss_type"].as_str().unwrap() {
            "sigmoid" => (PreferenceLoss::Sigmoid, false),
            "sigmoid_norm" => (PreferenceLoss::Sigmoid, true),
            "hinge" => (PreferenceLoss::Hinge, false),
            "ipo" => (PreferenceLoss::Ipo, false),
            _ => continue,
        };
        let preference =
            Preference { loss, beta: number(&case["beta"]), label_smoothing: 0.0, length_normalised };
        let sum: f64 =
            (0..4).map(|pair| preference.pair(side("chosen", pair), side("rejected", pair)).loss).sum();
        let expected = number(&case["mean_float64"]);
        assert_near(&case.to_string(), sum / 4.0, expected, 1e-9_f64.max(1e-9 * expected));
        compared += 1;
    }
    assert_eq!(compared, 5);
}

/// The logits of every position of some texts of equal length, from the head's input.
fn logits<B: TrainingBackend>(replica: &mut Replica<B>, batch: &MicroBatch, head: &[f32]) -> Vec<f32> {
    let hidden = replica.hidden(batch).unwrap();
    let d = hidden.len() / batch.inputs.len();
    let dot = |x: &[f32], w: &[f32]| {
        x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() as f32
    };
    hidden.chunks(d).flat_map(|x| head.chunks(d).map(move |w| dot(x, w))).collect()
}

fn adapters_train_as_in_peft<B: TrainingBackend>(backend: &B) {
    let file = json("peft.json");
    let rows: Vec<Row> = list(&file["tokens"]).iter().map(|ids| Row::whole(tokens(ids))).collect();
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap();
    let HfModel { config, weights: base, .. } = model();
    let head = &base[Layout::new(&config).tensors()[0].range.clone()];
    let probe: Vec<u32> = list(&file["probe_ids"]).iter().flat_map(tokens).collect();
    let probe = MicroBatch::of_whole_documents(2, probe.len() / 2, probe.clone(), vec![IGNORE; probe.len()]);
    for case in list(&file["cases"]) {
        let name = case["name"].as_str().unwrap();
        let adapter = |of: &str| peft::read(&golden(&format!("tune/peft/{name}/{of}")), &config).unwrap();
        let (initial, trained) = (adapter("initial"), adapter("final"));
        assert_eq!(initial.weights.len() as u64, case["trainable"].as_u64().unwrap(), "{name}");
        let z_loss = number(&case["z_loss"]);
        let shape = BatchShape::new(4, longest);
        let mut replica = adapted(backend, &initial, shape, Objective::Answers { z_loss });
        let stored = tensors(&format!("peft/{name}/grads.safetensors"));
        let steps = first(backend, &case["steps"], 2);
        for (step, expected) in steps.iter().enumerate() {
            let chosen: Vec<&Row> = indices(&expected["rows"]).into_iter().map(|row| &rows[row]).collect();
            let batches = [batch(&chosen, 0)];
            let lr = number(&expected["lr"]);
            let beta2 = number(&case["betas"][1]);
            let (loss, norm, gradient) = update(&mut replica, &batches, &recipe(beta2), lr, step as u64);
            let what = format!("{name}, step {step}");
            assert_near(&what, loss.mean_ce(), number(&expected["ce"]), LOSS);
            let z_loss = replica.objective().mean_z_loss(&loss);
            assert_near(&format!("{what}, z-loss"), z_loss, number(&expected["z_loss"]), LOSS);
            assert_near(&what, norm / number(&expected["grad_norm"]), 1.0, NORM);
            if step == 0 || step == 10 {
                for tensor in replica.layout().tensors() {
                    let expected = stored_tensor(&stored, &format!("step{step}"), tensor);
                    let found = &gradient[tensor.range.clone()];
                    let difference = relative_l2(found, &expected);
                    // What has no gradient yet must have none.
                    let is_zero = expected.iter().all(|x| *x == 0.0) && found.iter().all(|x| *x == 0.0);
                    assert!(is_zero || difference < WEIGHTS, "{what}, {}: {difference:e}", tensor.name);
                }
            }
        }
        if steps.len() < list(&case["steps"]).len() {
            continue;
        }
        let found = replica.state().weights;
        for Tensor { name: tensor, range, .. } in replica.layout().tensors() {
            let difference = relative_l2(&found[range.clone()], &trained.weights[range.clone()]);
            assert!(difference < WEIGHTS, "{name}, {tensor}: {difference:e}");
        }
        assert_merges(backend, name, &trained, &base, head, &probe);
    }
}

/// A tensor of a record, in the layout that it has in memory.
fn stored_tensor(stored: &Tensors, step: &str, tensor: &Tensor) -> Vec<f32> {
    let name = format!("{step}/{}", tensor.name);
    let values = stored.f32(&if stored.has(&name) { name } else { format!("{name}.weight") });
    if !tensor.name.ends_with("lora_embedding_A") {
        return values;
    }
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    (0..values.len()).map(|at| values[at % columns * rows + at / columns]).collect()
}

/// Compares the logits of a trained adapter with the record, and with those of the merged model.
fn assert_merges<B: TrainingBackend>(
    backend: &B,
    name: &str,
    trained: &Adapter,
    base: &[f32],
    head: &[f32],
    probe: &MicroBatch,
) {
    let config = model().config;
    let stored = tensors(&format!("peft/{name}/logits.safetensors"));
    let shape = BatchShape::new(2, probe.length);
    let mut replica = adapted(backend, trained, shape, Objective::next_token(0.0));
    let unmerged = logits(&mut replica, probe, head);
    let difference = largest_difference(&unmerged, &stored.f32("adapter"));
    assert!(difference < LOGITS, "{name}: {difference:e}");

    let merged = trained.shape.merge(&config, base.to_vec(), &trained.weights).unwrap();
    let merged_config = trained.shape.merged_config(&config);
    let layout = Layout::new(&merged_config);
    let record = tensors(&format!("peft/{name}/merged.safetensors"));
    for Tensor { name: tensor, range, .. } in layout.tensors() {
        let found = &merged[range.clone()];
        if record.has(tensor) && tensor != "lm_head.weight" {
            let difference = relative_l2(found, &record.f32(tensor));
            assert!(difference < WEIGHTS, "{name}, {tensor}: {difference:e}");
        } else {
            // All others, and the head that the embedding was tied to, are those of the base model.
            let tensor =
                if tensor == "lm_head.weight" { "transformer.token_embeddings.weight" } else { tensor };
            let of_base = Layout::new(&config).tensor(tensor).unwrap().range.clone();
            assert_eq!(found, &base[of_base], "{name}, {tensor}");
        }
    }
    let model = Arc::new(Model::new(backend.clone(), &merged_config, &merged).unwrap());
    let mut generator = Generator::new(model, probe.length).unwrap();
    let mut found = Vec::new();
    for text in probe.inputs.chunks(probe.length) {
        generator.reset();
        for token in text {
            found.extend_from_slice(generator.feed(&[*token]).unwrap());
        }
    }
    let difference = largest_difference(&found, &unmerged);
    assert!(difference < MERGED, "{name}: merging changes logits by {difference:e}");
}
