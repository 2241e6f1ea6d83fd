//! The OpenELM model: network, training step, decoding, files.
//!
//! A network runs a fixed forward and backward pass over buffers planned once, on any
//! [`Backend`](ulmus_backend::Backend). A [`Replica`] is what a worker trains, by its [`Objective`]; a [`Generator`]
//! decodes with a KV cache; [`hf`] reads and writes Hugging Face directories, [`peft`] adapters, and [`corenet`] reads
//! the reference's checkpoints. This crate knows no device and no clock,
//! and never opens a connection.

#![forbid(unsafe_code)]

mod activations;
mod adapter;
mod backward;
mod batch;
mod buffers;
mod card;
pub mod corenet;
mod error;
mod generate;
mod head;
pub mod hf;
mod init;
mod linear;
mod network;
mod objective;
mod optimizer;
mod params;
pub mod peft;
mod pickle;
mod replica;
mod rows;
mod sample;
mod state;
mod sums;
mod tensors;

pub use adapter::AdapterShape;
pub use batch::{BatchShape, MicroBatch};
pub use card::{CardData, ModelCard};
pub use error::ModelError;
pub use generate::{Generator, Model, Score, Span};
pub use objective::{Answer, LossSum, Objective, PairLoss, PairSum, Preference, SequenceScore};
pub use optimizer::Optimizer;
pub use params::{Initial, Layout, Tensor, Trainable};
pub use replica::Replica;
pub use sample::{Sampler, Sampling};
pub use state::{State, StateCopy, StatePart};
pub use sums::Sums;
pub use tensors::{weights_from_safetensors, weights_to_safetensors, weights_to_safetensors_as};
pub use ulmus_backend::{BackendError, Quantum, WeightFormat, greedy};
