//! Any text gets the same ids as from the crate `kitoken`, and decodes to the same text.

#![no_main]

use std::cell::RefCell;
use std::sync::LazyLock;

use kitoken::Kitoken;
use libfuzzer_sys::fuzz_target;
use ulmus_tokenizer::{Encoder, Tokenizer};

const MODEL: &[u8] = include_bytes!("../../../tests/golden/tiny/tokenizer.model");

static KITOKEN: LazyLock<Kitoken> =
    LazyLock::new(|| Kitoken::from_sentencepiece_slice(MODEL).expect("the model is a tokenizer"));
static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::read(MODEL, "tokenizer.model", None, None).expect("the model is a tokenizer"));

thread_local! {
    // One encoder serves all texts, as in production: its cache must not matter.
    static ENCODER: RefCell<Encoder> = RefCell::new(TOKENIZER.encoder());
}

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let mut ids = Vec::new();
    ENCODER.with_borrow_mut(|encoder| encoder.encode(&text, &mut ids));
    assert_eq!(ids, KITOKEN.encode(&text, false).expect("any text can be encoded"));
    // This model maps no characters and keeps all spaces.
    assert_eq!(TOKENIZER.decode(&ids), text.replace('\u{2581}', " "));
});
