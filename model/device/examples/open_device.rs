//! Opens what a person may call a device, and shows what each name means on this machine.
//!
//!     cargo run -p ulmus-device --example open_device

#![expect(clippy::print_stdout, reason = "an example")]

use ulmus_backend::Backend;
use ulmus_device::AnyBackend;
use ulmus_plan::Device;

fn main() -> Result<(), String> {
    // `nth` tells the workers of one machine apart: of several GPUs the second worker gets the second.
    let (threads, nth) = (2, 0);
    for name in ["auto", "cpu", "cuda", "cuda:1"] {
        let device: Device = name.parse()?;
        // Code that computes is generic over the backend; this is the one place that asks which it is.
        match AnyBackend::new(device, threads, nth) {
            Ok(AnyBackend::Cpu(cpu)) => println!("{name}: {}", cpu.describe()),
            Ok(AnyBackend::Cuda(gpu)) => println!("{name}: {}", gpu.describe()),
            // A GPU that was asked for and is not there is an error: the CPU would be many times slower.
            Err(error) => println!("{name}: {error}"),
        }
    }
    println!("gpu: {}", "gpu".parse::<Device>().err().unwrap_or_default());
    Ok(())
}
