//! Compares every kernel of any backend with a plain f64 implementation, and every backward pass with that
//! implementation's central differences. Sizes extend beyond the kernels' blocks and are not multiples of vector
//! widths.

mod adapters;

use ulmus_backend::{
    AdamW, AttentionShape, BLOCK, Element, HeadGradients, Heads, IGNORE, LinearShape, Norm, Quantum, Rope,
    TrainingBackend, View, ViewMut,
};
use ulmus_plan::NormKind;
use ulmus_plan::ROW_BLOCK;

/// Tolerance for a float32 kernel's output, as relative L2.
pub(crate) const FORWARD: f64 = 1e-5;
/// Tolerance for a float32 gradient, as relative L2. The differences in f64 are accurate to about 1e-8.
pub(crate) const BACKWARD: f64 = 2e-5;
/// Half the step of a central difference.
const STEP: f64 = 1e-5;

/// Moves test data to and from a backend.
#[derive(Debug)]
pub struct Device<B>(pub B);

impl<B: TrainingBackend> Device<B> {
    /// A buffer with the given values.
    pub fn put<T: Element>(&self, values: &[T]) -> B::Buffer<T> {
        let mut buffer = self.0.allocate(values.len()).unwrap();
        self.0.upload(ViewMut::new(&mut buffer, 0..values.len()), values);
        buffer
    }

    /// Activations with the given values, rounded to the device's format.
    pub fn acts(&self, values: &[f32]) -> B::Activations {
        let mut activations = self.0.activations(values.len()).unwrap();
        self.0.set_activations(all_mut(&mut activations, values.len()), values);
        activations
    }

    /// Parameters with the given values.
    pub fn params(&self, values: &[f32]) -> B::Parameters {
        let mut parameters = self.0.parameters(values.len()).unwrap();
        self.0.set_parameters(all_mut(&mut parameters, values.len()), values);
        parameters
    }

    /// Runs a kernel that fills `len` activations, which are NaN before, and returns them.
    pub fn fill_acts(&self, len: usize, kernel: impl FnOnce(ViewMut<'_, B::Activations>)) -> Vec<f32> {
        let mut activations = self.acts(&vec![f32::NAN; len]);
        kernel(all_mut(&mut activations, len));
        self.get_acts(&activations, len)
    }

    /// The first `len` activations.
    pub fn get_acts(&self, activations: &B::Activations, len: usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        self.0.read_activations(all(activations, len), &mut values);
        values
    }

    /// Runs a kernel that fills a buffer of `len` numbers, which are NaN before, and returns them.
    pub fn fill(&self, len: usize, kernel: impl FnOnce(ViewMut<'_, B::Buffer<f32>>)) -> Vec<f32> {
        let mut buffer = self.put(&vec![f32::NAN; len]);
        kernel(ViewMut::new(&mut buffer, 0..len));
        self.get(&buffer, len)
    }

    /// The first `len` elements of a buffer.
    pub fn get<T: Element>(&self, buffer: &B::Buffer<T>, len: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); len];
        self.0.download(View::new(buffer, 0..len), &mut values);
        values
    }
}

/// A view of the first `len` elements.
pub fn all<T>(buffer: &T, len: usize) -> View<'_, T> {
    View::new(buffer, 0..len)
}

/// A mutable view of the first `len` elements.
pub fn all_mut<T>(buffer: &mut T, len: usize) -> ViewMut<'_, T> {
    ViewMut::new(buffer, 0..len)
}

/// Random numbers in (-1, 1).
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The values in f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// Fails if the relative L2 difference is above the tolerance.
pub fn assert_close(what: &str, found: &[f32], reference: &[f64], tolerance: f64) {
    assert_eq!(found.len(), reference.len(), "{what}");
    let difference: f64 = found.iter().zip(reference).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let norm: f64 = reference.iter().map(|x| x * x).sum();
    let relative = (difference / norm).sqrt();
    assert!(relative < tolerance, "{what}: relative difference {relative:e}");
}

/// Checks a kernel's output and its gradients with respect to `inputs`, under the loss `Σ upstream · output`.
pub(crate) fn check(
    what: &str,
    reference: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    inputs: &[&[f32]],
    out: &[f32],
    upstream: &[f32],
    gradients: &[&[f32]],
) {
    let mut inputs: Vec<Vec<f64>> = inputs.iter().map(|input| wide(input)).collect();
    assert_close(what, out, &reference(&inputs), FORWARD);
    let upstream = wide(upstream);
    let loss =
        |inputs: &[Vec<f64>]| -> f64 { reference(inputs).iter().zip(&upstream).map(|(y, g)| y * g).sum() };
    for (number, gradient) in gradients.iter().enumerate() {
        let differences: Vec<f64> = (0..inputs[number].len())
            .map(|i| {
                let value = inputs[number][i];
                inputs[number][i] = value + STEP;
                let above = loss(&inputs);
                inputs[number][i] = value - STEP;
                let below = loss(&inputs);
                inputs[number][i] = value;
                (above - below) / (2.0 * STEP)
            })
            .collect();
        assert_close(&format!("{what}, gradient {number}"), gradient, &differences, BACKWARD);
    }
}

fn reference_norm(kind: NormKind, x: &[f64], weight: &[f64]) -> Vec<f64> {
    let d = weight.len();
    x.chunks(d)
        .flat_map(|x| {
            let (mean, epsilon) = match kind {
                NormKind::Layer => (x.iter().sum::<f64>() / d as f64, 1e-5),
                NormKind::Rms | NormKind::NaiveRms => (0.0, 1e-6),
            };
            let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
            let scale = 1.0 / (squares / d as f64 + epsilon).sqrt();
            x.iter().zip(weight).map(move |(x, w)| (x - mean) * scale * w).collect::<Vec<_>>()
        })
        .collect()
}

/// A norm, with scratch memory that is NaN at first.
struct NormOnDevice<B: TrainingBackend> {
    kind: NormKind,
    weight: (B::Buffer<f32>, usize),
    scratch: (B::Buffer<f32>, usize),
}

impl<B: TrainingBackend> NormOnDevice<B> {
    fn new(device: &Device<B>, kind: NormKind, weight: &[f32], scratch: usize) -> Self {
        let scratch = (device.put(&vec![f32::NAN; scratch]), scratch);
        Self { kind, weight: (device.put(weight), weight.len()), scratch }
    }

    fn view(&mut self) -> Norm<'_, B::Buffer<f32>> {
        let Self { kind, weight, scratch } = self;
        Norm { kind: *kind, weight: all(&weight.0, weight.1), scratch: all_mut(&mut scratch.0, scratch.1) }
    }
}

/// The output of a norm, and the gradients of its rows (added to the given values, if any) and of its weights.
pub fn pass_norm<B: TrainingBackend>(
    device: &Device<B>,
    kind: NormKind,
    [x, weight, upstream]: [&[f32]; 3],
    residual: Option<&[f32]>,
) -> [Vec<f32>; 3] {
    let (len, d) = (x.len(), weight.len());
    let mut norm = NormOnDevice::new(device, kind, weight, kind.row_scratch(len / d, d));
    let (x, upstream) = (device.acts(x), device.acts(upstream));
    let out = device.fill_acts(len, |out| device.0.norm(out, all(&x, len), norm.view()));
    let mut x_gradient = device.acts(&residual.map_or_else(|| vec![f32::NAN; len], <[f32]>::to_vec));
    let weight_gradient = device.fill(d, |weight_gradient| {
        let (x_gradient, accumulate) = (all_mut(&mut x_gradient, len), residual.is_some());
        let (upstream, x) = (all(&upstream, len), all(&x, len));
        device.0.norm_backward(x_gradient, Some(weight_gradient), upstream, x, norm.view(), accumulate);
    });
    [out, device.get_acts(&x_gradient, len), weight_gradient]
}

fn norm<B: TrainingBackend>(device: &Device<B>, kind: NormKind) {
    for (rows, d) in [(ROW_BLOCK + 6, 20), (1, 33), (2 * ROW_BLOCK + 1, 7)] {
        let (x, weight, upstream, residual) =
            (random(rows * d, 1), random(d, 2), random(rows * d, 3), random(rows * d, 4));
        let reference = |inputs: &[Vec<f64>]| reference_norm(kind, &inputs[0], &inputs[1]);
        for residual in [None, Some(residual.as_slice())] {
            let given = [x.as_slice(), &weight, &upstream];
            let [out, mut x_gradient, weight_gradient] = pass_norm(device, kind, given, residual);
            for (total, residual) in x_gradient.iter_mut().zip(residual.into_iter().flatten()) {
                *total -= residual;
            }
            let gradients: [&[f32]; 2] = [&x_gradient, &weight_gradient];
            check(kind.name(), reference, &[&x, &weight], &out, &upstream, &gradients);
        }

        let (len, delta) = (rows * d, random(rows * d, 5));
        let (x_, delta_) = (device.acts(&x), device.acts(&delta));
        let mut sum = device.acts(&vec![f32::NAN; len]);
        let mut norm = NormOnDevice::new(device, kind, &weight, kind.row_scratch(rows, d));
        let out = device.fill_acts(len, |out| {
            let (x, delta) = (all(&x_, len), all(&delta_, len));
            device.0.add_norm(all_mut(&mut sum, len), out, x, delta, norm.view());
        });
        let expected: Vec<f64> = wide(&x).iter().zip(wide(&delta)).map(|(x, delta)| x + delta).collect();
        assert_close("add_norm, sum", &device.get_acts(&sum, len), &expected, FORWARD);
        assert_close("add_norm", &out, &reference_norm(kind, &expected, &wide(&weight)), FORWARD);
    }
}

fn linear<B: TrainingBackend>(device: &Device<B>) {
    for (rows, inputs, outputs) in [(5, 7, 9), (1, 21, 67), (70, 33, 18)] {
        let shape = LinearShape { rows, inputs, outputs };
        let (x, weight, upstream) =
            (random(rows * inputs, 1), random(outputs * inputs, 2), random(rows * outputs, 3));
        let (x_, weight_, upstream_) = (device.acts(&x), device.params(&weight), device.acts(&upstream));
        let (x_view, weight_view) = (|| all(&x_, rows * inputs), || all(&weight_, outputs * inputs));
        let out = device
            .fill_acts(rows * outputs, |out| device.0.linear(out, x_view(), weight_view(), shape, false));
        let gradient = || all(&upstream_, rows * outputs);
        let x_gradient = device.fill_acts(rows * inputs, |into| {
            device.0.linear_backward_input(into, gradient(), weight_view(), shape, false);
        });
        let weight_gradient = device.fill(outputs * inputs, |into| {
            device.0.linear_backward_weight(into, gradient(), x_view(), shape);
        });
        let reference = |given: &[Vec<f64>]| {
            let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
            let rows = given[0].chunks(inputs);
            rows.flat_map(|x| given[1].chunks(inputs).map(move |w| dot(x, w)).collect::<Vec<_>>()).collect()
        };
        check("linear", reference, &[&x, &weight], &out, &upstream, &[&x_gradient, &weight_gradient]);
    }
}

fn embedding<B: TrainingBackend>(device: &Device<B>) {
    let (vocabulary, width) = (5, 7);
    let ids = [3, 0, 3, 4, 3];
    let (table, upstream) = (random(vocabulary * width, 1), random(ids.len() * width, 2));
    let (table_, upstream_, ids_) = (device.params(&table), device.acts(&upstream), device.put(&ids));
    let out = device.fill_acts(ids.len() * width, |out| {
        device.0.embed(out, all(&table_, vocabulary * width), all(&ids_, ids.len()), width);
    });
    // The gradient is added to that of the tied head.
    let before = 1.0;
    let mut gradient = device.put(&vec![before; vocabulary * width]);
    device.0.embed_backward(
        all_mut(&mut gradient, vocabulary * width),
        all(&upstream_, ids.len() * width),
        all(&ids_, ids.len()),
        width,
        true,
    );
    let gradient: Vec<f32> = device.get(&gradient, vocabulary * width).iter().map(|x| x - before).collect();
    let reference = |inputs: &[Vec<f64>]| {
        ids.iter().flat_map(|id| inputs[0][*id as usize * width..][..width].to_vec()).collect()
    };
    check("embedding", reference, &[&table], &out, &upstream, &[&gradient]);
}

fn swiglu<B: TrainingBackend>(device: &Device<B>) {
    let (rows, width) = (ROW_BLOCK + 3, 19);
    let x: Vec<f32> = random(rows * 2 * width, 1).iter().map(|x| x * 6.0).collect();
    let upstream = random(rows * width, 2);
    let (x_, mut upstream_) = (device.acts(&x), device.acts(&upstream));
    let out = device.fill_acts(rows * width, |out| device.0.swiglu(out, all(&x_, rows * 2 * width), width));
    let mut gradient = device.acts(&x);
    let into = all_mut(&mut gradient, rows * 2 * width);
    device.0.swiglu_backward(into, all_mut(&mut upstream_, rows * width), width);
    assert_eq!(device.get_acts(&upstream_, rows * width), out, "the recomputed output");
    let gradient = device.get_acts(&gradient, rows * 2 * width);
    let reference = |inputs: &[Vec<f64>]| {
        let rows = inputs[0].chunks(2 * width);
        rows.flat_map(|x| (0..width).map(|i| x[i] / (1.0 + (-x[i]).exp()) * x[width + i]).collect::<Vec<_>>())
            .collect()
    };
    check("swiglu", reference, &[&x], &out, &upstream, &[&gradient]);
}

/// Packed rows of sequences of `length` whose first position is `first`.
#[derive(Debug)]
pub struct PackedRows {
    /// The heads in a row.
    pub heads: Heads,
    length: usize,
    first: u32,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The values of all rows.
    pub packed: Vec<f32>,
    weights: Vec<f32>,
    upstream: Vec<f32>,
}

impl PackedRows {
    /// Random rows for `sequences` sequences of length `length`.
    pub fn random(heads: Heads, sequences: usize, length: usize) -> Self {
        let (len, half, first) = (sequences * length * heads.packed_width(), heads.width / 2, 3u32);
        let angle = |i: usize| (i / half) as f64 * 100f64.powf(-((i % half) as f64) / half as f64);
        let table =
            |of: fn(f64) -> f64| (0..(first as usize + length) * half).map(|i| of(angle(i)) as f32).collect();
        let (cos, sin) = (table(f64::cos), table(f64::sin));
        let (packed, weights, upstream) = (random(len, 1), random(2 * heads.width, 2), random(len, 3));
        Self { heads, length, first, cos, sin, packed, weights, upstream }
    }

    /// The output of the norm and the rotation, and the gradients of packed rows and weights.
    pub fn pass<B: TrainingBackend>(&self, device: &Device<B>, kind: NormKind) -> [Vec<f32>; 3] {
        let Self { heads, length, first, cos, sin, packed, weights, upstream } = self;
        let (len, rows) = (packed.len(), packed.len() / heads.packed_width());
        let (cos_, sin_) = (device.put(cos), device.put(sin));
        let sequences = rows / length;
        let first = device.put(&vec![*first; sequences]);
        let rope = || {
            let (cos, sin) = (all(&cos_, cos.len()), all(&sin_, sin.len()));
            Rope { cos, sin, first: all(&first, sequences), length: *length }
        };
        let scratch = kind.head_scratch(rows, [heads.query, heads.key_value], heads.width);
        let mut norm = NormOnDevice::new(device, kind, weights, scratch);
        let (packed_, upstream) = (device.acts(packed), device.acts(upstream));
        let out = device.fill_acts(len, |out| {
            device.0.qk_norm_rope(out, all(&packed_, len), norm.view(), rope(), *heads);
        });
        let mut gradient = device.acts(packed);
        let weights_gradient = device.fill(weights.len(), |weights_gradient| {
            let (gradient, upstream) = (all_mut(&mut gradient, len), all(&upstream, len));
            device.0.qk_norm_rope_backward(
                gradient,
                Some(weights_gradient),
                upstream,
                norm.view(),
                rope(),
                *heads,
            );
        });
        [out, device.get_acts(&gradient, len), weights_gradient]
    }

    fn reference(&self, kind: NormKind, inputs: &[Vec<f64>]) -> Vec<f64> {
        let (h, half) = (self.heads.width, self.heads.width / 2);
        let mut out = Vec::new();
        for (row, packed) in inputs[0].chunks(self.heads.packed_width()).enumerate() {
            for (head, x) in packed.chunks(h).enumerate() {
                if head >= self.heads.query + self.heads.key_value {
                    out.extend(x);
                    continue;
                }
                let side = if head < self.heads.query { 0 } else { h };
                let x = reference_norm(kind, x, &inputs[1][side..side + h]);
                let at = (self.first as usize + row % self.length) * half;
                let cos = |i: usize| f64::from(self.cos[at + i]);
                let sin = |i: usize| f64::from(self.sin[at + i]);
                out.extend((0..half).map(|i| x[i] * cos(i) - x[half + i] * sin(i)));
                out.extend((0..half).map(|i| x[half + i] * cos(i) + x[i] * sin(i)));
            }
        }
        out
    }
}

fn qk_norm_rope<B: TrainingBackend>(device: &Device<B>, kind: NormKind) {
    let heads = |query, key_value, width| Heads { query, key_value, width };
    for (heads, sequences, length) in [
        (heads(4, 2, 6), 2, ROW_BLOCK / 2 + 5),
        (heads(2, 1, 32), 1, 3),
        (heads(1, 1, 64), 1, 1),
        (heads(2, 1, 128), 1, 2),
    ] {
        let rows = PackedRows::random(heads, sequences, length);
        let [out, packed, weights] = rows.pass(device, kind);
        let what = format!("{} of heads of {}", kind.name(), heads.width);
        let reference = |inputs: &[Vec<f64>]| rows.reference(kind, inputs);
        check(&what, reference, &[&rows.packed, &rows.weights], &out, &rows.upstream, &[&packed, &weights]);
    }
}

/// Attention over packed rows. `visible` decides whether a query row sees a key row in its sequence.
fn reference_attention(
    packed: &[f64],
    shape: AttentionShape,
    visible: impl Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let AttentionShape { sequences, length, heads } = shape;
    let (h, width) = (heads.width, heads.packed_width());
    let row = |sequence: usize, key: usize, head: usize| {
        &packed[((sequence * length) + key) * width + head * h..][..h]
    };
    let mut out = vec![0.0; sequences * length * heads.query_width()];
    for sequence in 0..sequences {
        for query in 0..length {
            for head in 0..heads.query {
                let kv_head = head / (heads.query / heads.key_value);
                let q = row(sequence, query, head);
                let seen: Vec<usize> =
                    (0..=query).filter(|key| visible(sequence * length + query, *key)).collect();
                let weights: Vec<f64> = seen
                    .iter()
                    .map(|key| {
                        let k = row(sequence, *key, heads.query + kv_head);
                        (q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (h as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                let at = ((sequence * length) + query) * heads.query_width() + head * h;
                for (key, weight) in seen.iter().zip(weights) {
                    let v = row(sequence, *key, heads.query + heads.key_value + kv_head);
                    out[at..at + h].iter_mut().zip(v).for_each(|(out, v)| *out += weight / total * v);
                }
            }
        }
    }
    out
}

fn attention<B: TrainingBackend>(device: &Device<B>) {
    let heads = Heads { query: 2, key_value: 1, width: 6 };
    let (sequences, length) = (2, 70);
    let (rows, width) = (sequences * length, heads.packed_width());
    let out_len = rows * heads.query_width();
    let shape = AttentionShape { sequences, length, heads };
    let packed: Vec<f32> = random(rows * width, 1).iter().map(|x| 2.0 * x).collect();
    let upstream = random(out_len, 2);
    let (packed_, upstream_) = (device.acts(&packed), device.acts(&upstream));
    // The cases are a single document, and documents that begin within a block, at its edge, and at every position.
    let starts_of = |breaks: &[usize]| -> Vec<u32> {
        let start = |p: usize| *breaks.iter().rfind(|b| **b <= p).unwrap() as u32;
        (0..length).map(start).collect()
    };
    let patterns =
        [starts_of(&[0]), starts_of(&[0, 10, 66]), starts_of(&[0, 64]), (0..length as u32).collect()];
    for (first, second) in [(0, 1), (2, 3)] {
        let doc_starts = [patterns[first].as_slice(), &patterns[second]].concat();
        let starts_ = device.put(&doc_starts);
        let mut lse = device.put(&vec![f32::NAN; rows * heads.query]);
        let mut out = device.acts(&vec![f32::NAN; out_len]);
        device.0.attention(
            all_mut(&mut out, out_len),
            all_mut(&mut lse, rows * heads.query),
            all(&packed_, rows * width),
            all(&starts_, rows),
            shape,
        );
        let gradient = device.fill_acts(rows * width, |gradient| {
            device.0.attention_backward(
                gradient,
                all(&upstream_, out_len),
                all(&out, out_len),
                all(&lse, rows * heads.query),
                all(&packed_, rows * width),
                all(&starts_, rows),
                shape,
            );
        });
        let reference = |inputs: &[Vec<f64>]| {
            reference_attention(&inputs[0], shape, |query, key| key >= doc_starts[query] as usize)
        };
        check("attention", reference, &[&packed], &device.get_acts(&out, out_len), &upstream, &[&gradient]);
    }
}

fn head_loss<B: TrainingBackend>(device: &Device<B>) {
    let shape = LinearShape { rows: 9, inputs: 10, outputs: 37 };
    let LinearShape { rows, inputs, outputs } = shape;
    let targets = [3, 36, IGNORE, 0, 5, 5, IGNORE, 20, 7];
    let z_loss = 0.05;
    let (hidden, table) = (random(rows * inputs, 1), random(outputs * inputs, 2));
    let (hidden_, table_, targets_) = (device.acts(&hidden), device.params(&table), device.put(&targets));
    let weights = random(rows, 3);
    let weights_ = device.put(&weights);
    let chunk_rows = 4;
    let mut logits = device.put(&vec![f32::NAN; chunk_rows * outputs]);
    let (mut ce, mut lse) = (device.put(&vec![f32::NAN; rows]), device.put(&vec![f32::NAN; rows]));
    let mut hidden_gradient = device.acts(&vec![f32::NAN; rows * inputs]);
    let mut table_gradient = device.put(&vec![f32::NAN; outputs * inputs]);
    let mut losses = |with_gradients: bool| {
        let gradients = with_gradients.then(|| HeadGradients {
            hidden: all_mut(&mut hidden_gradient, rows * inputs),
            table: Some(all_mut(&mut table_gradient, outputs * inputs)),
            row_weights: Some(all(&weights_, rows)),
            z_loss,
        });
        device.0.head_loss(
            all_mut(&mut ce, rows),
            all_mut(&mut lse, rows),
            gradients,
            all(&hidden_, rows * inputs),
            all(&table_, outputs * inputs),
            all(&targets_, rows),
            all_mut(&mut logits, chunk_rows * outputs),
            shape,
        );
        (device.get(&ce, rows), device.get(&lse, rows))
    };
    let alone = losses(false);
    let (ce, lse) = losses(true);
    assert_eq!((&ce, &lse), (&alone.0, &alone.1));
    assert_eq!((ce[2], lse[2], ce[6], lse[6]), (0.0, 0.0, 0.0, 0.0));
    let losses = ce.iter().zip(&lse).map(|(ce, lse)| ce + z_loss * lse * lse);
    let loss: f32 = losses.zip(&weights).map(|(loss, weight)| weight * loss).sum();
    let reference = |given: &[Vec<f64>]| {
        let mut total = 0.0;
        let rows = given[0].chunks(inputs).zip(targets).zip(&weights);
        for ((x, target), weight) in rows.filter(|((_, target), _)| *target != IGNORE) {
            let logit = |w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
            let logits: Vec<f64> = given[1].chunks(inputs).map(logit).collect();
            let lse = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
            total += f64::from(*weight) * (lse - logits[target as usize] + f64::from(z_loss) * lse * lse);
        }
        vec![total]
    };
    let hidden_gradient = device.get_acts(&hidden_gradient, rows * inputs);
    let table_gradient = device.get(&table_gradient, outputs * inputs);
    let gradients: [&[f32]; 2] = [&hidden_gradient, &table_gradient];
    check("head and loss", reference, &[&hidden, &table], &[loss], &[1.0], &gradients);
}

fn adamw<B: TrainingBackend>(device: &Device<B>) {
    let len = 1000;
    let (beta1, beta2, lr, decay, epsilon) = (0.9, 0.95, 0.01, 0.1, 1e-8);
    let mut weights = device.params(&random(len, 1));
    let (mut first, mut second) = (device.put(&vec![0.0; len]), device.put(&vec![0.0; len]));
    let mut reference: Vec<[f64; 3]> = wide(&random(len, 1)).into_iter().map(|w| [w, 0.0, 0.0]).collect();
    for step in 1..=3 {
        let gradient = random(len, 10 + step as u64);
        let clip = 0.5;
        for ([w, m, v], g) in reference.iter_mut().zip(&gradient) {
            let g = f64::from(*g) * clip;
            *w -= lr * decay * *w;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let corrected = (*v / (1.0 - beta2.powi(step))).sqrt() + epsilon;
            *w -= lr * (*m / (1.0 - beta1.powi(step))) / corrected;
        }
        let gradient_ = device.put(&gradient);
        device.0.adamw(
            all_mut(&mut weights, len),
            all_mut(&mut first, len),
            all_mut(&mut second, len),
            all(&gradient_, len),
            AdamW {
                gradient_scale: clip as f32,
                decay: (1.0 - lr * decay) as f32,
                first_share: (1.0 - beta1) as f32,
                beta2: beta2 as f32,
                second_share: (1.0 - beta2) as f32,
                step_size: (lr / (1.0 - beta1.powi(step))) as f32,
                second_correction: (1.0 - beta2.powi(step)).sqrt() as f32,
                epsilon: epsilon as f32,
            },
        );
    }
    let parts = [device.0.values(all(&weights, len)), all(&first, len), all(&second, len)];
    for (part, found) in parts.into_iter().enumerate() {
        let mut values = vec![f32::NAN; len];
        device.0.download(found, &mut values);
        let expected: Vec<f64> = reference.iter().map(|state| state[part]).collect();
        assert_close("adamw", &values, &expected, FORWARD);
    }
}

fn reductions<B: TrainingBackend>(device: &Device<B>) {
    let len = 2 * BLOCK + 11;
    let x = random(len, 1);
    let x_ = device.put(&x);
    let mut blocks = vec![f64::NAN; len.div_ceil(BLOCK)];
    device.0.block_squares(&mut blocks, all(&x_, len));
    let expected: Vec<f64> = x.chunks(BLOCK).map(|block| wide(block).iter().map(|x| x * x).sum()).collect();
    assert_eq!(blocks.len(), 3);
    assert!(blocks.iter().zip(&expected).all(|(found, expected)| (found / expected - 1.0).abs() < 1e-12));

    let quantum = Quantum::new(1 << 20, 5);
    let start: Vec<i64> = (0..len as i64).collect();
    let mut sums = device.put(&start);
    let mut outside = device.put(&[0_u32]);
    let expect = |found: &[i64], before: &dyn Fn(usize) -> i64| {
        let mut each = found.iter().zip(&x).enumerate();
        assert!(each.all(|(at, (sum, x))| *sum == before(at) + quantum.quantise(*x).unwrap()));
    };
    device.0.quantise(all_mut(&mut sums, len), all_mut(&mut outside, 1), all(&x_, len), &quantum, true);
    expect(&device.get(&sums, len), &|at| start[at]);
    device.0.quantise(all_mut(&mut sums, len), all_mut(&mut outside, 1), all(&x_, len), &quantum, false);
    let sums_back = device.get(&sums, len);
    expect(&sums_back, &|_| 0);
    let scale = quantum.mean_scale(321);
    let mean = device.fill(len, |mean| device.0.dequantise(mean, all(&sums, len), scale));
    let mut expected = vec![0.0; len];
    quantum.mean_into(&sums_back, 321, &mut expected);
    assert_eq!(mean, expected);
    let mut alone = device.put(&x);
    device.0.quantise_mean(all_mut(&mut alone, len), all_mut(&mut outside, 1), &quantum, scale);
    assert_eq!(device.get(&alone, len), expected);
    assert_eq!(device.get(&outside, 1), [0]);
    for (position, bad) in [(0, f32::NAN), (BLOCK, f32::INFINITY), (len - 1, quantum.limit() as f32 * 1.001)]
    {
        let mut x = x.clone();
        x[position] = bad;
        let mut x_ = device.put(&x);
        for mean in [false, true] {
            let mut outside = device.put(&[0_u32]);
            if mean {
                device.0.quantise_mean(all_mut(&mut x_, len), all_mut(&mut outside, 1), &quantum, scale);
            } else {
                let (sums, x) = (all_mut(&mut sums, len), all(&x_, len));
                device.0.quantise(sums, all_mut(&mut outside, 1), x, &quantum, true);
            }
            assert_eq!(device.get(&outside, 1), [1], "{bad} at {position}");
        }
    }
}

/// Runs all tests that a backend has to pass.
pub fn conform<B: TrainingBackend>(backend: B) {
    let device = Device(backend);
    for kind in NormKind::ALL {
        norm(&device, kind);
        qk_norm_rope(&device, kind);
    }
    linear(&device);
    embedding(&device);
    swiglu(&device);
    attention(&device);
    head_loss(&device);
    adamw(&device);
    reductions(&device);
    adapters::conform(&device);
}
