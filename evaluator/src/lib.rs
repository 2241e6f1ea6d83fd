//! Evaluation, generation and benchmarks of exported models
