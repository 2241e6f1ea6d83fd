//! The shape of an OpenELM model, and the exact rounding rules that decide it.
//!
//! Field names are those of the published `config.json`, so that a plan, an exported model and the reference
//! speak of the same thing by the same word.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ulmus_types::Problems;

use crate::norm::NormKind;
use crate::rules::{range, sound};

/// The longest context of a model.
const LONGEST_CONTEXT: usize = 1 << 20;
/// The most layers of a model.
const MOST_LAYERS: usize = 512;

/// Width multipliers over the depth of a model (paper: α for attention, β for the FFN).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "it must be a number or a list of numbers")]
pub enum Multipliers {
    /// The same in every layer.
    Uniform(f64),
    /// Two values stand for the first and the last layer: layers between are evenly spaced, and each value is rounded to 2
    /// decimals. Otherwise there is one value per layer.
    Layers(Vec<f64>),
}

impl Multipliers {
    /// One value per layer.
    ///
    /// Two values expand as `linspace(first, last, layers)` in f64, rounded to 2 decimals. Without that rounding, seven layers
    /// of the published models would have other widths.
    pub fn expand(&self, layers: usize) -> Vec<f64> {
        match self {
            Self::Uniform(value) => vec![*value; layers],
            Self::Layers(ends) if ends.len() == 2 => {
                let step = (ends[1] - ends[0]) / (layers.max(2) - 1) as f64;
                let at =
                    |i: usize| if i > 0 && i + 1 == layers { ends[1] } else { ends[0] + step * i as f64 };
                (0..layers).map(|i| (at(i) * 100.0).round_ties_even() / 100.0).collect()
            }
            Self::Layers(values) => values.clone(),
        }
    }

    /// Reports every rule that is broken; `layers` is not given where it is wrong itself.
    fn check(&self, key: &str, layers: Option<usize>, published: &str, problems: &mut Problems) {
        let (written, values) = match self {
            Self::Uniform(value) => (format!("{value:?}"), std::slice::from_ref(value)),
            Self::Layers(values) => (format!("{values:?}"), &values[..]),
        };
        let advice = format!("write for instance {published}");
        if let (Self::Layers(values), Some(layers)) = (self, layers) {
            problems.check(
                values.len() == 2 || values.len() == layers,
                key,
                &written,
                format!("a list needs 2 values (first and last layer) or {layers} (one per layer)"),
                &advice,
            );
        }
        // Values between two valid multipliers are valid as well.
        problems.check(
            values.iter().all(|multiplier| *multiplier > 0.0 && *multiplier <= 64.0),
            key,
            &written,
            "multipliers must be above 0 and at most 64",
            advice,
        );
    }
}

/// Rounds `value` to a multiple of `divisor`: half rounds up, never below 0.9·`value`, never below `divisor`.
fn make_divisible(value: f64, divisor: usize) -> usize {
    let divisor_f = divisor as f64;
    let nearest = ((value + divisor_f / 2.0).floor() / divisor_f).floor() as usize * divisor;
    let rounded = nearest.max(divisor);
    if (rounded as f64) < 0.9 * value { rounded + divisor } else { rounded }
}

/// The widths of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDims {
    /// Query heads.
    pub q_heads: usize,
    /// Key heads. There are as many value heads.
    pub kv_heads: usize,
    /// Hidden width of the FFN (each of the two halves of `proj_1`).
    pub ffn_dim: usize,
}

/// The shape of a model: everything that decides which parameters it has and what is computed with them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelConfig {
    /// Rows of the embedding matrix. If it is not set but `tokenizer.pieces` is: one for each piece and a pad id, rounded up to a
    /// multiple of 128.
    pub vocab_size: usize,
    /// Sequence length in tokens.
    pub max_context_length: usize,
    /// Number of decoder layers, N.
    pub num_transformer_layers: usize,
    /// Width of the residual stream (hidden size).
    pub model_dim: usize,
    /// Width of one attention head.
    pub head_dim: usize,
    /// Query heads that share a key/value head (grouped-query attention).
    pub num_gqa_groups: usize,
    /// α: width of attention relative to `model_dim`. A number, a pair (first and last layer, interpolated), or one per layer.
    pub qkv_multipliers: Multipliers,
    /// β: width of the FFN relative to `model_dim`, written like α.
    pub ffn_multipliers: Multipliers,
    /// FFN widths are multiples of this.
    pub ffn_dim_divisor: usize,
    /// Base of the rotary position embedding (rope theta).
    pub rope_freq_constant: f64,
    /// Kind of every norm. Not a key of the published `config.json`, where it is RMS norm.
    pub norm: NormKind,
    /// Whether the output head is the embedding (tied), or a matrix of its own.
    // Left out where it is true, so that plans from before it was a key keep their digests.
    #[serde(skip_serializing_if = "is_true")]
    pub share_input_output_layers: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_true(value: &bool) -> bool {
    *value
}

impl Default for ModelConfig {
    /// OpenELM-270M.
    fn default() -> Self {
        Preset::Openelm270m.config()
    }
}

/// The four published models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preset {
    /// 16 layers of width 1280.
    #[serde(rename = "openelm-270m")]
    Openelm270m,
    /// 20 layers of width 1536.
    #[serde(rename = "openelm-450m")]
    Openelm450m,
    /// 28 layers of width 2048.
    #[serde(rename = "openelm-1_1b")]
    Openelm1_1b,
    /// 36 layers of width 3072.
    #[serde(rename = "openelm-3b")]
    Openelm3b,
}

impl FromStr for Preset {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::from_name(name).ok_or("use openelm-270m, openelm-450m, openelm-1_1b or openelm-3b")
    }
}

impl Preset {
    /// Every preset, smallest first.
    pub const ALL: [Self; 4] = [Self::Openelm270m, Self::Openelm450m, Self::Openelm1_1b, Self::Openelm3b];

    /// The name used in plans and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Openelm270m => "openelm-270m",
            Self::Openelm450m => "openelm-450m",
            Self::Openelm1_1b => "openelm-1_1b",
            Self::Openelm3b => "openelm-3b",
        }
    }

    /// The preset of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|preset| preset.name() == name)
    }

    /// The published shape, with the 32,128 embedding rows that pretraining used.
    pub fn config(self) -> ModelConfig {
        let (layers, model_dim, head_dim) = match self {
            Self::Openelm270m => (16, 1280, 64),
            Self::Openelm450m => (20, 1536, 64),
            Self::Openelm1_1b => (28, 2048, 64),
            Self::Openelm3b => (36, 3072, 128),
        };
        ModelConfig {
            vocab_size: 32_128,
            max_context_length: 2048,
            num_transformer_layers: layers,
            model_dim,
            head_dim,
            num_gqa_groups: 4,
            qkv_multipliers: Multipliers::Layers(vec![0.5, 1.0]),
            ffn_multipliers: Multipliers::Layers(vec![0.5, 4.0]),
            ffn_dim_divisor: 256,
            rope_freq_constant: 10_000.0,
            norm: NormKind::Rms,
            share_input_output_layers: true,
        }
    }
}

impl ModelConfig {
    /// A shape with the most layers and the longest context that there may be, in which everything has room that has room in some
    /// model.
    pub fn largest() -> Self {
        Self { max_context_length: LONGEST_CONTEXT, num_transformer_layers: MOST_LAYERS, ..Self::default() }
    }

    /// The widths of every layer, first to last.
    pub fn layers(&self) -> Vec<LayerDims> {
        let count = self.num_transformer_layers;
        let attention = self.qkv_multipliers.expand(count);
        let ffn = self.ffn_multipliers.expand(count);
        let width = self.model_dim as f64;
        attention
            .into_iter()
            .zip(ffn)
            .map(|(alpha, beta)| {
                let q_dim = make_divisible(width * alpha, self.head_dim * self.num_gqa_groups);
                let q_heads = q_dim / self.head_dim;
                LayerDims {
                    q_heads,
                    kv_heads: q_heads / self.num_gqa_groups,
                    ffn_dim: make_divisible(beta * width, self.ffn_dim_divisor),
                }
            })
            .collect()
    }

    /// Number of parameters; a tied embedding counts once.
    pub fn parameters(&self) -> u64 {
        let d = self.model_dim;
        let layers: usize = self
            .layers()
            .iter()
            .map(|layer| {
                let qkv = (layer.q_heads + 2 * layer.kv_heads) * self.head_dim;
                let out = layer.q_heads * self.head_dim;
                d * (qkv + out + 3 * layer.ffn_dim) + 2 * d + 2 * self.head_dim
            })
            .sum();
        let tables = if self.share_input_output_layers { 1 } else { 2 };
        (tables * self.vocab_size * d + layers + d) as u64
    }

    /// Reports every rule that the shape breaks; keys are below `at`, for instance `model`.
    pub fn check(&self, at: &str, problems: &mut Problems) {
        let key = |name: &str| format!("{at}.{name}");
        for (name, value, most) in [
            ("vocab_size", self.vocab_size, 1 << 20),
            ("max_context_length", self.max_context_length, LONGEST_CONTEXT),
            ("num_transformer_layers", self.num_transformer_layers, MOST_LAYERS),
            ("model_dim", self.model_dim, 1 << 16),
            ("head_dim", self.head_dim, 512),
            ("num_gqa_groups", self.num_gqa_groups, 256),
            ("ffn_dim_divisor", self.ffn_dim_divisor, 1 << 16),
        ] {
            range(problems, key(name), value, 1..=most);
        }
        if sound(problems, &[&key("head_dim")]) {
            problems.check(
                self.head_dim.is_multiple_of(2),
                key("head_dim"),
                self.head_dim,
                "rotary embedding pairs the two halves of a head, so it must be even",
                format!("set it to {}", self.head_dim + 1),
            );
        }
        problems.check(
            self.rope_freq_constant.is_finite() && self.rope_freq_constant > 1.0,
            key("rope_freq_constant"),
            self.rope_freq_constant,
            "it must be above 1",
            "set it to 10000, as in the published models",
        );
        let layers =
            sound(problems, &[&key("num_transformer_layers")]).then_some(self.num_transformer_layers);
        self.qkv_multipliers.check(&key("qkv_multipliers"), layers, "[0.5, 1.0]", problems);
        self.ffn_multipliers.check(&key("ffn_multipliers"), layers, "[0.5, 4.0]", problems);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs of equal values, as the paper's tables write them.
    fn runs(values: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for value in values {
            match runs.last_mut() {
                Some((last, count)) if *last == value => *count += 1,
                _ => runs.push((value, 1)),
            }
        }
        runs
    }

    #[test]
    fn published_models_have_the_published_sizes() {
        let sizes = Preset::ALL.map(|preset| preset.config().parameters());
        assert_eq!(sizes, [271_691_008, 457_375_744, 1_080_153_600, 3_037_040_640]);
        let hub =
            Preset::ALL.map(|preset| ModelConfig { vocab_size: 32_000, ..preset.config() }.parameters());
        assert_eq!(hub, [271_527_168, 457_179_136, 1_079_891_456, 3_036_647_424]);
    }

    #[test]
    fn an_untied_head_counts_and_is_written_down() {
        let tied = ModelConfig::default();
        let untied = ModelConfig { share_input_output_layers: false, ..tied.clone() };
        assert_eq!(untied.parameters() - tied.parameters(), (tied.vocab_size * tied.model_dim) as u64);
        let json = |config: &ModelConfig| serde_json::to_string(config).unwrap();
        assert!(!json(&tied).contains("share_input_output_layers"));
        for config in [tied, untied] {
            assert_eq!(serde_json::from_str::<ModelConfig>(&json(&config)).unwrap(), config);
        }
    }

    #[test]
    fn heads_follow_the_rounding_rules() {
        let heads = |preset: Preset| runs(preset.config().layers().iter().map(|layer| layer.q_heads));
        assert_eq!(heads(Preset::Openelm270m), [(12, 5), (16, 7), (20, 4)]);
        assert_eq!(heads(Preset::Openelm450m), [(12, 3), (16, 7), (20, 6), (24, 4)]);
        assert_eq!(heads(Preset::Openelm1_1b), [(16, 3), (20, 7), (24, 8), (28, 6), (32, 4)]);
        assert_eq!(heads(Preset::Openelm3b), [(12, 4), (16, 14), (20, 12), (24, 6)]);
    }

    #[test]
    fn a_pair_for_one_layer_is_its_first_value() {
        assert_eq!(Multipliers::Layers(vec![0.5, 1.0]).expand(1), [0.5]);
    }

    #[test]
    fn every_broken_rule_is_reported() {
        let mut problems = Problems::new();
        let wrong = ModelConfig {
            head_dim: 63,
            model_dim: 0,
            ffn_multipliers: Multipliers::Layers(vec![1.0, 2.0, 3.0]),
            ..ModelConfig::default()
        };
        wrong.check("model", &mut problems);
        let keys: Vec<_> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, ["model.model_dim", "model.head_dim", "model.ffn_multipliers"]);
    }
}
