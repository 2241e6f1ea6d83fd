//! The same kernel on candle's processor tensors and on our own: the numbers agree, the bits need not.
//!
//!     cargo run -p ulmus-candle --example against_cpu

#![expect(clippy::print_stdout, reason = "an example")]

use ulmus_backend::{Backend, BackendError, View, ViewMut};
use ulmus_candle::Candle;
use ulmus_cpu::Cpu;

const ROWS: usize = 8;
const WIDTH: usize = 64;

/// SwiGLU of some rows, on any device.
fn swiglu<B: Backend>(device: &B) -> Result<Vec<f32>, BackendError> {
    let values: Vec<f32> =
        (0..ROWS * 2 * WIDTH).map(|at| ((at * 7919) % 1013) as f32 / 200.0 - 2.5).collect();
    let (mut x, mut out) = (device.activations(values.len())?, device.activations(ROWS * WIDTH)?);
    device.set_activations(ViewMut::new(&mut x, 0..values.len()), &values);
    device.swiglu(ViewMut::new(&mut out, 0..ROWS * WIDTH), View::new(&x, 0..values.len()), WIDTH);
    let mut found = vec![0.0; ROWS * WIDTH];
    device.read_activations(View::new(&out, 0..ROWS * WIDTH), &mut found);
    Ok(found)
}

fn main() -> Result<(), BackendError> {
    // On an Apple computer `Candle::metal` opens the GPU; elsewhere it says why it cannot.
    let candle = match Candle::metal() {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("no Metal ({error}); candle computes on the processor");
            Candle::processor()
        }
    };
    let (own, other) = (swiglu(&Cpu::new(1))?, swiglu(&candle)?);
    let largest = own.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!(
        "{} and {}: {} numbers, largest difference {largest:e}",
        Cpu::new(1).describe(),
        candle.describe(),
        own.len()
    );
    Ok(())
}
