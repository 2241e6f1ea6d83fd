//! Multiplies a matrix on the processor: the number of threads changes no bit of the result.
//!
//!     cargo run --release -p ulmus-cpu --example matrix_product

#![expect(clippy::print_stdout, reason = "an example")]

use ulmus_backend::{Backend, BackendError, View, ViewMut, WeightFormat};
use ulmus_cpu::Cpu;

const ROWS: usize = 16;
const INPUTS: usize = 512;
const OUTPUTS: usize = 256;

/// Some values that are no short fractions.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|at| ((at * 7919) % 1013) as f32 / 700.0 - 0.7).collect()
}

fn product(threads: usize, format: WeightFormat) -> Result<Vec<f32>, BackendError> {
    let cpu = Cpu::new(threads);
    // Weights are packed once, as this device reads them best; buffers are planned before anything is computed.
    let weights = cpu.weights(&values(OUTPUTS * INPUTS), OUTPUTS, format)?;
    let (mut x, mut out) = (cpu.activations(ROWS * INPUTS)?, cpu.activations(ROWS * OUTPUTS)?);
    cpu.set_activations(ViewMut::new(&mut x, 0..ROWS * INPUTS), &values(ROWS * INPUTS));
    cpu.linear_weights(
        ViewMut::new(&mut out, 0..ROWS * OUTPUTS),
        View::new(&x, 0..ROWS * INPUTS),
        &weights,
        ROWS,
    );
    println!("{format:?} on {}", cpu.describe());
    let mut found = vec![0.0; ROWS * OUTPUTS];
    cpu.read_activations(View::new(&out, 0..ROWS * OUTPUTS), &mut found);
    Ok(found)
}

fn main() -> Result<(), BackendError> {
    for format in [WeightFormat::F32, WeightFormat::Bf16] {
        let (one, four) = (product(1, format)?, product(4, format)?);
        let same = one.iter().zip(&four).all(|(a, b)| a.to_bits() == b.to_bits());
        println!("the first number is {}; all bits are the same: {same}", one[0]);
    }
    Ok(())
}
