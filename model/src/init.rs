//! Initial weights as a function of a seed alone.
//!
//! Each tensor draws from its own `ChaCha8` stream, so a seed gives the same model on every worker, for any number of
//! workers, and in whatever order the tensors are made.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::params::{Initial, Tensor};

/// The initial values of a tensor, first to last; `index` is its number in the layout. Norms of a matrix are left to the
/// caller, who has the matrix, and 0 here.
pub(crate) fn initial_values(tensor: &Tensor, index: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(index as u64);
    let initial = tensor.initial.clone();
    tensor.range.clone().map(move |_| match initial {
        Initial::Normal(std) => {
            let normal: f64 = StandardNormal.sample(&mut random);
            (normal * std) as f32
        }
        Initial::Uniform(bound) => (random.random_range(-1.0..1.0) * bound) as f32,
        Initial::Zeros | Initial::RowNorms(_) => 0.0,
        Initial::Ones => 1.0,
    })
}

/// The L2 norm of a row and its square, of which the norm is the root.
pub(crate) fn row_norm(row: &[f32]) -> (f32, f32) {
    let square = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() as f32;
    (square.sqrt(), square)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Layout;
    use ulmus_plan::{ModelConfig, Multipliers};

    fn small() -> Layout {
        Layout::new(&ModelConfig {
            vocab_size: 512,
            num_transformer_layers: 4,
            model_dim: 128,
            head_dim: 32,
            num_gqa_groups: 2,
            ffn_multipliers: Multipliers::Uniform(2.0),
            ..ModelConfig::default()
        })
    }

    #[test]
    fn matrices_have_the_published_spread_and_norms_are_one() {
        for (index, tensor) in small().tensors().iter().enumerate() {
            let values: Vec<f32> = initial_values(tensor, index, 7).collect();
            let count = values.len() as f64;
            let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
            let std = (values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count).sqrt();
            let expected = if tensor.name.contains("out_proj") || tensor.name.contains("proj_2") {
                128f64.powf(-0.5) * 8f64.powf(-0.5)
            } else {
                128f64.powf(-0.5)
            };
            if tensor.decays() {
                assert!((std / expected - 1.0).abs() < 0.03, "{}: {std} for {expected}", tensor.name);
                assert!(mean.abs() < 4.0 * expected / count.sqrt(), "{}: mean {mean}", tensor.name);
            } else {
                assert!(values.iter().all(|x| *x == 1.0), "{}", tensor.name);
            }
        }
    }

    #[test]
    fn seeds_and_tensors_differ_and_repeat() {
        let layout = small();
        let draw = |index: usize, seed| -> Vec<f32> {
            initial_values(&layout.tensors()[index], index, seed).collect()
        };
        assert_eq!(draw(1, 7), draw(1, 7));
        assert_ne!(draw(1, 7), draw(1, 8));
        let shared = draw(1, 7).len();
        assert_ne!(draw(0, 7)[..shared], draw(1, 7)[..]);
    }
}
