//! Mistakes that are easily made with chat data, and expensive. Each has a test of its own.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test fails at the first error")]

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use ulmus_chat::{
    Example, Forbidden, Form, IGNORE, Item, Pair, Prepare, Preprocessor, Reason, Rules, SpecialNames,
    Template,
};
use ulmus_plan::{Method, OnUseless, Tokenization, Truncation};
use ulmus_tokenizer::Tokenizer;

const BOS: u32 = 1;
const EOS: u32 = 2;
/// Longer than everything in these tests.
const LONG: usize = 1000;

fn tokenizer() -> Tokenizer {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/tokenizer.json");
    Tokenizer::read(&fs::read(file).unwrap(), "tokenizer.json", None, None).unwrap()
}

fn rules(method: Method, tokenization: Tokenization) -> Rules {
    Rules {
        method,
        prompts_only: false,
        tokenization,
        truncation: Truncation::KeepEnd,
        max_length: LONG,
        max_prompt: 20,
        mask_prompt: true,
        on_useless: OnUseless::Drop,
    }
}

fn names() -> SpecialNames {
    [("bos_token", "<s>"), ("eos_token", "</s>")]
        .map(|(name, token)| (name.to_owned(), token.to_owned()))
        .into()
}

fn with_template(rules: Rules, template: &str) -> Preprocessor {
    let template = Template::new("test", template, &names(), None).unwrap();
    Preprocessor::new(rules, template, &tokenizer(), true, None)
}

fn with_recipe(rules: Rules) -> Preprocessor {
    Preprocessor::new(rules, Template::recipe(&names()), &tokenizer(), true, None)
}

fn prepare(preprocessor: &mut Preprocessor, row: Value) -> Result<Item, Reason> {
    let row: ulmus_chat::Row = serde_json::from_value(row).unwrap();
    let form = preprocessor.form(&row.columns().collect::<Vec<_>>()).unwrap();
    preprocessor.prepare(form, &row).unwrap().map(|prepared| prepared.item)
}

fn example(preprocessor: &mut Preprocessor, row: Value) -> Example {
    match prepare(preprocessor, row) {
        Ok(Item::Example(example)) => example,
        other => panic!("{other:?}"),
    }
}

fn pair(preprocessor: &mut Preprocessor, row: Value) -> Pair {
    match prepare(preprocessor, row) {
        Ok(Item::Pair(pair)) => pair,
        other => panic!("{other:?}"),
    }
}

/// The ids that are learned.
fn learned(example: &Example) -> Vec<u32> {
    example.labels.iter().copied().filter(|label| *label != IGNORE).collect()
}

fn talk(turns: &[(&str, &str)]) -> Value {
    turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
}

fn preference(prompt: &str, chosen: &str, rejected: &str) -> Value {
    json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
}

#[test]
fn bos_is_there_once_even_if_the_template_writes_it() {
    let template =
        "{{ bos_token }}{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ eos_token }}{% endfor %}";
    let messages = json!({"messages": talk(&[("user", "a"), ("assistant", "b")])});
    let count = |ids: &[u32]| ids.iter().filter(|id| **id == BOS).count();
    for tokenization in [Tokenization::Chat, Tokenization::Recipe] {
        let mut sft = with_template(rules(Method::Sft, tokenization), template);
        let mut dpo = with_template(rules(Method::Dpo, tokenization), template);
        let own = example(&mut sft, messages.clone());
        assert_eq!((own.ids[0], count(&own.ids)), (BOS, 1), "{tokenization:?}");
        for row in [preference("<s>a", " b", " c"), preference("a", " b", " c")] {
            for sequence in pair(&mut dpo, row).sequences() {
                assert_eq!((sequence.ids[0], count(&sequence.ids)), (BOS, 1), "{tokenization:?}");
            }
        }
    }
    // Where a template writes none, today's practice adds none, and the recipe does.
    for (tokenization, expected) in [(Tokenization::Chat, 0), (Tokenization::Recipe, 1)] {
        let own = example(&mut with_recipe(rules(Method::Sft, tokenization)), messages.clone());
        assert_eq!(count(&own.ids), expected);
    }
}

#[test]
fn a_tokenizer_that_adds_no_bos_gets_none() {
    let rules = rules(Method::Sft, Tokenization::Chat);
    let mut without = Preprocessor::new(rules, Template::recipe(&names()), &tokenizer(), false, None);
    let own = example(&mut without, json!({"text": "a b"}));
    assert_eq!(own.ids, [tokenizer().encode("a b"), vec![EOS]].concat());
}

#[test]
fn eos_is_learned_although_padding_may_have_its_id() {
    let mut sft = with_recipe(rules(Method::Sft, Tokenization::Chat));
    let row =
        json!({"messages": talk(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])});
    let own = example(&mut sft, row);
    let of_eos = |labels: &[u32]| labels.iter().filter(|label| **label == EOS).count();
    assert_eq!((of_eos(&own.ids), of_eos(&own.labels)), (4, 2), "of four turns, two are answers");
    for row in [json!({"prompt": "a", "completion": " b"}), json!({"text": "a b"})] {
        assert_eq!(example(&mut sft, row).labels.last(), Some(&EOS));
    }
    for tokenization in [Tokenization::Chat, Tokenization::Recipe] {
        let mut dpo = with_recipe(rules(Method::Dpo, tokenization));
        let own = pair(&mut dpo, preference("a", " b", " c"));
        assert_eq!([&own.chosen, &own.rejected].map(|answer| answer.labels.last().copied()), [Some(EOS); 2]);
    }
}

#[test]
fn a_text_that_has_eos_gets_no_other_but_in_the_recipe() {
    let row = json!({"prompt": "a", "completion": " b</s>"});
    let count = |tokenization| {
        let own = example(&mut with_recipe(rules(Method::Sft, tokenization)), row.clone());
        own.ids.iter().filter(|id| **id == EOS).count()
    };
    assert_eq!((count(Tokenization::Chat), count(Tokenization::Recipe)), (1, 2));
}

#[test]
fn all_that_the_assistant_says_is_learned_and_nothing_else() {
    let turns = [
        ("system", "Be short."),
        ("user", "Why?"),
        ("assistant", "rust"),
        ("user", "Why not?"),
        ("assistant", "a tide"),
    ];
    let row = json!({"messages": talk(&turns)});
    let text = |tokenization| {
        let own = example(&mut with_recipe(rules(Method::Sft, tokenization)), row.clone());
        tokenizer().decode(&learned(&own))
    };
    assert_eq!(text(Tokenization::Chat), "rust \na tide \n");
    assert_eq!(text(Tokenization::Recipe), "<|assistant|>\nrust \n<|assistant|>\na tide \n");
    // A template that says itself what the assistant says has the last word.
    let marked = "{% for m in messages %}{% if m.role == 'assistant' %}A {% generation %}{{ m.content }}{% endgeneration %}\n\
                  {% else %}{{ m.content }}\n{% endif %}{% endfor %}";
    let own = example(&mut with_template(rules(Method::Sft, Tokenization::Chat), marked), row.clone());
    assert_eq!(tokenizer().decode(&learned(&own)), "rust a tide");
    // Without a mask, everything is learned.
    let all = Rules { mask_prompt: false, ..rules(Method::Sft, Tokenization::Chat) };
    let own = example(&mut with_recipe(all), row);
    assert_eq!(own.ids, own.labels);
}

#[test]
fn what_is_too_long_loses_the_end_that_the_plan_names() {
    let row = json!({"prompt": "one two three four five six", "completion": " seven eight nine"});
    let sft = |max_length, truncation| {
        let rules =
            Rules { max_length, truncation, mask_prompt: false, ..rules(Method::Sft, Tokenization::Chat) };
        example(&mut with_recipe(rules), row.clone()).ids
    };
    let whole = sft(LONG, Truncation::KeepEnd);
    assert_eq!(sft(10, Truncation::KeepEnd), whole[whole.len() - 10..]);
    assert_eq!(sft(10, Truncation::KeepStart), whole[..10]);

    let row = preference("one two three four five six", " seven", " eight nine");
    let dpo = |max_length, truncation| {
        let rules = Rules { max_length, truncation, ..rules(Method::Dpo, Tokenization::Chat) };
        pair(&mut with_recipe(rules), row.clone())
    };
    let whole = dpo(LONG, Truncation::KeepEnd);
    let longer = whole.chosen.ids.len().max(whole.rejected.ids.len());
    let end = dpo(longer + 3, Truncation::KeepEnd);
    assert_eq!(
        end.prompt,
        whole.prompt[whole.prompt.len() - 3..],
        "the last of the prompt stay, and both answers whole"
    );
    assert_eq!((&end.chosen, &end.rejected), (&whole.chosen, &whole.rejected));
    let start = dpo(whole.prompt.len() + 2, Truncation::KeepStart);
    assert_eq!((&start.prompt, &start.chosen.ids[..]), (&whole.prompt, &whole.chosen.ids[..2]));
}

#[test]
fn cutting_a_prompt_of_the_recipe_takes_its_bos_and_cutting_an_answer_its_eos() {
    let rules = Rules { max_length: 24, max_prompt: 8, ..rules(Method::Dpo, Tokenization::Recipe) };
    let long = " one two three four five six seven eight nine ten";
    let own = pair(&mut with_recipe(rules), preference(&long.repeat(2), long, " no"));
    assert_eq!(own.prompt.len(), 8);
    assert!(!own.prompt.contains(&BOS) && !own.chosen.ids.contains(&EOS));
    assert_eq!(own.chosen.ids.len(), 16, "max_length without max_prompt");
    assert_eq!(own.rejected.ids.last(), Some(&EOS));
    // A prompt that is over its limit stays as it is where prompt and answer fit.
    let own = pair(&mut with_recipe(Rules { max_length: 40, ..rules }), preference(long, " yes", " no"));
    assert!(own.prompt.len() > 8 && own.prompt[0] == BOS);
}

#[test]
fn equal_answers_are_left_out() {
    let mut dpo = with_recipe(rules(Method::Dpo, Tokenization::Chat));
    assert_eq!(prepare(&mut dpo, preference("a", " b", " b")), Err(Reason::Identical));
    let mut kept =
        with_recipe(Rules { on_useless: OnUseless::Keep, ..rules(Method::Dpo, Tokenization::Chat) });
    assert!(prepare(&mut kept, preference("a", " b", " b")).is_ok());
}

#[test]
fn empty_answers_are_left_out() {
    let mut dpo = with_recipe(rules(Method::Dpo, Tokenization::Chat));
    assert_eq!(prepare(&mut dpo, preference("a", " b", " \n")), Err(Reason::Empty));
    let mut sft = with_recipe(rules(Method::Sft, Tokenization::Chat));
    for row in [
        json!({"prompt": "a", "completion": ""}),
        json!({"instruction": "a", "output": " "}),
        json!({"text": ""}),
        json!({"messages": talk(&[("user", "a"), ("assistant", "")])}),
    ] {
        assert_eq!(prepare(&mut sft, row.clone()), Err(Reason::Empty), "{row}");
    }
}

#[test]
fn conversations_without_an_answer_are_left_out() {
    let mut sft = with_recipe(rules(Method::Sft, Tokenization::Chat));
    let row = json!({"messages": talk(&[("system", "a"), ("user", "b")])});
    assert_eq!(prepare(&mut sft, row), Err(Reason::NothingLearned));
    let row = json!({"prompt": talk(&[("user", "a")]), "completion": talk(&[("user", "b")])});
    assert_eq!(prepare(&mut sft, row), Err(Reason::NoAnswer));
}

#[test]
fn rows_whose_prompt_or_answer_leaves_no_room_are_left_out() {
    let long = "one two three four five six seven";
    let limits =
        |truncation, method| Rules { max_length: 8, truncation, ..rules(method, Tokenization::Chat) };
    let mut start = with_recipe(limits(Truncation::KeepStart, Method::Dpo));
    assert_eq!(prepare(&mut start, preference(long, " a", " b")), Err(Reason::LongPrompt));
    let mut end = with_recipe(limits(Truncation::KeepEnd, Method::Dpo));
    assert_eq!(prepare(&mut end, preference("a", &format!(" {long}"), " b")), Err(Reason::LongAnswer));
    let mut sft = with_recipe(limits(Truncation::KeepStart, Method::Sft));
    assert_eq!(prepare(&mut sft, json!({"prompt": long, "completion": " a"})), Err(Reason::LongPrompt));
}

#[test]
fn an_answer_whose_prompt_and_beginning_are_cut_off_is_left_out() {
    let row = json!({"prompt": "Why?", "completion": " because".repeat(60)});
    let short = Rules { max_length: 24, ..rules(Method::Sft, Tokenization::Chat) };
    assert_eq!(prepare(&mut with_recipe(short), row.clone()), Err(Reason::LongAnswer));
    let keeps_start = Rules { truncation: Truncation::KeepStart, ..short };
    assert_eq!(example(&mut with_recipe(keeps_start), row.clone()).ids.len(), 24);
    let keeps = Rules { on_useless: OnUseless::Keep, ..short };
    assert_eq!(example(&mut with_recipe(keeps), row).ids.len(), 24);
    // A text has no prompt that could be lost.
    let text = json!({"text": " because".repeat(60)});
    assert_eq!(example(&mut with_recipe(short), text).ids.len(), 24);
}

#[test]
fn a_special_token_that_a_user_has_typed_is_read_as_such_and_told() {
    let mut sft = with_recipe(rules(Method::Sft, Tokenization::Chat));
    for (content, expected) in [("say </s> now", true), ("say it now", false)] {
        let row = json!({"messages": talk(&[("user", content), ("assistant", "b")])});
        let row: ulmus_chat::Row = serde_json::from_value(row).unwrap();
        let prepared = sft.prepare(Form::Messages, &row).unwrap().unwrap();
        let Item::Example(example) = prepared.item else { panic!("a conversation is an example") };
        let turns = 2 + usize::from(expected);
        assert_eq!(example.ids.iter().filter(|id| **id == EOS).count(), turns);
        assert_eq!(prepared.has_special, expected);
    }
}

#[test]
fn what_a_template_leaves_out_or_rewrites_is_not_learned() {
    let rules = rules(Method::Sft, Tokenization::Chat);
    let mut sft = with_recipe(rules);
    let row = json!({"messages": talk(&[("user", "a"), ("tool", "seven"), ("assistant", "b")])});
    assert_eq!(prepare(&mut sft, row), Err(Reason::LeftOut));
    let row = json!({"conversations": [{"from": "Human", "value": "seven"}, {"from": "GPT", "value": "b"}]});
    assert!(prepare(&mut sft, row).is_ok());
    let source = "{% for message in messages|reverse %}{{ message.content }} {% endfor %}";
    let reversed = Template::new("own", source, &names(), None).unwrap();
    let mut sft = Preprocessor::new(rules, reversed, &tokenizer(), true, None);
    let row = json!({"messages": talk(&[("user", "seven"), ("assistant", "b")])});
    assert_eq!(prepare(&mut sft, row), Err(Reason::Rewritten));
}

#[test]
fn pairs_that_a_limit_makes_equal_are_left_out() {
    let rules =
        Rules { max_length: 16, truncation: Truncation::KeepStart, ..rules(Method::Dpo, Tokenization::Chat) };
    let long = " x".repeat(40);
    let row = || preference("a", &format!("{long} p"), &format!("{long} q"));
    assert_eq!(prepare(&mut with_recipe(rules), row()), Err(Reason::Identical));
    let keeping = Rules { on_useless: OnUseless::Keep, ..rules };
    assert!(prepare(&mut with_recipe(keeping), row()).is_ok());
}

#[test]
fn a_template_without_an_end_is_stopped() {
    let source = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    let template = Template::new("own", source, &names(), None).unwrap();
    let message = template.render(&[], false).unwrap_err().to_string();
    assert!(message.contains("the chat template own refuses the conversation"), "{message}");
}

#[test]
fn rows_that_contain_a_forbidden_text_are_left_out() {
    let forbidden = Forbidden::read(b"[\"def  solve():\"]").unwrap();
    let rules = rules(Method::Dpo, Tokenization::Chat);
    let mut dpo = Preprocessor::new(rules, Template::recipe(&names()), &tokenizer(), true, Some(forbidden));
    assert_eq!(prepare(&mut dpo, preference("a", " Sure:\n\nDef Solve():\n", " c")), Err(Reason::Forbidden));
    assert!(prepare(&mut dpo, preference("a", " define solve()", " c")).is_ok());
}

#[test]
fn a_mistake_in_a_row_names_its_column_and_what_to_write() {
    for (method, row, words) in [
        (
            Method::Sft,
            json!({"messages": "a"}),
            "column \"messages\": it is text, and not a list of messages",
        ),
        (
            Method::Sft,
            json!({"messages": [1]}),
            "message 0: it is a number, and not an object with \"role\" and \"content\"",
        ),
        (
            Method::Sft,
            json!({"messages": [{"role": "user", "text": "a"}]}),
            "it has no \"content\" but [\"role\", \"text\"]",
        ),
        (
            Method::Sft,
            json!({"prompt": "a", "completion": talk(&[("assistant", "b")])}),
            "column \"completion\": it is not like \"prompt\"",
        ),
        (
            Method::Sft,
            json!({"instruction": 1, "output": "a"}),
            "column \"instruction\": it is a number, and not text",
        ),
        (Method::Sft, json!({"text": null}), "column \"text\": it is null"),
        (
            Method::Dpo,
            json!({"prompt": "a", "chosen": {}, "rejected": "b"}),
            "column \"chosen\": it is a struct",
        ),
        (
            Method::Dpo,
            json!({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "b"}),
            "a part of its content is of type \"image\", and not text",
        ),
    ] {
        let row: ulmus_chat::Row = serde_json::from_value(row).unwrap();
        let mut preprocessor = with_recipe(rules(method, Tokenization::Chat));
        let form = preprocessor.form(&row.columns().collect::<Vec<_>>()).unwrap();
        let message = preprocessor.prepare(form, &row).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
}
