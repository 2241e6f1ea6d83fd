//! Number formats of a model's matrices, and of its cached keys and values, in inference.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};
use ulmus_plan::Precision;

/// How the matrices of a model are stored. Norm weights and all sums are float32 in every format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum WeightFormat {
    /// 32-bit floats; 4 bytes per weight.
    #[default]
    F32,
    /// IEEE 754 half precision, multiplied by float32 activations; 2 bytes per weight.
    F16,
    /// 16-bit floats with the exponent of float32, multiplied by activations rounded to the same format; 2 bytes per
    /// weight.
    Bf16,
    /// 8-bit integers in blocks of 32 inputs that share an f16 scale, as in GGUF; activations are quantised in the same
    /// blocks. 34 bytes per 32 weights.
    Q8_0,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0];

    /// The name: `f32`, `f16`, `bf16` or `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// The precision of activations that are multiplied by weights of this format.
    pub fn precision(self) -> Precision {
        match self {
            Self::F32 | Self::F16 | Self::Q8_0 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
        }
    }

    /// Bytes that so many weights take.
    pub fn bytes(self, weights: u64) -> u64 {
        match self {
            Self::F32 => 4 * weights,
            Self::F16 | Self::Bf16 => 2 * weights,
            Self::Q8_0 => weights.div_ceil(32) * 34,
        }
    }

    /// The largest magnitude that stays finite in this format.
    pub fn largest(self) -> f32 {
        match self {
            Self::F32 => f32::MAX,
            Self::F16 => f16::MAX.to_f32(),
            Self::Bf16 => bf16::MAX.to_f32(),
            // The scale, an f16, is the largest magnitude of a block divided by 127.
            Self::Q8_0 => f16::MAX.to_f32() * 127.0,
        }
    }
}

/// How the keys and values of a generator are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheFormat {
    /// 32-bit floats.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// 16-bit floats with the exponent of float32; queries and probabilities are rounded to the same format.
    Bf16,
}

impl CacheFormat {
    /// The format that goes with weights of a format: 16 bits with those of 16 bits or fewer, so that reading a long
    /// text's keys and values does not cost more than reading the weights.
    pub fn beside(weights: WeightFormat) -> Self {
        match weights {
            WeightFormat::F32 => Self::F32,
            WeightFormat::F16 | WeightFormat::Q8_0 => Self::F16,
            WeightFormat::Bf16 => Self::Bf16,
        }
    }
}

impl From<CacheFormat> for WeightFormat {
    fn from(format: CacheFormat) -> Self {
        match format {
            CacheFormat::F32 => Self::F32,
            CacheFormat::F16 => Self::F16,
            CacheFormat::Bf16 => Self::Bf16,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WeightFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|format| format.name() == name);
        named.ok_or_else(|| format!("unknown weight format `{name}`; use f32, f16, bf16 or q8_0"))
    }
}
