//! Evaluation, generation and benchmarks of models in Hugging Face layout.
//!
//! Workers call the library for a run's evaluation jobs, and the `evaluator` program calls it for a person; both report
//! the same numbers, because neither computes any of its own. [`perplexity()`] measures held-out text,
//! [`continuations`] shows what a model writes, [`bench()`] times it. Results are plain data that serialise to JSON.
//!
//! Nothing here decides what to evaluate or where results go, and nothing prints.

#![forbid(unsafe_code)]

mod bench;
mod error;
mod folder;
mod likelihood;
mod perplexity;
mod python;
mod speeds;
pub mod tasks;
mod texts;
mod writing;

pub use bench::{BenchConfig, BenchResult, Machine, Rates, Timing, bench, median, synthetic_weights};
pub use error::EvaluatorError;
pub use folder::{
    LoadedModel, adds_bos, fitting_tokenizer, folder_of, load_model, load_tokenizer, misfit, model_folder,
    read_adapted, read_model, read_tokenizer, tokenizer_place,
};
pub use perplexity::{perplexity, zstd_bits_per_byte};
pub use speeds::{Measured, SpeedRow, Speeds};
pub use texts::read_texts;
pub use writing::{Continuation, Transcript, continuations};
