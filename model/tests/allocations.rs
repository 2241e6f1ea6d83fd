//! Neither a training step nor a decoded token allocates anything: buffers are planned once, and only the thread pool's
//! queue still grows. The allocations of all threads are counted, so these tests run one at a time.
//!
//! A thread allocates when it begins, when it first gets work of a kind, and when it ends, and on a busy machine any of that may
//! come late; threads of a pool that was dropped are not waited for. So several windows of time are measured, and the best one
//! counts: what allocates with every step or token does so in each of them.

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

/// More windows than there are threads that may be late, and kinds of work that they may be late for.
const WINDOWS: usize = 40;

/// Checks that nothing but the pool's queue allocates while `work` gives it so many `jobs` from outside.
fn must_allocate_nothing(jobs: usize, what: &str, mut work: impl FnMut()) {
    let most = jobs.div_ceil(QUEUE_BLOCK);
    let mut found = Vec::with_capacity(WINDOWS);
    while found.last().is_none_or(|made| *made > most) {
        assert!(found.len() < WINDOWS, "{what}: more than {most} allocations in each window: {found:?}");
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        work();
        found.push(ALLOCATIONS.load(Ordering::Relaxed) - before);
    }
}

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
        let mut numbers = 0..;
        // There are five jobs from outside per step.
        must_allocate_nothing(30 * 5, "30 steps", || numbers.by_ref().take(30).for_each(&mut step));
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
        let mut numbers = 0..;
        // There are six jobs from outside per step.
        must_allocate_nothing(30 * 6, "30 steps", || numbers.by_ref().take(30).for_each(&mut step));
    }
}

#[test]
fn a_decoded_token_allocates_nothing() {
    // Each window adds 120 tokens to a text.
    const CAPACITY: usize = 120 * WINDOWS + 3;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = ModelConfig {
        vocab_size: 500,
        max_context_length: CAPACITY,
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
            let mut generator = Generator::with_sequences(Arc::new(model), CAPACITY, 2).unwrap();
            let mut sampler = Sampler::new(Sampling::new(0.9, Some(50), 0.95).unwrap(), 1, 0);
            generator.feed_to(0, &[1, 2, 3]).unwrap();
            let mut token = sampler.choose(generator.feed_to(1, &[4]).unwrap());
            must_allocate_nothing(120, &format!("{format}, {norm:?}, {threads} threads, 120 passes"), || {
                for _ in 0..60 {
                    token = sampler.choose(generator.feed_to(0, &[token]).unwrap());
                    generator.feed_each(&[(1, token), (0, 7)]).unwrap();
                }
            });
        }
    }
}
