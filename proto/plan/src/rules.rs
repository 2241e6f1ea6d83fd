//! Rules that many keys share, and the advice for a value that breaks one.

use std::ops::{Bound, RangeBounds};
use std::time::Duration;

use ulmus_types::Problems;

use crate::bytes::Bytes;

/// A kind of value that keys have bounds for.
pub(crate) trait Bounded: PartialOrd + Copy {
    /// The value as TOML writes it.
    fn written(self) -> String;
}

impl Bounded for u64 {
    fn written(self) -> String {
        self.to_string()
    }
}

impl Bounded for usize {
    fn written(self) -> String {
        self.to_string()
    }
}

impl Bounded for f64 {
    fn written(self) -> String {
        format!("{self:?}")
    }
}

impl Bounded for Bytes {
    fn written(self) -> String {
        format!("\"{self}\"")
    }
}

impl Bounded for Duration {
    /// In the largest unit of which it is a whole number.
    fn written(self) -> String {
        if self.subsec_nanos() > 0 {
            return format!("\"{}\"", humantime_serde::re::humantime::format_duration(self));
        }
        let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
        let fits = |(seconds, _): &(u64, _)| self.as_secs() > 0 && self.as_secs().is_multiple_of(*seconds);
        let (seconds, unit) = units.into_iter().find(fits).unwrap_or((1, "s"));
        format!("\"{}{unit}\"", self.as_secs() / seconds)
    }
}

/// Reports a value outside of `allowed`, and suggests the bound that is nearest to it.
pub(crate) fn range<T: Bounded>(
    problems: &mut Problems,
    key: impl Into<String>,
    value: T,
    allowed: impl RangeBounds<T>,
) {
    let nearest = match (bound(allowed.start_bound()), bound(allowed.end_bound())) {
        (Some(least), _) if value < least => least,
        (_, Some(most)) if value > most => most,
        // NaN is nearest to nothing.
        (least, most) => least.or(most).unwrap_or(value),
    };
    range_or(problems, key, value, allowed, format!("set it to {}", nearest.written()));
}

/// Reports a value outside of `allowed` with other advice, where neither bound is a sensible value.
pub(crate) fn range_or<T: Bounded>(
    problems: &mut Problems,
    key: impl Into<String>,
    value: T,
    allowed: impl RangeBounds<T>,
    advice: impl Into<String>,
) {
    let shown = |value: T| value.written().trim_matches('"').to_owned();
    let rule = match (bound(allowed.start_bound()), bound(allowed.end_bound())) {
        (Some(least), Some(most)) => format!("it must be from {} to {}", shown(least), shown(most)),
        (Some(least), None) => format!("it must be at least {}", shown(least)),
        (None, Some(most)) => format!("it must be at most {}", shown(most)),
        (None, None) => return,
    };
    problems.check(allowed.contains(&value), key, value.written(), rule, advice);
}

/// The value at an end of a range that includes its ends.
fn bound<T: Copy>(bound: Bound<&T>) -> Option<T> {
    match bound {
        Bound::Included(value) | Bound::Excluded(value) => Some(*value),
        Bound::Unbounded => None,
    }
}

/// Whether nothing has been found wrong with any of these keys. A rule about the relation between keys is only checked
/// then: otherwise it would report what merely follows from another problem.
pub(crate) fn sound(problems: &Problems, keys: &[&str]) -> bool {
    problems.iter().all(|problem| keys.iter().all(|key| !related(&problem.key, key)))
}

/// Whether two keys are the same, or one is a table or list that holds the other.
pub(crate) fn related(one: &str, other: &str) -> bool {
    let (short, long) = if one.len() < other.len() { (one, other) } else { (other, one) };
    long.strip_prefix(short).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_out_of_range_is_told_the_range_and_its_nearest_bound() {
        fn told<T: Bounded>(value: T, allowed: impl RangeBounds<T>) -> String {
            let mut problems = Problems::new();
            range(&mut problems, "key", value, allowed);
            problems.to_string().trim().to_owned()
        }
        assert_eq!(told(0_u64, 1..=256), "key = 0: it must be from 1 to 256; set it to 1");
        assert_eq!(told(300_u64, 1..=256), "key = 300: it must be from 1 to 256; set it to 256");
        assert_eq!(told(0_usize, 1..), "key = 0: it must be at least 1; set it to 1");
        assert_eq!(told(f64::NAN, 0.0..=0.5), "key = NaN: it must be from 0.0 to 0.5; set it to 0.0");
        assert_eq!(
            told(Bytes::new(1000), Bytes::mib(1)..=Bytes::mib(1 << 10)),
            "key = \"1000B\": it must be from 1MiB to 1GiB; set it to \"1MiB\""
        );
        assert_eq!(
            told(Duration::from_hours(100), ..=Duration::from_hours(24)),
            "key = \"100h\": it must be at most 1d; set it to \"1d\""
        );
        assert_eq!(Duration::ZERO.written(), "\"0s\"");
        assert_eq!(Duration::from_millis(1500).written(), "\"1s 500ms\"");
        assert_eq!(told(1_u64, 1..=1), "");
    }

    #[test]
    fn keys_are_related_by_tables() {
        assert!(related("train", "train.clip") && related("train.clip", "train") && related("a", "a"));
        assert!(!related("train.clip", "train.clips") && !related("train.clip", "train.z_loss"));
    }
}
