//! What a worker relies on: bits depend on nothing but the data, documents do not see each other, bad numbers are caught,
//! and memory is as planned.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use ulmus_backend::{Backend as _, BackendError, IGNORE, Quantum, TrainingBackend as _};
use ulmus_conformance::reference::mean_gradient;
use ulmus_conformance::relative_l2;
use ulmus_cpu::Cpu;
use ulmus_model::{
    AdapterShape, Answer, BatchShape, LossSum, MicroBatch, ModelError, Objective, Preference, Replica,
    SequenceScore, State, StatePart, Sums,
};
use ulmus_plan::{
    AdapterConfig, AdapterKind, MemoryPlan, Method, ModelConfig, Multipliers, NormKind, Precision,
    PreferenceLoss, TrainConfig, TuneConfig, tuning_memory, worker_memory,
};

const OBJECTIVE: Objective = Objective::next_token(1e-4);

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 97,
        max_context_length: 96,
        num_transformer_layers: 3,
        model_dim: 48,
        head_dim: 12,
        num_gqa_groups: 2,
        qkv_multipliers: Multipliers::Layers(vec![0.5, 1.0]),
        ffn_multipliers: Multipliers::Layers(vec![0.5, 2.0]),
        ffn_dim_divisor: 20,
        rope_freq_constant: 10_000.0,
        norm: NormKind::Rms,
        share_input_output_layers: true,
    }
}

fn recipe() -> TrainConfig {
    TrainConfig { iterations: 10, warmup: 2, max_lr: 0.01, min_lr: 0.001, ..TrainConfig::default() }
}

/// Tokens of a small pseudo-random language.
fn tokens(len: usize, seed: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 97
        })
        .collect()
}

fn micro_batch(seed: u32) -> MicroBatch {
    let (sequences, length) = (2, 80);
    let mut targets = tokens(sequences * length, seed + 1000);
    targets[5..9].fill(IGNORE);
    MicroBatch::of_whole_documents(sequences, length, tokens(sequences * length, seed), targets)
}

fn replica(threads: usize) -> Replica<Cpu> {
    let mut replica = Replica::new(Cpu::new(threads), &config(), BatchShape::new(2, 80), OBJECTIVE).unwrap();
    replica.initialise(11);
    replica
}

/// One step whose micro-batches are dealt to several workers; all of them apply the same mean gradient.
fn distributed_step(workers: &mut [Replica<Cpu>], batches: &[u32], step: u64) -> Vec<(LossSum, f64)> {
    let quantum = Quantum::new(160 * batches.len() as u64, batches.len() as u64);
    let (count, parameters) = (workers.len(), workers[0].trainable().parameters());
    let (mut ce, mut z, mut valid) = (0i64, 0i64, 0);
    let mut all: Vec<Sums<Cpu>> = Vec::new();
    for (worker, replica) in workers.iter_mut().enumerate() {
        let mut own = Sums::new(replica.backend(), replica.trainable()).unwrap();
        for seed in batches.iter().skip(worker).step_by(count) {
            let mut complete = 0;
            let loss = replica.add_gradient(&micro_batch(*seed), &mut own, &quantum, |_, range| {
                complete += range.len();
            });
            assert_eq!(complete, parameters);
            let loss = loss.unwrap();
            ce += quantum.loss_to_fixed(loss.ce).unwrap();
            z += quantum.loss_to_fixed(loss.z).unwrap();
            valid += loss.valid;
        }
        all.push(own);
    }
    let mut total = vec![0i64; parameters];
    for (worker, own) in workers.iter().zip(&mut all) {
        worker.backend().on_host(own.values(), |own| {
            total.iter_mut().zip(own).for_each(|(total, own)| *total += *own);
        });
    }
    let loss = LossSum {
        ce: Quantum::loss_from_fixed(ce),
        z: Quantum::loss_from_fixed(z),
        valid,
        ..LossSum::default()
    };
    workers
        .iter_mut()
        .zip(all)
        .map(|(replica, mut sums)| {
            replica.backend().upload(sums.values(), &total);
            replica.set_mean_gradient(&sums, 0..parameters, &quantum, valid);
            (loss, replica.update(&recipe(), recipe().learning_rate(step), step).unwrap())
        })
        .collect()
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_bits() {
    let run = |workers: usize, threads: usize, batches: &[u32]| {
        let mut workers: Vec<_> = (0..workers).map(|_| replica(threads)).collect();
        let losses: Vec<_> = (0..3).map(|step| distributed_step(&mut workers, batches, step)[0]).collect();
        let hashes: Vec<_> = workers.iter().map(Replica::state_hash).collect();
        assert!(hashes.iter().all(|hash| *hash == hashes[0]));
        (losses, hashes[0])
    };
    let batches = [1, 2, 3, 4, 5];
    let reference = run(1, 1, &batches);
    assert!(reference.0[2].0.mean_ce() < reference.0[0].0.mean_ce(), "training on the same data learns it");
    for (workers, threads) in [(1, 2), (1, 3), (2, 1), (3, 2), (5, 1)] {
        assert_eq!(run(workers, threads, &batches), reference, "{workers} workers, {threads} threads");
    }
    assert_eq!(run(2, 1, &[4, 1, 5, 3, 2]), reference, "another order");
}

/// Trains on the same data again and again with every kind of norm; the norm changes what is computed.
#[test]
fn training_lowers_the_loss_with_every_norm() {
    let last = NormKind::ALL.map(|norm| {
        let config = ModelConfig { norm, ..config() };
        let mut replica = Replica::new(Cpu::new(2), &config, BatchShape::new(2, 80), OBJECTIVE).unwrap();
        replica.initialise(11);
        let mut loss =
            |step| distributed_step(std::slice::from_mut(&mut replica), &[1, 2], step)[0].0.mean_ce();
        let first = loss(0);
        let last = (1..8).map(loss).last().unwrap();
        assert!(last < first - 1.0, "{}: from {first} to {last}", norm.name());
        last
    });
    assert!(last[0] != last[2], "layer norm is another model");
    assert!((last[0] / last[1] - 1.0).abs() < 1e-4, "both RMS norms are the same: {last:?}");
}

#[test]
fn gradients_have_the_same_bits_for_any_number_of_threads() {
    for norm in NormKind::ALL {
        let config = ModelConfig { norm, ..config() };
        let hash = |threads| {
            let mut replica =
                Replica::new(Cpu::new(threads), &config, BatchShape::new(2, 80), OBJECTIVE).unwrap();
            replica.initialise(11);
            let loss = replica.forward_backward(&micro_batch(7)).unwrap();
            (loss, replica.gradient_hash())
        };
        let one = hash(1);
        assert_eq!(hash(2), one);
        assert_eq!(hash(3), one);
    }
}

#[test]
fn a_single_micro_batch_is_its_own_exact_sum() {
    let (mut through_sums, mut in_place) = (replica(2), replica(2));
    let quantum = Quantum::new(160, 1);
    let parameters = through_sums.trainable().parameters();
    let mut sums = Sums::new(through_sums.backend(), through_sums.trainable()).unwrap();
    // A new sum has nothing of the one before.
    for seed in [3, 7] {
        sums.clear();
        let loss = through_sums.add_gradient(&micro_batch(seed), &mut sums, &quantum, |_, _| {}).unwrap();
        through_sums.set_mean_gradient(&sums, 0..parameters, &quantum, loss.valid);
        assert_eq!(in_place.forward_backward(&micro_batch(seed)).unwrap(), loss);
        in_place.quantise_mean_gradient(&quantum, loss.valid).unwrap();
        assert_eq!(in_place.gradient_hash(), through_sums.gradient_hash());
    }
    in_place.gradient_on_host(|gradient| gradient[77] = f32::NAN);
    assert!(matches!(in_place.quantise_mean_gradient(&quantum, 160), Err(ModelError::GradientRange { .. })));
}

/// Texts are longer and layers wider here, so that products are large enough to be split over threads.
#[test]
fn larger_products_have_the_same_bits_for_any_number_of_threads() {
    let config = ModelConfig {
        vocab_size: 1024,
        model_dim: 256,
        head_dim: 32,
        ffn_dim_divisor: 256,
        num_transformer_layers: 2,
        ..config()
    };
    let batch = MicroBatch::of_whole_documents(2, 256, tokens(512, 1), tokens(512, 2));
    let hash = |threads, precision, recompute| {
        let backend = Cpu::new(threads).with_precision(precision);
        let shape = BatchShape { sequences: 2, length: 256, recompute };
        let mut replica = Replica::new(backend, &config, shape, OBJECTIVE).unwrap();
        replica.initialise(1);
        replica.forward_backward(&batch).unwrap();
        replica.gradient_hash()
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let one = hash(1, precision, false);
        assert_eq!(hash(2, precision, false), one);
        assert_eq!(hash(3, precision, true), one, "layers that are computed again");
    }
    assert_ne!(hash(1, Precision::F32, false), hash(1, Precision::Bf16, false));
}

/// A micro-batch's gradient, as a sum over its tokens.
fn summed_gradient(config: &ModelConfig, batch: &MicroBatch) -> (LossSum, Vec<f32>) {
    summed_gradient_of(OBJECTIVE, config, batch)
}

fn summed_gradient_of(objective: Objective, config: &ModelConfig, batch: &MicroBatch) -> (LossSum, Vec<f32>) {
    let shape = BatchShape::new(batch.sequences, batch.length);
    let mut replica = Replica::new(Cpu::new(2), config, shape, objective).unwrap();
    replica.initialise(3);
    let loss = replica.forward_backward(batch).unwrap();
    let mut gradient = vec![0.0; replica.trainable().parameters()];
    replica.read_gradient(0, &mut gradient);
    (loss, gradient)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Documents packed into one sequence give the sum of what each gives alone.
    #[test]
    fn packed_documents_do_not_see_each_other(lengths in prop::collection::vec(1usize..60, 2..5), seed in 0u32..1000) {
        let length: usize = lengths.iter().sum();
        let (inputs, targets) = (tokens(length, seed), tokens(length, seed + 1));
        let mut doc_starts = Vec::new();
        let (mut alone_loss, mut alone) = (LossSum::default(), Vec::new());
        for document in &lengths {
            let part = doc_starts.len()..doc_starts.len() + document;
            doc_starts.extend(std::iter::repeat_n(part.start as u32, *document));
            let batch = MicroBatch::of_whole_documents(
                1, *document, inputs[part.clone()].to_vec(), targets[part].to_vec(),
            );
            let (loss, gradient) = summed_gradient(&config(), &batch);
            alone_loss += loss;
            alone.resize(gradient.len(), 0.0);
            alone.iter_mut().zip(gradient).for_each(|(sum, x): (&mut f32, f32)| *sum += x);
        }
        let packed = MicroBatch { sequences: 1, length, inputs, targets, doc_starts, ..MicroBatch::default() };
        let (loss, gradient) = summed_gradient(&config(), &packed);
        prop_assert!((loss.ce / alone_loss.ce - 1.0).abs() < 1e-5);
        prop_assert!((loss.z / alone_loss.z - 1.0).abs() < 1e-5);
        prop_assert_eq!(loss.valid, alone_loss.valid);
        prop_assert!(relative_l2(&gradient, &alone) < 1e-5);
    }
}

/// Where only what labels depend on is computed, losses are those of all rows, bit for bit in float32, and so is the gradient but
/// for the order of its sums; a batch smaller than the planned shape has those of a replica that was planned for it.
#[test]
fn prompts_and_padding_need_no_logits_and_no_full_shape() {
    let untied = ModelConfig { share_input_output_layers: false, ..config() };
    for config in [config(), untied] {
        let labelled = |position: usize| position % 40 > 25 && position % 40 < 37;
        for targets in [
            (0..80).map(|position| if labelled(position) { 5 + position as u32 } else { IGNORE }).collect(),
            vec![IGNORE; 80],
        ] {
            let batch = MicroBatch::of_whole_documents(2, 40, tokens(80, 1), targets);
            let (expected, gradient) = summed_gradient(&config, &batch);
            let objective = Objective::Answers { z_loss: 1e-4 };
            let mut replica = Replica::new(Cpu::new(2), &config, BatchShape::new(3, 64), objective).unwrap();
            replica.initialise(3);
            // What an earlier batch left behind does not matter.
            let other = MicroBatch::of_whole_documents(3, 64, tokens(192, 3), tokens(192, 4));
            replica.forward_backward(&other).unwrap();
            assert_eq!(replica.forward_backward(&batch).unwrap(), expected);
            let mut found = vec![f32::NAN; gradient.len()];
            replica.read_gradient(0, &mut found);
            assert!(found == gradient || relative_l2(&found, &gradient) < 1e-6);
        }
    }
}

/// A pair has the losses of its answers alone, bit for bit, and the sum of their gradients, although it has its prompt once.
#[test]
fn a_shared_prompt_changes_nothing() {
    let preference = Preference {
        loss: PreferenceLoss::Sigmoid,
        beta: 0.1,
        label_smoothing: 0.0,
        length_normalised: false,
    };
    let (length, prompt) = (40, 17);
    let (mut inputs, mut targets) = (tokens(4 * length, 1), tokens(4 * length, 2));
    let ends = [length, length - 9, prompt + 1, length - 2];
    for (sequence, end) in ends.into_iter().enumerate() {
        let own = sequence * length;
        let chosen = (sequence & !1) * length;
        inputs.copy_within(chosen..chosen + prompt, own);
        targets[own..own + prompt - 1].fill(IGNORE);
        targets[own + end..own + length].fill(IGNORE);
    }
    // The second pair is no pair of answers to one prompt.
    inputs[3 * length] = (inputs[3 * length] + 1) % 97;
    let part = |sequence: usize| sequence * length..sequence * length + ends[sequence];
    let alone: Vec<(LossSum, Vec<f32>)> = (0..4)
        .map(|sequence| {
            let (inputs, targets) = (inputs[part(sequence)].to_vec(), targets[part(sequence)].to_vec());
            let batch = MicroBatch::of_whole_documents(1, ends[sequence], inputs, targets);
            summed_gradient_of(Objective::Answers { z_loss: 0.0 }, &config(), &batch)
        })
        .collect();
    let references: Vec<f64> = alone.iter().map(|(loss, _)| 0.5 - loss.ce).collect();
    let batch = MicroBatch { references, ..MicroBatch::of_whole_documents(4, length, inputs, targets) };
    let (loss, gradient) = summed_gradient_of(Objective::Preferences(preference), &config(), &batch);
    let mut expected = vec![0.0; gradient.len()];
    for pair in [0, 2] {
        let answer = |sequence: usize| Answer {
            policy: SequenceScore { log_probability: -alone[sequence].0.ce, tokens: alone[sequence].0.valid },
            reference: batch.references[sequence],
        };
        let slopes = preference.pair(answer(pair), answer(pair + 1));
        for (slope, sequence) in [(slopes.chosen, pair), (slopes.rejected, pair + 1)] {
            // The log-probability falls as the cross-entropy rises.
            expected.iter_mut().zip(&alone[sequence].1).for_each(|(sum, x)| *sum -= slope as f32 * x);
        }
    }
    assert_eq!(loss.pairs.chosen, -(alone[0].0.ce + alone[2].0.ce));
    assert_eq!(loss.pairs.rejected, -(alone[1].0.ce + alone[3].0.ce));
    assert!(relative_l2(&gradient, &expected) < 1e-5, "{}", relative_l2(&gradient, &expected));
}

#[test]
fn pairs_without_references_are_refused() {
    let preference = Preference {
        loss: PreferenceLoss::Sigmoid,
        beta: 0.1,
        label_smoothing: 0.0,
        length_normalised: false,
    };
    let objective = Objective::Preferences(preference);
    let mut replica = Replica::new(Cpu::new(1), &config(), BatchShape::new(2, 20), objective).unwrap();
    replica.initialise(5);
    let mut batch = MicroBatch::of_whole_documents(2, 20, tokens(40, 1), tokens(40, 2));
    assert!(matches!(replica.forward_backward(&batch), Err(ModelError::Batch(_))));
    // Its own scores are references from which nothing differs.
    batch.references = replica.score(&batch).unwrap().iter().map(|score| score.log_probability).collect();
    let loss = replica.forward_backward(&batch).unwrap();
    assert_eq!(objective.metrics(&loss)[..4], [0.0; 4]);
    assert_eq!(objective.mean_loss(&loss), 2f64.ln());
    assert_eq!((loss.valid, objective.divisor(&loss)), (40, 1));
    // Pairs without a label have no gradient.
    let nothing = MicroBatch { targets: vec![IGNORE; 40], references: vec![0.0; 2], ..batch };
    assert_eq!(replica.forward_backward(&nothing).unwrap().valid, 0);
    assert_eq!(replica.gradient_norm(), 0.0);
}

#[test]
fn masked_positions_count_for_nothing() {
    let (inputs, targets) = (tokens(40, 1), tokens(40, 2));
    let whole = MicroBatch::of_whole_documents(1, 20, inputs[..20].to_vec(), targets[..20].to_vec());
    let mut padded = MicroBatch::of_whole_documents(1, 40, inputs, targets);
    padded.targets[20..].fill(IGNORE);
    let ((loss, gradient), (padded_loss, padded_gradient)) =
        (summed_gradient(&config(), &whole), summed_gradient(&config(), &padded));
    assert_eq!(loss.valid, padded_loss.valid);
    assert!((loss.ce - padded_loss.ce).abs() < 1e-4);
    assert!(relative_l2(&padded_gradient, &gradient) < 1e-5);
    padded.targets.fill(IGNORE);
    let (loss, gradient) = summed_gradient(&config(), &padded);
    assert_eq!(loss, LossSum::default());
    assert!(gradient.iter().all(|x| *x == 0.0));
}

#[test]
fn numbers_that_are_not_finite_stop_the_step() {
    let mut replica = replica(1);
    let quantum = Quantum::new(160, 1);
    let parameters = replica.layout().parameters();
    let loss = replica.forward_backward(&micro_batch(1)).unwrap();
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        replica.gradient_on_host(|gradient| gradient[77] = bad);
        let error = replica.quantise_mean_gradient(&quantum, loss.valid).unwrap_err();
        assert!(matches!(error, ModelError::GradientRange { .. }), "{error}");
    }
    replica.gradient_on_host(|gradient| gradient[77] = f32::INFINITY);
    let before = replica.state_hash();
    assert!(matches!(replica.update(&recipe(), 0.01, 0), Err(ModelError::GradientNorm { .. })));
    assert_eq!(replica.state_hash(), before);
    // A weight that is NaN shows in the loss and in the gradient.
    replica.write_state(StatePart::Weights, 0, &vec![f32::NAN; parameters]);
    let loss = replica.forward_backward(&micro_batch(1)).unwrap();
    assert!(loss.ce.is_nan());
    assert_eq!(quantum.loss_to_fixed(loss.ce), None);
    let mut sums = Sums::new(replica.backend(), replica.trainable()).unwrap();
    let added = replica.add_gradient(&micro_batch(1), &mut sums, &quantum, |_, _| {});
    assert!(matches!(added, Err(ModelError::GradientRange { .. })));
    // The next gradient is judged on its own.
    replica.initialise(11);
    sums.clear();
    replica.add_gradient(&micro_batch(1), &mut sums, &quantum, |_, _| {}).unwrap();
}

#[test]
fn clipping_bounds_the_step() {
    // Plain sign-like first step: with clip tiny, the moments are those of the scaled gradient.
    let mut replica = replica(1);
    let (_, gradient) = mean_gradient(&mut replica, &micro_batch(1)).unwrap();
    let clip = 1e-3;
    let norm = replica.update(&TrainConfig { clip, ..recipe() }, 0.0, 0).unwrap();
    let exact = gradient.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    assert!((norm / exact - 1.0).abs() < 1e-12);
    let first = replica.state().first_moment;
    let scaled: Vec<f32> =
        gradient.iter().map(|g| (f64::from(*g) * clip / (norm + 1e-6) * 0.1) as f32).collect();
    assert!(relative_l2(&first, &scaled) < 1e-6);
}

#[test]
fn the_state_moves_to_another_replica() {
    let mut one = replica(1);
    mean_gradient(&mut one, &micro_batch(1)).unwrap();
    one.update(&recipe(), 0.01, 0).unwrap();
    let mut other = Replica::new(Cpu::new(1), &config(), BatchShape::new(2, 80), OBJECTIVE).unwrap();
    assert_ne!(other.state_hash(), one.state_hash());
    other.load_state(&one.state()).unwrap();
    assert_eq!(other.state_hash(), one.state_hash());
    // In pieces, as it travels to a worker that joins.
    let mut third = Replica::new(Cpu::new(2), &config(), BatchShape::new(2, 80), OBJECTIVE).unwrap();
    let parameters = one.layout().parameters();
    for part in StatePart::ALL {
        for start in (0..parameters).step_by(1000) {
            let mut piece = vec![0.0; 1000.min(parameters - start)];
            one.read_state(part, start, &mut piece);
            third.write_state(part, start, &piece);
        }
    }
    assert_eq!(third.state_hash(), one.state_hash());
    assert_eq!(third.state(), one.state());
    for replica in [&mut one, &mut other, &mut third] {
        mean_gradient(replica, &micro_batch(2)).unwrap();
        replica.update(&recipe(), 0.01, 1).unwrap();
    }
    assert_eq!(one.state_hash(), other.state_hash());
    assert_eq!(one.state_hash(), third.state_hash());
}

#[test]
fn seeds_decide_the_initial_state() {
    let mut replica = replica(1);
    let first = replica.state_hash();
    mean_gradient(&mut replica, &micro_batch(1)).unwrap();
    replica.update(&recipe(), 0.01, 0).unwrap();
    replica.initialise(11);
    assert_eq!(replica.state_hash(), first, "moments are zero again");
    replica.initialise(12);
    assert_ne!(replica.state_hash(), first);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut replica = replica(1);
    let wrong = MicroBatch::of_whole_documents(1, 81, tokens(81, 1), tokens(81, 2));
    assert!(matches!(replica.forward_backward(&wrong), Err(ModelError::Batch(_))));
    let short = State { weights: vec![0.0], first_moment: vec![0.0], second_moment: vec![0.0] };
    assert!(matches!(replica.load_state(&short), Err(ModelError::Tensors(_))));
    assert!(matches!(
        Replica::new(Cpu::new(1), &config(), BatchShape::new(0, 80), OBJECTIVE),
        Err(ModelError::Batch(_))
    ));
    assert!(matches!(Cpu::new(1).allocate::<f32>(usize::MAX / 8), Err(BackendError::OutOfMemory { .. })));
}

#[test]
fn memory_is_what_the_plan_says() {
    let shapes = [(1, 1), (2, 80), (3, 7), (1, 96)];
    let untied = ModelConfig { share_input_output_layers: false, ..config() };
    let configs = [config(), untied, ModelConfig { model_dim: 24, head_dim: 32, ..config() }];
    let configs =
        configs.iter().flat_map(|config| NormKind::ALL.map(|norm| ModelConfig { norm, ..config.clone() }));
    for (config, (sequences, length)) in
        configs.flat_map(|config| shapes.map(|shape| (config.clone(), shape)))
    {
        let train = |count: u64, recompute| TrainConfig {
            sequences: count * sequences as u64,
            micro_batch: sequences as u64,
            recompute,
            ..TrainConfig::default()
        };
        for recompute in [false, true] {
            let shape = BatchShape { sequences, length, recompute };
            let replica = Replica::new(Cpu::new(1), &config, shape, OBJECTIVE).unwrap();
            let plan = worker_memory(&config, &train(1, recompute), length);
            assert_eq!(replica.planned_bytes(), plan.total);
        }
        let plan = worker_memory(&config, &train(2, false), length);
        assert_eq!(plan.reduction, 8 * config.parameters());
    }
}

#[test]
fn memory_of_tuning_is_what_the_plan_says() {
    let adapter = |kind, targets: &[&str], dropout| AdapterConfig {
        kind,
        rank: 5,
        dropout,
        targets: targets.iter().map(|&target| target.to_owned()).collect(),
        rank_pattern: [("layers.1.ffn.proj_2".to_owned(), 7)].into(),
        ..AdapterConfig::default()
    };
    let adapters = [
        None,
        Some(adapter(AdapterKind::Lora, &["all-linear", "token_embeddings"], 0.1)),
        Some(adapter(AdapterKind::Lora, &["token_embeddings"], 0.0)),
        Some(adapter(AdapterKind::Dora, &["all-linear"], 0.1)),
        Some(adapter(AdapterKind::Dora, &["qkv_proj", "layers.1.ffn.proj_2"], 0.0)),
    ];
    for (adapter, method) in
        adapters.iter().flat_map(|adapter| [Method::Sft, Method::Dpo].map(|method| (adapter, method)))
    {
        for (recompute, micro_batch, max_length) in [(false, 3, 41), (true, 2, 80), (true, 1, 2)] {
            let (batch, adapter) = (micro_batch, adapter.clone());
            let tune = TuneConfig {
                method,
                batch,
                micro_batch,
                max_length,
                recompute,
                adapter,
                ..TuneConfig::default()
            };
            let sequences = (micro_batch * tune.sequences_per_example()) as usize;
            let shape = BatchShape { sequences, length: tune.positions(), recompute };
            let objective = match method {
                Method::Sft => Objective::Answers { z_loss: 0.0 },
                Method::Dpo => Objective::Preferences(Preference {
                    loss: PreferenceLoss::Sigmoid,
                    beta: 0.1,
                    label_smoothing: 0.0,
                    length_normalised: false,
                }),
            };
            let (cpu, config) = (Cpu::new(1), config());
            let replica = match &tune.adapter {
                None => Replica::new(cpu, &config, shape, objective),
                Some(adapter) => {
                    let adapter = AdapterShape::new(&config, adapter).unwrap();
                    Replica::with_adapter(cpu, &config, &adapter, 0, shape, objective)
                }
            };
            let (replica, plan) = (replica.unwrap(), tuning_memory(&config, &tune));
            let MemoryPlan { parameters, gradients, optimizer, activations, loading, total, .. } = plan;
            let training = parameters + gradients + optimizer + activations;
            assert_eq!(replica.planned_bytes(), training, "{tune:?}");
            assert_eq!(total, training.max(parameters + optimizer + loading));
            let several = TuneConfig { batch: 2 * batch, ..tune };
            let sums = 8 * replica.trainable().parameters() as u64;
            assert_eq!(tuning_memory(&config, &several).reduction, sums);
        }
    }
}
