//! A tokenizer file of arbitrary bytes is read or refused, and a tokenizer that was read encodes and decodes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ulmus_tokenizer::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    let name = if bytes.first() == Some(&b'{') { "tokenizer.json" } else { "tokenizer.model" };
    if let Ok(tokenizer) = Tokenizer::read(bytes, name, None, None) {
        for text in ["", "Hello  world, 1234\n\u{e9}e\u{301} \u{1F600}<s>", "aaaaaaaaaaaaaaaaaaaaaaaa"] {
            let ids = tokenizer.encode(text);
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.pieces()));
            // For other kinds, another crate decodes, which trusts the file.
            if tokenizer.is_native() {
                tokenizer.decode(&ids);
            }
        }
    }
});
