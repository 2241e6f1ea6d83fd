//! How a model normalises, and the memory that its norms share.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::ModelConfig;

/// Rows whose contribution to a weight's gradient is summed apart, before the partial sums are added in order.
pub const ROW_BLOCK: usize = 64;

/// What every norm of a model computes, and how: before attention, FFN and head, and of query and key heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// RMS norm, `x / sqrt(mean(x²) + 1e-6) · weight`. A row is read once.
    #[default]
    Rms,
    /// The mathematics of `rms`, one operation after the other over the whole tensor, as an eager framework without a
    /// fused kernel computes it. For comparison: it only costs time and memory.
    NaiveRms,
    /// Layer norm without bias, `(x − mean(x)) / sqrt(variance(x) + 1e-5) · weight`. A row is read once.
    Layer,
}

impl NormKind {
    /// Every kind, the default first.
    pub const ALL: [Self; 3] = [Self::Rms, Self::NaiveRms, Self::Layer];

    /// The name used in plans and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rms => "rms",
            Self::NaiveRms => "naive_rms",
            Self::Layer => "layer",
        }
    }

    /// Elements of scratch for the norm of rows of that width, forward and backward.
    pub const fn row_scratch(self, rows: usize, width: usize) -> usize {
        let partial = rows.div_ceil(ROW_BLOCK) * width;
        match self {
            Self::Rms | Self::Layer => partial,
            // Three intermediate tensors, and two of one number per row.
            Self::NaiveRms => partial + rows * (3 * width + 2),
        }
    }

    /// Elements of scratch for the norms of the query and key heads of packed rows.
    pub fn head_scratch(self, rows: usize, [query, key]: [usize; 2], width: usize) -> usize {
        match self {
            Self::Rms | Self::Layer => 2 * self.row_scratch(rows, width),
            Self::NaiveRms => self.side_scratch(rows * query, width) + self.side_scratch(rows * key, width),
        }
    }

    /// Queries or keys as a tensor of their own: themselves, normed, and what norming takes.
    pub const fn side_scratch(self, heads: usize, width: usize) -> usize {
        2 * heads * width + self.row_scratch(heads, width)
    }
}

impl FromStr for NormKind {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or("use rms, naive_rms or layer")
    }
}

impl ModelConfig {
    /// Elements of scratch that the norms of the model share, for that many rows.
    pub fn norm_scratch(&self, rows: usize) -> usize {
        let heads = |layer: crate::LayerDims| {
            self.norm.head_scratch(rows, [layer.q_heads, layer.kv_heads], self.head_dim)
        };
        let stream = self.norm.row_scratch(rows, self.model_dim);
        self.layers().into_iter().map(heads).fold(stream, usize::max)
    }
}
