//! Benchmarks of every kernel, in the shapes of OpenELM-270M with a micro-batch of 4 sequences of 512 positions.
//!
//! `cargo bench -p ulmus-cpu` prints the time and the rate of each kernel: GB/s of the memory that a perfect kernel would
//! move or, where arithmetic is the limit, floating-point operations as Gitem/s. `worker roofline` measures the limits
//! of the machine. `ULMUS_THREADS` sets the number of threads (default 1).

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use ulmus_backend::{
    AdamW, AttentionShape, BLOCK, Backend, HeadGradients, Heads, LinearShape, Norm, Rope,
    TrainingBackend as _, View, ViewMut,
};
use ulmus_cpu::Cpu;
use ulmus_plan::{HEAD_ROWS, NormKind, Precision};

const SEQUENCES: usize = 4;
const LENGTH: usize = 512;
const ROWS: usize = SEQUENCES * LENGTH;
/// Model width.
const D: usize = 1280;
/// The widest FFN.
const FFN: usize = 5120;
const VOCABULARY: usize = 32_128;
const HEADS: Heads = Heads { query: 20, key_value: 5, width: 64 };
const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];
/// Inputs and outputs of the last layer's two FFN matrices and its fused QKV, and of the first layer's output
/// projection.
const LINEAR: [(usize, usize); 4] = [(D, 2 * FFN), (FFN, D), (D, 1920), (768, D)];

fn main() {
    divan::main();
}

fn backend(precision: Precision) -> Cpu {
    let threads = std::env::var("ULMUS_THREADS").map_or(1, |threads| threads.parse().expect("a number"));
    Cpu::new(threads).with_precision(precision)
}

/// Values of both signs, none of them denormal.
fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32) - 1.0).collect()
}

fn all<T>(buffer: &Vec<T>) -> View<'_, Vec<T>> {
    View::new(buffer, 0..buffer.len())
}

fn all_mut<T>(buffer: &mut Vec<T>) -> ViewMut<'_, Vec<T>> {
    let len = buffer.len();
    ViewMut::new(buffer, 0..len)
}

fn floats(count: usize) -> BytesCount {
    BytesCount::of_many::<f32>(count)
}

fn linear_cases() -> impl Iterator<Item = (Precision, usize, usize)> {
    PRECISIONS.into_iter().flat_map(|precision| LINEAR.map(|(inputs, outputs)| (precision, inputs, outputs)))
}

#[divan::bench(args = linear_cases())]
fn linear(bencher: Bencher<'_, '_>, (precision, inputs, outputs): (Precision, usize, usize)) {
    let backend = backend(precision);
    let (x, weight, mut out) = (values(ROWS * inputs), values(outputs * inputs), vec![0.0; ROWS * outputs]);
    let shape = LinearShape { rows: ROWS, inputs, outputs };
    bencher
        .counter(ItemsCount::new(2 * ROWS * inputs * outputs))
        .bench_local(|| backend.linear(all_mut(&mut out), all(&x), all(&weight), shape, false));
}

#[divan::bench(args = linear_cases())]
fn linear_backward_weight(bencher: Bencher<'_, '_>, (precision, inputs, outputs): (Precision, usize, usize)) {
    let backend = backend(precision);
    let (x, gradient, mut into) =
        (values(ROWS * inputs), values(ROWS * outputs), vec![0.0; outputs * inputs]);
    let shape = LinearShape { rows: ROWS, inputs, outputs };
    bencher
        .counter(ItemsCount::new(2 * ROWS * inputs * outputs))
        .bench_local(|| backend.linear_backward_weight(all_mut(&mut into), all(&gradient), all(&x), shape));
}

#[divan::bench(args = linear_cases())]
fn linear_backward_input(bencher: Bencher<'_, '_>, (precision, inputs, outputs): (Precision, usize, usize)) {
    let backend = backend(precision);
    let (weight, gradient, mut into) =
        (values(outputs * inputs), values(ROWS * outputs), vec![0.0; ROWS * inputs]);
    let shape = LinearShape { rows: ROWS, inputs, outputs };
    bencher.counter(ItemsCount::new(2 * ROWS * inputs * outputs)).bench_local(|| {
        backend.linear_backward_input(all_mut(&mut into), all(&gradient), all(&weight), shape, false);
    });
}

const ATTENTION: AttentionShape = AttentionShape { sequences: SEQUENCES, length: LENGTH, heads: HEADS };

/// Operations of one product in the shape of the scores, of which only the causal half is needed.
const ATTENTION_PRODUCT: usize = SEQUENCES * HEADS.query * LENGTH * LENGTH * HEADS.width;

#[divan::bench(args = PRECISIONS)]
fn attention(bencher: Bencher<'_, '_>, precision: Precision) {
    let backend = backend(precision);
    let width = HEADS.packed_width();
    let (packed, mut out) = (values(ROWS * width), vec![0.0; ROWS * HEADS.query_width()]);
    let (mut lse, starts) = (vec![0.0; ROWS * HEADS.query], vec![0_u32; ROWS]);
    bencher.counter(ItemsCount::new(2 * ATTENTION_PRODUCT)).bench_local(|| {
        backend.attention(all_mut(&mut out), all_mut(&mut lse), all(&packed), all(&starts), ATTENTION);
    });
}

#[divan::bench(args = PRECISIONS)]
fn attention_backward(bencher: Bencher<'_, '_>, precision: Precision) {
    let backend = backend(precision);
    let packed = values(ROWS * HEADS.packed_width());
    let (mut into, out) = (packed.clone(), values(ROWS * HEADS.query_width()));
    let (gradient, lse, starts) = (out.clone(), vec![6.0; ROWS * HEADS.query], vec![0_u32; ROWS]);
    bencher.counter(ItemsCount::new(5 * ATTENTION_PRODUCT)).bench_local(|| {
        backend.attention_backward(
            all_mut(&mut into),
            all(&gradient),
            all(&out),
            all(&lse),
            all(&packed),
            all(&starts),
            ATTENTION,
        );
    });
}

#[divan::bench(args = PRECISIONS)]
fn head_loss(bencher: Bencher<'_, '_>, precision: Precision) {
    let backend = backend(precision);
    let (hidden, table, mut logits) =
        (values(ROWS * D), values(VOCABULARY * D), vec![0.0; HEAD_ROWS * VOCABULARY]);
    let (mut hidden_gradient, mut table_gradient) = (hidden.clone(), table.clone());
    let (mut cross_entropy, mut lse) = (vec![0.0; ROWS], vec![0.0; ROWS]);
    let targets: Vec<u32> = (0..ROWS as u32).collect();
    bencher.counter(ItemsCount::new(6 * ROWS * D * VOCABULARY)).bench_local(|| {
        backend.head_loss(
            all_mut(&mut cross_entropy),
            all_mut(&mut lse),
            Some(HeadGradients {
                hidden: all_mut(&mut hidden_gradient),
                table: Some(all_mut(&mut table_gradient)),
                row_weights: None,
                z_loss: 1e-4,
            }),
            all(&hidden),
            all(&table),
            all(&targets),
            all_mut(&mut logits),
            LinearShape { rows: ROWS, inputs: D, outputs: VOCABULARY },
        );
    });
}

/// A norm with weights of 1.
struct NormOf {
    kind: NormKind,
    weight: Vec<f32>,
    scratch: Vec<f32>,
}

impl NormOf {
    fn rows(kind: NormKind) -> Self {
        Self { kind, weight: vec![1.0; D], scratch: vec![0.0; kind.row_scratch(ROWS, D)] }
    }

    fn heads(kind: NormKind) -> Self {
        let scratch = kind.head_scratch(ROWS, [HEADS.query, HEADS.key_value], HEADS.width);
        Self { kind, weight: vec![1.0; 2 * HEADS.width], scratch: vec![0.0; scratch] }
    }

    fn view(&mut self) -> Norm<'_, Vec<f32>> {
        Norm { kind: self.kind, weight: all(&self.weight), scratch: all_mut(&mut self.scratch) }
    }
}

#[divan::bench(args = NormKind::ALL)]
fn add_norm(bencher: Bencher<'_, '_>, kind: NormKind) {
    let (backend, mut norm) = (backend(Precision::F32), NormOf::rows(kind));
    let (x, delta) = (values(ROWS * D), values(ROWS * D));
    let (mut sum, mut out) = (x.clone(), x.clone());
    bencher.counter(floats(4 * ROWS * D)).bench_local(|| {
        backend.add_norm(all_mut(&mut sum), all_mut(&mut out), all(&x), all(&delta), norm.view());
    });
}

#[divan::bench(args = NormKind::ALL)]
fn norm_backward(bencher: Bencher<'_, '_>, kind: NormKind) {
    let (backend, mut norm) = (backend(Precision::F32), NormOf::rows(kind));
    let (x, gradient) = (values(ROWS * D), values(ROWS * D));
    let (mut x_gradient, mut weight_gradient) = (x.clone(), vec![0.0; D]);
    backend.norm(all_mut(&mut x_gradient), all(&x), norm.view());
    bencher.counter(floats(4 * ROWS * D)).bench_local(|| {
        backend.norm_backward(
            all_mut(&mut x_gradient),
            Some(all_mut(&mut weight_gradient)),
            all(&gradient),
            all(&x),
            norm.view(),
            true,
        );
    });
}

/// Cosines and sines, whose values do not matter.
struct RopeTables([Vec<f32>; 2], Vec<u32>);

impl RopeTables {
    fn new() -> Self {
        Self([(); 2].map(|()| values(LENGTH * HEADS.width / 2)), vec![0; ROWS / LENGTH])
    }

    fn view(&self) -> Rope<'_, Cpu> {
        Rope { cos: all(&self.0[0]), sin: all(&self.0[1]), first: all(&self.1), length: LENGTH }
    }
}

#[divan::bench(args = NormKind::ALL)]
fn qk_norm_rope(bencher: Bencher<'_, '_>, kind: NormKind) {
    let (backend, tables, mut norm) = (backend(Precision::F32), RopeTables::new(), NormOf::heads(kind));
    let packed = values(ROWS * HEADS.packed_width());
    let mut out = packed.clone();
    bencher.counter(floats(2 * packed.len())).bench_local(|| {
        backend.qk_norm_rope(all_mut(&mut out), all(&packed), norm.view(), tables.view(), HEADS);
    });
}

#[divan::bench(args = NormKind::ALL)]
fn qk_norm_rope_backward(bencher: Bencher<'_, '_>, kind: NormKind) {
    let (backend, tables, mut norm) = (backend(Precision::F32), RopeTables::new(), NormOf::heads(kind));
    let mut packed = values(ROWS * HEADS.packed_width());
    let (gradient, mut weights_into) = (packed.clone(), norm.weight.clone());
    backend.qk_norm_rope(all_mut(&mut packed), all(&gradient), norm.view(), tables.view(), HEADS);
    bencher.counter(floats(3 * packed.len())).bench_local(|| {
        backend.qk_norm_rope_backward(
            all_mut(&mut packed),
            Some(all_mut(&mut weights_into)),
            all(&gradient),
            norm.view(),
            tables.view(),
            HEADS,
        );
    });
}

#[divan::bench]
fn swiglu(bencher: Bencher<'_, '_>) {
    let backend = backend(Precision::F32);
    let (x, mut out) = (values(ROWS * 2 * FFN), vec![0.0; ROWS * FFN]);
    bencher.counter(floats(3 * ROWS * FFN)).bench_local(|| backend.swiglu(all_mut(&mut out), all(&x), FFN));
}

#[divan::bench]
fn swiglu_backward(bencher: Bencher<'_, '_>) {
    let backend = backend(Precision::F32);
    let (mut x, mut gradient) = (values(ROWS * 2 * FFN), values(ROWS * FFN));
    bencher
        .counter(floats(6 * ROWS * FFN))
        .bench_local(|| backend.swiglu_backward(all_mut(&mut x), all_mut(&mut gradient), FFN));
}

#[divan::bench]
fn adamw(bencher: Bencher<'_, '_>) {
    let backend = backend(Precision::F32);
    let len = 2 * FFN * D;
    let (mut weights, mut first, mut second, gradient) =
        (values(len), vec![0.0; len], vec![0.0; len], values(len));
    let step = AdamW {
        gradient_scale: 0.5,
        decay: 0.9999,
        first_share: 0.1,
        beta2: 0.95,
        second_share: 0.05,
        step_size: 1e-3,
        second_correction: 0.2,
        epsilon: 1e-8,
    };
    bencher.counter(floats(7 * len)).bench_local(|| {
        backend.adamw(all_mut(&mut weights), all_mut(&mut first), all_mut(&mut second), all(&gradient), step);
    });
}

#[divan::bench]
fn block_squares(bencher: Bencher<'_, '_>) {
    let (backend, x) = (backend(Precision::F32), values(2 * FFN * D));
    let mut sums = vec![0.0; x.len().div_ceil(BLOCK)];
    bencher.counter(floats(x.len())).bench_local(|| backend.block_squares(&mut sums, all(&x)));
}
