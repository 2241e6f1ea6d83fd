//! Tasks as lm-evaluation-harness has them.

mod compare;
mod definition;
mod examples;
mod fetch;
#[cfg(test)]
mod golden;
mod journal;
mod measure;
mod metric;
mod published;
mod question;
mod report;
mod rows;
mod run;
mod scorer;
mod select;
mod template;
mod tokens;
mod tree;

pub use compare::{Comparison, Results, compare};
pub use definition::{Catalogue, PERPLEXITY, Revision};
pub use fetch::{Fetched, fetch};
pub use journal::Journal;
pub use measure::{Limit, Settings};
pub use metric::{Estimate, Metric};
pub use published::beside_published;
pub use report::{Outcome, description, kind_of_device, markdown, results_file};
pub use rows::DataSets;
pub use run::{Evaluation, Progress, TaskPlan, average};
pub use scorer::Batching;
pub use select::{Selection, TaskRow};
