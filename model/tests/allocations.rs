//! A decoded token allocates nothing. Alone in its process, because it counts the allocations of all threads.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ulmus_model::{Cpu, Generator, Model, Sampler, Sampling, WeightFormat};
use ulmus_plan::{ModelConfig, Multipliers};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: promised by the caller.
        unsafe { System.dealloc(memory, layout) };
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_decoded_token_allocates_nothing() {
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
    for threads in [1, 3] {
        for format in WeightFormat::ALL {
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
            // The pool's queue takes a block for every 63 pieces of work from outside.
            let queue = 2 * 60_usize.div_ceil(60);
            let most = if threads == 1 { queue } else { queue + 2 * threads };
            assert!(made <= most, "{format}, {threads} threads: {made} allocations for 120 tokens");
        }
    }
}
