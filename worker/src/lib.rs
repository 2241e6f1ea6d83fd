//! A worker: trains its share of a run and does its jobs

pub mod collective;
