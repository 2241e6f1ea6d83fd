//! Tables of speed, as the paper has them: several models on several devices with several types of weights.

use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use ulmus_types::counted;

use crate::bench::{BenchConfig, Machine, Rates, Timing};

/// The version of the file of speeds.
const FORMAT_VERSION: u32 = 1;
/// Width of the figure and height of a bar, in pixels.
const WIDTH: u32 = 900;
const BAR: u32 = 26;

/// The speeds of some models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speeds {
    format_version: u32,
    /// The lengths that were timed.
    pub config: BenchConfig,
    /// The machine that computed.
    pub machine: Machine,
    /// A row for each model, device and type of weights.
    pub rows: Vec<SpeedRow>,
}

/// The speed of a model on a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpeedRow {
    /// Name of the model.
    pub model: String,
    /// Number of its parameters.
    pub parameters: u64,
    /// Description of the device.
    pub device: String,
    /// Type of weights and activations.
    pub dtype: String,
    /// What was measured, or why nothing was.
    #[serde(flatten)]
    pub measured: Measured,
}

/// What was measured, or why nothing was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Measured {
    /// The median of each rate over the runs, and the runs.
    Done {
        /// The medians.
        median: Rates,
        /// The times of all runs, in order.
        runs: Vec<Timing>,
    },
    /// Nothing was measured.
    Skipped {
        /// Why not.
        skipped: String,
    },
}

impl SpeedRow {
    fn median(&self) -> Option<Rates> {
        match &self.measured {
            Measured::Done { median, .. } => Some(*median),
            Measured::Skipped { .. } => None,
        }
    }

    fn is_of_the_same(&self, other: &Self) -> bool {
        (&self.model, &self.device, &self.dtype) == (&other.model, &other.device, &other.dtype)
    }
}

impl Speeds {
    /// A report of these rows.
    pub fn new(config: BenchConfig, rows: Vec<SpeedRow>) -> Self {
        Self { format_version: FORMAT_VERSION, config, machine: Machine::this(), rows }
    }

    /// Reads a report.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let json: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        match json["format_version"].as_u64() {
            Some(version) if version != u64::from(FORMAT_VERSION) => {
                Err(format!("it has format version {version}, and this program reads {FORMAT_VERSION}"))
            }
            _ => serde_json::from_value(json).map_err(|error| error.to_string()),
        }
    }

    /// Whether rates of another report can be compared with those of this configuration.
    pub fn compares_with(&self, config: BenchConfig) -> bool {
        let lengths = |config: BenchConfig| (config.prompt, config.generate, config.batch);
        lengths(self.config) == lengths(config)
    }

    /// The table as Markdown. Beside each rate stands how many times that of an earlier report it is, if that has the same model,
    /// device and type of weights.
    pub fn markdown(&self, before: Option<&Self>) -> String {
        let BenchConfig { prompt, generate, runs, batch } = self.config;
        let header = format!(
            "| model | parameters | device | dtype | prompt of {prompt} | generation of {generate} | total |\n|---|--:|---|---|--:|--:|--:|\n"
        );
        let row = |row: &SpeedRow| {
            let earlier = before
                .and_then(|before| before.rows.iter().find(|other| other.is_of_the_same(row))?.median());
            let cell = |rate: fn(Rates) -> f64, median: Rates| match earlier {
                Some(earlier) => format!("{:.1} ({:.2}×)", rate(median), rate(median) / rate(earlier)),
                None => format!("{:.1}", rate(median)),
            };
            let cells = match &row.measured {
                Measured::Done { median, .. } => {
                    let rates: [fn(Rates) -> f64; 3] =
                        [|rates| rates.prompt, |rates| rates.generation, |rates| rates.total];
                    rates.map(|rate| cell(rate, *median))
                }
                Measured::Skipped { skipped } => [skipped.clone(), "-".to_owned(), "-".to_owned()],
            };
            let SpeedRow { model, parameters, device, dtype, .. } = row;
            format!("| {model} | {parameters} | {device} | {dtype} | {} |\n", cells.join(" | "))
        };
        let Machine { processor, cores, platform } = &self.machine;
        format!(
            "{header}{}\ntokens per second, median of {} after a warm-up run, batch {batch}; {processor}, {}, {platform}\n",
            self.rows.iter().map(row).collect::<String>(),
            counted(runs, "run"),
            counted(*cores, "core")
        )
    }

    /// The rates of generation as bars, in SVG; `None` if nothing was measured.
    pub fn svg(&self) -> Option<String> {
        let bars = self.rows.iter().filter_map(|row| {
            Some((format!("{}, {}, {}", row.model, row.dtype, row.device), row.median()?.generation))
        });
        let bars: Vec<(String, f64)> = bars.collect();
        let most = bars.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
        if bars.is_empty() {
            return None;
        }
        let mut svg = String::new();
        self.draw(&mut svg, &bars, most).ok()?;
        Some(svg)
    }

    fn draw(
        &self,
        svg: &mut String,
        bars: &[(String, f64)],
        most: f64,
    ) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let height = BAR * bars.len() as u32 + 90;
        let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let title = format!("generation of {} tokens, tokens per second", self.config.generate);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(28)
            .build_cartesian_2d(0.0..most * 1.05, 0.0..bars.len() as f64)?;
        chart.configure_mesh().disable_y_mesh().disable_y_axis().light_line_style(WHITE).draw()?;
        for (index, (label, rate)) in bars.iter().enumerate() {
            // The first row is at the top.
            let at = (bars.len() - 1 - index) as f64;
            let colour = Palette99::pick(index).mix(0.45);
            chart.draw_series([Rectangle::new([(0.0, at + 0.1), (*rate, at + 0.9)], colour.filled())])?;
            let text = format!("{label}: {rate:.1}");
            chart.draw_series([Text::new(text, (most * 0.01, at + 0.75), ("sans-serif", 13))])?;
        }
        area.present()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(dtype: &str, generation: f64) -> SpeedRow {
        let median = Rates { prompt: 100.0, generation, total: 30.0 };
        SpeedRow {
            model: "openelm-270m".to_owned(),
            parameters: 271_527_168,
            device: "cpu, 2 threads".to_owned(),
            dtype: dtype.to_owned(),
            measured: Measured::Done { median, runs: Vec::new() },
        }
    }

    #[test]
    fn a_table_compares_rows_of_the_same_kind() {
        let config = BenchConfig { prompt: 35, generate: 1024, runs: 3, batch: 1 };
        let skipped = Measured::Skipped { skipped: "it needs 24.0 GB".to_owned() };
        let rows =
            vec![row("f32", 20.0), row("bf16", 40.0), SpeedRow { measured: skipped, ..row("f16", 1.0) }];
        let speeds = Speeds::new(config, rows);
        let before = Speeds::new(config, vec![row("f32", 10.0)]);
        let text = speeds.markdown(Some(&before));
        assert!(text.contains("| f32 | 100.0 (1.00×) | 20.0 (2.00×) | 30.0 (1.00×) |"), "{text}");
        assert!(text.contains("| bf16 | 100.0 | 40.0 | 30.0 |"), "{text}");
        assert!(text.contains("| f16 | it needs 24.0 GB | - | - |"), "{text}");
        assert!(before.compares_with(BenchConfig { runs: 9, ..config }));
        assert!(!before.compares_with(BenchConfig { prompt: 8, ..config }));
        let json = serde_json::to_string(&speeds).unwrap();
        assert_eq!(Speeds::parse(&json).unwrap(), speeds, "{json}");
        let later = json.replace("\"format_version\":1", "\"format_version\":2");
        assert_eq!(Speeds::parse(&later).unwrap_err(), "it has format version 2, and this program reads 1");
        let svg = speeds.svg().unwrap();
        assert!(
            svg.contains("openelm-270m, bf16, cpu, 2 threads: 40.0")
                && !svg.contains("f16, cpu, 2 threads: 1")
        );
        assert_eq!(Speeds::new(config, Vec::new()).svg(), None);
    }
}
