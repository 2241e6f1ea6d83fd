//! Runs `evaluator render`: what templates make of conversations, compared with transformers.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

/// Runs the program on lines.
fn render(model: &Path, arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_evaluator"))
        .args(["render", "--model", model.to_str().unwrap()])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn answers(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn conversations_are_rendered_as_transformers_renders_them() {
    let home = tempfile::tempdir().unwrap();
    let chat: Value = serde_json::from_slice(&fs::read(golden().join("tune/chat.json")).unwrap()).unwrap();
    let cases = chat["cases"].as_array().unwrap();
    let mut compared = 0;
    for (name, source) in chat["templates"].as_object().unwrap() {
        let file = home.path().join(name);
        fs::write(&file, source.as_str().unwrap()).unwrap();
        let file = file.display().to_string();
        // The recipe's template of our own gives what the recipe's gives.
        let templates: &[&str] = if name == "zephyr" { &[&file, "recipe", "auto"] } else { &[&file] };
        for template in templates {
            for (generation, empty) in [(false, false), (true, false), (false, true), (true, true)] {
                let of_case = |case: &Value| {
                    let renders = case["renders"].as_array().unwrap().iter();
                    let mut wanted = renders.filter(|render| {
                        render["template"] == *name
                            && render["add_generation_prompt"] == generation
                            && render["empty_system_message_inserted"] == empty
                    });
                    Some((case["messages"].to_string(), wanted.next()?.clone()))
                };
                let (lines, expected): (Vec<String>, Vec<Value>) = cases.iter().filter_map(of_case).unzip();
                let masked = name == "masked" && !generation;
                let mut arguments = vec!["--template", template];
                for (is_given, flag) in
                    [(generation, "--generation-prompt"), (empty, "--empty-system"), (masked, "--mask")]
                {
                    arguments.extend(is_given.then_some(flag));
                }
                let answers = answers(&render(&golden().join("tiny"), &arguments, &lines.join("\n")));
                assert_eq!(answers.len(), expected.len());
                for (answer, expected) in answers.iter().zip(&expected) {
                    if let Some(error) = expected.get("error") {
                        let own = answer["error"].as_str().unwrap();
                        assert!(own.contains(error.as_str().unwrap()) && own.contains(&file), "{own}");
                    } else {
                        for key in ["text", "ids", "assistant_mask"] {
                            assert_eq!(answer[key], expected[key], "{key} of {template}");
                        }
                    }
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 150, "{compared}");
}

#[test]
fn the_template_of_the_model_is_used_and_may_ask_for_the_date() {
    let home = tempfile::tempdir().unwrap();
    fs::copy(golden().join("tiny/tokenizer.json"), home.path().join("tokenizer.json")).unwrap();
    let config = json!({"chat_template": "{{ strftime_now('%Y') | int > 2000 }} {{ bos_token }}{{ messages | length }}"});
    fs::write(home.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let line = json!([{"role": "user", "content": "a"}]).to_string();
    assert_eq!(answers(&render(home.path(), &[], &line))[0]["text"], "True <s>1");
}

#[test]
fn mistakes_say_what_to_write() {
    let home = tempfile::tempdir().unwrap();
    let tiny = golden().join("tiny");
    let line = json!([{"role": "user", "content": "a"}]).to_string();
    for (model, arguments, input, words) in [
        (&tiny, &["--template", "none.jinja"][..], &*line, "none.jinja does not exist"),
        (&tiny, &[], "{}", "line 1 of the input is not a JSON list of messages"),
        (&home.path().to_owned(), &[], &*line, "neither tokenizer.model nor tokenizer.json"),
    ] {
        let output = render(model, arguments, input);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(words), "{message}");
    }
    // A template without marks is told, and marks nothing.
    let output = render(&tiny, &["--mask"], &line);
    assert!(String::from_utf8_lossy(&output.stderr).contains("recipe does not mark what the assistant says"));
    let mask = &answers(&output)[0]["assistant_mask"];
    assert!(mask.as_array().unwrap().iter().all(|of_assistant| *of_assistant == 0), "{mask}");
}
