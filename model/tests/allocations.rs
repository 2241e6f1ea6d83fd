//! A step allocates nothing: buffers are planned once, and what is left is a queue of the thread pool.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use ulmus_model::{Backend, BatchShape, Cpu, MicroBatch, Quantum, Replica};
use ulmus_plan::{ModelConfig, Multipliers, Precision, TrainConfig};

/// Counts what is asked of the system.
struct Counting;

static BYTES: AtomicU64 = AtomicU64::new(0);

#[expect(unsafe_code, reason = "an allocator is unsafe by its trait")]
// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Blocks of the pool's queue of calls from outside, in which a step has a dozen: about one block of 1.5 KB per 60.
const QUEUE_BYTES_PER_STEP: u64 = 2048;

#[test]
fn steps_allocate_nothing() {
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
    for (precision, recompute) in [(Precision::F32, false), (Precision::Bf16, true)] {
        let backend = Cpu::new(2).with_precision(precision);
        let shape = BatchShape { sequences: 2, length: 128, recompute };
        let mut replica = Replica::new(backend, &config, shape, 1e-4).unwrap();
        replica.initialise(0);
        let quantum = Quantum::new(256, 1);
        let mut step = |number| {
            let loss = replica.forward_backward(&batch).unwrap();
            replica.check_gradient(&quantum).unwrap();
            replica.quantise_mean_gradient(&quantum, loss.valid);
            replica.update(&recipe, 1e-3, number).unwrap();
        };
        // Each thread gets its scratch when it first has a task of a kind, and who has which task is chance.
        for number in 0..30 {
            step(number);
        }
        let before = BYTES.load(Ordering::Relaxed);
        for number in 30..60 {
            step(number);
        }
        let bytes = BYTES.load(Ordering::Relaxed) - before;
        assert!(bytes <= 30 * QUEUE_BYTES_PER_STEP, "{bytes} bytes in 30 steps");
    }
}
