//! How a model normalises.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
}

impl FromStr for NormKind {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or("use rms, naive_rms or layer")
    }
}
