//! Tests inference on candle's tensors. The processor runs the same operations as Apple's GPUs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ulmus_backend::{Backend, BackendError, View, ViewMut, WeightFormat};
use ulmus_candle::Candle;
use ulmus_conformance::inference::{config, inference};
use ulmus_conformance::relative_l2;
use ulmus_cpu::Cpu;
use ulmus_plan::{ModelConfig, NormKind};

fn assert_agrees_with_the_cpus(config: &ModelConfig, format: WeightFormat, tolerance: f64) {
    let found = inference(Candle::processor(), config, format);
    for ((what, found), (_, expected)) in found.iter().zip(inference(Cpu::new(2), config, format)) {
        let difference = relative_l2(found, &expected);
        assert!(
            difference < tolerance,
            "{:?}, {format}, {what}: relative difference {difference:e}",
            config.norm
        );
    }
}

#[test]
fn every_format_agrees_with_the_cpus() {
    for (format, tolerance) in
        [(WeightFormat::F32, 1e-4), (WeightFormat::F16, 5e-3), (WeightFormat::Bf16, 3e-2)]
    {
        assert_agrees_with_the_cpus(&config(), format, tolerance);
    }
}

/// Both backends round activations to 8 bits, but differently, and candle depends on the processor. So the test
/// compares the accuracy that each loses against the model in f32.
#[test]
fn eight_bits_cost_about_as_much_accuracy_as_on_the_cpu() {
    let config = config();
    let exact = inference(Cpu::new(2), &config, WeightFormat::F32);
    let own = inference(Cpu::new(2), &config, WeightFormat::Q8_0);
    let candles = inference(Candle::processor(), &config, WeightFormat::Q8_0);
    for (((what, exact), (_, own)), (_, candles)) in exact.iter().zip(&own).zip(&candles) {
        let [own, candles] = [own, candles].map(|found| relative_l2(found, exact));
        assert!(
            own < 0.06 && candles < 2.0 * own,
            "{what}: relative differences {own:e}, candle's {candles:e}"
        );
    }
}

/// Activations are exact in 8 bits, so that only the reading and summing of weights can differ.
#[test]
fn eight_bit_products_of_whole_numbers_agree_with_the_cpus() {
    fn product<B: Backend>(backend: &B, [rows, inputs, outputs]: [usize; 3]) -> Vec<f32> {
        let wave = |at: usize| ((at * at + 7 * at) % 255) as f32 - 127.0;
        let values: Vec<f32> = (0..outputs * inputs).map(|at| wave(at + 1) * 0.001).collect();
        // The largest number in each block of 32 is 127.
        let x: Vec<f32> =
            (0..rows * inputs).map(|at| if at % 32 == 0 { 127.0 } else { wave(3 * at) }).collect();
        let weights = backend.weights(&values, outputs, WeightFormat::Q8_0).unwrap();
        let (mut from, mut to) =
            (backend.activations(x.len()).unwrap(), backend.activations(rows * outputs).unwrap());
        backend.set_activations(ViewMut::new(&mut from, 0..x.len()), &x);
        let out = ViewMut::new(&mut to, 0..rows * outputs);
        backend.run(|| backend.linear_weights(out, View::new(&from, 0..x.len()), &weights, rows));
        let mut found = vec![0.0; rows * outputs];
        backend.read_activations(View::new(&to, 0..rows * outputs), &mut found);
        found
    }
    for shape in [[1, 64, 40], [5, 256, 96], [70, 128, 33]] {
        let difference = relative_l2(&product(&Candle::processor(), shape), &product(&Cpu::new(2), shape));
        assert!(difference < 1e-5, "{shape:?}: relative difference {difference:e}");
    }
}

#[test]
fn every_norm_agrees_with_the_cpus() {
    for norm in NormKind::ALL {
        assert_agrees_with_the_cpus(&ModelConfig { norm, ..config() }, WeightFormat::F32, 1e-4);
    }
}

#[test]
fn unsupported_requests_are_refused() {
    let problem = |error: BackendError| match error {
        BackendError::Device { problem, .. } => problem,
        error => panic!("{error}"),
    };
    let matrix = Candle::processor().weights(&[0.5; 2 * 33], 2, WeightFormat::Q8_0);
    assert!(problem(matrix.unwrap_err()).contains("33"));
    if !cfg!(target_os = "macos") {
        assert!(problem(Candle::metal().unwrap_err()).contains("metal"));
    }
}
