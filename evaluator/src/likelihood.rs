//! How likely a model finds a sequence of tokens, whatever task asks for it.

use std::ops::Range;

use ulmus_backend::{Backend, IGNORE};
use ulmus_model::Generator;

use crate::error::EvaluatorError;

/// Negative log-likelihood, in nats, of all tokens but the first, which is only context.
pub(crate) fn rolling_nll<B: Backend>(
    generator: &mut Generator<B>,
    tokens: &[u32],
) -> Result<f64, EvaluatorError> {
    let mut nll = 0.0;
    for window in windows(tokens.len() - 1, generator.capacity()) {
        // The token at position p is the target of position p - 1.
        let mut targets = vec![IGNORE; window.scored.start - window.start];
        targets.extend(&tokens[window.scored.start + 1..=window.scored.end]);
        generator.reset();
        let losses = generator.score(&tokens[window.start..window.scored.end], &targets)?;
        nll += losses.iter().copied().map(f64::from).sum::<f64>();
    }
    Ok(nll)
}

/// A range of positions that goes through the model at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    /// The first position, from which on the model reads.
    pub(crate) start: usize,
    /// The positions whose predictions are scored. Their end is the end of the window, too.
    pub(crate) scored: Range<usize>,
}

/// Covers `positions` with windows of at most `context` positions, so that each position is scored once.
pub(crate) fn windows(positions: usize, context: usize) -> impl Iterator<Item = Window> {
    let stride = context.div_ceil(2);
    let mut done = 0;
    std::iter::from_fn(move || {
        let step = if done == 0 { context } else { stride };
        let end = positions.min(done + step);
        let window = Window { start: end.saturating_sub(context), scored: done..end };
        done = end;
        (!window.scored.is_empty()).then_some(window)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_score_every_position_once_with_half_a_window_of_context(
            positions in 0_usize..3000,
            context in 1_usize..300,
        ) {
            let mut done = 0;
            for window in windows(positions, context) {
                prop_assert_eq!(window.scored.start, done);
                prop_assert!(window.start <= window.scored.start);
                prop_assert!(window.scored.end - window.start <= context);
                let read_before = window.scored.start - window.start;
                prop_assert!(done == 0 || read_before >= context / 2);
                done = window.scored.end;
            }
            prop_assert_eq!(done, positions);
        }
    }
}
