//! Compares whole models of various shapes with the oracle.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use ulmus_backend::IGNORE;
use ulmus_cpu::Cpu;
use ulmus_model::{BatchShape, Layout, MicroBatch, Objective, Replica, StatePart};
use ulmus_oracle::Oracle;
use ulmus_plan::{ModelConfig, Multipliers, NormKind};

const Z_LOSS: f64 = 0.01;
/// Relative tolerance for losses, between float32 and float64.
const LOSS: f64 = 2e-6;
/// Relative tolerance for each tensor's gradient.
const GRADIENT: f64 = 2e-5;
/// Smaller gradients, as a share of the whole gradient's norm, are not compared relatively: they may be zero except for
/// rounding, like that of queries with a single key.
const NEGLIGIBLE: f64 = 1e-3;

/// Random numbers below `bound`.
fn numbers(len: usize, bound: u32, seed: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 12) % bound
        })
        .collect()
}

fn compare(config: &ModelConfig, sequences: usize, length: usize, seed: u32) {
    for norm in NormKind::ALL {
        compare_with(&ModelConfig { norm, ..config.clone() }, BatchShape::new(sequences, length), seed);
    }
}

fn compare_with(config: &ModelConfig, shape: BatchShape, seed: u32) {
    let BatchShape { sequences, length, .. } = shape;
    let layout = Layout::new(config);
    let rows = sequences * length;
    let vocabulary = config.vocab_size as u32;
    let mut targets = numbers(rows, vocabulary, seed);
    targets.iter_mut().step_by(7).for_each(|target| *target = IGNORE);
    // In even sequences, a new document begins every 11 positions.
    let start = |row: usize| if (row / length).is_multiple_of(2) { row % length / 11 * 11 } else { 0 };
    let batch = MicroBatch {
        sequences,
        length,
        inputs: numbers(rows, vocabulary, seed + 1),
        targets,
        doc_starts: (0..rows).map(|row| start(row) as u32).collect(),
        ..MicroBatch::default()
    };

    let mut replica = Replica::new(Cpu::new(2), config, shape, Objective::next_token(Z_LOSS)).unwrap();
    replica.initialise(u64::from(seed));
    // Norm weights differ from 1, so that they matter.
    for tensor in layout.tensors().iter().filter(|tensor| !tensor.decays()) {
        let noise = numbers(tensor.range.len(), 1000, seed + 2);
        let values: Vec<f32> = noise.iter().map(|x| 0.8 + *x as f32 / 2500.0).collect();
        replica.write_state(StatePart::Weights, tensor.range.start, &values);
    }
    let loss = replica.forward_backward(&batch).unwrap();
    let mut gradient = vec![0.0; layout.parameters()];
    replica.read_gradient(0, &mut gradient);

    let weights = replica.state().weights;
    let tensors = layout.tensors().iter();
    let tensors =
        tensors.map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice(), &weights[tensor.range.clone()]));
    let expected = Oracle::new(config, tensors).unwrap().losses(&batch, Z_LOSS).unwrap();
    assert!((loss.ce / expected.cross_entropy - 1.0).abs() < LOSS, "{loss:?} for {expected:?}");
    assert!((loss.z / expected.z - 1.0).abs() < LOSS, "{loss:?} for {expected:?}");
    let whole = expected.gradients.iter().map(|x| norm(x).powi(2)).sum::<f64>().sqrt();
    for (tensor, expected) in layout.tensors().iter().zip(expected.gradients) {
        let own = &gradient[tensor.range.clone()];
        let difference: Vec<f64> = own.iter().zip(&expected).map(|(a, b)| f64::from(*a) - b).collect();
        let (difference, size) = (norm(&difference), norm(&expected).max(NEGLIGIBLE * whole));
        assert!(difference <= GRADIENT * size, "{}: {difference:e} of {size:e}", tensor.name);
    }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x.powi(2)).sum::<f64>().sqrt()
}

fn config(
    vocab_size: usize,
    layers: usize,
    (model_dim, head_dim): (usize, usize),
    num_gqa_groups: usize,
    (qkv_multipliers, ffn_multipliers): (Multipliers, Multipliers),
    ffn_dim_divisor: usize,
) -> ModelConfig {
    ModelConfig {
        vocab_size,
        max_context_length: 128,
        num_transformer_layers: layers,
        model_dim,
        head_dim,
        num_gqa_groups,
        qkv_multipliers,
        ffn_multipliers,
        ffn_dim_divisor,
        rope_freq_constant: 10_000.0,
        norm: NormKind::Rms,
        share_input_output_layers: true,
    }
}

fn pair(first: f64, last: f64) -> Multipliers {
    Multipliers::Layers(vec![first, last])
}

#[test]
fn layer_wise_scaled_with_groups_of_four() {
    compare(&config(300, 4, (64, 16), 4, (pair(0.5, 1.0), pair(0.5, 4.0)), 32), 2, 70, 1);
}

#[test]
fn no_grouping_and_odd_widths() {
    compare(
        &config(131, 2, (30, 10), 1, (Multipliers::Uniform(1.0), Multipliers::Uniform(1.5)), 7),
        3,
        33,
        2,
    );
}

#[test]
fn one_layer_whose_attention_is_wider_than_the_model() {
    compare(
        &config(64, 1, (24, 32), 2, (Multipliers::Uniform(2.0), Multipliers::Uniform(0.5)), 16),
        1,
        65,
        3,
    );
}

#[test]
fn widths_listed_per_layer_and_another_rope_base() {
    let lists = (Multipliers::Layers(vec![1.0, 0.5, 0.75]), Multipliers::Layers(vec![2.0, 1.0, 3.0]));
    let config = ModelConfig { rope_freq_constant: 500.0, ..config(517, 3, (96, 24), 2, lists, 48) };
    compare(&config, 2, 129, 4);
}

/// Widths of heads, including those of the published models.
fn head_dims() -> impl Strategy<Value = usize> {
    prop_oneof![Just(32), Just(64), Just(128), (3..20_usize).prop_map(|half| 2 * half)]
}

/// Configurations with widths from 16 on, because the layer norm of very few numbers cancels most of their digits.
fn configs() -> impl Strategy<Value = ModelConfig> {
    let vocabulary = prop_oneof![9 => 2..300_usize, 1 => Just(32_001)];
    let multipliers = || (1..5_u32, 1..5_u32).prop_map(|(a, b)| pair(f64::from(a) / 2.0, f64::from(b) / 2.0));
    let norms = prop::sample::select(NormKind::ALL.as_slice());
    (
        vocabulary,
        1..4_usize,
        (16..70_usize, head_dims()),
        1..5_usize,
        (multipliers(), multipliers()),
        1..40_usize,
        norms,
    )
        .prop_map(|(vocabulary, layers, dims, groups, multipliers, divisor, norm)| {
            let layers_of = |multipliers: Multipliers| match multipliers {
                // A pair has values for the first and the last layer.
                Multipliers::Layers(pair) if layers == 1 => Multipliers::Uniform(pair[0]),
                other => other,
            };
            let multipliers = (layers_of(multipliers.0), layers_of(multipliers.1));
            ModelConfig { norm, ..config(vocabulary, layers, dims, groups, multipliers, divisor) }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Shapes need not be multiples of tiles, blocks or vectors, and may be as small as one row of one sequence.
    #[test]
    fn any_shape(config in configs(), sequences in 1..4_usize, length in 1..90_usize, recompute: bool, seed in 0..1000_u32) {
        // The first of every seven targets is ignored, so a single row would have no target.
        prop_assume!(sequences * length > 1);
        compare_with(&config, BatchShape { sequences, length, recompute }, seed);
    }
}
