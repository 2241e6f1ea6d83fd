//! Stages that a plan adds to those of every run: evaluations and benchmarks of its models, or of others.

use std::fmt;
use std::time::Duration;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use ulmus_types::{Of, Problems, Reads, Requirements, Stage, StageKind, StageName};

use crate::bytes::Bytes;
use crate::data::refuse_secret;
use crate::rules::{range, sound};

/// The task that a run makes from its own held-out text.
pub const NEXT_TEXT: &str = "next_text";

/// A stage that measures models on tasks, as `evaluator run` does. A plan may have several.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationConfig {
    /// Name of the stage, and of the folder of its results.
    pub name: String,
    /// The models, at least one, as text or as a list: `average`, `last`, `milestones` (each as soon as it is stored), `base`, the
    /// name of a tuning stage, or where a model is: a folder, a `.pt` file of CoreNet, `hf://ORG/NAME[@REVISION]`, or
    /// `run:NAME/STEP` or `run:NAME/average` of another run in the same store.
    #[serde(deserialize_with = "one_or_several")]
    pub of: Vec<Of>,
    /// A published set of tasks with their numbers of examples: `zeroshot`, `openllm`, `llm360` or `adapters`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// Names of tasks and groups, and patterns such as `arc_*`, instead of a suite. `next_text` is made from the run's held-out
    /// text: which of four texts comes next?
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// Files with more tasks, defined like the built-in ones. The coordinator and the workers that evaluate must reach them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Folders or stores with the tasks' data sets in the hub's layout, at least one unless there is only `next_text`. The workers
    /// that evaluate must reach them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<String>,
    /// Tokenizer file, or a folder with one, for models from elsewhere that have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Number of examples before each question; by default that of each task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shots: Option<u64>,
    /// Use only the first so many rows of each task, or that part of them if it is below 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<f64>,
    /// A pattern that what a worker says of its device must match, such as `*4090*`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Memory that a worker's device must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// How long a finished run waits for a worker that has what the stage needs, before it skips the stage; by default for ever.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub wait: Option<Duration>,
}

/// A stage that measures how fast models read and write, as `evaluator bench` does. A plan may have several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BenchConfig {
    /// Name of the stage, and of the folder of its results.
    pub name: String,
    /// The models, at least one, as for an evaluation.
    #[serde(deserialize_with = "one_or_several")]
    pub of: Vec<Of>,
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Tokens to generate.
    pub generate: u64,
    /// Measured runs, after a warm-up run.
    pub runs: u64,
    /// Data type of the weights.
    pub dtype: WeightType,
    /// A pattern that what a worker says of its device must match, such as `*M2 Max*`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Memory that a worker's device must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// How long a finished run waits for a worker that has what the stage needs, before it skips the stage; by default for ever.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub wait: Option<Duration>,
}

impl Default for BenchConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            of: Vec::new(),
            prompt: 35,
            generate: 1024,
            runs: 3,
            dtype: WeightType::default(),
            device: None,
            memory: None,
            wait: None,
        }
    }
}

/// A stage that writes models in Hugging Face layout, each to `exports/NAME/MODEL` in the run folder. A plan may have several.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExportConfig {
    /// Name of the stage, and of the folder of its models.
    pub name: String,
    /// The models, at least one, as for an evaluation.
    #[serde(deserialize_with = "one_or_several")]
    pub of: Vec<Of>,
    /// Data type of the weights: `f32`, `f16` or `bf16`.
    pub dtype: WeightType,
}

/// The data type in which weights are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightType {
    /// 32-bit floats.
    #[default]
    F32,
    /// IEEE 754 half precision; activations stay f32.
    F16,
    /// bfloat16, for weights and activations.
    Bf16,
    /// 8-bit integers with a scale per 32 of them, for weights and activations.
    #[serde(rename = "q8_0")]
    Q8_0,
}

/// Reads a list, or what would be its only entry.
fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Of>, D::Error> {
    struct Models;
    impl<'de> Visitor<'de> for Models {
        type Value = Vec<Of>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a sequence")
        }

        fn visit_str<E>(self, text: &str) -> Result<Vec<Of>, E> {
            Ok(vec![Of::from(text.to_owned())])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Of>, A::Error> {
            let mut models = Vec::new();
            while let Some(text) = list.next_element::<String>()? {
                models.push(Of::from(text));
            }
            Ok(models)
        }
    }
    deserializer.deserialize_any(Models)
}

/// What the kinds of stages have in common, with the key under which the plan has it. They do not share a flattened
/// struct, because misspelt keys of one would not be noticed.
struct Added<'a> {
    key: String,
    kind: StageKind,
    name: &'a str,
    of: &'a [Of],
    device: Option<&'a String>,
    memory: Option<Bytes>,
    wait: Option<Duration>,
}

impl Added<'_> {
    fn stage(&self) -> Option<Stage> {
        Some(Stage {
            name: self.name.parse().ok()?,
            kind: self.kind,
            reads: Reads::Models(self.of.to_vec()),
            after: None,
            needs: Requirements {
                device: self.device.cloned(),
                memory: self.memory.map(Bytes::get),
                wait: self.wait,
            },
        })
    }

    /// Reports what is wrong; `models` are the models of the run.
    fn check(&self, models: &[&str], problems: &mut Problems) {
        let key = |name: &str| format!("{}.{name}", self.key);
        problems.check(
            self.name.parse::<StageName>().is_ok(),
            key("name"),
            format!("{:?}", self.name),
            "every stage needs a name: 1 to 64 letters, digits, '-' and '_', beginning with a letter",
            "write for instance name = \"zeroshot\"",
        );
        problems.check(
            !StageName::IMPLIED.contains(&self.name),
            key("name"),
            format!("{:?}", self.name),
            format!("every run has a stage of this name, as of {}", StageName::IMPLIED.join(", ")),
            "choose another",
        );
        problems.check(
            !self.of.is_empty(),
            key("of"),
            "missing",
            "a stage needs models",
            "write of = \"average\", or a list",
        );
        for (index, of) in self.of.iter().enumerate() {
            problems.check(
                !self.of[..index].contains(of),
                key("of"),
                format!("{:?}", of.to_string()),
                "it is named twice",
                "name each model once",
            );
            let Of::Model(place) = of else {
                let of = of.to_string();
                problems.check(
                    models.contains(&&of[..]),
                    key("of"),
                    format!("{of:?}"),
                    format!(
                        "it is no model of the run, which has {}, and no place either",
                        models.join(", ")
                    ),
                    format!("for a folder of that name, write \"./{of}\""),
                );
                continue;
            };
            if refuse_secret(problems, key("of"), place) {
                continue;
            }
            problems.check(
                !place.contains("://") || place.starts_with("hf://"),
                key("of"),
                format!("{place:?}"),
                "models are read from folders, from hf:// and from run:",
                "copy it to a folder that the workers reach",
            );
            problems.check(
                place.contains('/') || place.starts_with('.'),
                key("of"),
                format!("{place:?}"),
                format!("it is no model of the run, which has {}, and no place either", models.join(", ")),
                format!("for a folder of that name, write \"./{place}\""),
            );
        }
        if let Some(device) = self.device {
            let is_pattern = globset::Glob::new(device);
            problems.check(
                is_pattern.is_ok() && !device.is_empty(),
                key("device"),
                format!("{device:?}"),
                "it is no pattern",
                "write for instance device = \"*4090*\"",
            );
        }
        if let Some(wait) = self.wait {
            problems.check(
                self.device.is_some() || self.memory.is_some(),
                key("wait"),
                format!("\"{}\"", humantime_serde::re::humantime::format_duration(wait)),
                "any worker serves a stage that asks for no device and no memory, so there is nothing to wait for",
                "leave it out, or say which device the stage needs",
            );
            range(problems, key("wait"), wait, ..=Duration::from_hours(24 * 366));
        }
    }
}

/// The stages that a plan adds to those of every run.
fn added<'a>(
    evaluations: &'a [EvaluationConfig],
    exports: &'a [ExportConfig],
    benches: &'a [BenchConfig],
) -> Vec<Added<'a>> {
    let evaluations = evaluations.iter().enumerate().map(|(index, config)| Added {
        key: format!("evaluation.{index}"),
        kind: StageKind::Evaluation,
        name: &config.name,
        of: &config.of,
        device: config.device.as_ref(),
        memory: config.memory,
        wait: config.wait,
    });
    let benches = benches.iter().enumerate().map(|(index, config)| Added {
        key: format!("bench.{index}"),
        kind: StageKind::Benchmark,
        name: &config.name,
        of: &config.of,
        device: config.device.as_ref(),
        memory: config.memory,
        wait: config.wait,
    });
    let exports = exports.iter().enumerate().map(|(index, config)| Added {
        key: format!("export.{index}"),
        kind: StageKind::Export,
        name: &config.name,
        of: &config.of,
        device: None,
        memory: None,
        wait: None,
    });
    evaluations.chain(exports).chain(benches).collect()
}

/// The stages of evaluations, exports and benchmarks.
pub(crate) fn stages(
    evaluations: &[EvaluationConfig],
    exports: &[ExportConfig],
    benches: &[BenchConfig],
) -> Vec<Stage> {
    added(evaluations, exports, benches).iter().filter_map(Added::stage).collect()
}

/// Reports what is wrong with evaluations, exports and benchmarks, but for the lengths of the last.
pub(crate) fn check(
    evaluations: &[EvaluationConfig],
    exports: &[ExportConfig],
    benches: &[BenchConfig],
    models: &[&str],
    problems: &mut Problems,
) {
    let added = added(evaluations, exports, benches);
    for (index, stage) in added.iter().enumerate() {
        stage.check(models, problems);
        let mut tunings = models.iter().filter_map(|model| model.parse::<StageName>().ok());
        let is_taken = models.contains(&stage.name)
            || tunings.any(|tuning| tuning.of_tuning().iter().any(|part| part.as_str() == stage.name));
        problems.check(
            stage.name.is_empty() || !is_taken && added[..index].iter().all(|other| other.name != stage.name),
            format!("{}.name", stage.key),
            format!("{:?}", stage.name),
            "another stage has this name",
            "rename one of them",
        );
    }
    for (index, config) in evaluations.iter().enumerate() {
        config.check(&format!("evaluation.{index}"), problems);
    }
    for (index, config) in exports.iter().enumerate() {
        problems.check(
            config.dtype != WeightType::Q8_0,
            format!("export.{index}.dtype"),
            "\"q8_0\"",
            "other programs read no such weights from this layout",
            "write \"f32\", \"f16\" or \"bf16\"",
        );
    }
    for (index, config) in benches.iter().enumerate() {
        range(problems, format!("bench.{index}.runs"), config.runs, 1..=1000);
    }
}

impl EvaluationConfig {
    fn check(&self, at: &str, problems: &mut Problems) {
        let key = |name: &str| format!("{at}.{name}");
        problems.check(
            self.suite.is_some() == self.tasks.is_empty(),
            key(if self.suite.is_some() { "suite" } else { "tasks" }),
            self.suite.as_ref().map_or_else(|| "missing".to_owned(), |suite| format!("{suite:?}")),
            "an evaluation has either a suite or tasks",
            "write suite = \"zeroshot\", or for instance tasks = [\"arc_easy\"]",
        );
        problems.check(
            !self.data.is_empty() || self.tasks == [NEXT_TEXT],
            key("data"),
            "missing",
            "the rows of tasks must be somewhere",
            "write data = [\"FOLDER\"]; evaluator fetch fills one",
        );
        for (index, address) in self.data.iter().enumerate() {
            refuse_secret(problems, key(&format!("data.{index}")), address);
        }
        if sound(problems, &[&key("suite")]) {
            problems.check(
                self.suite.is_none() || self.shots.is_none(),
                key("shots"),
                self.shots.unwrap_or_default(),
                "the tasks of a suite have their own numbers of examples",
                "leave it out, or name tasks",
            );
        }
        if let Some(limit) = self.limit {
            let is_rows = limit >= 1.0 && limit.fract() == 0.0 && limit <= 1e12;
            problems.check(
                is_rows || limit > 0.0 && limit < 1.0,
                key("limit"),
                limit,
                "it must be a whole number of rows, or a part of them between 0 and 1",
                "write for instance 100, or 0.1",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Plan, read};

    const RUN: &str = "[tokenizer]\nfile = \"t.model\"\n[[data.source]]\nname = \"a\"\nurl = \"b\"\nfiles = [\"c\"]\ntext = \"d\"\n";
    const TASKS: &str = "[[evaluation]]\nname = \"tasks\"\nof = [\"average\", \"milestones\", \"hf://a/b@v1\"]\ntasks = [\"arc_*\"]\ndata = [\"/data\"]\nlimit = 0.5\ndevice = \"*4090*\"\nmemory = \"20GB\"\nwait = \"1h\"\n";
    const RELEASE: &str = "[[export]]\nname = \"release\"\nof = [\"last\", \"average\"]\ndtype = \"bf16\"\n";
    const SPEED: &str = "[[bench]]\nname = \"speed\"\nof = \"last\"\ndtype = \"q8_0\"\n";

    fn plan(set: &[&str]) -> Result<Plan, String> {
        let set: Vec<String> = set.iter().map(|&set| set.to_owned()).collect();
        let plans = read(&[RUN, TASKS, RELEASE, SPEED].concat(), &set);
        plans.map(|mut plans| plans.remove(0)).map_err(|problems| problems.to_string())
    }

    #[test]
    fn a_plan_adds_stages() {
        let plan = plan(&["evaluation.tasks.limit=10", "bench.speed.runs=2"])
            .unwrap_or_else(|told| panic!("{told}"));
        assert_eq!((plan.evaluation[0].limit, plan.bench[0].runs), (Some(10.0), 2));
        let graph = plan.graph();
        let stage = graph.stage(&"tasks".parse().unwrap()).unwrap();
        assert_eq!(stage.kind, StageKind::Evaluation);
        let models = vec![Of::Average, Of::Milestones, Of::Model("hf://a/b@v1".to_owned())];
        assert_eq!(stage.reads, Reads::Models(models));
        assert_eq!(stage.needs.memory, Some(20_000_000_000));
        assert_eq!(stage.needs.wait, Some(Duration::from_hours(1)));
        assert_eq!(graph.stage(&"speed".parse().unwrap()).unwrap().reads, Reads::Models(vec![Of::Last]));
        let release = graph.stage(&"release".parse().unwrap()).unwrap();
        assert_eq!(
            (release.kind, &release.reads),
            (StageKind::Export, &Reads::Models(vec![Of::Last, Of::Average]))
        );
        let again = read(&plan.to_toml(), &[]).unwrap().remove(0);
        assert_eq!(again, plan, "{}", plan.to_toml());
    }

    #[test]
    fn stages_may_change_and_change_no_digest() {
        let other = plan(&["evaluation.tasks.limit=3", "bench.speed.name=pace"]).unwrap();
        let plan = plan(&[]).unwrap();
        assert!(other.changed_keys(&plan).is_empty());
        assert_eq!(other.digest(), plan.digest());
    }

    #[test]
    fn what_is_wrong_with_a_stage_is_told() {
        for (set, told) in [
            (
                "evaluation.tasks.name=export",
                "evaluation.0.name = \"export\": every run has a stage of this name",
            ),
            ("export.release.dtype=q8_0", "export.0.dtype = \"q8_0\": other programs read no such weights"),
            ("export.release.name=tasks", "export.0.name = \"tasks\": another stage has this name"),
            ("bench.speed.name=tasks", "bench.0.name = \"tasks\": another stage has this name"),
            ("evaluation.tasks.name=a/b", "every stage needs a name"),
            (
                "evaluation.tasks.of=best",
                "it is no model of the run, which has average, last, milestones, and no place",
            ),
            ("evaluation.tasks.of=[]", "evaluation.0.of = missing: a stage needs models"),
            ("evaluation.tasks.of=[\"last\", \"last\"]", "it is named twice"),
            ("evaluation.tasks.of=hf://u:p@host/x", "an address in it has no password"),
            ("evaluation.tasks.of=s3://b/model", "models are read from folders, from hf:// and from run:"),
            ("evaluation.tasks.data.0=https://u:p@host/x", "evaluation.0.data.0"),
            ("evaluation.tasks.name=v1.0", "every stage needs a name"),
            ("evaluation.tasks.suite=zeroshot", "an evaluation has either a suite or tasks"),
            ("evaluation.tasks.data=[]", "the rows of tasks must be somewhere"),
            ("evaluation.tasks.limit=1.5", "it must be a whole number of rows"),
            ("evaluation.tasks.limit=0", "it must be a whole number of rows"),
            ("evaluation.tasks.device=[a", "it is no pattern"),
            ("bench.speed.wait=1h", "bench.0.wait = \"1h\": any worker serves a stage"),
            ("evaluation.speed.limit=1", "the plan has no stage of this name; name one that it has"),
            ("bench.speed.generate=1", "bench.0.generate = 1"),
            ("bench.speed.prompt=4000", "bench.0.prompt = 4000"),
            ("bench.speed.dtype=q8", "it must be \"f32\", \"f16\", \"bf16\" or \"q8_0\""),
        ] {
            let problems = plan(&[set]).unwrap_err();
            assert!(problems.contains(told) && problems.lines().count() == 1, "{set}: {problems}");
        }
        let suite =
            ["evaluation.tasks.suite=zeroshot", "evaluation.tasks.tasks=[]", "evaluation.tasks.shots=5"];
        assert!(plan(&suite).unwrap_err().contains("a suite have their own numbers of examples"));
    }
}
