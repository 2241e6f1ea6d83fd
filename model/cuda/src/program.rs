//! The files of kernels, and the options that they are compiled with.

use serde::{Deserialize, Serialize};

use ulmus_backend::{CacheFormat, WeightFormat};

/// The format of numbers on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) enum Format {
    F32,
    F16,
    Bf16,
}

impl Format {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Name of the format in the kernels.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl From<CacheFormat> for Format {
    fn from(format: CacheFormat) -> Self {
        match format {
            CacheFormat::F32 => Self::F32,
            CacheFormat::F16 => Self::F16,
            CacheFormat::Bf16 => Self::Bf16,
        }
    }
}

/// The shape of a block in attention.cu.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tiling {
    /// Number of tiles of 16 rows per warp.
    pub tiles: usize,
    /// Number of warps per block.
    pub warps: usize,
    /// Number of columns in shared memory at a time.
    pub columns: usize,
}

impl Tiling {
    /// Number of rows per block.
    pub(super) fn rows(self) -> usize {
        self.tiles * self.warps * 16
    }

    /// Bytes of shared memory for `row_tiles` tiles of rows and two stages of two tiles of columns.
    pub(super) fn shared(self, head: usize, row_tiles: usize) -> usize {
        2 * head * (row_tiles * self.rows() + 4 * self.columns)
    }
}

/// A file of kernels, with the options specific to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Program {
    Norm { width: usize, centred: bool },
    Heads { half: usize, lanes: usize, centred: bool },
    Naive,
    Sums,
    Swiglu,
    Adapter,
    Embed { table: Format },
    Loss,
    Optimizer,
    Attention { head: usize, tiling: Tiling },
    AttentionAny { head: usize, cached: Format },
    Matvec { weights: WeightFormat, rows: usize, result: Format, loads: usize },
    Cache { head: usize, cached: Format, group: Option<usize> },
    Convert { from: Format, to: Format },
}

impl Program {
    /// Name of the file.
    pub(super) fn file(self) -> &'static str {
        self.source().0
    }

    /// Name and text of the file.
    pub(super) fn source(self) -> (&'static str, &'static str) {
        match self {
            Self::Norm { .. } => ("norm.cu", include_str!("kernels/norm.cu")),
            Self::Heads { .. } => ("heads.cu", include_str!("kernels/heads.cu")),
            Self::Naive => ("naive.cu", include_str!("kernels/naive.cu")),
            Self::Sums => ("sums.cu", include_str!("kernels/sums.cu")),
            Self::Swiglu => ("swiglu.cu", include_str!("kernels/swiglu.cu")),
            Self::Adapter => ("adapter.cu", include_str!("kernels/adapter.cu")),
            Self::Embed { .. } => ("embed.cu", include_str!("kernels/embed.cu")),
            Self::Loss => ("loss.cu", include_str!("kernels/loss.cu")),
            Self::Optimizer => ("optimizer.cu", include_str!("kernels/optimizer.cu")),
            Self::Attention { .. } => ("attention.cu", include_str!("kernels/attention.cu")),
            Self::AttentionAny { .. } => ("attention_any.cu", include_str!("kernels/attention_any.cu")),
            Self::Matvec { .. } => ("matvec.cu", include_str!("kernels/matvec.cu")),
            Self::Cache { .. } => ("cache.cu", include_str!("kernels/cache.cu")),
            Self::Convert { .. } => ("convert.cu", include_str!("kernels/convert.cu")),
        }
    }

    fn defines(self) -> Vec<(&'static str, String)> {
        let flag = |on: bool| u8::from(on).to_string();
        match self {
            Self::Norm { width, centred } => vec![("WIDTH", width.to_string()), ("CENTRED", flag(centred))],
            Self::Heads { half, lanes, centred } => vec![
                ("HALF", half.to_string()),
                ("HEAD_LANES", lanes.to_string()),
                ("CENTRED", flag(centred)),
            ],
            Self::Naive | Self::Sums | Self::Swiglu | Self::Adapter | Self::Loss | Self::Optimizer => {
                Vec::new()
            }
            Self::Embed { table } => vec![("TABLE", table.name().to_owned())],
            Self::Attention { head, tiling: Tiling { tiles, warps, columns } } => vec![
                ("HEAD", head.to_string()),
                ("TILES", tiles.to_string()),
                ("WARPS", warps.to_string()),
                ("COLUMNS", columns.to_string()),
            ],
            Self::AttentionAny { head, cached } => {
                vec![("HEAD", head.to_string()), ("CACHED", cached.name().to_owned())]
            }
            Self::Matvec { weights, rows, result, loads } => vec![
                ("WEIGHTS", format!("WEIGHTS_{}", weights.name().to_uppercase())),
                ("ROWS", rows.to_string()),
                ("RESULT", result.name().to_owned()),
                ("LOADS", loads.to_string()),
            ],
            Self::Cache { head, cached, group } => {
                let mut defines = vec![("HEAD", head.to_string()), ("CACHED", cached.name().to_owned())];
                defines.extend(group.map(|group| ("GROUP", group.to_string())));
                defines
            }
            Self::Convert { from, to } => {
                vec![("FROM", from.name().to_owned()), ("TO", to.name().to_owned())]
            }
        }
    }
}

/// A program for activations in one format, which loads `vector` of them at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Variant {
    pub program: Program,
    pub activation: Format,
    pub vector: usize,
}

impl Variant {
    /// The definitions for the compiler, as options.
    pub(super) fn options(self) -> Vec<String> {
        let mut defines = self.program.defines();
        defines.push(("ACTIVATION", self.activation.name().to_owned()));
        defines.push(("VEC", self.vector.to_string()));
        defines.into_iter().map(|(name, value)| format!("-D{name}={value}")).collect()
    }
}

/// The headers that every file includes.
pub(super) const HEADERS: [(&str, &str); 2] = [
    ("common.cuh", include_str!("kernels/common.cuh")),
    ("intrinsics.cuh", include_str!("kernels/intrinsics.cuh")),
];

#[cfg(test)]
impl Variant {
    /// The variants for training and using the published models in both precisions, and those that tests use.
    pub(super) fn published() -> Vec<Self> {
        use ulmus_plan::Preset;

        use super::{norm::head_lanes, tilings};

        let mut programs = vec![
            Program::Naive,
            Program::Sums,
            Program::Swiglu,
            Program::Adapter,
            Program::Loss,
            Program::Optimizer,
            Program::Convert { from: Format::F32, to: Format::F16 },
            Program::Convert { from: Format::Bf16, to: Format::F16 },
        ];
        programs.extend([Format::F32, Format::Bf16].map(|table| Program::Embed { table }));
        for (weights, most) in [
            (WeightFormat::F32, 4),
            (WeightFormat::F16, 8),
            (WeightFormat::Bf16, 8),
            (WeightFormat::Q8_0, 16),
        ] {
            for (rows, loads) in [(1, most), (4, most), (8, most), (1, 1)] {
                let of = |result| Program::Matvec { weights, rows, result, loads };
                programs.extend([Format::F32, Format::Bf16].map(of));
            }
        }
        let mut variants = Vec::new();
        for activation in [Format::F32, Format::Bf16] {
            let wide = 16 / activation.bytes();
            for vector in [1, wide] {
                let mut programs = programs.clone();
                for config in Preset::ALL.map(Preset::config) {
                    let (width, head) = (config.model_dim, config.head_dim);
                    for centred in [false, true] {
                        let lanes = head_lanes(head / 2, vector);
                        programs.push(Program::Norm { width, centred });
                        programs.push(Program::Heads { half: head / 2, lanes, centred });
                    }
                    for cached in [Format::F32, Format::F16, Format::Bf16] {
                        let group = (vector == wide).then_some(config.num_gqa_groups);
                        programs.push(Program::Cache { head, cached, group });
                        programs.push(Program::AttentionAny { head, cached });
                    }
                    if (activation, vector) == (Format::Bf16, wide) {
                        let tilings = tilings(head).expect("published heads have tilings");
                        let all = [tilings.forward, tilings.queries, tilings.keys];
                        programs.extend(all.map(|tiling| Program::Attention { head, tiling }));
                    }
                }
                variants.extend(programs.into_iter().map(|program| Self { program, activation, vector }));
            }
        }
        // The optimizer loads f32 even if activations are bf16.
        variants.push(Self { program: Program::Optimizer, activation: Format::Bf16, vector: 4 });
        let mut seen = std::collections::BTreeSet::new();
        variants.retain(|variant| seen.insert(*variant));
        variants
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that did not wait would run concurrently with earlier ones, and let later ones do so, too.
    #[test]
    fn every_kernel_waits_for_those_before_it() {
        let mut files = std::collections::BTreeMap::new();
        for variant in Variant::published() {
            let (file, source) = variant.program.source();
            files.insert(file, source);
        }
        assert_eq!(files.len(), 14);
        for (file, source) in files {
            let kernels: Vec<&str> = source.split("extern \"C\" __global__").skip(1).collect();
            assert!(!kernels.is_empty(), "{file}");
            for kernel in kernels {
                let (head, body) = kernel.split_once('{').unwrap();
                let (before, _) =
                    body.split_once("begin_kernel();").unwrap_or_else(|| panic!("{file}:{head}"));
                // Before it waits, a kernel may only prefetch weights, which never change.
                let early =
                    before.trim().is_empty() || head.contains(" matvec(") && before.contains("weights.bring");
                assert!(early, "{file}:{head}");
            }
        }
    }
}
