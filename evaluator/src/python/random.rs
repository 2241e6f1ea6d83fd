//! Python's `random.Random`, as far as few-shot examples are drawn with it.
//!
//! The harness draws its examples with `Random(1234).sample(...)`; its numbers are met only with the same draws, bit for
//! bit.

use rand_mt::Mt;

/// The generator of Python's `random` module, seeded with an integer.
#[derive(Debug, Clone)]
pub(crate) struct Random(Mt);

impl Random {
    /// `random.Random(seed)`.
    pub(crate) fn new(seed: u64) -> Self {
        // Python passes the 32-bit digits of the seed, the least significant first, without leading zeros.
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        Self(if high == 0 { Mt::new_with_key([low]) } else { Mt::new_with_key([low, high]) })
    }

    /// `getrandbits(bits)`, of at most 32 bits.
    pub(crate) fn bits(&mut self, bits: u32) -> u32 {
        if bits == 0 { 0 } else { self.0.next_u32() >> (32 - bits) }
    }

    /// `randrange(count)`; `count` is at least 1 and less than 2³².
    pub(crate) fn below(&mut self, count: usize) -> usize {
        let bits = usize::BITS - count.leading_zeros();
        loop {
            let drawn = self.bits(bits) as usize;
            if drawn < count {
                return drawn;
            }
        }
    }

    /// The indices that `sample(population, count)` draws from a population of `population` elements, of which there
    /// are at least `count`.
    pub(crate) fn sample(&mut self, population: usize, count: usize) -> Vec<usize> {
        if population <= pool_size(count) {
            let mut pool: Vec<usize> = (0..population).collect();
            return (0..count)
                .map(|taken| {
                    let last = population - taken - 1;
                    let drawn = self.below(last + 1);
                    let index = pool[drawn];
                    pool[drawn] = pool[last];
                    index
                })
                .collect();
        }
        let mut drawn = Vec::with_capacity(count);
        while drawn.len() < count {
            let index = self.below(population);
            if !drawn.contains(&index) {
                drawn.push(index);
            }
        }
        drawn
    }

    /// `shuffle(items)`.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last + 1);
            items.swap(last, other);
        }
    }
}

/// The largest population of which `sample` makes a list: about what a set of `count` elements takes in memory.
fn pool_size(count: usize) -> usize {
    let mut table = 1;
    while count > 5 && table < 3 * count {
        table *= 4;
    }
    if count > 5 { 21 + table } else { 21 }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn numbers(value: &Value) -> Vec<usize> {
        value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as usize).collect()
    }

    /// What Python 3.11 drew.
    fn vectors() -> Value {
        serde_json::from_str(include_str!("../../../tests/golden/evaluation/python_rng_vectors.json"))
            .unwrap()
    }

    #[test]
    fn bits_are_those_of_python() {
        let mut random = Random::new(1234);
        for expected in numbers(&vectors()["getrandbits32"]) {
            assert_eq!(random.bits(32) as usize, expected);
        }
    }

    #[test]
    fn samples_are_those_of_python() {
        for case in vectors()["sample"].as_array().unwrap() {
            let number = |key: &str| case[key].as_u64().unwrap();
            let mut random = Random::new(number("seed"));
            for expected in case["draws"].as_array().unwrap() {
                let drawn = random.sample(number("population") as usize, number("k") as usize);
                assert_eq!(drawn, numbers(expected), "{case}");
            }
        }
    }

    #[test]
    fn shuffles_are_those_of_python() {
        for case in vectors()["shuffle"].as_array().unwrap() {
            let expected = numbers(&case["first"]);
            let mut items: Vec<usize> = (0..case["n"].as_u64().unwrap() as usize).collect();
            Random::new(case["seed"].as_u64().unwrap()).shuffle(&mut items);
            assert_eq!(items[..expected.len()], expected, "{case}");
        }
    }
}
