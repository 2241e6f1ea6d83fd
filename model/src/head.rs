//! The head of a [`Network`] and its loss: forward, backward, and the sums over a batch.

use ulmus_backend::{HeadGradients, IGNORE, LinearShape, TrainingBackend, View, ViewMut};

use crate::activations::Scratch;
use crate::batch::MicroBatch;
use crate::buffers::{read, write};
use crate::network::Network;
use crate::objective::{Answer, LossSum, Objective, Preference, SequenceScore};

impl<B: TrainingBackend> Network<B> {
    /// The head and the loss of the loaded batch, after [`Network::forward`].
    pub(crate) fn loss(&mut self, weights: &B::Parameters) {
        self.head(weights, None);
    }

    /// The head and the loss. With `gradient`, computes those of the weights of the head, if they are trained, and of its
    /// input, `[R, D]`: it is in `normed` if only some rows go through the head, and otherwise in `branch`.
    fn head(&mut self, weights: &B::Parameters, gradient: Option<&mut B::Buffer<f32>>) {
        let (rows, count, d) = (self.rows.count(), self.head_rows(), self.model_dim);
        let (is_sparse, is_weighted) =
            (self.objective.is_sparse(), matches!(self.objective, Objective::Preferences(_)));
        let Self { backend, places, trainable, label_rows, .. } = self;
        let Scratch { normed, stream, branch, logits, logits_len, .. } = &mut self.scratch;
        let label_rows = || read(&*label_rows, count);
        if is_sparse {
            backend.gather(write(stream, count * d), read(normed, rows * d), label_rows(), d);
        }
        let hidden = if is_sparse { read(stream, count * d) } else { read(normed, rows * d) };
        let wants_gradient = gradient.is_some();
        let gradients = gradient.map(|gradient| HeadGradients {
            hidden: write(branch, count * d),
            table: trainable.place(&places.head).map(|place| ViewMut::new(gradient, place)),
            row_weights: is_weighted.then(|| read(&self.row_weights, count)),
            z_loss: self.objective.z_loss() as f32,
        });
        backend.head_loss(
            write(&mut self.cross_entropy, count),
            write(&mut self.lse, count),
            gradients,
            hidden,
            View::new(weights, places.head.clone()),
            read(&self.targets, count),
            write(logits, *logits_len),
            LinearShape { rows: count, inputs: d, outputs: self.vocabulary },
        );
        if is_sparse && wants_gradient {
            backend.scatter(write(normed, rows * d), read(branch, count * d), label_rows(), d);
        }
    }

    /// From the final norm's output to the loss, and back to the stream's gradient.
    pub(crate) fn head_backward(&mut self, weights: &B::Parameters, gradient: &mut B::Buffer<f32>) {
        self.head(weights, Some(gradient));
        let (len, layers) = (self.rows.count() * self.model_dim, self.places.layers.len());
        let Scratch { stream, branch, normed, norms, .. } = &mut self.scratch;
        let final_norm = &self.places.final_norm;
        self.backend.norm_backward(
            write(stream, len),
            self.trainable.place(final_norm).map(|place| ViewMut::new(gradient, place)),
            read(if self.objective.is_sparse() { normed } else { branch }, len),
            read(&self.x[layers], len),
            norms.of(self.backend.values(View::new(weights, final_norm.clone()))),
            false,
        );
    }

    /// Sets the weight of the loss of each row so that the gradient of the weighted sum of cross-entropies is that of the
    /// losses of pairs. The head has made the cross-entropies.
    pub(crate) fn weigh(&mut self, batch: &MicroBatch, preference: &Preference) {
        self.read_losses(batch);
        let Self { backend, scores, rows, labels: [labelled, _], weights_on_host, row_weights, .. } = self;
        weights_on_host.clear();
        weights_on_host.extend(labelled.iter().map(|row| {
            let sequence = rows.positions()[*row as usize] as usize / batch.length;
            let pair =
                preference.pair(answer(scores, batch, sequence & !1), answer(scores, batch, sequence | 1));
            // The log-probability falls as the cross-entropy rises.
            -(if sequence & 1 == 0 { pair.chosen } else { pair.rejected }) as f32
        }));
        backend.upload(write(row_weights, weights_on_host.len()), weights_on_host);
    }

    /// Copies the losses of the loaded batch to the host, and adds them up by sequence.
    fn read_losses(&mut self, batch: &MicroBatch) {
        let count = self.head_rows();
        let Self { backend, losses: [cross_entropy, lse], scores, labels, rows, .. } = self;
        backend.download(read(&self.cross_entropy, count), &mut cross_entropy[..count]);
        backend.download(read(&self.lse, count), &mut lse[..count]);
        scores.clear();
        scores.resize(batch.sequences, SequenceScore::default());
        let is_sparse = self.objective.is_sparse();
        for (index, ce) in cross_entropy[..count].iter().enumerate() {
            let (row, target) = if is_sparse {
                (labels[0][index] as usize, labels[1][index])
            } else {
                (index, batch.targets[index])
            };
            if target != IGNORE {
                let score = &mut scores[rows.positions()[row] as usize / batch.length];
                score.log_probability -= f64::from(*ce);
                score.tokens += 1;
            }
        }
    }

    /// The scores of the sequences of `batch`, the one loaded, after [`Network::loss`].
    pub(crate) fn scores(&mut self, batch: &MicroBatch) -> &[SequenceScore] {
        self.read_losses(batch);
        &self.scores
    }

    /// The losses of `batch`, the one loaded, after [`Network::loss`] or [`Network::forward_backward`].
    pub(crate) fn loss_sum(&mut self, batch: &MicroBatch) -> LossSum {
        self.read_losses(batch);
        let (count, [cross_entropy, lse]) = (self.head_rows(), &self.losses);
        let targets = if self.objective.is_sparse() { &self.labels[1] } else { &batch.targets };
        let mut sum = Objective::sum(targets, &cross_entropy[..count], &lse[..count]);
        if let Objective::Preferences(preference) = self.objective {
            for chosen in (0..batch.sequences).step_by(2) {
                let of = |sequence| answer(&self.scores, batch, sequence);
                sum.pairs += preference.sum(of(chosen), of(chosen + 1));
            }
        }
        sum
    }
}

/// One answer of a batch of pairs.
fn answer(scores: &[SequenceScore], batch: &MicroBatch, sequence: usize) -> Answer {
    Answer { policy: scores[sequence], reference: batch.references[sequence] }
}
