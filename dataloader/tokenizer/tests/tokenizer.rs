//! Compares the tokenizer with an independent implementation, on texts of arbitrary characters.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use kitoken::Kitoken;
use proptest::prelude::*;
use ulmus_tokenizer::{Encoder, Tokenizer};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tiny/tokenizer.model");

fn both() -> (Encoder, Kitoken) {
    let model = std::fs::read(MODEL).unwrap();
    let kitoken = Kitoken::from_sentencepiece_slice(&model).unwrap();
    (Tokenizer::read(&model, MODEL, None, None).unwrap().encoder(), kitoken)
}

/// Words and symbols as they occur in texts, all kinds of whitespace, and anything else.
fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        6 => "[ ]?[a-z]{1,12}",
        2 => "[ ]{1,20}",
        2 => "[0-9A-Z.,;:!?()\"'=#/-]{1,8}",
        1 => "[\\n\\t\\r\u{a0}\u{2581}]{1,3}",
        1 => "[\u{c0}-\u{24f}\u{3b1}-\u{3c9}\u{4e00}-\u{4eff}]{1,6}",
        1 => "\\PC{1,6}",
        1 => Just("<s></s><unk><0x41>".to_owned()),
    ];
    prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

#[test]
fn ids_equal_those_of_kitoken() {
    let (encoder, kitoken) = both();
    // One encoder serves all texts, as in production: its cache must not matter.
    let encoder = std::cell::RefCell::new(encoder);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(3000));
    let result = runner.run(&text(), |text| {
        let mut ids = Vec::new();
        encoder.borrow_mut().encode(&text, &mut ids);
        prop_assert_eq!(ids, kitoken.encode(&text, false).unwrap(), "{:?}", text);
        Ok(())
    });
    result.unwrap();
}
