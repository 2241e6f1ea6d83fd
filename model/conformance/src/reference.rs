//! The numbers of the reference implementation, and batches to compare with them.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use ulmus_backend::{IGNORE, Quantum, TrainingBackend};
use ulmus_model::{LossSum, MicroBatch, ModelError, Replica, Sums};

/// The id that pads the golden batches.
pub const PAD: u32 = 500;

/// Path of a golden file. `ULMUS_GOLDEN` names their folder if tests do not run where they were built.
pub fn golden(name: &str) -> PathBuf {
    let folder = std::env::var_os("ULMUS_GOLDEN").map(PathBuf::from);
    let here = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/a");
    folder.unwrap_or_else(here).join(name)
}

/// A golden JSON file.
pub fn json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

/// A golden safetensors file.
#[derive(Debug)]
pub struct Tensors(Vec<u8>);

impl Tensors {
    /// Opens the file `name`.
    pub fn open(name: &str) -> Self {
        Self::at(&golden(name))
    }

    /// Opens the file at `path`.
    pub fn at(path: &Path) -> Self {
        Self(std::fs::read(path).unwrap())
    }

    fn view<T>(&self, name: &str, read: impl Fn(Dtype, &[usize], &[u8]) -> T) -> T {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        read(tensor.dtype(), tensor.shape(), tensor.data())
    }

    /// Whether there is a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).is_ok()
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.view(name, |_, shape, _| shape.to_vec())
    }

    /// The values of a float32 tensor.
    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.view(name, |dtype, _, data| {
            assert_eq!(dtype, Dtype::F32);
            data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        })
    }

    /// The values of a tensor of 64-bit integers.
    pub fn u32(&self, name: &str) -> Vec<u32> {
        self.view(name, |dtype, _, data| {
            assert_eq!(dtype, Dtype::I64);
            data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
        })
    }
}

/// A golden batch, in which padding is masked.
pub fn batch(shape: &[usize], inputs: Vec<u32>, targets: &[u32]) -> MicroBatch {
    let targets = targets.iter().map(|t| if *t == PAD { IGNORE } else { *t }).collect();
    MicroBatch::of_whole_documents(shape[0], shape[1], inputs, targets)
}

/// The largest absolute difference.
pub fn largest_difference(found: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(found.len(), reference.len());
    found.iter().zip(reference).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, f64::max)
}

/// Runs one micro-batch, and computes the mean gradient over valid tokens by the exact sum.
///
/// # Errors
/// The errors of [`Replica::add_gradient`].
pub fn mean_gradient<B: TrainingBackend>(
    replica: &mut Replica<B>,
    batch: &MicroBatch,
) -> Result<(LossSum, Vec<f32>), ModelError> {
    let quantum = Quantum::new(batch.inputs.len() as u64, 1);
    let parameters = replica.trainable().parameters();
    let mut sums = Sums::new(replica.backend(), replica.trainable())?;
    let loss = replica.add_gradient(batch, &mut sums, &quantum, |_, _| {})?;
    replica.set_mean_gradient(&sums, 0..parameters, &quantum, loss.valid);
    let mut gradient = vec![0.0; parameters];
    replica.read_gradient(0, &mut gradient);
    Ok((loss, gradient))
}
