//! Texts, ids, labels and masks of other programs: transformers' templates, TRL 0.8.2 (the published recipe) and TRL 1.16.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test fails at the first error")]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use ulmus_chat::{
    Example, Form, IGNORE, Item, Lesson, Message, Pair, Prepare, Preprocessor, Row, Rules, SpecialNames,
    Template, Texts, bins,
};
use ulmus_plan::{Method, OnUseless, Tokenization, Truncation};
use ulmus_tokenizer::Tokenizer;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&fs::read(golden().join("tune").join(name)).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn tokenizer() -> Tokenizer {
    let file = golden().join("tiny/tokenizer.json");
    Tokenizer::read(&fs::read(file).unwrap(), "tokenizer.json", None, None).unwrap()
}

fn names() -> SpecialNames {
    [("bos_token", "<s>"), ("eos_token", "</s>")]
        .map(|(name, token)| (name.to_owned(), token.to_owned()))
        .into()
}

/// The rows of a file of JSON lines, or of a JSON list.
fn rows(name: &str) -> Vec<Row> {
    let text = fs::read_to_string(golden().join("tune/data").join(name)).unwrap();
    if text.starts_with('[') {
        serde_json::from_str(&text).unwrap()
    } else {
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn row(value: &Value) -> Row {
    serde_json::from_value(value.clone()).unwrap()
}

fn rules(method: Method, tokenization: Tokenization) -> Rules {
    Rules {
        method,
        prompts_only: false,
        tokenization,
        truncation: Truncation::KeepEnd,
        max_length: 96,
        max_prompt: 48,
        mask_prompt: true,
        on_useless: OnUseless::Drop,
    }
}

fn preprocessor(rules: Rules) -> Preprocessor {
    Preprocessor::new(rules, Template::recipe(&names()), &tokenizer(), true, None)
}

fn pair(item: Item) -> Pair {
    match item {
        Item::Pair(pair) => pair,
        _ => panic!("a row of preferences is a pair"),
    }
}

fn example(item: Item) -> Example {
    match item {
        Item::Example(example) => example,
        _ => panic!("a row with one answer is an example"),
    }
}

/// Labels as the reference writes them.
fn labels(example: &Example) -> Value {
    example.labels.iter().map(|label| if *label == IGNORE { json!(-100) } else { json!(label) }).collect()
}

#[test]
fn templates_give_the_texts_the_ids_and_the_masks_of_transformers() {
    let chat = read("chat.json");
    let mut encoder = tokenizer().special_encoder();
    let (mut texts, mut refusals, mut masks) = (0, 0, 0);
    for case in list(&chat["cases"]) {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        for expected in list(&case["renders"]) {
            let name = expected["template"].as_str().unwrap();
            let template =
                Template::new(name, chat["templates"][name].as_str().unwrap(), &names(), None).unwrap();
            let given = if expected["empty_system_message_inserted"] == true {
                template.with_empty_system(&messages)
            } else {
                messages.clone()
            };
            let generation_prompt = expected["add_generation_prompt"] == true;
            let rendered = template.render(&given, generation_prompt);
            if let Some(error) = expected["error"].as_str() {
                let message = rendered.unwrap_err().to_string();
                assert!(message.contains(error) && message.contains(name), "{message}");
                refusals += 1;
                continue;
            }
            let rendered = rendered.unwrap();
            assert_eq!(rendered.text, expected["text"].as_str().unwrap(), "{name}: {}", case["note"]);
            let example = Example::of_rendered(&rendered, &mut encoder);
            assert_eq!(json!(example.ids), expected["ids"], "{name}: {}", case["note"]);
            if let Some(mask) = expected.get("assistant_mask") {
                let own: Vec<u8> = example.labels.iter().map(|label| u8::from(*label != IGNORE)).collect();
                assert_eq!(json!(own), *mask, "{name}: {}", case["note"]);
                masks += 1;
            }
            if name == "zephyr" {
                let own = Template::recipe(&names()).render(&given, generation_prompt).unwrap();
                assert_eq!(own, rendered, "the recipe's template of our own: {}", case["note"]);
            }
            texts += 1;
        }
    }
    assert_eq!((texts > 100, refusals, masks), (true, 2, 13));
}

#[test]
fn rows_of_every_form_are_read_as_trl_reads_them() {
    let expected = read("data/expected.json");
    let mut files = 0;
    for (name, normalised) in expected["normalised"].as_object().unwrap() {
        let method = if name.starts_with("pref") { Method::Dpo } else { Method::Sft };
        let rows = rows(name);
        let form = Form::of(&rows[0].columns().collect::<Vec<_>>(), method).unwrap();
        let lessons: Vec<Lesson> = rows.iter().map(|row| Lesson::read(form, row).unwrap()).collect();
        assert_eq!(serde_json::to_value(lessons).unwrap(), *normalised, "{name}");
        files += 1;
    }
    assert_eq!(files, 6);
}

#[test]
fn examples_have_the_ids_and_labels_of_trl() {
    let sft = read("sft.json");
    for run in list(&sft["runs"]) {
        let mask_prompt = run["prompt_masked"] == true;
        let mut preprocessor = preprocessor(Rules { mask_prompt, ..rules(Method::Sft, Tokenization::Chat) });
        for (given, expected) in list(&sft["rows"]).iter().zip(list(&run["tokens"])) {
            let prepared = preprocessor.prepare(Form::PromptCompletion, &row(given)).unwrap().unwrap();
            let example = example(prepared.item);
            assert_eq!(json!(example.ids), expected["ids"], "{given}");
            assert_eq!(labels(&example), expected["labels"], "{given}");
        }
    }
}

#[test]
fn sequences_are_packed_as_trl_packs_them() {
    let sft = read("sft.json");
    let ids: Vec<Vec<u32>> = list(&sft["runs"][1]["tokens"])
        .iter()
        .map(|tokens| serde_json::from_value(tokens["ids"].clone()).unwrap())
        .collect();
    let lengths: Vec<usize> = ids.iter().map(Vec::len).collect();
    let bins = bins(&lengths, sft["packing"]["max_length"].as_u64().unwrap() as usize);
    let packed: Vec<Value> = bins
        .iter()
        .map(|bin| {
            let lengths: Vec<usize> = bin.iter().map(|example| lengths[*example]).collect();
            json!({"ids": bin.iter().flat_map(|example| ids[*example].clone()).collect::<Vec<_>>(), "seq_lengths": lengths})
        })
        .collect();
    assert_eq!(json!(packed), sft["packing"]["bins"]["bfd"]);
}

/// A pair as the recipe's trainer has it.
fn of_recipe(pair: &Pair) -> Value {
    let [chosen, rejected] = pair.sequences();
    json!({
        "chosen_input_ids": chosen.ids, "chosen_labels": labels(&chosen),
        "rejected_input_ids": rejected.ids, "rejected_labels": labels(&rejected),
    })
}

fn same_sequences(pair: &Pair, expected: &Value, note: &Value) {
    for (key, own) in of_recipe(pair).as_object().unwrap() {
        assert_eq!(*own, expected[key], "{key} of {note}");
    }
}

#[test]
fn pairs_of_the_recipe_have_the_texts_ids_and_labels_of_its_trainer() {
    let dpo = read("dpo.json");
    for (name, truncation) in [("keep_end", Truncation::KeepEnd), ("keep_start", Truncation::KeepStart)] {
        let mut preprocessor = preprocessor(Rules { truncation, ..rules(Method::Dpo, Tokenization::Recipe) });
        let expected = list(&dpo["tokens"][name]);
        assert_eq!(expected.len(), 16);
        for ((given, texts), expected) in list(&dpo["rows"]).iter().zip(list(&dpo["texts"])).zip(expected) {
            let prepared = preprocessor.prepare(Form::Preferences, &row(given)).unwrap().unwrap();
            let text = |key: &str| texts[key].as_str().unwrap();
            let whole = |key: &str| text("prompt").to_owned() + text(key);
            let (prompt, chosen, rejected) = (text("prompt").to_owned(), whole("chosen"), whole("rejected"));
            assert_eq!(prepared.texts, Texts::Two { prompt, chosen, rejected });
            same_sequences(&pair(prepared.item), expected, &given["note"]);
        }
    }
}

#[test]
fn where_prompt_and_answer_become_one_token_the_recipe_stops_or_gives_it_to_the_answer() {
    let dpo = read("dpo.json");
    let mut preprocessor = preprocessor(rules(Method::Dpo, Tokenization::Recipe));
    let mut stopped = 0;
    for expected in list(&dpo["border"]) {
        let given = json!({"prompt": expected["prompt"], "chosen": expected["chosen"], "rejected": expected["rejected"]});
        match preprocessor.prepare(Form::Preferences, &row(&given)) {
            Ok(prepared) => same_sequences(&pair(prepared.unwrap().item), expected, &expected["prompt"]),
            Err(error) => {
                assert!(
                    expected.get("error").is_some() && error.to_string().contains("become one token"),
                    "{error}"
                );
                stopped += 1;
            }
        }
    }
    assert_eq!(stopped, 1);
}

#[test]
fn pairs_of_today_have_the_ids_of_trl_and_those_without_room_are_left_out() {
    let (dpo, current) = (read("dpo.json"), read("dpo_current.json"));
    let plain = |row: &Value| {
        let last = |key: &str| list(&row[key]).last().unwrap()["content"].clone();
        (last("chosen"), last("rejected"))
    };
    let rules = Rules { truncation: Truncation::KeepStart, ..rules(Method::Dpo, Tokenization::Chat) };
    for kind in ["conversational", "standard"] {
        let mut cut = preprocessor(rules);
        let mut whole = preprocessor(Rules { max_length: 10_000, ..rules });
        let mut expected = list(&current["tokens"][kind]).iter();
        for (given, kept) in list(&dpo["rows"]).iter().zip(list(&current["kept"][kind])) {
            let given = if kind == "standard" {
                let (chosen, rejected) = plain(given);
                let prompt = format!("Q: {}\nA:", given["prompt"].as_str().unwrap());
                let answer = |text: Value| format!(" {}", text.as_str().unwrap());
                json!({"prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected)})
            } else {
                given.clone()
            };
            let prepared = cut.prepare(Form::Preferences, &row(&given)).unwrap();
            assert_eq!(json!(prepared.is_ok()), *kept, "{given}");
            if let Ok(prepared) = prepared {
                let expected = expected.next().unwrap();
                let pair_whole = pair(whole.prepare(Form::Preferences, &row(&given)).unwrap().unwrap().item);
                assert_eq!(json!(pair_whole.prompt), expected["prompt_ids"], "{given}");
                assert_eq!(json!(pair_whole.chosen.ids), expected["chosen_ids"], "{given}");
                assert_eq!(json!(pair_whole.rejected.ids), expected["rejected_ids"], "{given}");
                let cut = pair(prepared.item).sequences().map(|sequence| sequence.ids);
                let whole = pair_whole.sequences().map(|sequence| sequence.ids);
                for (cut, whole) in cut.iter().zip(&whole) {
                    assert_eq!(cut[..], whole[..whole.len().min(96)]);
                }
            }
        }
        assert!(expected.next().is_none());
    }
}

#[test]
fn instructions_have_the_prompt_and_the_ids_of_the_adapter_recipe() {
    let expected = read("data/expected.json");
    let peft = read("peft.json");
    let rows = rows("commonsense_like.json");
    for tokenization in [Tokenization::Chat, Tokenization::Recipe] {
        let rules = Rules { mask_prompt: false, max_length: 2048, ..rules(Method::Sft, tokenization) };
        let mut preprocessor = preprocessor(rules);
        let mut prepare = |row: &Row| preprocessor.prepare(Form::Instructions, row).unwrap().unwrap();
        for (row, expected) in rows.iter().zip(list(&expected["commonsense"])) {
            let prepared = prepare(row);
            let Texts::One { text, .. } = prepared.texts else { panic!("instructions have one answer") };
            assert_eq!(text, expected["text"].as_str().unwrap());
            let example = example(prepared.item);
            assert_eq!(json!(example.ids), expected["ids"]);
            assert_eq!(example.labels, example.ids, "all tokens are learned");
        }
        for (given, expected) in list(&peft["rows"]).iter().zip(list(&peft["tokens"])) {
            assert_eq!(json!(example(prepare(&row(given)).item).ids), *expected);
        }
    }
}

/// Rows on which the recipe stops.
const STOPS: [&str; 3] = ["null content", "rejected missing", "empty list"];
/// The row on which the recipe stops and that is dropped here: its answers have no prompt.
const NO_PROMPT: &str = "only an assistant message";

#[test]
fn defects_are_trained_on_as_in_the_recipe_if_that_is_wanted() {
    let expected_of_all = read("data/expected.json");
    let rows = rows("defects.jsonl");
    let rules = Rules { on_useless: OnUseless::Keep, ..rules(Method::Dpo, Tokenization::Recipe) };
    let mut preprocessor = preprocessor(rules);
    let (mut trained_on, mut stopped) = (0, 0);
    for (row, expected) in rows.iter().zip(list(&expected_of_all["defects"])) {
        let name = expected["name"].as_str().unwrap();
        let form = Form::of(&row.columns().collect::<Vec<_>>(), Method::Dpo).unwrap();
        let prepared = preprocessor.prepare(form, row);
        if expected["outcome"] == "trained on" {
            same_sequences(&pair(prepared.unwrap().unwrap().item), &expected["tokens"], &expected["name"]);
            trained_on += 1;
        } else if name == NO_PROMPT {
            assert!(prepared.unwrap().is_err());
        } else if name == "content is a list of parts" {
            // The parts are joined to the answer that other rows have as one text.
            let joined = list(&expected_of_all["defects"])
                .iter()
                .find(|defect| defect["name"] == "scores equal")
                .unwrap();
            same_sequences(&pair(prepared.unwrap().unwrap().item), &joined["tokens"], &expected["name"]);
        } else {
            assert!(STOPS.contains(&name) && prepared.is_err(), "{name}");
            stopped += 1;
        }
    }
    assert_eq!((trained_on, stopped), (15, 3));
}

#[test]
fn defects_are_left_out_by_default_each_with_its_reason() {
    let names = read("data/expected.json");
    let mut preprocessor = preprocessor(rules(Method::Dpo, Tokenization::Chat));
    let outcomes: Vec<(String, String)> = rows("defects.jsonl")
        .iter()
        .zip(list(&names["defects"]))
        .map(|(row, defect)| {
            let form = Form::of(&row.columns().collect::<Vec<_>>(), Method::Dpo).unwrap();
            let outcome = match preprocessor.prepare(form, row) {
                Err(error) => error.to_string(),
                Ok(Err(reason)) => reason.to_string(),
                Ok(Ok(_)) => "kept".to_owned(),
            };
            (defect["name"].as_str().unwrap().to_owned(), outcome)
        })
        .collect();
    let of = |name: &str| &outcomes.iter().find(|(other, _)| other == name).unwrap().1;
    for (name, words) in [
        ("chosen equals rejected", "chosen and rejected are equal"),
        ("both empty", "chosen and rejected are equal"),
        ("empty rejected", "an answer is empty"),
        ("empty chosen", "an answer is empty"),
        ("whitespace only response", "an answer is empty"),
        ("last message is the user's", "chosen and rejected are equal"),
        (NO_PROMPT, "nothing stands before the answer"),
        ("null content", "column \"rejected\": message 1: its \"content\" is null"),
        ("rejected missing", "column \"rejected\": it is null"),
        ("empty list", "column \"chosen\": it has no messages"),
        ("end marker inside the answer", "kept"),
        ("content is a list of parts", "kept"),
        ("history differs between chosen and rejected", "kept"),
    ] {
        assert!(of(name).starts_with(words), "{name}: {}", of(name));
    }
    assert_eq!(outcomes.iter().filter(|(_, outcome)| outcome == "kept").count(), 10);
}
