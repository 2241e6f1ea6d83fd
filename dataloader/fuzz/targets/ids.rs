//! Any text has the ids that crate `kitoken` gives it, and becomes the same text again.

#![no_main]

use std::cell::RefCell;
use std::sync::LazyLock;

use kitoken::Kitoken;
use libfuzzer_sys::fuzz_target;
use ulmus_tokenizer::{Encoder, Tokenizer};

const MODEL: &[u8] = include_bytes!("../../../tests/golden/tiny/tokenizer.model");

static KITOKEN: LazyLock<Kitoken> =
    LazyLock::new(|| Kitoken::from_sentencepiece_slice(MODEL).expect("the model is one"));
static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::read(MODEL, "tokenizer.model", None, None).expect("the model is one"));

thread_local! {
    // One encoder for all texts, as in use: what it remembers must not matter.
    static ENCODER: RefCell<Encoder> = RefCell::new(TOKENIZER.encoder());
}

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let mut ids = Vec::new();
    ENCODER.with_borrow_mut(|encoder| encoder.encode(&text, &mut ids));
    assert_eq!(ids, KITOKEN.encode(&text, false).expect("it encodes any text"));
    // This model maps no characters and keeps all blanks.
    assert_eq!(TOKENIZER.decode(&ids), text.replace('\u{2581}', " "));
});
