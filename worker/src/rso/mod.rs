//! Statistical rejection sampling (arXiv 2309.06657, section 3.2): which of a prompt's sampled answers are accepted, and which of
//! those are compared.
//!
//! Answers come from the policy that is to be tuned, and are accepted as if they came from the best policy for their scores.

mod answers;
mod head;

pub(crate) use answers::{Answers, from_lines, scores_from_lines, to_lines};
pub(crate) use head::RewardHead;

use std::cmp::Ordering;

use ulmus_plan::Pairing;

/// Accepts up to `wanted` answers, in order of acceptance. Answers are looked at in turn, again and again: one is accepted if a random
/// number from 0 to 1 is below `exp((score − best) / beta)`, in which `best` is the highest score among those that were not accepted
/// when the turn began. With a `beta` of 0 only the best is.
pub(crate) fn accept(
    scores: &[f64],
    wanted: usize,
    beta: f64,
    mut uniform: impl FnMut() -> f64,
) -> Vec<usize> {
    let mut left: Vec<usize> = (0..scores.len()).collect();
    let mut accepted = Vec::new();
    while accepted.len() < wanted.min(scores.len()) {
        let best = left.iter().map(|at| scores[*at]).fold(f64::NEG_INFINITY, f64::max);
        left.retain(|at| {
            if accepted.len() == wanted {
                return true;
            }
            let distance = scores[*at] - best;
            let chance = if distance < 0.0 { (distance / beta).exp() } else { 1.0 };
            let is_accepted = uniform() < chance;
            if is_accepted {
                accepted.push(*at);
            }
            !is_accepted
        });
    }
    accepted
}

/// Pairs of accepted answers, the better one first; of two with equal scores, the one that was accepted first.
pub(crate) fn pairs(accepted: &[usize], scores: &[f64], pairing: Pairing) -> Vec<[usize; 2]> {
    let mut pairs = Vec::new();
    let mut round = accepted.to_vec();
    while round.len() > 1 {
        let mut winners = Vec::with_capacity(round.len().div_ceil(2));
        for neighbours in round.chunks(2) {
            let [one, other] = *neighbours else {
                winners.extend(neighbours);
                continue;
            };
            let order = scores[one].total_cmp(&scores[other]);
            let [winner, loser] = if order == Ordering::Less { [other, one] } else { [one, other] };
            winners.push(winner);
            pairs.push([winner, loser]);
        }
        round = winners;
        if pairing == Pairing::FirstRound {
            break;
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn answers_are_accepted_and_paired_as_in_the_reference() {
        let golden: Value =
            serde_json::from_str(include_str!("../../../tests/golden/tune/rso.json")).unwrap();
        let numbers = |list: &Value| -> Vec<f64> {
            list.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
        };
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() > 4);
        for case in cases {
            let scores = numbers(&case["rewards"]);
            let uniforms = numbers(&case["uniforms"]);
            let mut uniform = uniforms.iter();
            let (wanted, beta) = (case["num_samples"].as_u64().unwrap(), case["beta"].as_f64().unwrap());
            let accepted = accept(&scores, wanted as usize, beta, || *uniform.next().unwrap());
            assert_eq!(serde_json::json!(accepted), case["accepted"]);
            assert_eq!(uniform.next(), None, "every number is used");
            for (pairing, name) in
                [(Pairing::FirstRound, "pairs_first_round"), (Pairing::Tournament, "pairs_tournament")]
            {
                assert_eq!(serde_json::json!(pairs(&accepted, &scores, pairing)), case[name]);
            }
        }
    }

    #[test]
    fn the_first_of_equal_answers_wins_and_no_more_is_accepted_than_there_is() {
        assert_eq!(accept(&[1.0, 1.0], 8, 0.5, || 0.999), [0, 1]);
        assert_eq!(accept(&[], 8, 0.5, || 0.0), [0; 0]);
        assert_eq!(pairs(&[0, 1, 2], &[1.0, 1.0, 3.0], Pairing::Tournament), [[0, 1], [2, 0]]);
        assert_eq!(pairs(&[0], &[1.0], Pairing::FirstRound), [[0; 2]; 0]);
    }
}
