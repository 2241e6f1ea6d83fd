//! Why gradients are summed as integers: a sum of floats depends on the order, a sum of quanta does not.
//!
//!     cargo run -p ulmus-backend --example exact_sum

#![expect(clippy::print_stdout, reason = "an example")]

use ulmus_backend::Quantum;

fn main() {
    // Gradients of one parameter, of four micro-batches of 1,024 positions each.
    let gradients = [0.1_f32, -3.7e-5, 12.5, 1.3e-3];
    let orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]];

    let floats = orders.map(|order| order.iter().map(|at| gradients[*at]).sum::<f32>().to_bits());
    println!("bits of the sum of floats, by order: {floats:x?}");

    let quantum = Quantum::new(4 * 1024, 4);
    println!("a quantum is 2^{}, and a gradient at most {:e}", quantum.value().log2(), quantum.limit());
    let quanta = gradients.map(|gradient| quantum.quantise(gradient));
    let sums = orders.map(|order| order.iter().filter_map(|at| quanta[*at]).sum::<i64>());
    println!("sums of quanta, by order: {sums:?}");

    let mut mean = [0.0];
    quantum.mean_into(&sums[..1], 4 * 1024, &mut mean);
    println!("the mean over 4096 tokens, rounded once: {:e}", mean[0]);

    // What cannot be summed is reported, and never rounded away.
    println!("NaN: {:?}; 1e30: {:?}", quantum.quantise(f32::NAN), quantum.quantise(1e30));
}
