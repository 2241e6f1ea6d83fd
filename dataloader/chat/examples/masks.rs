//! Makes a training example of a conversation, and shows what is learned of it.
//!
//!     cargo run -p ulmus-chat --example masks

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;

use ulmus_chat::{Prepare, Preprocessor, Row, Rules, SpecialNames, Template, Viewer};
use ulmus_plan::TuneConfig;

fn main() -> Result<(), Box<dyn Error>> {
    let texts: Vec<String> =
        (0..200).map(|n| format!("The elm is {n} years old. Is the oak {}?", n + 7)).collect();
    let tokenizer = ulmus_tokenizer::train(&texts, 300)?;
    let names = SpecialNames::from([("eos_token".to_owned(), tokenizer.special_names().1.to_owned())]);
    let rules = Rules::from(&TuneConfig::default());
    let mut preprocessor = Preprocessor::new(rules, Template::recipe(&names), &tokenizer, true, None);
    let row: Row = serde_json::from_str(
        r#"{"messages": [{"role": "user", "content": "Is the oak old?"}, {"role": "assistant", "content": "It is."}]}"#,
    )?;
    let form = preprocessor.form(&row.columns().collect::<Vec<_>>())?;
    match preprocessor.prepare(form, &row)? {
        Ok(prepared) => println!("{}: {}", form.name(), Viewer::new(&tokenizer).show(&prepared.item)),
        Err(reason) => println!("left out: {reason}"),
    }
    Ok(())
}
