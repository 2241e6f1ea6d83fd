//! Neither a training step nor a decoded token allocates anything: buffers are planned once, and only the thread pool's
//! queue still grows. The allocations of all threads are counted, so these tests run one at a time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ulmus_backend::{Backend, IGNORE, Quantum, WeightFormat};
use ulmus_cpu::Cpu;
use ulmus_model::{
    AdapterShape, BatchShape, Generator, MicroBatch, Model, Objective, Preference, Replica, Sampler, Sampling,
};
use ulmus_plan::{
    AdapterConfig, AdapterKind, ModelConfig, Multipliers, NormKind, Precision, PreferenceLoss, TrainConfig,
    TuneConfig,
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which `System` has as well.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which `System` has as well.
        unsafe { System.dealloc(memory, layout) };
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

static ALONE: Mutex<()> = Mutex::new(());

/// The pool's queue allocates one block of memory for this many jobs from outside.
const QUEUE_BLOCK: usize = 63;

#[test]
fn steps_allocate_nothing() {
    const THREADS: usize = 2;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = ModelConfig {
        vocab_size: 512,
        max_context_length: 128,
        num_transformer_layers: 3,
        model_dim: 128,
        head_dim: 32,
        num_gqa_groups: 2,
        qkv_multipliers: Multipliers::Uniform(1.0),
        ffn_multipliers: Multipliers::Uniform(2.0),
        ffn_dim_divisor: 64,
        ..ModelConfig::default()
    };
    let recipe = TrainConfig::default();
    let tokens: Vec<u32> = (0..256).map(|i| i * 7 % 512).collect();
    let batch = MicroBatch::of_whole_documents(2, 128, tokens.clone(), tokens);
    for (precision, recompute, norm) in [
        (Precision::F32, false, NormKind::Rms),
        (Precision::Bf16, true, NormKind::Layer),
        (Precision::F32, true, NormKind::NaiveRms),
    ] {
        let config = ModelConfig { norm, ..config.clone() };
        let backend = Cpu::new(THREADS).with_precision(precision);
        let shape = BatchShape { sequences: 2, length: 128, recompute };
        let mut replica = Replica::new(backend, &config, shape, Objective::next_token(1e-4)).unwrap();
        replica.initialise(0);
        let quantum = Quantum::new(256, 1);
        let mut step = |number| {
            let loss = replica.forward_backward(&batch).unwrap();
            replica.quantise_mean_gradient(&quantum, loss.valid).unwrap();
            replica.update(&recipe, 1e-3, number).unwrap();
        };
        // Each thread allocates its scratch at its first task of a kind, and which thread gets which task is chance.
        for number in 0..30 {
            step(number);
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for number in 30..60 {
            step(number);
        }
        let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
        // There are five jobs from outside per step, and a thread may meet a larger task than before.
        let most = (30 * 5_usize).div_ceil(QUEUE_BLOCK) + 1 + 2 * THREADS;
        assert!(made <= most, "{made} allocations in 30 steps");
    }
}

/// Neither do steps on examples and pairs of all lengths, with an adapter and its noise.
#[test]
fn tuning_steps_allocate_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = ModelConfig {
        vocab_size: 512,
        num_transformer_layers: 3,
        model_dim: 128,
        head_dim: 32,
        num_gqa_groups: 2,
        ffn_multipliers: Multipliers::Uniform(2.0),
        ffn_dim_divisor: 64,
        ..ModelConfig::default()
    };
    let parameters = ulmus_model::Layout::new(&config).parameters();
    let base: Vec<f32> = (0..parameters).map(|i| ((i * 31 % 101) as f32 - 50.0) * 2e-3).collect();
    let adapter =
        AdapterConfig { kind: AdapterKind::Dora, rank: 8, dropout: 0.1, ..AdapterConfig::default() };
    let adapter = AdapterShape::new(&config, &adapter).unwrap();
    let preference = Preference {
        loss: PreferenceLoss::Sigmoid,
        beta: 0.1,
        label_smoothing: 0.0,
        length_normalised: false,
    };
    let batch = |sequences: usize, length: usize| {
        let tokens: Vec<u32> = (0..sequences * length).map(|i| (i * 7 % 512) as u32).collect();
        let mut targets = tokens.clone();
        targets[..length / 2].fill(IGNORE);
        let references = vec![-100.0; sequences];
        MicroBatch { references, ..MicroBatch::of_whole_documents(sequences, length, tokens, targets) }
    };
    let recipe = TuneConfig::default();
    let batches = [batch(4, 128), batch(2, 100), batch(4, 31)];
    for objective in [Objective::Answers { z_loss: 1e-4 }, Objective::Preferences(preference)] {
        let shape = BatchShape::new(4, 128);
        let mut replica = Replica::with_adapter(Cpu::new(1), &config, &adapter, 1, shape, objective).unwrap();
        replica.load_base([&base]).unwrap();
        replica.initialise(0);
        let quantum = Quantum::new(512, 1);
        let mut step = |number: usize| {
            let loss = replica.forward_backward(&batches[number % batches.len()]).unwrap();
            replica.quantise_mean_gradient(&quantum, objective.divisor(&loss)).unwrap();
            replica.update(&recipe, 1e-3, number as u64).unwrap();
        };
        (0..12).for_each(&mut step);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        (12..42).for_each(&mut step);
        let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
        // There are six jobs from outside per step.
        let most = (30 * 6_usize).div_ceil(QUEUE_BLOCK) + 1;
        assert!(made <= most, "{made} allocations in 30 steps");
    }
}

#[test]
fn a_decoded_token_allocates_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = ModelConfig {
        vocab_size: 500,
        max_context_length: 300,
        num_transformer_layers: 3,
        model_dim: 96,
        head_dim: 16,
        num_gqa_groups: 2,
        qkv_multipliers: Multipliers::Layers(vec![0.5, 1.0]),
        ffn_multipliers: Multipliers::Layers(vec![0.5, 2.0]),
        ffn_dim_divisor: 32,
        ..ModelConfig::default()
    };
    let parameters = ulmus_model::Layout::new(&config).parameters();
    let weights: Vec<f32> = (0..parameters).map(|i| ((i * 31 % 101) as f32 - 50.0) * 2e-3).collect();
    let every = WeightFormat::ALL.map(|format| (format, NormKind::Rms));
    let norms = [NormKind::NaiveRms, NormKind::Layer].map(|norm| (WeightFormat::F32, norm));
    for threads in [1, 3] {
        for (format, norm) in every.into_iter().chain(norms) {
            let config = ModelConfig { norm, ..config.clone() };
            let model = Model::in_format(Cpu::new(threads), &config, &weights, format).unwrap();
            let mut generator = Generator::with_sequences(Arc::new(model), 300, 2).unwrap();
            let mut sampler = Sampler::new(Sampling::new(0.9, Some(50), 0.95).unwrap(), 1, 0);
            generator.feed_to(0, &[1, 2, 3]).unwrap();
            let mut token = sampler.choose(generator.feed_to(1, &[4]).unwrap());
            // Every thread grows its scratch once, when it first gets work.
            for _ in 0..40 {
                token = sampler.choose(generator.feed_to(0, &[token]).unwrap());
                generator.feed_each(&[(1, token), (0, 7)]).unwrap();
            }
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for _ in 0..60 {
                token = sampler.choose(generator.feed_to(0, &[token]).unwrap());
                generator.feed_each(&[(1, token), (0, 7)]).unwrap();
            }
            let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
            let queue = 2 * 60_usize.div_ceil(QUEUE_BLOCK) + 1;
            // One or two of the three threads may have had no work until now; each allocates five pieces of scratch.
            let most = if threads == 1 { queue } else { queue + 5 * (threads - 1) };
            assert!(made <= most, "{format}, {norm:?}, {threads} threads: {made} allocations for 120 tokens");
        }
    }
}
