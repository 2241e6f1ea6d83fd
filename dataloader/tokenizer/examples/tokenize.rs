//! Trains a byte-pair tokenizer on a few texts, and encodes and decodes with it.
//!
//!     cargo run -p ulmus-tokenizer --example tokenize

#![expect(clippy::print_stdout, reason = "an example")]

use ulmus_tokenizer::{TokenizerError, train};

fn main() -> Result<(), TokenizerError> {
    let texts: Vec<String> =
        (0..200).map(|n| format!("The elm is {n} years old, and the oak is {}.", n + 7)).collect();
    let tokenizer = train(&texts, 300)?;
    let ids = tokenizer.encode("The elm and the oak are old.");
    println!("{} pieces; ids {ids:?}; text {:?}", tokenizer.pieces(), tokenizer.decode(&ids));
    Ok(())
}
