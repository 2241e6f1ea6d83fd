//! Several results files side by side, ours or the harness's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::Value as Json;
use ulmus_types::counted;

use super::metric::Estimate;

/// Results by task and metric, from a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Results {
    name: String,
    numbers: Vec<((String, String), Estimate)>,
    asked: BTreeMap<String, Asked>,
    /// The groups and tasks that each group has.
    members: BTreeMap<String, Vec<String>>,
}

/// What a task was asked, as far as a file says it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Asked {
    shots: Option<u64>,
    rows: Option<u64>,
    /// Of all questions.
    hash: Option<String>,
}

impl Asked {
    /// Whether the same was asked, as far as both files say it. The hash is of all rows, prompts and answers.
    fn is_like(&self, other: &Self) -> bool {
        let agree = |a: Option<u64>, b: Option<u64>| a.zip(b).is_none_or(|(a, b)| a == b);
        match (&self.hash, &other.hash) {
            (Some(a), Some(b)) => a == b,
            _ => agree(self.shots, other.shots) && agree(self.rows, other.rows),
        }
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = |number: Option<u64>, noun| {
            number.map_or_else(|| format!("? {noun}s"), |number| counted(number, noun))
        };
        write!(f, "{} with {} each", known(self.rows, "row"), known(self.shots, "example"))
    }
}

/// One number of every file.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The task.
    pub task: String,
    /// The metric, as the file names it.
    pub metric: String,
    /// Of each file, in order.
    pub estimates: Vec<Option<Estimate>>,
    /// For each file, what was asked otherwise than in the first one, so that a difference says nothing of the models.
    pub unlike: Vec<Option<String>>,
}

impl Results {
    /// Takes the numbers out of a results file, which messages call `name`.
    ///
    /// # Errors
    /// That it is no results file.
    pub fn read(name: &str, file: &[u8]) -> Result<Self, String> {
        let json: Json =
            serde_json::from_slice(file).map_err(|error| format!("{name} is no JSON: {error}"))?;
        let tasks = json["results"].as_object();
        let tasks = tasks.ok_or_else(|| {
            format!("{name} has no \"results\"; name a file that `evaluator run --output` wrote")
        })?;
        let mut numbers = Vec::new();
        for (task, values) in tasks {
            for (key, value) in values.as_object().into_iter().flatten() {
                // Perplexity of a user's texts has plain names.
                let (metric, filter) = key.split_once(',').unwrap_or((key, "none"));
                if metric == "sample_len" {
                    continue;
                }
                let Some(value) = value.as_f64().filter(|_| !metric.ends_with("_stderr")) else { continue };
                let stderr = values[format!("{metric}_stderr,{filter}")].as_f64();
                let metric = if filter == "none" { metric.to_owned() } else { key.clone() };
                numbers.push(((task.clone(), metric), Estimate { value, stderr }));
            }
        }
        if numbers.is_empty() {
            return Err(format!("{name} has no numbers of tasks"));
        }
        let asked = |task: &String| Asked {
            shots: json["n-shot"][task].as_u64(),
            rows: json["n-samples"][task]["effective"].as_u64(),
            hash: json["task_hashes"][task].as_str().filter(|hash| !hash.is_empty()).map(str::to_owned),
        };
        let asked = tasks.keys().map(|task| (task.clone(), asked(task))).collect();
        let of_group = |members: &Json| -> Vec<String> {
            members
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|name| Some(name.as_str()?.to_owned()))
                .collect()
        };
        let groups = json["group_subtasks"].as_object().into_iter().flatten();
        let members = groups.map(|(group, members)| (group.clone(), of_group(members))).collect();
        Ok(Self { name: name.to_owned(), numbers, asked, members })
    }

    /// What differs in how a task, or a task of a group, was asked in another file.
    fn unlike(&self, other: &Self, task: &str) -> Option<String> {
        let members = |file: &Self| file.leaves(task, &mut BTreeSet::new());
        let (first, second) = (members(self), members(other));
        if first != second {
            return Some(format!("{task}: other tasks in {} than in {}", self.name, other.name));
        }
        first.iter().find_map(|task| {
            let (first, second) = (self.asked.get(task)?, other.asked.get(task)?);
            let which = if first.to_string() == second.to_string() { ", but other questions," } else { "" };
            (!first.is_like(second))
                .then(|| format!("{task}: {first} in {}, {second}{which} in {}", self.name, other.name))
        })
    }

    /// The tasks of a group at any depth, or the task itself.
    fn leaves<'a>(&'a self, task: &'a str, seen: &mut BTreeSet<&'a str>) -> BTreeSet<String> {
        if !seen.insert(task) {
            return BTreeSet::new();
        }
        match self.members.get(task).filter(|members| !members.is_empty()) {
            None => BTreeSet::from([task.to_owned()]),
            Some(members) => members.iter().flat_map(|member| self.leaves(member, seen)).collect(),
        }
    }

    /// What the file is called.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// All numbers of some files, by task and metric.
pub fn compare(files: &[Results]) -> Vec<Comparison> {
    let keys: BTreeSet<&(String, String)> =
        files.iter().flat_map(|file| file.numbers.iter().map(|(key, _)| key)).collect();
    let of = |file: &Results, key: &(String, String)| {
        file.numbers.iter().find(|(other, _)| other == key).map(|(_, estimate)| *estimate)
    };
    let row = |key: &(String, String)| Comparison {
        task: key.0.clone(),
        metric: key.1.clone(),
        estimates: files.iter().map(|file| of(file, key)).collect(),
        unlike: files.iter().map(|file| files[0].unlike(file, &key.0)).collect(),
    };
    keys.into_iter().map(row).collect()
}

impl Comparison {
    /// The difference of a file's number to the first file's, and the standard error of the difference where both have one.
    pub fn difference(&self, file: usize) -> Option<Estimate> {
        let (first, other) = (self.estimates[0]?, self.estimates[file]?);
        let stderr = first.stderr.zip(other.stderr).map(|(a, b)| a.hypot(b));
        Some(Estimate { value: other.value - first.value, stderr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_files_stand_side_by_side() {
        let file = |acc: f64| {
            let text = format!(
                r#"{{"results": {{"piqa": {{"alias": "piqa", "acc,none": {acc}, "acc_stderr,none": 0.03}},
                    "wikitext": {{"bits_per_byte,none": 1.5, "bits_per_byte_stderr,none": "N/A"}}}}}}"#
            );
            Results::read("a.json", text.as_bytes()).unwrap()
        };
        let rows = compare(&[file(0.5), file(0.75)]);
        assert_eq!(
            rows.iter().map(|row| (&*row.task, &*row.metric)).collect::<Vec<_>>(),
            [("piqa", "acc"), ("wikitext", "bits_per_byte")]
        );
        let difference = rows[0].difference(1).unwrap();
        assert!(
            (difference.value - 0.25).abs() < 1e-12
                && (difference.stderr.unwrap() - 0.03 * 2_f64.sqrt()).abs() < 1e-12
        );
        assert_eq!(rows[1].difference(1), Some(Estimate { value: 0.0, stderr: None }));
        let asked = |rows: u64| {
            let text = format!(
                r#"{{"results": {{"piqa": {{"acc,none": 0.5}}, "all": {{"acc,none": 0.5}}}}, "n-shot": {{"piqa": 2}},
                    "group_subtasks": {{"all": ["piqa"]}}, "n-samples": {{"piqa": {{"effective": {rows}}}}}}}"#
            );
            Results::read(&format!("{rows}.json"), text.as_bytes()).unwrap()
        };
        assert!(compare(&[asked(5), asked(5)]).iter().all(|row| row.unlike == [None, None]));
        let unlike = "piqa: 5 rows with 2 examples each in 5.json, 9 rows with 2 examples each in 9.json";
        assert!(
            compare(&[asked(5), asked(9)]).iter().all(|row| row.unlike == [None, Some(unlike.to_owned())])
        );
        assert!(Results::read("b.json", b"{}").unwrap_err().contains("b.json has no \"results\""));
    }
}
