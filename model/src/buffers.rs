//! Buffers that both training and inference plan, once, before the first pass.

use ulmus_backend::{Backend, Element, Heads, In, Norm, Rope, TrainingBackend, View, ViewMut};
use ulmus_plan::{ModelConfig, NormKind};

use crate::error::ModelError;
use crate::params::LayerPlaces;

/// Allocates buffers and counts their bytes.
pub(crate) struct Planner<'a, B> {
    pub backend: &'a B,
    pub bytes: u64,
}

impl<'a, B: Backend> Planner<'a, B> {
    pub(crate) fn new(backend: &'a B) -> Self {
        Self { backend, bytes: 0 }
    }

    pub(crate) fn buffer<T: Element>(&mut self, len: usize) -> Result<B::Buffer<T>, ModelError> {
        self.bytes += (len * size_of::<T>()) as u64;
        Ok(self.backend.allocate(len)?)
    }

    pub(crate) fn activations(&mut self, len: usize) -> Result<B::Activations, ModelError> {
        self.bytes += (len * self.backend.activation_bytes()) as u64;
        Ok(self.backend.activations(len)?)
    }
}

impl<B: TrainingBackend> Planner<'_, B> {
    pub(crate) fn parameters(&mut self, len: usize) -> Result<B::Parameters, ModelError> {
        self.bytes += (len * self.backend.parameter_bytes()) as u64;
        Ok(self.backend.parameters(len)?)
    }
}

/// The first `len` elements of a buffer.
pub(crate) fn read<T>(buffer: &T, len: usize) -> View<'_, T> {
    View::new(buffer, 0..len)
}

/// The first `len` elements of a buffer, to write.
pub(crate) fn write<T>(buffer: &mut T, len: usize) -> ViewMut<'_, T> {
    ViewMut::new(buffer, 0..len)
}

/// Rotary tables on the device.
#[derive(Debug)]
pub(crate) struct RopeTables<B: Backend> {
    cos: B::Buffer<f32>,
    sin: B::Buffer<f32>,
    len: usize,
}

impl<B: Backend> RopeTables<B> {
    pub(crate) fn new(
        plan: &mut Planner<'_, B>,
        config: &ModelConfig,
        positions: usize,
    ) -> Result<Self, ModelError> {
        let (cos, sin) = rope_tables(config.head_dim, config.rope_freq_constant, positions);
        let len = cos.len();
        let mut tables = Self { cos: plan.buffer(len)?, sin: plan.buffer(len)?, len };
        plan.backend.upload(write(&mut tables.cos, len), &cos);
        plan.backend.upload(write(&mut tables.sin, len), &sin);
        Ok(tables)
    }

    /// The tables for spans of `length` rows, whose first rows have the positions `first`.
    pub(crate) fn at<'a>(&'a self, first: In<'a, B, u32>, length: usize) -> Rope<'a, B> {
        Rope { cos: read(&self.cos, self.len), sin: read(&self.sin, self.len), first, length }
    }
}

/// Cosines and sines `[positions, head_dim / 2]`. Exponents, powers, frequencies and angles are each rounded to f32, as
/// in the reference, because at position 2047 the last bit of a frequency moves the angle by 1e-4 radians.
fn rope_tables(head_dim: usize, base: f64, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let frequency = |j: usize| {
        let exponent = (2 * j) as f32 / head_dim as f32;
        1.0 / base.powf(f64::from(exponent)) as f32
    };
    let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
    let angles = (0..positions)
        .flat_map(|position| frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency)));
    angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
}

/// What all norms of a model share: their kind, and scratch that they use in turn.
#[derive(Debug)]
pub(crate) struct Norms<B: Backend> {
    kind: NormKind,
    scratch: B::Buffer<f32>,
    len: usize,
}

impl<B: Backend> Norms<B> {
    pub(crate) fn new(
        plan: &mut Planner<'_, B>,
        config: &ModelConfig,
        rows: usize,
    ) -> Result<Self, ModelError> {
        let len = config.norm_scratch(rows);
        Ok(Self { kind: config.norm, scratch: plan.buffer(len)?, len })
    }

    /// The norm with the weights `weight`.
    pub(crate) fn of<'a>(&'a mut self, weight: View<'a, B::Buffer<f32>>) -> Norm<'a, B::Buffer<f32>> {
        Norm { kind: self.kind, weight, scratch: write(&mut self.scratch, self.len) }
    }
}

/// The heads of a layer.
pub(crate) fn heads(layer: &LayerPlaces, head_dim: usize) -> Heads {
    Heads { query: layer.dims.q_heads, key_value: layer.dims.kv_heads, width: head_dim }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;
    use ulmus_cpu::Cpu;

    /// Reads the reference's RMS norms and rotations.
    fn pieces() -> impl Fn(&str) -> Vec<f32> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/a/pieces.safetensors");
        let bytes = std::fs::read(path).unwrap();
        move |name| {
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let tensor = tensors.tensor(name).unwrap();
            match tensor.dtype() {
                safetensors::Dtype::F32 => {
                    tensor.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                }
                _ => tensor
                    .data()
                    .chunks(8)
                    .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32)
                    .collect(),
            }
        }
    }

    fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= tolerance, "{worst:e}");
    }

    #[test]
    fn rotary_tables_are_the_reference_s() {
        let pieces = pieces();
        for head_dim in [64, 128] {
            let of = |name: &str| pieces(&format!("rope{head_dim}.{name}"));
            let positions = of("positions");
            let (cos, sin) = rope_tables(
                head_dim,
                10_000.0,
                positions.iter().fold(0.0, |a: f32, b| a.max(*b)) as usize + 1,
            );
            let half = head_dim / 2;
            for (row, position) in positions.iter().enumerate() {
                let at = *position as usize * half;
                // The reference repeats each table for the second half of the head.
                assert_close(&cos[at..at + half], &of("cos")[row * head_dim..][..half], 1e-6);
                assert_close(&sin[at..at + half], &of("sin")[row * head_dim..][..half], 1e-6);
            }
        }
    }

    #[test]
    fn norm_is_the_reference_s() {
        let pieces = pieces();
        let (x, weight) = (pieces("rmsnorm.x"), pieces("rmsnorm.weight"));
        let mut out = vec![0.0; x.len()];
        let (cpu, config) = (Cpu::new(1), ModelConfig::default());
        let mut norms = Norms::new(&mut Planner::new(&cpu), &config, x.len() / weight.len()).unwrap();
        let norm = norms.of(read(&weight, weight.len()));
        cpu.norm(write(&mut out, x.len()), read(&x, x.len()), norm);
        assert_close(&out, &pieces("rmsnorm.y"), 1e-6);
    }

    /// The kernel norms each head before it rotates; rotation is linear, so the head's own size undoes the norm.
    #[test]
    fn rotation_is_the_reference_s() {
        let pieces = pieces();
        let cpu = Cpu::new(1);
        let config = ModelConfig { head_dim: 32, ..ModelConfig::default() };
        let rope = RopeTables::new(&mut Planner::new(&cpu), &config, 9).unwrap();
        let mut norms = Norms::new(&mut Planner::new(&cpu), &config, 9).unwrap();
        let heads = Heads { query: 1, key_value: 1, width: 32 };
        // [heads, rows, 32]: queries are the last three of nine positions.
        for (name, count, first) in [("q", 3, 6), ("k", 9, 0)] {
            let expected = pieces(&format!("rope_apply.{name}_out"));
            for (x, expected) in
                pieces(&format!("rope_apply.{name}")).chunks(count * 32).zip(expected.chunks(count * 32))
            {
                let packed: Vec<f32> = x.chunks(32).flat_map(|x| [x, x, x].concat()).collect();
                let mut out = vec![0.0; packed.len()];
                cpu.qk_norm_rope(
                    write(&mut out, packed.len()),
                    read(&packed, packed.len()),
                    norms.of(read(&vec![1.0; 64], 64)),
                    rope.at(read(&vec![first as u32], 1), count),
                    heads,
                );
                for ((x, out), expected) in x.chunks(32).zip(out.chunks(96)).zip(expected.chunks(32)) {
                    let size = (x.iter().map(|x| x * x).sum::<f32>() / 32.0 + 1e-6).sqrt();
                    let rotated: Vec<f32> = out[..64].iter().map(|x| x * size).collect();
                    assert_close(&rotated[..32], expected, 3e-6);
                    assert_close(&rotated[32..], expected, 3e-6);
                }
            }
        }
    }
}
