//! Tests the CUDA backend: the conformance tests of every backend, and its fast paths and whole models against the
//! CPU's.
//!
//! On a machine without a GPU, `.ci/run cuda` runs these tests on the emulator in `model/cuda/emulator`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use half::bf16;
use ulmus_backend::{
    AttentionShape, Backend, BackendError, Dropout, DropoutPart, FIRST_PROPOSALS, HeadGradients, Heads,
    IGNORE, LinearShape, TrainingBackend, WeightFormat,
};
use ulmus_conformance::inference::{Outputs, config, inference};
use ulmus_conformance::kernels::{
    Device, PackedRows, all, all_mut, assert_close, conform, pass_norm, random, wide,
};
use ulmus_cpu::Cpu;
use ulmus_cuda::Cuda;
use ulmus_model::{BatchShape, MicroBatch, Objective, Replica, State, StateCopy, StatePart};
use ulmus_plan::ROW_BLOCK;
use ulmus_plan::{ModelConfig, NormKind, Precision};

fn cuda(precision: Precision) -> Cuda {
    Cuda::new(0).unwrap().with_precision(precision)
}

/// Numbers in (-1, 1) that bfloat16 represents exactly, so that only the kernels can make a difference.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    random(len, seed).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
}

/// Results of norms in shapes whose rows are whole vectors and whose heads have the published widths.
fn wide_shapes<B: TrainingBackend>(device: &Device<B>, kind: NormKind) -> Outputs {
    let mut outputs = Outputs::new();
    for (rows, d) in [(2 * ROW_BLOCK + 3, 1280), (5, 2048), (3, 264)] {
        let (x, upstream) = (numbers(rows * d, 1), numbers(rows * d, 2));
        let pass = pass_norm(device, kind, [&x, &random(d, 3), &upstream], Some(&x));
        let names = ["norm", "its gradient", "its weight's gradient"];
        outputs.extend(names.map(|name| format!("{name} of {rows} x {d}")).into_iter().zip(pass));
    }
    for heads in [
        Heads { query: 4, key_value: 2, width: 64 },
        Heads { query: 3, key_value: 1, width: 128 },
        Heads { query: 2, key_value: 1, width: 48 },
    ] {
        let mut rows = PackedRows::random(heads, 2, ROW_BLOCK - 5);
        rows.packed = numbers(rows.packed.len(), 4);
        let names = ["heads", "their gradient", "their weights' gradient"];
        outputs.extend(
            names.map(|name| format!("{name} of {}", heads.width)).into_iter().zip(rows.pass(device, kind)),
        );
    }
    outputs
}

/// Results of attention over documents of many lengths.
fn attention<B: TrainingBackend>(device: &Device<B>) -> Outputs {
    let mut outputs = Outputs::new();
    for (heads, length) in [
        (Heads { query: 4, key_value: 2, width: 64 }, 300),
        (Heads { query: 4, key_value: 1, width: 128 }, 260),
        (Heads { query: 2, key_value: 2, width: 64 }, 33),
        (Heads { query: 2, key_value: 1, width: 16 }, 70),
    ] {
        let sequences = 2;
        let (rows, width) = (sequences * length, heads.packed_width());
        let out_len = rows * heads.query_width();
        let packed: Vec<f32> = numbers(rows * width, 1).iter().map(|x| 2.0 * x).collect();
        let start = |breaks: &[usize], row: usize| *breaks.iter().rfind(|at| **at <= row).unwrap() as u32;
        let breaks: [&[usize]; 2] = [&[0], &[0, 1, 30, 64, 129, 131, 256]];
        let doc_starts: Vec<u32> =
            breaks.iter().flat_map(|breaks| (0..length).map(|row| start(breaks, row))).collect();
        let (packed, starts) = (device.acts(&packed), device.put(&doc_starts));
        let upstream = device.acts(&numbers(out_len, 2));
        let shape = AttentionShape { sequences, length, heads };
        let mut out = device.acts(&vec![f32::NAN; out_len]);
        let lse = device.fill(rows * heads.query, |lse| {
            let (packed, starts) = (all(&packed, rows * width), all(&starts, rows));
            device.0.attention(all_mut(&mut out, out_len), lse, packed, starts, shape);
        });
        let kept = device.put(&lse);
        let gradient = device.fill_acts(rows * width, |gradient| {
            device.0.attention_backward(
                gradient,
                all(&upstream, out_len),
                all(&out, out_len),
                all(&kept, lse.len()),
                all(&packed, rows * width),
                all(&starts, rows),
                shape,
            );
        });
        let name = |what| format!("{what} of {} heads of {}, {length} rows", heads.query, heads.width);
        outputs.push((name("attention"), device.get_acts(&out, out_len)));
        outputs.push((name("logsumexp"), lse));
        outputs.push((name("gradient of attention"), gradient));
    }
    outputs
}

/// Results of products, the embedding, SwiGLU and the head.
fn products<B: TrainingBackend>(device: &Device<B>) -> Outputs {
    let mut outputs = Outputs::new();
    let LinearShape { rows, inputs, outputs: wide } = LinearShape { rows: 70, inputs: 64, outputs: 264 };
    let shape = LinearShape { rows, inputs, outputs: wide };
    let weight = device.params(&numbers(wide * inputs, 1));
    let x = device.acts(&numbers(rows * inputs, 2));
    let upstream = device.acts(&numbers(rows * wide, 3));
    let weight = || all(&weight, wide * inputs);
    let (x, upstream) = (|| all(&x, rows * inputs), || all(&upstream, rows * wide));
    let of_acts =
        |len, kernel: &dyn Fn(ulmus_backend::ViewMut<'_, B::Activations>)| device.fill_acts(len, kernel);
    outputs.push((
        "linear".to_owned(),
        of_acts(rows * wide, &|out| device.0.linear(out, x(), weight(), shape, false)),
    ));
    outputs.push((
        "its gradient".to_owned(),
        of_acts(rows * inputs, &|out| {
            device.0.linear_backward_input(out, upstream(), weight(), shape, false);
        }),
    ));
    outputs.push((
        "its weight's gradient".to_owned(),
        device.fill(wide * inputs, |out| device.0.linear_backward_weight(out, upstream(), x(), shape)),
    ));
    let width = wide / 2;
    outputs
        .push(("swiglu".to_owned(), of_acts(rows * width, &|out| device.0.swiglu(out, upstream(), width))));
    let mut slopes = device.acts(&numbers(rows * wide, 3));
    let mut of_gated = device.acts(&numbers(rows * width, 4));
    device.0.swiglu_backward(all_mut(&mut slopes, rows * wide), all_mut(&mut of_gated, rows * width), width);
    outputs.push(("its gradient".to_owned(), device.get_acts(&slopes, rows * wide)));

    let ids: Vec<u32> = (0..300).map(|row| (row * row) % 7).collect();
    let on_device = device.put(&ids);
    let ids_ = || all(&on_device, ids.len());
    let embedded = of_acts(ids.len() * inputs, &|out| device.0.embed(out, weight(), ids_(), inputs));
    outputs.push(("embedding".to_owned(), embedded));
    let mut table_gradient = device.put(&random(wide * inputs, 5));
    let gradient = device.acts(&numbers(ids.len() * inputs, 6));
    let into = all_mut(&mut table_gradient, wide * inputs);
    device.0.embed_backward(into, all(&gradient, ids.len() * inputs), ids_(), inputs, true);
    outputs.push(("its gradient".to_owned(), device.get(&table_gradient, wide * inputs)));

    let targets: Vec<u32> = (0..rows as u32).map(|row| if row % 5 == 0 { IGNORE } else { row * 3 }).collect();
    let targets = device.put(&targets);
    let mut logits = device.put(&vec![f32::NAN; 32 * wide]);
    let (mut ce, mut lse) = (device.put(&vec![f32::NAN; rows]), device.put(&vec![f32::NAN; rows]));
    let mut hidden_gradient = device.acts(&vec![f32::NAN; rows * inputs]);
    let mut table_gradient = device.put(&vec![f32::NAN; wide * inputs]);
    device.0.head_loss(
        all_mut(&mut ce, rows),
        all_mut(&mut lse, rows),
        Some(HeadGradients {
            hidden: all_mut(&mut hidden_gradient, rows * inputs),
            table: Some(all_mut(&mut table_gradient, wide * inputs)),
            row_weights: None,
            z_loss: 0.05,
        }),
        x(),
        weight(),
        all(&targets, rows),
        all_mut(&mut logits, 32 * wide),
        shape,
    );
    outputs.push(("cross-entropy".to_owned(), device.get(&ce, rows)));
    outputs.push(("its logsumexp".to_owned(), device.get(&lse, rows)));
    outputs.push(("gradient of hidden rows".to_owned(), device.get_acts(&hidden_gradient, rows * inputs)));
    outputs.push(("gradient of the table".to_owned(), device.get(&table_gradient, wide * inputs)));
    outputs
}

/// Results of what adapters need.
fn adapters<B: TrainingBackend>(device: &Device<B>) -> Outputs {
    let mut outputs = Outputs::new();
    let (rows, inputs, rank) = (70, 264, 8);
    let of_acts =
        |len, kernel: &dyn Fn(ulmus_backend::ViewMut<'_, B::Activations>)| device.fill_acts(len, kernel);
    let (x, a) = (device.acts(&numbers(rows * inputs, 1)), device.params(&numbers(rank * inputs, 2)));
    let x = || all(&x, rows * inputs);
    let shape = LinearShape { rows, inputs, outputs: rank };
    let before = numbers(rows * rank, 3);
    let mut inner = device.acts(&before);
    device.0.linear(all_mut(&mut inner, rows * rank), x(), all(&a, rank * inputs), shape, true);
    device.0.scale(all_mut(&mut inner, rows * rank), 0.75);
    outputs.push(("a product that is added, and scaled".to_owned(), device.get_acts(&inner, rows * rank)));
    let sequences = device.put(&[5_u32, 0, 6, 1]);
    let positions: Vec<u32> = (0..rows as u32).rev().collect();
    let positions = device.put(&positions);
    for (part, accumulate) in [(DropoutPart::Kept, true), (DropoutPart::Rest, false)] {
        let mut out = device.acts(&numbers(rows * inputs, 4));
        let (sequences, length) = (all(&sequences, 4), rows / 2);
        let positions = all(&positions, rows);
        let dropout = Dropout { sequences, length, positions, key: 77, rate: 0.25 };
        device.0.dropout(all_mut(&mut out, rows * inputs), x(), dropout, inputs, part, accumulate);
        outputs.push((format!("dropout, {part:?}"), device.get_acts(&out, rows * inputs)));
    }
    let to: Vec<u32> = (0..rows as u32).map(|row| (row * 3) % 100).collect();
    let to = device.put(&to);
    let scattered = of_acts(100 * inputs, &|out| device.0.scatter(out, x(), all(&to, rows), inputs));
    outputs.push(("scattered rows".to_owned(), scattered));
    let mut added = device.acts(&numbers(rows * inputs, 7));
    let from: Vec<u32> = (0..rows as u32).map(|row| (row * 7) % rows as u32).collect();
    let from = device.put(&from);
    device.0.gather_add(all_mut(&mut added, rows * inputs), x(), all(&from, rows), inputs);
    outputs.push(("added rows".to_owned(), device.get_acts(&added, rows * inputs)));
    let gains = device.put(&numbers(2 * inputs, 5));
    let scaled = of_acts(rows * inputs, &|out| device.0.scale_columns(out, x(), all(&gains, inputs), false));
    outputs.push(("scaled columns".to_owned(), scaled));
    let upstream = device.acts(&numbers(rows * inputs, 6));
    let mut gradient = device.acts(&vec![f32::NAN; rows * inputs]);
    let magnitudes = device.fill(inputs, |into| {
        let (gradient, upstream) = (all_mut(&mut gradient, rows * inputs), all(&upstream, rows * inputs));
        device.0.scale_columns_backward(gradient, into, upstream, x(), all(&gains, 2 * inputs));
    });
    outputs.push(("their gradient".to_owned(), device.get_acts(&gradient, rows * inputs)));
    outputs.push(("that of magnitudes".to_owned(), magnitudes));
    outputs
}

fn assert_agree(found: Outputs, expected: Outputs, tolerance: f64) {
    for ((what, found), (same, expected)) in found.into_iter().zip(expected) {
        assert_eq!(what, same);
        assert_close(&what, &found, &wide(&expected), tolerance);
    }
}

#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn conforms_in_f32() {
    conform(cuda(Precision::F32));
}

/// In bfloat16, results have a relative rounding error of 2^-9, and some are computed from rounded ones.
#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn kernels_agree_with_those_of_the_cpu() {
    let cpu = Device(Cpu::new(2));
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 6e-3)] {
        let gpu = Device(cuda(precision));
        for kind in NormKind::ALL {
            assert_agree(wide_shapes(&gpu, kind), wide_shapes(&cpu, kind), tolerance);
        }
        assert_agree(products(&gpu), products(&cpu), tolerance);
        assert_agree(adapters(&gpu), adapters(&cpu), tolerance);
        assert_agree(attention(&gpu), attention(&cpu), tolerance);
    }
}

/// Two sequences of 150 tokens, each with the end of a document in it.
fn batch(config: &ModelConfig) -> MicroBatch {
    let (sequences, length) = (2, 150);
    let token = |at: usize| (at * at + 7 * at) as u32 % config.vocab_size as u32;
    let breaks = [40, 130];
    MicroBatch {
        sequences,
        length,
        inputs: (0..sequences * length).map(token).collect(),
        targets: (0..sequences * length)
            .map(|at| if breaks.contains(&(at % length)) { IGNORE } else { token(at + 1) })
            .collect(),
        doc_starts: (0..sequences * length)
            .map(|at| {
                let row = at % length;
                breaks.iter().rfind(|at| **at < row).map_or(0, |at| *at as u32 + 1)
            })
            .collect(),
        ..MicroBatch::default()
    }
}

fn replica<B: TrainingBackend>(backend: B, recompute: bool) -> Replica<B> {
    let config = config();
    let shape = BatchShape { recompute, ..BatchShape::new(2, 150) };
    let mut replica = Replica::new(backend, &config, shape, Objective::next_token(1e-4)).unwrap();
    replica.initialise(5);
    replica
}

/// The mean loss, the gradient, and the state after a step.
fn step<B: TrainingBackend>(replica: &mut Replica<B>) -> (f64, Vec<f32>, State) {
    let sum = replica.forward_backward(&batch(&config())).unwrap();
    let mut gradient = vec![0.0; replica.trainable().parameters()];
    replica.read_gradient(0, &mut gradient);
    replica.update(&ulmus_plan::TrainConfig::default(), 1e-3, 0).unwrap();
    (sum.ce / sum.valid as f64, gradient, replica.state())
}

#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn a_training_step_agrees_with_the_cpus() {
    let (loss, gradient, state) = step(&mut replica(Cpu::new(2), false));
    for (precision, tolerance) in [(Precision::F32, 1e-4), (Precision::Bf16, 3e-2)] {
        let own = step(&mut replica(cuda(precision), false));
        assert!((own.0 / loss - 1.0).abs() < tolerance / 3.0, "{precision:?}: loss {} is not {loss}", own.0);
        assert_close("gradient", &own.1, &wide(&gradient), tolerance);
        // Weights are not compared: the first step follows the gradient's sign, which is arbitrary for tiny gradients.
        assert_close("first moment", &own.2.first_moment, &wide(&state.first_moment), tolerance);
        assert_close("second moment", &own.2.second_moment, &wide(&state.second_moment), 2.0 * tolerance);
        // A repetition gives the same bits, and so does a step that recomputes layers.
        for recompute in [true, false] {
            let again = step(&mut replica(cuda(precision), recompute));
            assert_eq!((again.0, &again.1), (own.0, &own.1), "{precision:?}, recompute {recompute}");
            assert_eq!(again.2, own.2, "{precision:?}, recompute {recompute}");
        }
    }
}

/// The host executes the calls of a pass only twice: the second time they are captured as a graph.
#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn a_captured_pass_needs_no_calls() {
    let (device, rows, width) = (Device(cuda(Precision::F32)), 3, 40);
    let mut out = device.acts(&vec![f32::NAN; rows * width]);
    let mut x = device.acts(&vec![0.0; 2 * rows * width]);
    let (mut graph, mut calls) = (<Cuda as Backend>::Graph::default(), 0);
    for pass in 0..4 {
        let values = numbers(2 * rows * width, pass);
        device.0.set_activations(all_mut(&mut x, values.len()), &values);
        let once = device.fill_acts(rows * width, |out| device.0.swiglu(out, all(&x, values.len()), width));
        device.0.replay(&mut graph, || {
            calls += 1;
            device.0.swiglu(all_mut(&mut out, rows * width), all(&x, values.len()), width);
        });
        assert_eq!(device.get_acts(&out, rows * width), once, "pass {pass}");
    }
    // The environment can disable graphs.
    assert_eq!(calls, if std::env::var_os("ULMUS_GPU_SERIAL").is_some() { 4 } else { 2 });
}

/// Passes are captured in the second step and replayed from the third on.
#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn replayed_steps_have_the_same_bits_as_first_ones() {
    for (precision, recompute) in [(Precision::F32, true), (Precision::Bf16, false)] {
        let mut recorded = replica(cuda(precision), recompute);
        for _ in 0..4 {
            let mut new = replica(cuda(precision), recompute);
            new.load_state(&recorded.state()).unwrap();
            assert_eq!(step(&mut recorded), step(&mut new), "{precision:?}");
        }
    }
}

/// Training continues during a copy of the state. Only work that would change what is being copied waits.
#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn a_copy_holds_the_state_at_its_beginning() {
    type Change = fn(&mut Replica<Cuda>, &State);
    let of = |copy: &StateCopy| StatePart::ALL.map(|part| copy.part(part).to_vec());
    let mut replica = replica(cuda(Precision::F32), false);
    let other = step(&mut replica).2;
    let mut earlier: Option<(StateCopy, _)> = None;
    for change in [
        (|replica, _| _ = replica.update(&ulmus_plan::TrainConfig::default(), 1e-3, 1).unwrap()) as Change,
        |replica, _| replica.initialise(7),
        |replica, other| replica.load_state(other).unwrap(),
        |replica, _| {
            let backend = replica.backend().clone();
            replica.write_part(StatePart::Weights, |weights| {
                let zeros = vec![0.0; weights.len()];
                backend.upload(weights, &zeros);
            });
        },
    ] {
        let expected = of(&replica.state().into());
        assert_eq!(of(&replica.copy_state()), expected);
        let copy = replica.copy_state();
        change(&mut replica, &other);
        assert_eq!(of(&copy), expected);
        assert_ne!(of(&replica.state().into()), expected);
        // A new copy reuses the memory of copies that were dropped, but not of this one.
        if let Some((copy, expected)) = earlier.replace((copy, expected)) {
            assert_eq!(of(&copy), expected);
        }
    }
}

/// The copy is larger than the memory for which the emulator locks pages.
#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn a_copy_needs_no_locked_pages() {
    let (device, values) = (Device(cuda(Precision::F32)), numbers(17 << 20, 1));
    let on_device = device.put(&values);
    assert!(device.0.begin_copy(all(&on_device, values.len())).values() == values);
}

/// The algorithms that one process has chosen can be used by all. Without a choice, the library's first proposal is
/// used.
#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn chosen_algorithms_give_the_same_bits_in_other_processes() {
    let choose = |device: &Cuda, known: Option<&str>| {
        let (step, names) =
            device.choose_algorithms(known, || step(&mut replica(device.clone(), false))).unwrap();
        (step, names.unwrap())
    };
    let chooser = cuda(Precision::Bf16);
    let (fastest, names) = choose(&chooser, None);
    assert_eq!(choose(&cuda(Precision::Bf16), Some(&names)), (fastest.clone(), names.clone()));
    let unchosen = step(&mut replica(cuda(Precision::Bf16), false));
    let none = FIRST_PROPOSALS.to_owned();
    assert_eq!(choose(&cuda(Precision::Bf16), Some(&none)), (unchosen.clone(), none.clone()));
    // An earlier choice has no further effect.
    assert_eq!(choose(&chooser, Some(&none)), (unchosen.clone(), none.clone()));
    // This also holds for passes that were captured with it.
    let mut recorded = replica(chooser.clone(), false);
    for (known, expected) in [(&names, &fastest), (&none, &unchosen)] {
        let steps = || {
            for _ in 0..3 {
                recorded.initialise(5);
                assert_eq!(&step(&mut recorded), expected);
            }
        };
        chooser.choose_algorithms(Some(known), steps).unwrap();
    }
    // The emulator's first proposal is slow, and each proposal sums in another order.
    if chooser.describe().contains("Emulated") {
        assert_ne!(fastest.1, unchosen.1);
        let others = names
            .replace(",1,0,", ",0,0,")
            .replace(",2,0,", ",1,0,")
            .replace(",0,0,0,0,0,0,0]", ",2,0,0,0,0,0,0]");
        assert_ne!(others, names);
        // A backend that has chosen for itself can take over the choice of another.
        let (theirs, _) = choose(&chooser, Some(&others));
        assert_ne!(theirs.1, fastest.1);
        assert_eq!(theirs, choose(&cuda(Precision::Bf16), Some(&others)).0);
    }
    let error = chooser.choose_algorithms(Some("[1]"), || ()).unwrap_err();
    assert!(matches!(error, BackendError::Algorithms(_)), "{error}");
}

#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn inference_agrees_with_the_cpus() {
    let config = config();
    for (format, tolerance) in [
        (WeightFormat::F32, 1e-4),
        (WeightFormat::F16, 5e-3),
        (WeightFormat::Bf16, 3e-2),
        // Here the CPU rounds activations to 8 bits.
        (WeightFormat::Q8_0, 4e-2),
    ] {
        let own = inference(cuda(Precision::F32), &config, format);
        assert_eq!(own, inference(cuda(Precision::F32), &config, format), "{format}");
        assert_agree(own, inference(Cpu::new(2), &config, format), tolerance);
    }
}

#[test]
#[ignore = "needs a GPU or the emulator: .ci/run cuda"]
fn a_missing_device_is_refused() {
    let beyond = Cuda::devices();
    assert!(matches!(Cuda::new(beyond), Err(BackendError::Device { ordinal, .. }) if ordinal == beyond));
}
