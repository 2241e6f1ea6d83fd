//! Problems of a plan, collected so that a person sees them all at once.

use std::fmt;

/// One thing that is wrong with a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the key, such as `train.sequences`.
    pub key: String,
    /// The value as written, or `missing`.
    pub value: String,
    /// The rule that the value breaks.
    pub rule: String,
    /// What to write instead.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value, rule, fix } = self;
        // A whole table is not shown.
        let equals = if value.is_empty() { "" } else { " = " };
        write!(f, "{key}{equals}{value}: {rule}; {fix}")
    }
}

/// All problems found, in the order in which they were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// An empty collection.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Records a problem.
    pub fn add(
        &mut self,
        key: impl Into<String>,
        value: impl fmt::Display,
        rule: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.0.push(Problem {
            key: key.into(),
            value: value.to_string(),
            rule: rule.into(),
            fix: fix.into(),
        });
    }

    /// Records a problem unless `holds`.
    pub fn check(
        &mut self,
        holds: bool,
        key: impl Into<String>,
        value: impl fmt::Display,
        rule: impl Into<String>,
        fix: impl Into<String>,
    ) {
        if !holds {
            self.add(key, value, rule, fix);
        }
    }

    /// Appends the problems of another collection.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Whether there are no problems.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of problems.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Iterates over the problems.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }

    /// Returns `value` if there are no problems.
    ///
    /// # Errors
    /// The problems, if there are any.
    pub fn into_result<T>(self, value: T) -> Result<T, Self> {
        if self.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
