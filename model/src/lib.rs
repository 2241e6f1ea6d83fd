//! The OpenELM model: network, training step, decoding, files.
//!
//! A network runs a fixed forward and backward pass over buffers planned once, on any
//! [`Backend`](ulmus_backend::Backend). A [`Replica`] is what a worker trains, by its [`Objective`]; a [`Generator`]
//! decodes with a KV cache; [`hf`] reads and writes Hugging Face directories. This crate knows no device and no clock,
//! and never opens a connection.

#![forbid(unsafe_code)]

mod batch;
mod buffers;
mod error;
mod generate;
pub mod hf;
mod init;
mod network;
mod objective;
mod params;
mod replica;
mod sample;
mod tensors;

pub use batch::{BatchShape, MicroBatch};
pub use error::ModelError;
pub use generate::{Generator, Model, Score, Span};
pub use objective::{LossSum, Objective};
pub use params::{Layout, Tensor, Trainable};
pub use replica::{Replica, State, StateCopy, StatePart, Sums};
pub use sample::{Sampler, Sampling};
pub use tensors::{weights_from_safetensors, weights_to_safetensors};
pub use ulmus_backend::{BackendError, Quantum, WeightFormat, greedy};
