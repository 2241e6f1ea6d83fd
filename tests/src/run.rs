//! Reads the results of a run from its folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use serde_json::Value;

/// Number of columns of `metrics.csv` that the plan determines bit for bit.
const EXACT_COLUMNS: usize = 6;

/// The folder of a run.
#[derive(Debug, Clone)]
pub struct RunFolder {
    /// Folder of the coordinator's own files.
    own: PathBuf,
    /// Folder of the files that workers share: the same one, unless the run is kept in an object store.
    shared: PathBuf,
}

/// Everything of a finished run that must be bit-identical, whatever happened during the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bits {
    /// The first six columns of every row of `metrics.csv`.
    curve: Vec<String>,
    /// The hash of the training state at every milestone, by step.
    states: BTreeMap<u64, String>,
    /// The hash of the averaged weights.
    average: String,
}

impl Bits {
    /// The number of steps.
    pub fn steps(&self) -> usize {
        self.curve.len()
    }

    /// The losses of the first and of the last update.
    ///
    /// # Panics
    /// When there are no rows.
    pub fn losses(&self) -> (f64, f64) {
        let loss = |row: Option<&String>| -> f64 {
            let cell = row.and_then(|row| row.split(',').nth(2)).expect("every row has a loss");
            cell.parse().expect("a loss is a number")
        };
        (loss(self.curve.first()), loss(self.curve.last()))
    }

    /// Compares two runs, and reports the first difference.
    ///
    /// # Panics
    /// When the runs differ.
    pub fn assert_equal(&self, other: &Self) {
        let differing = self.curve.iter().zip(&other.curve).find(|(left, right)| left != right);
        assert_eq!(differing, None, "the first row that differs");
        assert_eq!(self.curve.len(), other.curve.len(), "rows");
        assert_eq!(self.states, other.states, "states at the milestones");
        assert_eq!(self.average, other.average, "average");
    }
}

impl RunFolder {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { own: path.clone(), shared: path }
    }

    /// The same folder, for a run whose shared files are elsewhere.
    #[must_use]
    pub fn shared_in(self, shared: PathBuf) -> Self {
        Self { shared, ..self }
    }

    /// The folder of the coordinator's own files.
    pub fn path(&self) -> &Path {
        &self.own
    }

    /// A file of the folder, as text.
    ///
    /// # Panics
    /// When the file does not exist.
    pub fn read(&self, name: &str) -> String {
        let [own, shared] = [&self.own, &self.shared].map(|folder| folder.join(name));
        let path = if own.exists() { own } else { shared };
        let text = fs::read_to_string(&path);
        assert!(text.is_ok(), "{}: {text:?}", path.display());
        text.unwrap_or_default()
    }

    /// A file where the run is kept, which the coordinator's own folder does not stand in for.
    pub fn stored(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.shared.join(name)).ok()
    }

    /// A JSON file of the folder.
    ///
    /// # Panics
    /// When the file does not exist, or is not JSON.
    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).expect("a file named .json is JSON")
    }

    /// Everything that must be equal between runs of one plan.
    ///
    /// # Panics
    /// When the run is not finished, or two checkpoints of one step have different states.
    pub fn bits(&self) -> Bits {
        let mut states = BTreeMap::new();
        for checkpoint in self.checkpoints() {
            let manifest = self.json(&format!("checkpoints/{checkpoint}/manifest.json"));
            if manifest["kind"] == "milestone" {
                let step = checkpoint["step-".len()..][..8].parse().expect("eight digits of step");
                let state = manifest["state_digest"].as_str().expect("a state has a hash").to_owned();
                let other = states.insert(step, state.clone());
                assert!(other.is_none_or(|other| other == state), "two states of step {step}");
            }
        }
        Bits {
            curve: self.rows().map(|row| row[..EXACT_COLUMNS].join(",")).collect(),
            states,
            average: self.json("results/average.json")["weights"].as_str().expect("a hash").to_owned(),
        }
    }

    /// Everything of a tuning stage that must be equal between runs of one plan: the columns of its metrics before the times, the
    /// hash of its last state, and each of the model's files with its hash.
    ///
    /// # Panics
    /// When the stage is not finished.
    pub fn tuned(&self, stage: &str) -> Vec<String> {
        let folder = self.shared.join("tune").join(stage);
        let metrics = self.read(&format!("tune/{stage}/metrics.csv"));
        let exact = |line: &str, count: usize| line.split(',').take(count).collect::<Vec<_>>().join(",");
        let header = metrics.lines().next().expect("there is a header");
        let count = header.split(',').position(|column| column == "tokens_per_second").expect("times follow");
        let curve = metrics.lines().map(|line| exact(line, count));
        let latest = fs::read_to_string(folder.join("latest")).expect("the stage has checkpoints");
        let manifest = self.json(&format!("tune/{stage}/checkpoints/{}/manifest.json", latest.trim()));
        let state = manifest["state_digest"].as_str().expect("a state has a hash").to_owned();
        let export = self.json(&format!("results/{stage}-export.json"));
        let files = export["files"].as_object().expect("an export has files");
        let files = files.iter().map(|(name, file)| format!("{name} {file}"));
        curve.chain([state]).chain(files).collect()
    }

    /// The number of steps in `metrics.csv`.
    ///
    /// # Panics
    /// When the file does not exist.
    pub fn steps_so_far(&self) -> usize {
        self.rows().count()
    }

    /// The generations that contributed steps to the run, each with their number.
    ///
    /// # Panics
    /// When `metrics.csv` does not exist.
    pub fn generations(&self) -> BTreeMap<u64, usize> {
        let mut generations = BTreeMap::new();
        for row in self.rows() {
            let generation = row.last().and_then(|cell| cell.parse().ok()).expect("the attempt is a number");
            *generations.entry(generation).or_insert(0) += 1;
        }
        generations
    }

    fn rows(&self) -> impl Iterator<Item = Vec<String>> {
        let rows: Vec<Vec<String>> = self
            .read("metrics.csv")
            .lines()
            .skip(1)
            .map(|line| line.split(',').map(str::to_owned).collect())
            .collect();
        rows.into_iter()
    }

    /// The rows of `sources.csv`, by column.
    ///
    /// # Panics
    /// When the file does not exist.
    pub fn sources(&self) -> Vec<BTreeMap<String, String>> {
        let text = self.read("sources.csv");
        let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned));
        let header: Vec<String> = lines.next().into_iter().flatten().collect();
        lines.map(|row| header.iter().cloned().zip(row).collect()).collect()
    }

    /// Names of the complete checkpoints, oldest first.
    ///
    /// # Panics
    /// When the folder of checkpoints does not exist.
    pub fn checkpoints(&self) -> Vec<String> {
        let entries = fs::read_dir(self.shared.join("checkpoints")).expect("the run has checkpoints");
        let mut names: Vec<String> = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.path().join("manifest.json").exists())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The process ids of the last started local workers, by name.
    ///
    /// # Panics
    /// When a name is not text.
    pub fn local_workers(&self) -> BTreeMap<String, Pid> {
        let Ok(entries) = fs::read_dir(self.own.join("logs")) else { return BTreeMap::new() };
        let pid_files = entries.filter_map(Result::ok).map(|entry| entry.path());
        pid_files
            .filter(|path| path.extension().is_some_and(|extension| extension == "pid"))
            .filter_map(|path| {
                let pid = fs::read_to_string(&path).ok()?.trim().parse().ok().and_then(Pid::from_raw)?;
                Some((path.file_stem()?.to_str()?.to_owned(), pid))
            })
            .collect()
    }

    /// The content of every file, by its path in the folder, except for logs and for files that are different for every
    /// coordinator process. Equal contents mean that nothing was lost or changed.
    ///
    /// # Panics
    /// When a file cannot be read.
    pub fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let passing = ["logs", "lock", "coordinator.nonce", "coordinator.address"];
        let mut files = BTreeMap::new();
        let mut folders = vec![self.own.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("a run's folder can be read").filter_map(Result::ok) {
                let path = entry.path();
                let name = path.strip_prefix(&self.own).expect("it lies below").to_path_buf();
                if passing.iter().any(|passing| name == Path::new(passing)) {
                    continue;
                }
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.insert(name, fs::read(&path).expect("a file of the run can be read"));
                }
            }
        }
        files
    }
}
