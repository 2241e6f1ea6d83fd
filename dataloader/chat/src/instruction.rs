//! The prompt around an instruction: Alpaca's, with the blanks that it has in the published adapter recipe.

/// The text before an answer to `instruction`, and to the `input` that comes with it, if that is not empty.
pub(crate) fn prompt(instruction: &str, input: &str) -> String {
    // The recipe's text was a literal in indented code, so each line begins with as many blanks, and a comment that had been
    // there left one or two more.
    let line = format!("\n{:16}", "");
    let with_input = !input.is_empty();
    let (context, blanks) =
        if with_input { (", paired with an input that provides further context", " ") } else { ("", "  ") };
    let mut prompt = format!(
        "Below is an instruction that describes a task{context}. Write a response that appropriately completes the \
         request.{blanks}\n"
    );
    let mut section = |name: &str, text: &str| {
        for part in [line.as_str(), "### ", name, ":", &line, text] {
            prompt.push_str(part);
        }
    };
    let end = |text: &str| format!("{text}{line}");
    section("Instruction", &end(instruction));
    if with_input {
        section("Input", &end(input));
    }
    section("Response", "");
    prompt
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_prompt_is_the_published_one_to_the_last_blank() {
        for (input, sha256) in [
            ("", "d954eec4a3fde6dd8174ef8e8ddc2628b309da3bf609e8b4f371102718b86c9a"),
            ("X", "c0309921be9bade5cef3dd38021446b0017cc4785f71e437e3d17fbfd222d686"),
        ] {
            let text = prompt("I", input) + "O";
            let hash =
                Sha256::digest(&text).iter().fold(String::new(), |hash, byte| format!("{hash}{byte:02x}"));
            assert_eq!(hash, sha256, "{text}");
        }
    }
}
