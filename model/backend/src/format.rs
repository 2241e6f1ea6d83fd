//! The number formats that a model's matrices, and its keys and values, can be kept in for inference.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};
use ulmus_plan::Precision;

/// How the matrices of a model are kept. Norm weights are float32 in every format, and so are all sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum WeightFormat {
    /// 32-bit floats; 4 bytes per weight.
    #[default]
    F32,
    /// 16-bit floats of IEEE 754, times float32 activations; 2 bytes per weight.
    F16,
    /// 16-bit floats with the exponent of float32, times activations rounded alike; 2 bytes per weight.
    Bf16,
    /// Blocks of 32 inputs that share a scale in f16, each weight an 8-bit integer, as in GGUF; activations are
    /// quantised in the same blocks. 34 bytes per 32 weights.
    Q8_0,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0];

    /// Its name: `f32`, `f16`, `bf16` or `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Of activations beside weights of the format, on a device that keeps them in the precision.
    pub fn precision(self) -> Precision {
        match self {
            Self::F32 | Self::F16 | Self::Q8_0 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
        }
    }

    /// The largest magnitude that stays finite.
    pub fn largest(self) -> f32 {
        match self {
            Self::F32 => f32::MAX,
            Self::F16 => f16::MAX.to_f32(),
            Self::Bf16 => bf16::MAX.to_f32(),
            // The scale is the largest magnitude of a block over 127.
            Self::Q8_0 => f16::MAX.to_f32() * 127.0,
        }
    }
}

/// How the keys and values of a generator are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheFormat {
    /// 32-bit floats.
    F32,
    /// 16-bit floats of IEEE 754.
    F16,
    /// 16-bit floats with the exponent of float32; queries and probabilities are rounded alike.
    Bf16,
}

impl CacheFormat {
    /// With 16 bits beside weights of 16 bits or fewer, so that long texts do not cost more to read than the weights.
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
        named.ok_or_else(|| format!("no weight format is called `{name}`; use f32, f16, bf16 or q8_0"))
    }
}
