//! A plan small enough for a whole run to take seconds, and text for it that is the same everywhere.

use std::path::Path;

use crate::random::Random;

/// A plan with every phase: three layers of different widths, 60 updates, a milestone every 10 updates.
///
/// An update has four micro-batches, so up to four workers can take part. Text is expected in the folder `corpus`.
pub const TINY: &str = r#"
[run]
name = "tiny"

[local]
workers = 1

[cluster]
dead_after = "10s" # machines that test are busy

[model]
vocab_size = 640
max_context_length = 128
num_transformer_layers = 3
model_dim = 64
head_dim = 16
num_gqa_groups = 2
qkv_multipliers = [0.5, 1.0]
ffn_multipliers = [0.5, 2.0]
ffn_dim_divisor = 32

[tokenizer]
pieces = 600
sample = "256KiB"

[prepare]
paths = ["corpus"]
shard = "512KiB"

[data]
lanes = 4
unit = "64KiB"
window = 16
holdout = 0.05
min_tokens = 32
threads = 1

[train]
iterations = 60
sequences = 16
micro_batch = 4
max_lr = 0.01
min_lr = 0.001
warmup = 10
held_out_every = 20
held_out_sequences = 8

[checkpoint]
every = 10
average = 3

[evaluate]
text = "16KiB"
prompt = 16
continuation = 16

[benchmark]
prompt = 8
generate = 16
runs = 1
"#;

/// Stages that go on from the tiny plan: answers to imitate, then preferences, then an adapter; and tasks for all models. The
/// examples are those of [`write_examples`].
pub const CHAIN: &str = r#"
[[tune]]
name = "sft"
of = "average"
method = "sft"
max_length = 96
steps = 100
batch = 8
micro_batch = 2
max_lr = 1e-3
checkpoint_every = 40
eval_every = 50
[[tune.data]]
url = "answers.jsonl"
[[tune.eval]]
url = "answers.jsonl"

[[tune]]
name = "dpo"
of = "sft"
method = "dpo"
beta = 0.1
max_length = 96
steps = 100
batch = 8
micro_batch = 2
max_lr = 1e-4
checkpoint_every = 40
[[tune.data]]
url = "preferences.jsonl"

[[tune]]
name = "lora"
of = "dpo"
method = "sft"
max_length = 128
steps = 100
batch = 8
micro_batch = 2
max_lr = 1e-3
checkpoint_every = 40
[tune.adapter]
rank = 4
alpha = 4
dropout = 0.1
targets = ["all-linear", "token_embeddings"]
[[tune.data]]
url = "instructions.json"

[[evaluation]]
name = "tasks"
of = ["average", "lora"]
tasks = ["next_text"]
"#;

/// The tuning stages of [`CHAIN`].
pub const TUNED: [&str; 3] = ["sft", "dpo", "lora"];

/// Writes what the stages of [`CHAIN`] learn from: 61 rows each, so that the last update of an epoch is not full.
///
/// # Panics
/// When the files cannot be written.
pub fn write_examples(folder: &Path) {
    let mut random = Random::new(2);
    let words: Vec<String> = (0..200).map(|_| word(&mut random)).collect();
    let rows: Vec<[String; 3]> = (0..61).map(|_| [(); 3].map(|()| sentence(&words, &mut random))).collect();
    let lines = |line: fn(&[String; 3]) -> String| rows.iter().map(line).collect::<Vec<_>>().join("\n");
    let answers = lines(|[prompt, answer, _]| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"{prompt}"}},{{"role":"assistant","content":"{answer}"}}]}}"#
        )
    });
    let preferences = lines(|[prompt, chosen, rejected]| {
        format!(r#"{{"prompt":"{prompt}","chosen":"{chosen}","rejected":"{rejected}"}}"#)
    });
    let instructions = lines(|[prompt, answer, _]| {
        format!(r#",{{"instruction":"{prompt}","input":"","output":"{answer}"}}"#)
    });
    let instructions = format!("[{}]", instructions.trim_start_matches(','));
    for (name, text) in
        [("answers.jsonl", answers), ("preferences.jsonl", preferences), ("instructions.json", instructions)]
    {
        std::fs::write(folder.join(name), text).expect("the file can be written");
    }
}

/// Number of documents.
const DOCUMENTS: usize = 400;
/// Sentences per document, which make about 5 KB.
const SENTENCES: usize = 80;
/// Number of different words.
const WORDS: usize = 2000;

/// Writes about 2 MiB of meaningless prose to `folder`, one document per file. It is the same on every machine.
///
/// # Panics
/// When the files cannot be written.
pub fn write_prose(folder: &Path) {
    let mut random = Random::new(1);
    let words: Vec<String> = (0..WORDS).map(|_| word(&mut random)).collect();
    std::fs::create_dir_all(folder).expect("the folder can be made");
    for document in 0..DOCUMENTS {
        let sentences: Vec<String> = (0..SENTENCES).map(|_| sentence(&words, &mut random)).collect();
        let path = folder.join(format!("{document:04}.md"));
        std::fs::write(path, sentences.join(" ") + "\n").expect("the file can be written");
    }
}

fn word(random: &mut Random) -> String {
    let consonants = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "pl"];
    let vowels = ["a", "e", "i", "o", "u", "ai", "ou"];
    let syllables = 1 + random.below(3);
    (0..syllables)
        .map(|_| consonants[random.below(consonants.len())].to_owned() + vowels[random.below(vowels.len())])
        .collect()
}

/// Each word is followed by one of eight words, so that there is something to learn.
fn sentence(words: &[String], random: &mut Random) -> String {
    let mut at = random.below(words.len());
    let mut sentence = Vec::new();
    for _ in 0..5 + random.below(8) {
        sentence.push(words[at].as_str());
        at = (at * 31 + random.below(8) * 257 + 7) % words.len();
    }
    sentence.join(" ") + "."
}
