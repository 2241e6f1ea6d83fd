//! Opens every GPU that the driver shows; without one it says so, as on any machine without a GPU.
//!
//!     cargo run -p ulmus-cuda --example list_gpus

#![expect(clippy::print_stdout, reason = "an example")]

use ulmus_backend::{Backend, BackendError, View, ViewMut};
use ulmus_cuda::Cuda;

/// Copies some numbers to a GPU and back.
fn round_trip(gpu: &Cuda) -> Result<bool, BackendError> {
    let numbers = [1.5_f32, -2.0, 0.25];
    let mut buffer = gpu.allocate::<f32>(numbers.len())?;
    gpu.upload(ViewMut::new(&mut buffer, 0..numbers.len()), &numbers);
    let mut found = [0.0; 3];
    // It waits for everything before it that was asked of the device.
    gpu.download(View::new(&buffer, 0..numbers.len()), &mut found);
    Ok(found == numbers)
}

fn main() {
    // The driver is loaded when it is first needed, so that the same program runs where there is none.
    let devices = Cuda::devices();
    println!("GPUs that the driver shows: {devices}");
    for ordinal in 0..devices {
        match Cuda::new(ordinal).and_then(|gpu| Ok((gpu.describe(), round_trip(&gpu)?))) {
            Ok((name, whole)) => println!("cuda:{ordinal} is {name}; numbers came back whole: {whole}"),
            Err(error) => println!("cuda:{ordinal} cannot be used: {error}"),
        }
    }
    if devices == 0
        && let Err(error) = Cuda::new(0)
    {
        println!("whoever asks for one is told: {error}");
    }
}
