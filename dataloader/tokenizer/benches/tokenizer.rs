//! Compares the tokenizer with other crates, on texts that none of them has seen before.
//!
//! ```text
//! cargo bench -p ulmus-tokenizer --bench tokenizer -- TOKENIZER [TEXTS]
//! ```
//!
//! TOKENIZER is a `tokenizer.model` or a `tokenizer.json`. TEXTS is a folder whose text files are the documents; by
//! default, the Markdown files of the crates that cargo has unpacked. In each of [`ROUNDS`] rounds, every tokenizer in
//! turn is created anew and encodes all texts once, on one thread. The benchmark prints the median speed of each, and
//! the number of texts for which its ids differ from ours; then the same for decoding our ids.

#![expect(clippy::print_stdout, reason = "the benchmark prints its results")]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kitoken::Kitoken;
use ulmus_dataloader::cargo_home;
use ulmus_tokenizer::Tokenizer;

const ROUNDS: usize = 5;
/// Texts beyond this total size in bytes are left out.
const LIMIT: usize = 64 << 20;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let model = arguments.next().expect("give the path of a tokenizer.model or tokenizer.json");
    let folder = arguments.next().map_or_else(|| cargo_home().join("registry/src"), PathBuf::from);
    let model = std::fs::read(&model).expect("the model can be read");
    let mut texts = Vec::new();
    gather(&folder, &mut texts);
    let bytes: usize = texts.iter().map(String::len).sum();
    assert!(bytes > 0, "{} has no texts", folder.display());
    println!("{} texts, {:.1} MB, one thread, {ROUNDS} rounds", texts.len(), bytes as f64 / 1e6);

    let tokenizer = Tokenizer::read(&model, "tokenizer.model", None, None).expect("the model is a tokenizer");
    let json = tokenizer.to_json().expect("the model can be written as tokenizer.json");
    let contestants: [(&str, Make<'_>); 3] = [
        ("ulmus", Box::new(|| ours(&tokenizer))),
        ("kitoken", Box::new(|| kitoken(&model))),
        ("tokenizers", Box::new(|| tokenizers(&json))),
    ];
    let mut seconds = vec![Vec::new(); contestants.len()];
    let mut differing = vec![0; contestants.len()];
    let mut expected: Vec<Vec<u32>> = Vec::new();
    for round in 0..ROUNDS {
        for (index, (_, make)) in contestants.iter().enumerate() {
            let mut encode = make();
            let begun = Instant::now();
            let ids: Vec<Vec<u32>> = texts.iter().map(|text| encode(text)).collect();
            seconds[index].push(begun.elapsed().as_secs_f64());
            if round == 0 && index > 0 {
                differing[index] = ids.iter().zip(&expected).filter(|(a, b)| a != b).count();
            }
            if index == 0 {
                expected = ids;
            }
        }
    }
    for (index, (name, _)) in contestants.iter().enumerate() {
        let seconds = &mut seconds[index];
        seconds.sort_by(f64::total_cmp);
        let rate = bytes as f64 / 1e6 / seconds[ROUNDS / 2];
        println!("{name:12} {rate:8.1} MB/s, {} texts differ", differing[index]);
    }

    let library = tokenizers::Tokenizer::from_bytes(&json).expect("the file can be read by tokenizers");
    let decoders: [(&str, Decode<'_>); 2] = [
        ("ulmus", Box::new(|ids| tokenizer.decode(ids))),
        ("tokenizers", Box::new(|ids| library.decode(ids, true).expect("our ids have a text"))),
    ];
    for (name, decode) in decoders {
        let mut seconds: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let begun = Instant::now();
                for ids in &expected {
                    black_box(decode(ids));
                }
                begun.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        println!("{name:12} {:8.1} MB/s decoded", bytes as f64 / 1e6 / seconds[ROUNDS / 2]);
    }
}

/// Decodes ids.
type Decode<'a> = Box<dyn Fn(&[u32]) -> String + 'a>;

/// Creates a tokenizer.
type Make<'a> = Box<dyn Fn() -> Encode + 'a>;
/// Encodes a text.
type Encode = Box<dyn FnMut(&str) -> Vec<u32>>;

fn ours(tokenizer: &Tokenizer) -> Encode {
    let mut encoder = tokenizer.encoder();
    Box::new(move |text| {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        encoder.encode(text, &mut ids);
        ids
    })
}

fn kitoken(model: &[u8]) -> Encode {
    let kitoken = match model.first() {
        Some(b'{') => Kitoken::from_tokenizers_slice(model).map_err(|error| error.to_string()),
        _ => Kitoken::from_sentencepiece_slice(model).map_err(|error| error.to_string()),
    };
    let kitoken = kitoken.expect("the model can be read by kitoken");
    Box::new(move |text| kitoken.encode(text, false).expect("any text has ids"))
}

fn tokenizers(json: &str) -> Encode {
    let tokenizer = tokenizers::Tokenizer::from_bytes(json).expect("the file can be read by tokenizers");
    Box::new(move |text| tokenizer.encode_fast(text, false).expect("any text has ids").get_ids().to_vec())
}

fn gather(folder: &Path, texts: &mut Vec<String>) {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    for path in paths {
        let left = LIMIT.saturating_sub(texts.iter().map(String::len).sum());
        if path.is_dir() {
            gather(&path, texts);
        } else if path.extension().is_some_and(|suffix| suffix == "md" || suffix == "txt")
            && let Ok(text) = std::fs::read_to_string(&path)
            && text.len() <= left
        {
            texts.push(text);
        }
    }
}
