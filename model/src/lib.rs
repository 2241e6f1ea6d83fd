//! The OpenELM model: kernels, training step, generation.
//!
//! From the bottom up: a [`Backend`] computes ([`Cpu`] is one), a network runs a fixed forward and backward over
//! buffers planned once, a [`Replica`] is what a worker trains, a [`Generator`] decodes with a KV cache, and
//! [`hf`] reads and writes Hugging Face directories. [`Quantum`] makes sums of gradients exact, so that a run has
//! the same bits for any number of workers. This crate knows no clock, and no network but that which NCCL sees to.

#![deny(unsafe_code)]

mod backend;
mod batch;
mod buffers;
#[cfg(feature = "metal")]
mod candle;
mod cpu;
mod cuda;
mod device;
mod error;
mod exact;
mod format;
mod generate;
pub mod hf;
mod init;
mod network;
mod params;
mod replica;
mod sample;
mod tensors;

pub use backend::{
    Acts, ActsMut, AdamW, AttentionShape, BLOCK, Backend, Element, FIRST_PROPOSALS, HeadGradients, Heads,
    HostCopy, IGNORE, In, LinearShape, Norm, Out, Params, ROW_BLOCK, Rope, Spans, TrainingBackend, View,
    ViewMut, owned,
};
pub use batch::{BatchShape, LossSum, MicroBatch};
#[cfg(feature = "metal")]
pub use candle::Candle;
pub use cpu::{Cpu, Memory};
pub use cuda::{Communicator, CommunicatorId, Cuda, GiveUp, NcclError};
pub use device::AnyBackend;
pub use error::ModelError;
pub use exact::Quantum;
pub use format::{CacheFormat, WeightFormat};
pub use generate::{Generator, Model, greedy};
pub use params::{Layout, Tensor};
pub use replica::{Replica, State, StateCopy, StatePart, Sums};
pub use sample::{Sampler, Sampling};
pub use tensors::{weights_from_safetensors, weights_to_safetensors};
