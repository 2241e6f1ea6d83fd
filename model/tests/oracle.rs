//! The whole model against an independent implementation: candle's tensors and tape, in f64, on models of various
//! shapes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{D, Device, Result, Tensor, Var};
use proptest::prelude::*;
use ulmus_model::{BatchShape, Cpu, IGNORE, Layout, MicroBatch, Replica, StatePart};
use ulmus_plan::{ModelConfig, Multipliers, NormKind};

const Z_LOSS: f64 = 0.01;
/// Relative, between float32 and float64.
const LOSS: f64 = 2e-6;
const GRADIENT: f64 = 2e-5;
/// Of the whole gradient's norm; a tensor's gradient may be zero but for rounding, as that of queries with one key.
const NEGLIGIBLE: f64 = 1e-3;

/// OpenELM on candle, one variable per tensor of the layout.
struct Oracle<'a> {
    config: &'a ModelConfig,
    variables: Vec<(String, Var)>,
}

impl Oracle<'_> {
    fn weight(&self, name: &str) -> &Tensor {
        let name = format!("transformer.{name}.weight");
        self.variables.iter().find(|(own, _)| *own == name).unwrap().1.as_tensor()
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (x, epsilon) = match self.config.norm {
            NormKind::Rms | NormKind::NaiveRms => (x.clone(), 1e-6),
            NormKind::Layer => (x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, 1e-5),
        };
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
        x.broadcast_div(&scale)?.broadcast_mul(self.weight(name))
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.broadcast_matmul(&self.weight(name).t()?)
    }

    /// `x` is `[sequences, heads, length, head_dim]`.
    fn rope(&self, x: &Tensor) -> Result<Tensor> {
        let (length, half) = (x.dim(2)?, self.config.head_dim / 2);
        let frequency = |j: usize| self.config.rope_freq_constant.powf(-(j as f64) / half as f64);
        let angles: Vec<f64> = (0..length * half).map(|i| (i / half) as f64 * frequency(i % half)).collect();
        let angles = Tensor::from_vec(angles, (length, half), x.device())?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (low, high) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let new_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let new_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Tensor::cat(&[new_low, new_high], 3)
    }

    fn attention(&self, x: &Tensor, layer: usize, mask: &Tensor) -> Result<Tensor> {
        let (sequences, length, _) = x.dims3()?;
        let (dims, h) = (self.config.layers()[layer], self.config.head_dim);
        let packed = self.linear(x, &format!("layers.{layer}.attn.qkv_proj"))?;
        let heads = |from: usize, count: usize| {
            packed
                .narrow(2, from * h, count * h)?
                .reshape((sequences, length, count, h))?
                .transpose(1, 2)?
                .contiguous()
        };
        let repeat = |x: Tensor| {
            let groups = dims.q_heads / dims.kv_heads;
            x.unsqueeze(2)?.expand((sequences, dims.kv_heads, groups, length, h))?.reshape((
                sequences,
                dims.q_heads,
                length,
                h,
            ))
        };
        let q = self.rope(&self.norm(&heads(0, dims.q_heads)?, &format!("layers.{layer}.attn.q_norm"))?)?;
        let k = heads(dims.q_heads, dims.kv_heads)?;
        let k = repeat(self.rope(&self.norm(&k, &format!("layers.{layer}.attn.k_norm"))?)?)?;
        let v = repeat(heads(dims.q_heads + dims.kv_heads, dims.kv_heads)?)?;
        let scores =
            (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (h as f64).sqrt())?.broadcast_add(mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let out = weights.matmul(&v.contiguous()?)?.transpose(1, 2)?.reshape((
            sequences,
            length,
            dims.q_heads * h,
        ))?;
        self.linear(&out, &format!("layers.{layer}.attn.out_proj"))
    }

    fn ffn(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let width = self.config.layers()[layer].ffn_dim;
        let both = self.linear(x, &format!("layers.{layer}.ffn.proj_1"))?;
        let gated = (both.narrow(2, 0, width)?.silu()? * both.narrow(2, width, width)?)?;
        self.linear(&gated, &format!("layers.{layer}.ffn.proj_2"))
    }

    /// Sums over valid tokens: cross-entropy, squared logsumexp.
    fn losses(&self, batch: &MicroBatch) -> Result<(Tensor, Tensor)> {
        let (device, shape) = (Device::Cpu, (batch.sequences, batch.length));
        let table = self.weight("token_embeddings");
        let ids = Tensor::from_slice(&batch.inputs, batch.inputs.len(), &device)?;
        let mut x = table.index_select(&ids, 0)?.reshape((shape.0, shape.1, self.config.model_dim))?;
        let mut mask = Vec::new();
        for (row, start) in batch.doc_starts.iter().enumerate() {
            let query = row % batch.length;
            mask.extend(
                (0..batch.length).map(|key| {
                    if (*start as usize..=query).contains(&key) { 0.0 } else { f64::NEG_INFINITY }
                }),
            );
        }
        let mask = Tensor::from_vec(mask, (shape.0, 1, shape.1, shape.1), &device)?;
        for layer in 0..self.config.num_transformer_layers {
            let normed = self.norm(&x, &format!("layers.{layer}.attn_norm"))?;
            x = (&x + self.attention(&normed, layer, &mask)?)?;
            let normed = self.norm(&x, &format!("layers.{layer}.ffn_norm"))?;
            x = (&x + self.ffn(&normed, layer)?)?;
        }
        let logits = self.norm(&x, "norm")?.broadcast_matmul(&table.t()?)?.flatten_to(1)?;
        let most = logits.max_keepdim(1)?.detach();
        let lse = (logits.broadcast_sub(&most)?.exp()?.sum_keepdim(1)?.log()? + most)?.squeeze(1)?;
        let targets: Vec<u32> = batch.targets.iter().map(|t| if *t == IGNORE { 0 } else { *t }).collect();
        let valid: Vec<f64> = batch.targets.iter().map(|t| f64::from(u8::from(*t != IGNORE))).collect();
        let targets = Tensor::from_vec(targets, (batch.targets.len(), 1), &device)?;
        let valid = Tensor::from_vec(valid, batch.targets.len(), &device)?;
        let at_target = logits.gather(&targets, 1)?.squeeze(1)?;
        let ce = ((&lse - at_target)? * &valid)?.sum_all()?;
        let z = (lse.sqr()? * valid)?.sum_all()?;
        Ok((ce, z))
    }
}

/// Numbers below `bound`, the same for the same seed.
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
    // A new document every 11 positions in the even sequences.
    let start = |row: usize| if (row / length).is_multiple_of(2) { row % length / 11 * 11 } else { 0 };
    let batch = MicroBatch {
        sequences,
        length,
        inputs: numbers(rows, vocabulary, seed + 1),
        targets,
        doc_starts: (0..rows).map(|row| start(row) as u32).collect(),
    };

    let mut replica = Replica::new(Cpu::new(2), config, shape, Z_LOSS).unwrap();
    replica.initialise(u64::from(seed));
    // Norm weights away from 1, so that they matter.
    for tensor in layout.tensors().iter().filter(|tensor| !tensor.decays()) {
        let noise = numbers(tensor.range.len(), 1000, seed + 2);
        let values: Vec<f32> = noise.iter().map(|x| 0.8 + *x as f32 / 2500.0).collect();
        replica.write_state(StatePart::Weights, tensor.range.start, &values);
    }
    let loss = replica.forward_backward(&batch).unwrap();
    let mut gradient = vec![0.0; layout.parameters()];
    replica.read_gradient(0, &mut gradient);

    let weights = replica.state().weights;
    let variables = layout.tensors().iter().map(|tensor| {
        let values: Vec<f64> = weights[tensor.range.clone()].iter().map(|x| f64::from(*x)).collect();
        (tensor.name.clone(), Var::from_vec(values, tensor.shape.as_slice(), &Device::Cpu).unwrap())
    });
    let oracle = Oracle { config, variables: variables.collect() };
    let (ce, z) = oracle.losses(&batch).unwrap();
    let gradients = (&ce + (&z * Z_LOSS).unwrap()).unwrap().backward().unwrap();
    let (ce, z) = (ce.to_scalar::<f64>().unwrap(), z.to_scalar::<f64>().unwrap());
    assert!((loss.ce / ce - 1.0).abs() < LOSS, "{} for {ce}", loss.ce);
    assert!((loss.z / z - 1.0).abs() < LOSS, "{} for {z}", loss.z);
    let expected = |variable: &Var| {
        let expected = gradients.get(variable).unwrap().flatten_all().unwrap();
        expected.to_vec1::<f64>().unwrap().into_iter().map(|x| x as f32).collect::<Vec<f32>>()
    };
    let expected: Vec<Vec<f32>> = oracle.variables.iter().map(|(_, variable)| expected(variable)).collect();
    let whole = expected.iter().map(|x| norm(x).powi(2)).sum::<f64>().sqrt();
    for (tensor, expected) in layout.tensors().iter().zip(expected) {
        let own = &gradient[tensor.range.clone()];
        let difference: Vec<f32> = own.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let difference = norm(&difference) / norm(&expected).max(NEGLIGIBLE * whole);
        assert!(difference < GRADIENT, "{}: {difference:e}", tensor.name);
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
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

/// Head widths, with those of the published models among them.
fn head_dims() -> impl Strategy<Value = usize> {
    prop_oneof![Just(32), Just(64), Just(128), (1..20_usize).prop_map(|half| 2 * half)]
}

fn configs() -> impl Strategy<Value = ModelConfig> {
    let vocabulary = prop_oneof![9 => 2..300_usize, 1 => Just(32_001)];
    let multipliers = || (1..5_u32, 1..5_u32).prop_map(|(a, b)| pair(f64::from(a) / 2.0, f64::from(b) / 2.0));
    let norms = prop::sample::select(NormKind::ALL.as_slice());
    (
        vocabulary,
        1..4_usize,
        (1..70_usize, head_dims()),
        1..5_usize,
        (multipliers(), multipliers()),
        1..40_usize,
        norms,
    )
        .prop_map(|(vocabulary, layers, dims, groups, multipliers, divisor, norm)| {
            let layers_of = |multipliers: Multipliers| match multipliers {
                // A pair is the first and the last layer's.
                Multipliers::Layers(pair) if layers == 1 => Multipliers::Uniform(pair[0]),
                other => other,
            };
            let multipliers = (layers_of(multipliers.0), layers_of(multipliers.1));
            ModelConfig { norm, ..config(vocabulary, layers, dims, groups, multipliers, divisor) }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Shapes that are multiples of no tile, block or vector, down to one row of one sequence.
    #[test]
    fn any_shape(config in configs(), sequences in 1..4_usize, length in 1..90_usize, recompute: bool, seed in 0..1000_u32) {
        // The first of every seven targets is ignored.
        prop_assume!(sequences * length > 1);
        compare_with(&config, BatchShape { sequences, length, recompute }, seed);
    }
}
