//! The OpenELM model: kernels, training step, generation
