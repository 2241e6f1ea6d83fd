//! The likeliest token of logits, on the host.

/// The likeliest token, the first one where several are equal. NaN is never the likeliest.
pub fn greedy(logits: &[f32]) -> u32 {
    let best = |best: (usize, f32), (token, logit): (usize, &f32)| {
        if *logit > best.1 { (token, *logit) } else { best }
    };
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), best).0 as u32
}

/// The likeliest token of each row of logits.
pub fn greedy_rows(out: &mut [u32], logits: &[f32]) {
    let rows = logits.chunks_exact(logits.len() / out.len());
    out.iter_mut().zip(rows).for_each(|(out, logits)| *out = greedy(logits));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(greedy(&[0.5, 2.0, 2.0, -1.0]), 1);
        assert_eq!(greedy(&[f32::NAN, -3.0]), 1);
    }
}
