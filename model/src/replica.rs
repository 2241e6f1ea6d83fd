//! One worker's copy of the training state, and the operations of a step on it.
//!
//! A worker drives a step like this: for each of its micro-batches it calls [`Replica::add_gradient`], which adds the
//! gradient exactly to integer [`Sums`]; the sums are reduced over the workers; [`Replica::set_mean_gradient`] turns
//! them into the mean gradient; [`Replica::update`] clips it and updates the weights. Two replicas with the same state
//! and the same mean gradient have the same state afterwards, bit for bit. A replica knows neither how sums travel nor
//! where batches come from.
//!
//! If an adapter is trained, the base model's weights are frozen, and are no part of the state: they are loaded before it
//! ([`Replica::load_base`]).

use std::ops::Range;

use ulmus_backend::{BLOCK, In, Out, Quantum, TrainingBackend, View, ViewMut};
use ulmus_plan::ModelConfig;
use ulmus_types::Digest;

use crate::adapter::AdapterShape;
use crate::batch::{BatchShape, MicroBatch};
use crate::buffers::{Planner, read, write};
use crate::error::ModelError;
use crate::init::{initial_values, row_norm};
use crate::network::{DropoutRate, Network};
use crate::objective::{LossSum, Objective, SequenceScore};
use crate::optimizer::Optimizer;
use crate::params::{Initial, Layout, Places, Trainable, Update, check_len};
use crate::state::{State, StateCopy, StatePart};
use crate::sums::Sums;

/// Elements that pass through the host at a time while a state is hashed or initialised.
const CHUNK: usize = 1 << 20;

/// Weights, moments and gradient of one model on one device, and the network that computes with them.
#[derive(Debug)]
pub struct Replica<B: TrainingBackend> {
    backend: B,
    trainable: Trainable,
    network: Network<B>,
    /// All weights: those of the model, and behind them those of the adapter.
    weights: B::Parameters,
    first_moment: B::Buffer<f32>,
    second_moment: B::Buffer<f32>,
    gradient: B::Buffer<f32>,
    /// 1 if an element of a gradient was out of the quantum's range, otherwise 0.
    outside: B::Buffer<u32>,
    /// The sum of squares of each block of the gradient, on the host.
    squares: Vec<f64>,
    planned_bytes: u64,
}

impl<B: TrainingBackend> Replica<B> {
    /// Plans a replica for micro-batches up to one shape, with all parameters trained. Allocates all of its memory, zeroed.
    /// `config` has passed [`ModelConfig::check`].
    ///
    /// # Errors
    /// [`ModelError::Backend`]; [`ModelError::Batch`] for an empty shape.
    pub fn new(
        backend: B,
        config: &ModelConfig,
        shape: BatchShape,
        objective: Objective,
    ) -> Result<Self, ModelError> {
        Self::planned(backend, config, None, shape, objective)
    }

    /// Plans a replica that trains an adapter of a model, and nothing else. `seed` is that of the adapter's dropout. The
    /// model's weights have to be loaded before anything else, by [`Replica::load_base`].
    ///
    /// # Errors
    /// Those of [`Replica::new`].
    pub fn with_adapter(
        backend: B,
        config: &ModelConfig,
        adapter: &AdapterShape,
        seed: u64,
        shape: BatchShape,
        objective: Objective,
    ) -> Result<Self, ModelError> {
        Self::planned(backend, config, Some((adapter, seed)), shape, objective)
    }

    fn planned(
        backend: B,
        config: &ModelConfig,
        adapter: Option<(&AdapterShape, u64)>,
        shape: BatchShape,
        objective: Objective,
    ) -> Result<Self, ModelError> {
        let BatchShape { sequences, length, .. } = shape;
        if sequences == 0 || length == 0 {
            return Err(ModelError::Batch(format!("[{sequences}, {length}] has no position")));
        }
        let (layout, places) = Places::new(config, adapter.map_or(&[], |(adapter, _)| adapter.modules()));
        let first = if adapter.is_some() { places.base } else { 0 };
        let trainable = Trainable::of(&layout, first..layout.parameters());
        let (rate, seed) = adapter.map_or((0.0, 0), |(adapter, seed)| (adapter.config().dropout, seed));
        let dropout = DropoutRate { rate, seed };
        let network = Network::new(backend.clone(), config, places, &trainable, objective, shape, dropout)?;
        let plan = &mut Planner::new(&backend);
        let len = trainable.parameters();
        Ok(Self {
            network,
            weights: plan.parameters(layout.parameters())?,
            first_moment: plan.buffer(len)?,
            second_moment: plan.buffer(len)?,
            gradient: plan.buffer(len)?,
            outside: backend.allocate(1)?,
            squares: vec![0.0; len.div_ceil(BLOCK)],
            planned_bytes: plan.bytes,
            trainable,
            backend,
        })
    }

    /// Names, shapes and places of the trained parameters: of what is in the state.
    pub fn layout(&self) -> &Layout {
        self.trainable.layout()
    }

    /// The parameters that are trained.
    pub fn trainable(&self) -> &Trainable {
        &self.trainable
    }

    /// What is minimised.
    pub fn objective(&self) -> &Objective {
        self.network.objective()
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Bytes of all buffers of this replica, except for one flag. The integer sums belong to the caller.
    pub fn planned_bytes(&self) -> u64 {
        self.planned_bytes + self.network.planned_bytes()
    }

    /// Loads the frozen weights of a replica that trains an adapter: one slice, or several that follow each other, so that
    /// they need not all be in memory twice.
    ///
    /// # Errors
    /// [`ModelError::Tensors`] if there is not one weight per parameter of the model.
    ///
    /// # Panics
    /// If all parameters are trained.
    pub fn load_base(&mut self, parts: impl IntoIterator<Item: AsRef<[f32]>>) -> Result<(), ModelError> {
        let base = self.trainable.range().start;
        assert!(base > 0, "the weights of a model that is trained as a whole are its state");
        let mut start = 0;
        for part in parts {
            let part = part.as_ref();
            let end = start + part.len();
            if end <= base {
                self.backend.set_parameters(ViewMut::new(&mut self.weights, start..end), part);
            }
            start = end;
        }
        if start != base {
            return Err(ModelError::Tensors(format!("{start} values for {base} parameters")));
        }
        let Self { backend, network: Network { places, scratch, .. }, weights, .. } = self;
        scratch.adapters.set_squares(backend, places, weights);
        Ok(())
    }

    /// Sets the trained weights to the initial ones of this seed, the same for any number of workers, and the moments to 0.
    /// An adapter begins as one that changes nothing.
    pub fn initialise(&mut self, seed: u64) {
        self.backend.finish_copies();
        let Self { backend, trainable, weights, .. } = self;
        let first = trainable.range().start;
        let mut part = Vec::with_capacity(CHUNK);
        for (index, tensor) in trainable.layout().tensors().iter().enumerate() {
            let mut values = initial_values(tensor, index, seed);
            for start in tensor.range.clone().step_by(CHUNK) {
                part.clear();
                part.extend(values.by_ref().take(CHUNK));
                let start = first + start;
                backend.set_parameters(ViewMut::new(weights, start..start + part.len()), &part);
            }
            if let Initial::RowNorms(matrix) = &tensor.initial {
                let mut row = vec![0.0; matrix.len() / tensor.range.len()];
                let rows = matrix.clone().step_by(row.len());
                let norms: Vec<f32> = rows
                    .map(|start| {
                        let place = View::new(&*weights, start..start + row.len());
                        backend.download(backend.values(place), &mut row);
                        row_norm(&row).0
                    })
                    .collect();
                let place = first + tensor.range.start..first + tensor.range.end;
                backend.set_parameters(ViewMut::new(weights, place), &norms);
            }
        }
        self.clear_moments();
    }

    /// Sets the trained weights to these, and the moments to 0.
    ///
    /// # Errors
    /// [`ModelError::Tensors`] if there is not one weight per trained parameter.
    pub fn begin(&mut self, weights: &[f32]) -> Result<(), ModelError> {
        check_len(weights, self.part_len(StatePart::Weights))?;
        self.write_state(StatePart::Weights, 0, weights);
        self.clear_moments();
        Ok(())
    }

    fn clear_moments(&mut self) {
        let zeros = vec![0.0; CHUNK.min(self.trainable.parameters())];
        for range in chunks(self.trainable.parameters()) {
            let zeros = &zeros[..range.len()];
            self.backend.upload(ViewMut::new(&mut self.first_moment, range.clone()), zeros);
            self.backend.upload(ViewMut::new(&mut self.second_moment, range), zeros);
        }
    }

    /// Replaces the gradient by that of the [`Objective`] on this batch, and returns the batch's loss sums.
    ///
    /// # Errors
    /// [`ModelError::Batch`] if the batch does not fit the planned shape or the vocabulary.
    pub fn forward_backward(&mut self, batch: &MicroBatch) -> Result<LossSum, ModelError> {
        self.load(batch)?;
        let Self { network, weights, gradient, .. } = self;
        network.forward_backward(batch, weights, gradient, |_, _| {});
        Ok(network.loss_sum(batch))
    }

    /// Does the same as [`Replica::forward_backward`], and adds the gradient, in quanta, to `sums`. As soon as a range
    /// of the sums includes this gradient, `complete` is called with the sums and that range, while others are still
    /// being computed.
    ///
    /// # Errors
    /// Those of [`Replica::forward_backward`]; [`ModelError::GradientRange`] if an element is NaN, infinite or beyond
    /// the quantum's limit, which makes the sums void.
    pub fn add_gradient(
        &mut self,
        batch: &MicroBatch,
        sums: &mut Sums<B>,
        quantum: &Quantum,
        mut complete: impl FnMut(&mut Sums<B>, Range<usize>),
    ) -> Result<LossSum, ModelError> {
        self.load(batch)?;
        let accumulate = !std::mem::replace(&mut sums.cleared, false);
        let Self { backend, network, weights, gradient, outside, .. } = self;
        backend.upload(write(outside, 1), &[0]);
        network.forward_backward(batch, weights, gradient, |gradient, range| {
            let gradient = View::new(gradient, range.clone());
            backend.quantise(sums.part(range.clone()), write(outside, 1), gradient, quantum, accumulate);
            complete(sums, range);
        });
        self.check_range(quantum)?;
        Ok(self.network.loss_sum(batch))
    }

    fn check_range(&self, quantum: &Quantum) -> Result<(), ModelError> {
        let mut outside = [0];
        self.backend.download(read(&self.outside, 1), &mut outside);
        if outside == [0] { Ok(()) } else { Err(ModelError::GradientRange { limit: quantum.limit() }) }
    }

    /// Puts a batch on the device, with what the objective needs.
    fn load(&mut self, batch: &MicroBatch) -> Result<(), ModelError> {
        if matches!(self.objective(), Objective::Preferences(_)) {
            batch.check_pairs()?;
        }
        self.network.load(batch)
    }

    /// The loss sums of the batch, without a gradient and without dropout.
    ///
    /// # Errors
    /// Those of [`Replica::forward_backward`].
    pub fn loss(&mut self, batch: &MicroBatch) -> Result<LossSum, ModelError> {
        self.load(batch)?;
        self.compute_loss();
        Ok(self.network.loss_sum(batch))
    }

    fn compute_loss(&mut self) {
        let Self { backend, network, weights, .. } = self;
        backend.run(|| {
            network.forward(weights);
            network.loss(weights);
        });
    }

    /// How likely the model finds the targets of each sequence. If this is asked for before the first update, with the
    /// batches that are trained on, and given to them as [`MicroBatch::references`], all margins begin at exactly 0.
    ///
    /// # Errors
    /// Those of [`Replica::forward_backward`].
    pub fn score(&mut self, batch: &MicroBatch) -> Result<Vec<SequenceScore>, ModelError> {
        self.network.load(batch)?;
        self.compute_loss();
        Ok(self.network.scores(batch).to_vec())
    }

    /// What the head gets: the output of the final norm, `[sequences · length, model_dim]`.
    ///
    /// # Errors
    /// Those of [`Replica::forward_backward`].
    pub fn hidden(&mut self, batch: &MicroBatch) -> Result<Vec<f32>, ModelError> {
        self.network.load_rows(batch, false)?;
        let Self { backend, network, weights, .. } = self;
        backend.run(|| network.forward(weights));
        let mut hidden = vec![0.0; batch.inputs.len() * network.model_dim];
        backend.read_activations(read(&network.scratch.normed, hidden.len()), &mut hidden);
        Ok(hidden)
    }

    /// Sets elements `range` of the gradient to the mean over `valid` tokens or pairs ([`Objective::divisor`]) of what
    /// `sums` hold there.
    pub fn set_mean_gradient(&mut self, sums: &Sums<B>, range: Range<usize>, quantum: &Quantum, valid: u64) {
        let gradient = ViewMut::new(&mut self.gradient, range.clone());
        self.backend.dequantise(gradient, View::new(&sums.values, range), quantum.mean_scale(valid));
    }

    /// The gradient of the trainable parameters, on the device.
    pub fn gradient(&mut self) -> Out<'_, B> {
        write(&mut self.gradient, self.trainable.parameters())
    }

    /// Turns the gradient into the mean over `valid` tokens or pairs, bit for bit as if it had gone through sums of its own, but
    /// without memory for them.
    ///
    /// # Errors
    /// [`ModelError::GradientRange`] if an element is NaN, infinite or beyond the quantum's limit, which makes the
    /// gradient void.
    pub fn quantise_mean_gradient(&mut self, quantum: &Quantum, valid: u64) -> Result<(), ModelError> {
        let Self { backend, trainable, gradient, outside, .. } = self;
        backend.upload(write(outside, 1), &[0]);
        let gradient = write(gradient, trainable.parameters());
        backend.quantise_mean(gradient, write(outside, 1), quantum, quantum.mean_scale(valid));
        self.check_range(quantum)
    }

    /// Lets the host work on the gradient of the trainable parameters.
    pub fn gradient_on_host<R>(&mut self, work: impl FnOnce(&mut [f32]) -> R) -> R {
        let backend = self.backend.clone();
        backend.on_host(self.gradient(), work)
    }

    /// Copies elements `start..start + to.len()` of the gradient.
    pub fn read_gradient(&self, start: usize, to: &mut [f32]) {
        self.backend.download(View::new(&self.gradient, start..start + to.len()), to);
    }

    /// The L2 norm of the gradient, in f64: the sums of squares of fixed blocks, added in the order of the blocks.
    pub fn gradient_norm(&mut self) -> f64 {
        let gradient = read(&self.gradient, self.trainable.parameters());
        self.backend.block_squares(&mut self.squares, gradient);
        self.squares.iter().sum::<f64>().sqrt()
    }

    /// One AdamW step with the present gradient, clipped to the norm that `optimizer` allows; returns the norm before
    /// clipping. `step` is the number of updates before this one.
    ///
    /// # Errors
    /// [`ModelError::GradientNorm`] if the norm is NaN or infinite; the state is unchanged.
    pub fn update(&mut self, optimizer: impl Into<Optimizer>, lr: f64, step: u64) -> Result<f64, ModelError> {
        let norm = self.gradient_norm();
        if !norm.is_finite() {
            return Err(ModelError::GradientNorm { norm });
        }
        let [plain, decayed] = optimizer.into().step(norm, lr, step);
        let Self { backend, trainable, weights, first_moment, second_moment, gradient, .. } = self;
        backend.finish_copies();
        backend.run(|| {
            for Update { parameters, elements, decays } in trainable.updates() {
                backend.adamw(
                    ViewMut::new(weights, parameters.clone()),
                    ViewMut::new(first_moment, elements.clone()),
                    ViewMut::new(second_moment, elements.clone()),
                    View::new(gradient, elements.clone()),
                    if *decays { decayed } else { plain },
                );
            }
        });
        Ok(norm)
    }

    /// The number of elements of a part of the state.
    pub fn part_len(&self, _: StatePart) -> usize {
        self.trainable.parameters()
    }

    /// The place of elements of the state among all weights.
    fn place(&self, elements: &Range<usize>) -> Range<usize> {
        let first = self.trainable.range().start;
        first + elements.start..first + elements.end
    }

    fn part(&self, part: StatePart, range: Range<usize>) -> In<'_, B> {
        match part {
            StatePart::Weights => self.backend.values(View::new(&self.weights, self.place(&range))),
            StatePart::FirstMoment => View::new(&self.first_moment, range),
            StatePart::SecondMoment => View::new(&self.second_moment, range),
        }
    }

    /// Lets `work` write one whole part of the state, on the device.
    pub fn write_part<R>(&mut self, part: StatePart, work: impl FnOnce(Out<'_, B>) -> R) -> R {
        self.backend.finish_copies();
        let len = self.part_len(part);
        match part {
            StatePart::Weights => {
                let place = self.place(&(0..len));
                self.backend.write_values(ViewMut::new(&mut self.weights, place), work)
            }
            StatePart::FirstMoment => work(write(&mut self.first_moment, len)),
            StatePart::SecondMoment => work(write(&mut self.second_moment, len)),
        }
    }

    /// Copies elements `start..start + to.len()` of a part of the state.
    pub fn read_state(&self, part: StatePart, start: usize, to: &mut [f32]) {
        self.backend.download(self.part(part, start..start + to.len()), to);
    }

    /// Replaces elements `start..start + from.len()` of a part of the state.
    pub fn write_state(&mut self, part: StatePart, start: usize, from: &[f32]) {
        self.backend.finish_copies();
        let range = start..start + from.len();
        let moment = match part {
            StatePart::Weights => {
                let place = self.place(&range);
                return self.backend.set_parameters(ViewMut::new(&mut self.weights, place), from);
            }
            StatePart::FirstMoment => &mut self.first_moment,
            StatePart::SecondMoment => &mut self.second_moment,
        };
        self.backend.upload(ViewMut::new(moment, range), from);
    }

    /// A copy of the whole state on the host.
    pub fn state(&self) -> State {
        let copy = |part| {
            let mut values = vec![0.0; self.part_len(part)];
            self.read_state(part, 0, &mut values);
            values
        };
        State {
            weights: copy(StatePart::Weights),
            first_moment: copy(StatePart::FirstMoment),
            second_moment: copy(StatePart::SecondMoment),
        }
    }

    /// Begins to copy the whole state to the host. Changes of the state wait for the copy; everything else runs beside
    /// it.
    pub fn copy_state(&self) -> StateCopy {
        StateCopy(StatePart::ALL.map(|part| {
            let all = self.part(part, 0..self.part_len(part));
            self.backend.begin_copy(all)
        }))
    }

    /// Replaces the whole state.
    ///
    /// # Errors
    /// [`ModelError::Tensors`] if a vector does not have the length of its part of the state.
    pub fn load_state(&mut self, state: &State) -> Result<(), ModelError> {
        let parts = [&state.weights, &state.first_moment, &state.second_moment];
        for (part, values) in StatePart::ALL.into_iter().zip(parts) {
            check_len(values, self.part_len(part))?;
        }
        for (part, values) in StatePart::ALL.into_iter().zip(parts) {
            self.write_state(part, 0, values);
        }
        Ok(())
    }

    /// BLAKE3 of the trained weights and of the moments: equal on all workers after every step.
    pub fn state_hash(&self) -> Digest {
        self.hash(StatePart::ALL.map(|part| self.part(part, 0..self.part_len(part))))
    }

    /// BLAKE3 of the gradient: for a known batch, a fingerprint of the device and its library.
    pub fn gradient_hash(&self) -> Digest {
        self.hash([read(&self.gradient, self.trainable.parameters())])
    }

    fn hash<'a>(&'a self, vectors: impl IntoIterator<Item = In<'a, B>>) -> Digest {
        let mut hasher = blake3::Hasher::new();
        let mut host = vec![0.0; CHUNK.min(self.trainable.parameters())];
        for View { buffer, range } in vectors {
            for chunk in chunks(range.len()) {
                let host = &mut host[..chunk.len()];
                let chunk = range.start + chunk.start..range.start + chunk.end;
                self.backend.download(View::new(buffer, chunk), host);
                hasher.update(bytemuck::cast_slice(host));
            }
        }
        Digest::from_bytes(*hasher.finalize().as_bytes())
    }
}

/// The range `0..len` in ranges of [`CHUNK`] elements.
fn chunks(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(CHUNK).map(move |start| start..len.min(start + CHUNK))
}
