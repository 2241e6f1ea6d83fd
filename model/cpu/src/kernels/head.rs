//! The output head fused with its loss, one chunk of rows at a time.
//!
//! The logits of a chunk become probabilities and then the gradient of the logits, in place; the next chunk reuses
//! their memory. The size of a chunk follows from the caller's scratch, which the network plans by shape.

use rayon::prelude::*;
use ulmus_backend::{IGNORE, LinearShape};
use ulmus_plan::Precision;

use super::linear::{linear, linear_backward_input, linear_backward_weight};
use super::simd::{exp, max, sum, vectorised};
use super::view::Output;

/// The outputs for gradients, and the weights of the rows and of the z-loss in them.
pub(crate) struct Gradients<'a> {
    pub hidden: &'a mut [f32],
    pub table: Option<&'a mut [f32]>,
    pub row_weights: Option<&'a [f32]>,
    pub z_loss: f32,
}

/// See [`ulmus_backend::TrainingBackend::head_loss`].
pub(crate) fn head_loss(
    cross_entropy: &mut [f32],
    lse: &mut [f32],
    mut gradients: Option<Gradients<'_>>,
    hidden: &[f32],
    table: &[f32],
    targets: &[u32],
    logits: &mut [f32],
    shape: LinearShape,
    precision: Precision,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let chunk = logits.len() / outputs;
    let slopes = gradients.as_ref().map(|gradients| (gradients.row_weights, gradients.z_loss));
    let slope =
        |row: usize| slopes.map(|(weights, z_loss)| (weights.map_or(1.0, |weights| weights[row]), z_loss));
    for start in (0..rows).step_by(chunk) {
        let part = start..rows.min(start + chunk);
        let shape = LinearShape { rows: part.len(), ..shape };
        let hidden = &hidden[part.start * inputs..part.end * inputs];
        let logits = &mut logits[..part.len() * outputs];
        linear(logits, hidden, table, shape, Output::Overwrite, precision);
        logits
            .par_chunks_exact_mut(outputs)
            .zip(&targets[part.clone()])
            .zip(cross_entropy[part.clone()].par_iter_mut().zip(&mut lse[part.clone()]))
            .enumerate()
            .for_each(|(row, ((logits, target), (cross_entropy, lse)))| {
                (*cross_entropy, *lse) = loss_row(logits, *target, slope(part.start + row));
            });
        if let Some(gradients) = &mut gradients {
            let into = &mut gradients.hidden[part.start * inputs..part.end * inputs];
            linear_backward_input(into, logits, table, shape, Output::Overwrite, precision);
            if let Some(into) = &mut gradients.table {
                let output = if start == 0 { Output::Overwrite } else { Output::Accumulate };
                linear_backward_weight(into, logits, hidden, shape, output, precision);
            }
        }
    }
}

/// See [`ulmus_backend::Backend::cross_entropy`].
pub fn cross_entropy(out: &mut [f32], logits: &mut [f32], targets: &[u32]) {
    let width = logits.len() / targets.len().max(1);
    let rows = logits.par_chunks_exact_mut(width.max(1)).zip(targets);
    rows.zip(out).for_each(|((logits, target), out)| *out = loss_row(logits, *target, None).0);
}

vectorised! {
    /// Cross-entropy and logsumexp of one row, both 0 if the row is ignored. With the weights of the row and of the z-loss,
    /// the logits become the gradient of `weight · (cross_entropy + z_loss · lse²)`, which is
    /// `weight · (softmax · (1 + 2 · z_loss · lse) − onehot(target))`.
    fn loss_row(logits: &mut [f32], target: u32, slope: Option<(f32, f32)>) -> (f32, f32) {
        if target == IGNORE {
            if slope.is_some() {
                logits.fill(0.0);
            }
            return (0.0, 0.0);
        }
        let target = target as usize;
        let (most, at_target) = (max(logits), logits[target]);
        for logit in logits.iter_mut() {
            *logit = exp(*logit - most);
        }
        let total = sum(logits);
        let lse = most + total.ln();
        if let Some((weight, z_loss)) = slope {
            let scale = weight * (1.0 + 2.0 * z_loss * lse) / total;
            for probability in logits.iter_mut() {
                *probability *= scale;
            }
            logits[target] -= weight;
        }
        (lse - at_target, lse)
    }
}
