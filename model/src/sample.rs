//! Choosing the next token from its logits.
//!
//! The choice is pure: it depends on the logits, the settings, the seed, the stream, and the number of tokens that this
//! sampler has chosen before. Sequences that are decoded side by side have a stream each.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use ulmus_backend::greedy;

/// How a token is chosen. The default always takes the likeliest one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_k: Option<usize>,
    top_p: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0 }
    }
}

impl Sampling {
    /// Settings by which logits are divided by `temperature` (0 means the likeliest token), the `top_k` likeliest
    /// tokens are kept, and of these the fewest, likeliest first, whose probabilities add up to `top_p`.
    ///
    /// # Errors
    /// A message with the value and what is accepted: a finite temperature of at least 0, a `top_k` of at least 1, a
    /// `top_p` above 0 and at most 1.
    pub fn new(temperature: f32, top_k: Option<usize>, top_p: f32) -> Result<Self, String> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(format!(
                "temperature {temperature} is not a finite number of at least 0; use 0 for the likeliest token"
            ));
        }
        if top_k == Some(0) {
            return Err("top-k 0 leaves no token to choose; use at least 1".to_owned());
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(format!("top-p {top_p} is not above 0 and at most 1; use 1 to keep every token"));
        }
        Ok(Self { temperature, top_k, top_p })
    }
}

/// Chooses the tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens with their logits, later with their unnormalised probabilities; reused for every choice.
    candidates: Vec<(f64, u32)>,
}

impl Sampler {
    /// A sampler at the beginning of a random stream.
    pub fn new(sampling: Sampling, seed: u64, stream: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(stream);
        Self { sampling, random, candidates: Vec::new() }
    }

    /// Whether it always takes the likeliest token.
    pub(crate) fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0
    }

    /// Chooses the next token. A token whose logit is NaN is never chosen unless all are NaN.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p } = self.sampling;
        if temperature == 0.0 {
            return greedy(logits);
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        let numbers = logits.iter().zip(0..).filter(|(logit, _)| !logit.is_nan());
        candidates.extend(numbers.map(|(logit, token)| (f64::from(*logit), token)));
        if candidates.is_empty() {
            return greedy(logits);
        }
        let kept = top_k.unwrap_or(usize::MAX);
        if kept < candidates.len() || top_p < 1.0 {
            // Of equals the first is likelier, as in greedy choice.
            let likelier = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if kept < candidates.len() {
                candidates.select_nth_unstable_by(kept - 1, likelier);
                candidates.truncate(kept);
            }
            candidates.sort_unstable_by(likelier);
        }
        let most = candidates.iter().fold(f64::NEG_INFINITY, |most, (logit, _)| most.max(*logit));
        let mut total = 0.0;
        for (value, _) in candidates.iter_mut() {
            // The likeliest has the share 1 even if its logit is infinite.
            *value = if *value == most { 1.0 } else { ((*value - most) / f64::from(temperature)).exp() };
            total += *value;
        }
        if top_p < 1.0 {
            let (wanted, mut sum) = (f64::from(top_p) * total, 0.0);
            let enough = |(share, _): &(f64, u32)| {
                sum += share;
                sum >= wanted
            };
            let last = candidates.iter().position(enough).unwrap_or(candidates.len() - 1);
            candidates.truncate(last + 1);
            total = candidates.iter().map(|(share, _)| share).sum();
        }
        // 53 random bits make a number from 0 up to, but not including, 1.
        let mut left = (self.random.next_u64() >> 11) as f64 * (0.5_f64).powi(53) * total;
        for (share, token) in candidates.iter() {
            left -= share;
            if left < 0.0 {
                return *token;
            }
        }
        // Rounding left a remainder: take the last token that can be chosen.
        let possible = candidates.iter().rev().find(|(share, _)| *share > 0.0);
        possible.expect("the likeliest has the share 1").1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, f32::NAN, 2.0, f32::NEG_INFINITY];

    fn counts(temperature: f32, top_k: Option<usize>, top_p: f32) -> [usize; 5] {
        let mut sampler = Sampler::new(Sampling::new(temperature, top_k, top_p).unwrap(), 7, 0);
        let mut counts = [0; 5];
        for _ in 0..20_000 {
            counts[sampler.choose(&LOGITS) as usize] += 1;
        }
        counts
    }

    #[test]
    fn tokens_come_as_often_as_their_probabilities_say() {
        for temperature in [0.5, 1.0, 2.0] {
            let shares = LOGITS.map(|logit| if logit.is_nan() { 0.0 } else { (logit / temperature).exp() });
            let total: f32 = shares.iter().sum();
            for (count, share) in counts(temperature, None, 1.0).into_iter().zip(shares) {
                let expected = f64::from(share / total);
                // Five standard deviations.
                let most = 5.0 * (expected * (1.0 - expected) / 20_000.0).sqrt();
                assert!((count as f64 / 20_000.0 - expected).abs() <= most, "{count} for {expected}");
            }
        }
    }

    #[test]
    fn only_the_likeliest_are_kept() {
        assert_eq!(counts(1.0, Some(1), 1.0), [0, 20_000, 0, 0, 0]);
        // Shares 0.665, 0.245 and 0.090.
        assert_eq!(counts(1.0, None, 0.66), [0, 20_000, 0, 0, 0]);
        for two in [counts(1.0, Some(2), 1.0), counts(1.0, None, 0.67), counts(5.0, Some(2), 0.99)] {
            assert!(two[1] > two[3] && two[3] > 0 && two[1] + two[3] == 20_000, "{two:?}");
        }
        assert!(counts(1.0, Some(100), 0.95)[0] > 0);
    }

    #[test]
    fn a_seed_and_a_stream_give_the_same_tokens_again() {
        let logits: Vec<f32> = (0..500).map(|i| (i % 17) as f32 * 0.1).collect();
        let tokens = |seed, stream| {
            let mut sampler = Sampler::new(Sampling::new(0.8, Some(40), 0.9).unwrap(), seed, stream);
            (0..50).map(|_| sampler.choose(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(tokens(1, 0), tokens(1, 0));
        assert_ne!(tokens(1, 0), tokens(1, 1));
        assert_ne!(tokens(1, 0), tokens(2, 0));
    }

    #[test]
    fn greedy_is_the_default_and_odd_logits_still_give_a_token() {
        assert_eq!(Sampler::new(Sampling::default(), 0, 0).choose(&LOGITS), 1);
        let mut warm = Sampler::new(Sampling::new(1.0, None, 1.0).unwrap(), 0, 0);
        assert_eq!(warm.choose(&[f32::NAN, f32::NAN]), 0);
        assert_eq!(warm.choose(&[0.0, f32::INFINITY]), 1);
        assert!(warm.choose(&[f32::NEG_INFINITY; 2]) < 2);
    }

    #[test]
    fn nonsense_is_refused() {
        for (temperature, top_k, top_p, word) in [
            (-1.0, None, 1.0, "temperature -1"),
            (f32::NAN, None, 1.0, "temperature NaN"),
            (f32::INFINITY, None, 1.0, "temperature inf"),
            (1.0, Some(0), 1.0, "top-k 0"),
            (1.0, None, 0.0, "top-p 0"),
            (1.0, None, 1.5, "top-p 1.5"),
        ] {
            let message = Sampling::new(temperature, top_k, top_p).unwrap_err();
            assert!(message.contains(word), "{message}");
        }
    }
}
