//! The files of a checkpoint, and the contents of those that hold the optimizer's moments.
//!
//! The moments of the flattened trainable parameters are cut into ranges that depend on the number of these parameters
//! alone, so any number of workers can write them and any other number can read them.

use std::ops::Range;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use ulmus_run::paths;
use ulmus_types::Partition;

use crate::CheckpointError;

// Files hold little-endian numbers, and are written without conversion.
const _: () = assert!(cfg!(target_endian = "little"), "ulmus needs a little-endian machine");

/// Elements of one optimizer file. Its two moments take 64 MiB each, little enough to be sent again if a connection
/// breaks.
const SHARD_ELEMENTS: usize = 16 << 20;
const FIRST_MOMENT: &str = "exp_avg";
const SECOND_MOMENT: &str = "exp_avg_sq";

/// A fixed range of the flattened trainable parameters, and the optimizer file that holds its moments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptimizerShard {
    index: usize,
    range: Range<usize>,
}

/// The optimizer files of a model with this many trainable parameters, in order and without gaps.
pub fn optimizer_shards(trainable: usize) -> Vec<OptimizerShard> {
    shards(&Partition::fixed(trainable, SHARD_ELEMENTS))
}

/// The files of a checkpoint of a model with this many trainable parameters, in the order in which workers announce
/// them.
pub fn files_of(trainable: usize) -> Vec<String> {
    let moments = optimizer_shards(trainable).into_iter().map(|shard| shard.file_name());
    [paths::WEIGHTS.to_owned(), paths::STATE.to_owned()].into_iter().chain(moments).collect()
}

fn shards(partition: &Partition) -> Vec<OptimizerShard> {
    partition.parts().enumerate().map(|(index, range)| OptimizerShard { index, range }).collect()
}

impl OptimizerShard {
    /// The name of its file, such as `optimizer-00000.safetensors`.
    pub fn file_name(&self) -> String {
        format!("optimizer-{:05}.safetensors", self.index)
    }

    /// Encodes its file from both moments of *all* trainable parameters.
    ///
    /// # Panics
    /// When the moments are shorter than the range.
    pub fn encode(&self, first_moment: &[f32], second_moment: &[f32]) -> Vec<u8> {
        let moments = [(FIRST_MOMENT, first_moment), (SECOND_MOMENT, second_moment)];
        let views = moments.map(|(name, moment)| {
            let bytes = bytemuck::cast_slice(&moment[self.range.clone()]);
            let view = TensorView::new(Dtype::F32, vec![self.range.len()], bytes);
            (name, view.expect("4 bytes per element"))
        });
        #[expect(clippy::disallowed_types, reason = "safetensors asks for it; one entry has one order")]
        let metadata = std::collections::HashMap::from([("range".to_owned(), self.range_text())]);
        safetensors::serialize(views, Some(metadata)).expect("two tensors fit the header")
    }

    /// Decodes its file into its range of both moments of *all* trainable parameters.
    ///
    /// # Errors
    /// [`CheckpointError::Form`] when the contents belong to another range or are no optimizer file at all.
    ///
    /// # Panics
    /// When the moments are shorter than the range.
    pub fn decode(
        &self,
        contents: &[u8],
        first_moment: &mut [f32],
        second_moment: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let wrong = |reason: String| CheckpointError::Form { file: self.file_name(), reason };
        let (_, header) = SafeTensors::read_metadata(contents).map_err(|error| wrong(error.to_string()))?;
        let range = header.metadata().as_ref().and_then(|metadata| metadata.get("range"));
        if range != Some(&self.range_text()) {
            return Err(wrong(format!("it holds elements {range:?}, not {}", self.range_text())));
        }
        let tensors = SafeTensors::deserialize(contents).map_err(|error| wrong(error.to_string()))?;
        for (name, moment) in [(FIRST_MOMENT, first_moment), (SECOND_MOMENT, second_moment)] {
            let view = tensors.tensor(name).map_err(|error| wrong(error.to_string()))?;
            if view.dtype() != Dtype::F32 || view.shape() != [self.range.len()] {
                let (dtype, shape, expected) = (view.dtype(), view.shape(), self.range.len());
                return Err(wrong(format!("{name} is {dtype:?} {shape:?}, not F32 [{expected}]")));
            }
            let words = view.data().chunks_exact(4);
            for (value, word) in moment[self.range.clone()].iter_mut().zip(words) {
                *value = f32::from_le_bytes(word.try_into().expect("4 bytes"));
            }
        }
        Ok(())
    }

    fn range_text(&self) -> String {
        format!("{}..{}", self.range.start, self.range.end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn published_sizes_are_cut_into_whole_files() {
        let files = optimizer_shards(271_691_008);
        assert_eq!(files.len(), 17);
        assert_eq!(files[16].file_name(), "optimizer-00016.safetensors");
        assert_eq!(files[16].range, 16 * SHARD_ELEMENTS..271_691_008);
        assert!(optimizer_shards(0).is_empty());
    }

    #[test]
    fn a_file_of_another_range_is_refused() {
        let files = shards(&Partition::fixed(10, 4));
        let moments = [1.0_f32; 10];
        let contents = files[0].encode(&moments, &moments);
        let mut target = moments;
        let error = files[1].decode(&contents, &mut target, &mut [0.0; 10]).unwrap_err();
        assert!(error.to_string().contains("0..4"), "{error}");
        assert!(files[0].decode(&contents[1..], &mut target, &mut [0.0; 10]).is_err());
        assert!(files[0].decode(b"", &mut target, &mut [0.0; 10]).is_err());
    }

    proptest! {
        #[test]
        fn moments_survive_any_cut(
            bits in prop::collection::vec(any::<(u32, u32)>(), 0..200),
            elements in 1_usize..64,
        ) {
            let (first, second): (Vec<f32>, Vec<f32>) =
                bits.iter().map(|(a, b)| (f32::from_bits(*a), f32::from_bits(*b))).unzip();
            let (mut read_first, mut read_second) = (vec![0.0; first.len()], vec![0.0; first.len()]);
            for shard in shards(&Partition::fixed(first.len(), elements)) {
                let contents = shard.encode(&first, &second);
                prop_assert_eq!(&contents, &shard.encode(&first, &second));
                shard.decode(&contents, &mut read_first, &mut read_second).unwrap();
            }
            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(same(&first, &read_first) && same(&second, &read_second));
        }
    }
}
