//! Statistical rejection sampling optimisation (RSO, arXiv 2309.06657): preferences among answers of the model itself.

use serde::{Deserialize, Serialize};
use ulmus_types::{Problems, Rewards};

use crate::data::refuse_secret;
use crate::rules::{range, range_or, sound};

/// Which of the accepted answers are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// Neighbours in the order in which they were accepted.
    #[default]
    FirstRound,
    /// Those, then the better ones of them, and so on until one is left.
    Tournament,
}

/// A stage's pairs are made of answers that its model gives to the prompts of its data. The defaults are those of the paper.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RsoConfig {
    /// Answers to sample for each prompt.
    pub candidates: u64,
    /// Temperature of the sampling.
    pub temperature: f64,
    /// How many of the likeliest tokens are sampled from.
    pub top_k: u64,
    /// Answers to accept for each prompt.
    pub accept: u64,
    /// Temperature of the acceptance: 0 accepts the best, a large value any.
    pub beta: f64,
    /// Which of the accepted answers are compared.
    pub pairing: Pairing,
    /// A file with a score for each of the sampled answers. The run samples, stops if the file is not there yet, and goes on when it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<String>,
    /// Preferences from which a reward head learns to score answers, instead of `scores`: a folder, file or glob.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_head: Option<String>,
    /// Random seed of the sampling and of the acceptance; by default the stage's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for RsoConfig {
    fn default() -> Self {
        Self {
            candidates: 64,
            temperature: 0.7,
            top_k: 40,
            accept: 8,
            beta: 0.5,
            pairing: Pairing::default(),
            scores: None,
            reward_head: None,
            seed: None,
        }
    }
}

impl RsoConfig {
    /// Where the scores of answers come from.
    pub const fn rewards(&self) -> Rewards {
        match self.reward_head {
            Some(_) => Rewards::Head,
            None => Rewards::Scores,
        }
    }

    /// Reports every rule that is broken; `at` is the key of the table.
    pub(crate) fn check(&self, at: &str, problems: &mut Problems) {
        let key = |name: &str| format!("{at}.{name}");
        range(problems, key("candidates"), self.candidates, 2..=1 << 16);
        if sound(problems, &[&key("candidates")]) {
            range(problems, key("accept"), self.accept, 2..=self.candidates);
        }
        range_or(
            problems,
            key("temperature"),
            self.temperature,
            1e-3..=100.0,
            "set it to 0.7; at 0 all answers were the same",
        );
        range(problems, key("top_k"), self.top_k, 2..=1 << 32);
        range(problems, key("beta"), self.beta, 0.0..=1e6);
        match (&self.scores, &self.reward_head) {
            (Some(_), Some(_)) => problems.add(
                key("reward_head"),
                "set",
                "there are scores, too, and an answer has one score",
                "leave one of them out",
            ),
            (None, None) => problems.add(
                key("scores"),
                "missing",
                "sampled answers need scores",
                "name a file that you will make when the answers are sampled, or write reward_head = \"…\" with preferences to learn from",
            ),
            (Some(scores), None) => problems.check(
                !scores.is_empty(),
                key("scores"),
                "\"\"",
                "sampled answers need scores",
                "name a file that you will make when the answers are sampled",
            ),
            (None, Some(url)) => {
                problems.check(
                    !url.is_empty(),
                    key("reward_head"),
                    "\"\"",
                    "preferences must be somewhere",
                    "write the path of a folder or file, or hf://datasets/ORG/NAME",
                );
                refuse_secret(problems, key("reward_head"), url);
            }
        }
    }
}
