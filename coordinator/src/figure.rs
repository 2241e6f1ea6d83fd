//! What an evaluation of milestones finds over the course of training: the figure of the paper, as JSON and as SVG.

use std::collections::BTreeMap;

use plotters::prelude::*;
use serde::Serialize;
use serde_json::Value;
use ulmus_checkpoint::{Store, StoreError};
use ulmus_run::paths;
use ulmus_run::results::{Results, Tasks};
use ulmus_types::StageName;

/// Size of the figure in pixels.
const SIZE: (u32, u32) = (900, 560);
/// Metrics of which the first that a task has is drawn.
const DRAWN: [&str; 4] = ["acc_norm", "acc", "mc2", "mc1"];

/// A metric at a milestone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Point {
    /// The number of updates.
    step: u64,
    value: f64,
    /// The standard error, if the metric has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr: Option<f64>,
}

/// Every metric of every task over the milestones.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    stage: StageName,
    /// By task, and then by metric.
    tasks: BTreeMap<String, BTreeMap<String, Vec<Point>>>,
}

impl Figure {
    /// The figure of a stage; `None` if it has measured no milestone.
    pub(crate) fn of(stage: &StageName, results: &Results) -> Option<Self> {
        let mut tasks: BTreeMap<String, BTreeMap<String, Vec<Point>>> = BTreeMap::new();
        for (model, found) in results.of_models::<Tasks>(stage) {
            let Some(step) = model.strip_prefix("step-").and_then(|step| step.parse().ok()) else { continue };
            for (task, metrics) in &found.results {
                for (name, value) in metrics {
                    let Some(metric) = name.strip_suffix(",none") else { continue };
                    let Some(value) = value.as_f64().filter(|_| !metric.ends_with("_stderr")) else {
                        continue;
                    };
                    let stderr = metrics.get(&format!("{metric}_stderr,none")).and_then(Value::as_f64);
                    let points = tasks.entry(task.clone()).or_default().entry(metric.to_owned()).or_default();
                    points.push(Point { step, value, stderr });
                }
            }
        }
        (!tasks.is_empty()).then_some(Self { stage: *stage, tasks })
    }

    /// Writes the figure in both formats.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub(crate) async fn write(&self, store: &Store) -> Result<(), StoreError> {
        store.put(&paths::figure(&self.stage, "json"), ulmus_run::results::to_json(self)).await?;
        match self.svg() {
            Some(svg) => store.put(&paths::figure(&self.stage, "svg"), svg.into_bytes()).await,
            None => Ok(()),
        }
    }

    /// A line for each task, with the metric that is drawn of it.
    fn lines(&self) -> Vec<(String, &[Point])> {
        let lines = self.tasks.iter().filter_map(|(task, metrics)| {
            let metric = DRAWN.into_iter().find(|metric| metrics.contains_key(*metric))?;
            Some((format!("{task}, {metric}"), &metrics[metric][..]))
        });
        lines.collect()
    }

    /// The figure as SVG; `None` if no metric of it is an accuracy.
    pub(crate) fn svg(&self) -> Option<String> {
        let lines = self.lines();
        let points = || lines.iter().flat_map(|(_, points)| points.iter());
        let last = points().map(|point| point.step).max()?;
        let values = || points().map(|point| point.value);
        let (least, most) = (values().fold(1.0_f64, f64::min), values().fold(0.0_f64, f64::max));
        let (bottom, top) = ((least - 0.05).max(0.0), (most + 0.05).min(1.0));
        let mut svg = String::new();
        draw(&mut svg, &self.stage, &lines, last, bottom..top).ok()?;
        Some(svg)
    }
}

fn draw(
    svg: &mut String,
    stage: &StageName,
    lines: &[(String, &[Point])],
    last: u64,
    range: std::ops::Range<f64>,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(stage.as_str(), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(0..last + last / 50 + 1, range)?;
    chart.configure_mesh().x_desc("updates").y_desc("accuracy").light_line_style(WHITE).draw()?;
    for (index, (label, points)) in lines.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let line =
            LineSeries::new(points.iter().map(|point| (point.step, point.value)), colour.stroke_width(2));
        chart
            .draw_series(line.point_size(3))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    let background = WHITE.mix(0.8);
    chart
        .configure_series_labels()
        .background_style(background)
        .border_style(BLACK.mix(0.3))
        .position(SeriesLabelPosition::UpperLeft)
        .draw()?;
    area.present()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use ulmus_types::JobName;

    use super::*;

    #[test]
    fn a_figure_has_every_milestone_and_nothing_else() {
        let found = |value: f64| {
            json!({"results": {
                "boolq": {"acc,none": value, "acc_stderr,none": 0.1, "alias": "boolq"},
                "wikitext": {"word_perplexity,none": 30.0, "word_perplexity_stderr,none": "N/A"},
            }})
        };
        let results = [
            ("tasks/average", found(0.9)),
            ("tasks/step-00000010", found(0.5)),
            ("tasks/step-00000020", found(0.625)),
            ("other/step-00000020", found(0.1)),
        ];
        let results = results.map(|(name, found)| (JobName::stored(name.to_owned()), found));
        let results = Results::new(results.into());
        let figure = Figure::of(&"tasks".parse().unwrap(), &results).unwrap();
        assert_eq!(
            serde_json::to_value(&figure).unwrap(),
            json!({"stage": "tasks", "tasks": {
                "boolq": {"acc": [
                    {"step": 10, "value": 0.5, "stderr": 0.1}, {"step": 20, "value": 0.625, "stderr": 0.1},
                ]},
                "wikitext": {"word_perplexity": [{"step": 10, "value": 30.0}, {"step": 20, "value": 30.0}]},
            }})
        );
        let svg = figure.svg().unwrap();
        assert!(svg.contains("boolq, acc") && svg.contains("updates") && !svg.contains("wikitext"), "{svg}");
        assert_eq!(figure.svg().unwrap(), svg);
        assert_eq!(Figure::of(&"none".parse().unwrap(), &results), None);
    }
}
