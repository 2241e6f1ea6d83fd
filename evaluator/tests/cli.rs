//! Runs the real program: what it prints, what it writes, how it fails.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny")
}

fn evaluator(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_evaluator"))
        .args(arguments)
        .env_remove("ULMUS_THREADS")
        .output()
        .expect("the program can be started")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

#[test]
fn run_prints_a_table_and_writes_the_same_numbers() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("texts.jsonl");
    let lines = ["The choir sells the cold metal on the roof.", "Ingrid drops the long letter."]
        .map(|text| serde_json::json!({ "body": text.repeat(20) }).to_string());
    std::fs::write(&data, lines.join("\n")).unwrap();
    let (data, model) = (data.to_str().unwrap(), model());
    let run = |threads: &str, name: &str| {
        let file = home.path().join(name);
        let arguments = ["run", "--model", model.to_str().unwrap(), "--tasks", "perplexity", "--data", data];
        let more = ["--text", "body", "--output", file.to_str().unwrap(), "--threads", threads];
        let table = stdout(&evaluator(&[&arguments[..], &more].concat()));
        (table, std::fs::read_to_string(file).unwrap())
    };
    let (table, written) = run("1", "one.json");
    // Results are bit-identical for any number of threads.
    assert_eq!(run("2", "two.json").1, written);

    let file: Value = serde_json::from_str(&written).unwrap();
    let result = &file["results"]["perplexity"];
    assert_eq!(result["documents"], 2);
    assert_eq!(result["bytes"], 20 * (43 + 29));
    assert_eq!(result["context"], 2048);
    assert_eq!(file["model"]["config"]["model_dim"], 64);
    assert_eq!(file["model"]["weights"].as_str().unwrap().len(), 64);
    assert!(result["zstd_bits_per_byte"].as_f64().unwrap() < 1.0);
    let nll = result["nll"].as_f64().unwrap();
    let bits = result["bits_per_byte"].as_f64().unwrap();
    assert!((bits - nll / 1440.0 / 2.0_f64.ln()).abs() < 1e-12);
    assert!(table.contains("perplexity per token") && table.contains(&format!("{bits:.4}")), "{table}");
}

/// Runs tasks on the rows that the harness has measured.
fn tasks(more: &[&str]) -> Output {
    let (model, data) =
        (model().display().to_string(), model().join("../evaluation/data").display().to_string());
    evaluator(&[&["run", "--model", &model, "--data", &data][..], more].concat())
}

#[test]
fn tasks_are_measured_and_written_as_the_harness_writes_them() {
    let home = tempfile::tempdir().unwrap();
    let run = |threads: &str, batch: &str, name: &str| {
        let folder = home.path().join(name);
        let what =
            ["--tasks", "arc_*,wikitext", "--num-fewshot", "2", "--limit", "5", "--log-samples", "--output"];
        let how = [folder.to_str().unwrap(), "--threads", threads, "--batch-tokens", batch];
        let table = stdout(&tasks(&[&what[..], &how].concat()));
        let files = ["results.json", "samples_arc_easy.jsonl", "samples_wikitext.jsonl"]
            .map(|name| std::fs::read_to_string(folder.join(name)).unwrap());
        assert!(!folder.join("results.journal").exists());
        (table, files)
    };
    let whole = run("1", "auto", "one");
    assert_eq!(run("2", "300", "two"), whole, "neither threads nor batches change a bit");
    let (table, [results, samples, _]) = whole;
    let results: Value = serde_json::from_str(&results).unwrap();
    assert_eq!(results["n-samples"]["arc_easy"]["effective"], 5);
    assert_eq!(results["n-shot"]["arc_challenge"], 2);
    assert_eq!(results["results"]["wikitext"]["word_perplexity_stderr,none"], "N/A");
    let acc = results["results"]["arc_easy"]["acc_norm,none"].as_f64().unwrap();
    let row = table.lines().skip_while(|line| !line.starts_with("|arc_easy")).nth(1).unwrap();
    assert!(row.contains("acc_norm") && row.contains(&format!("{acc:.4}")), "{table}");
    let rows: Vec<Value> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mean = rows.iter().map(|row| row["acc_norm"].as_f64().unwrap()).sum::<f64>() / 5.0;
    assert!((mean - acc).abs() < 1e-12);
    let one = home.path().join("one/results.json");
    let compared = stdout(&evaluator(&["compare", one.to_str().unwrap(), one.to_str().unwrap()]));
    assert!(
        compared.contains("+0.0000") && compared.contains("standard error of the difference: 0"),
        "{compared}"
    );
}

#[test]
fn what_would_be_asked_is_told_without_asking() {
    let told =
        stdout(&tasks(&["--tasks", "mmlu_anatomy", "--num-fewshot", "5", "--check", "--print-prompts"]));
    assert!(told.contains("about anatomy.") && told.contains("mmlu_anatomy: ... \" A\""), "{told}");
    assert!(told.contains("read once") && told.contains("MB for the weights"), "{told}");
    let list = stdout(&evaluator(&["tasks"]));
    for name in ["hellaswag", "mmlu_virology", "openllm", "llm360", "llm_adapters_ARC-Easy", "bits_per_byte"]
    {
        assert!(list.contains(name), "{name} is not in {list}");
    }
}

#[test]
fn a_task_of_one_s_own_is_a_table_in_a_file() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("mine.toml");
    let define = |gold: &str| {
        let text = format!(
            "[[task]]\nname = \"capitals\"\nversion = 1.0\nsources = [\"me/capitals\"]\ntest = \"test\"\n\
             context = \"The capital of {{{{ country }}}} is\"\nchoices = \"cities\"\ngold = \"{gold}\"\n\
             metrics = [\"acc\", \"acc_norm\"]\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    let rows = home.path().join("me/capitals/test.jsonl");
    std::fs::create_dir_all(rows.parent().unwrap()).unwrap();
    std::fs::write(
        &rows,
        "{\"country\": \"France\", \"cities\": [\"Rome\", \"Paris\"], \"capital\": \"Paris\"}\n",
    )
    .unwrap();
    let run = || {
        let model = model();
        let arguments = ["run", "--model", model.to_str().unwrap(), "--data", home.path().to_str().unwrap()];
        evaluator(
            &[&arguments[..], &["--include", file.to_str().unwrap(), "--tasks", "capitals", "--json"]]
                .concat(),
        )
    };
    // A text has characters, but they are no choices.
    define("0");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("choices = \"cities\"", "choices = \"capital\"")).unwrap();
    let message = String::from_utf8_lossy(&run().stderr).into_owned();
    assert!(message.contains("`choices` is text, not a list of texts"), "{message}");
    define("cities | index(capital)");
    let results: Value = serde_json::from_str(&stdout(&run())).unwrap();
    assert_eq!(results["n-samples"]["capitals"]["original"], 1);
    assert_eq!(results["results"]["capitals"]["acc_stderr,none"], "N/A");
    for (gold, words) in [
        ("2", "`gold` is 2, and there are 2 choices"),
        ("captial", "the row has the columns country, cities, capital"),
        ("cities | indx(capital)", "indx"),
    ] {
        define(gold);
        let output = run();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(words), "{message}");
        assert!(message.contains("capitals"), "{message}");
    }
}

#[test]
fn tasks_that_cannot_be_measured_are_refused_with_what_to_do() {
    for (arguments, words) in [
        (&["--tasks", "helaswag"][..], "did you mean hellaswag"),
        (&["--tasks", "mmlu_virology"], "cais/mmlu/virology/test-*.parquet"),
        (&["--tasks", "piqa", "--limit", "0"], "--limit"),
        (&["--tasks", "piqa", "--context", "4096"], "at most 2048"),
        (&["--tasks", "piqa", "--num-fewshot", "1000"], "smaller --num-fewshot"),
        (&["--suite", "openllm", "--num-fewshot", "1"], "--num-fewshot"),
        (&["--tasks", "race", "--context", "2"], "tokens"),
        (&["--tasks", "piqa", "--tokenizer", "/nowhere"], "--tokenizer"),
        (&["--tasks", "piqa", "--resume"], "--output"),
        (&["--limit", "3"], "--limit means nothing for perplexity"),
        (&["--tasks", "hellaswag,openllm"], "hellaswag is asked for by name and by a group"),
    ] {
        let output = tasks(arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(words), "{arguments:?}: {message}");
    }
}

#[test]
fn what_others_have_written_is_left_alone() {
    let home = tempfile::tempdir().unwrap();
    let run = |output: &str, more: &[&str]| {
        let output = home.path().join(output).display().to_string();
        tasks(&[&["--tasks", "arc_easy", "--limit", "2", "--output", &output][..], more].concat())
    };
    let refused = |output: Output, words: &str| {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(words), "{message}");
    };
    stdout(&run("a.json", &["--log-samples"]));
    let samples = std::fs::read(home.path().join("samples_arc_easy.jsonl")).unwrap();
    refused(run("b.json", &["--log-samples"]), "does not belong to");
    assert_eq!(std::fs::read(home.path().join("samples_arc_easy.jsonl")).unwrap(), samples);
    // The same evaluation may be repeated.
    stdout(&run("a.json", &["--log-samples"]));
    std::fs::write(home.path().join("c.journal"), "dear diary\n").unwrap();
    refused(run("c.json", &[]), "no journal of an evaluation");
    assert_eq!(std::fs::read_to_string(home.path().join("c.journal")).unwrap(), "dear diary\n");
    std::fs::create_dir_all(home.path().join("d/results.json")).unwrap();
    refused(run("d", &[]), "it is a folder");
    stdout(&run("e.json/", &[]));
    assert!(home.path().join("e.json/results.json").is_file());
    let asked = stdout(&tasks(&["--tasks", "arc_easy", "--check", "--json"]));
    let asked: Value = serde_json::from_str(&asked).unwrap();
    assert!(asked["tasks"][0]["task"] == "arc_easy" && asked["memory"].as_u64().unwrap() > 0, "{asked}");
    // The two files have other examples.
    stdout(&run("f.json", &["--num-fewshot", "1"]));
    let names = ["a.json", "f.json"].map(|name| home.path().join(name).display().to_string());
    let compared = stdout(&evaluator(&["compare", &names[0], &names[1]]));
    assert!(compared.contains("arc_easy: 2 rows with 0 examples each in"), "{compared}");
}

#[test]
fn definitions_that_make_no_sense_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("mine.toml");
    let task = "name = \"a\"\nversion = 1.0\nsources = [\"me/a\"]\ntest = \"test\"\ncontext = \"x\"\nchoices = \"c\"\ngold = \"g\"\nmetrics = [\"acc\"]\n";
    let with = |from: &str, to: &str| format!("[[task]]\n{}", task.replace(from, to));
    for (text, words) in [
        (with("[\"me/a\"]", "[]"), "`sources` names no data set"),
        (with("\"a\"", "\"perplexity\""), "perplexity measures your own texts"),
        (with("[\"acc\"]", "[\"acc\", \"acc\"]"), "`metrics` has one of them twice"),
        (with("1.0", "nan"), "`version` is no number"),
        (with("\"test\"", "\"\""), "a split has no name"),
        (with("version", "like = 5\nversion"), "which is not above it"),
        (with("me/a", "me/a") + "[[group]]\nname = \"g\"\ngroups = [\"a\"]\n", "a is a task"),
        (
            with("me/a", "me/a") + "[[group]]\nname = \"g\"\ntasks = [\"a\"]\naggregate = \"acc_norm\"\n",
            "which a does not have",
        ),
        (with("me/a", "me/a") + "[[group]]\nname = \"g\"\n", "it has no tasks"),
        (
            with("me/a", "me/a")
                + "[[suite]]\nname = \"zeroshot\"\nentries = [{ name = \"a\", shots = 0 }]\n",
            "two suites",
        ),
        (with("me/a", "me/a") + "[[suite]]\nname = \"s\"\nentries = []\n", "has no `entries`"),
    ] {
        std::fs::write(&file, &text).unwrap();
        let output = evaluator(&["tasks", "--include", file.to_str().unwrap()]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(words), "{text}\n{message}");
    }
}

#[test]
fn bench_times_both_phases_of_every_run() {
    let model = model();
    let arguments = ["bench", "--model", model.to_str().unwrap(), "--prompt", "16", "--generate", "8"];
    let more = ["--threads", "1", "--dtype", "f32", "--runs", "3"];
    let arguments = [&arguments[..], &more].concat();
    let file: Value =
        serde_json::from_str(&stdout(&evaluator(&[&arguments[..], &["--json"]].concat()))).unwrap();
    assert_eq!(file["runs"].as_array().unwrap().len(), 3);
    assert_eq!(file["config"]["prompt"], 16);
    assert_eq!(file["threads"], 1);
    for rate in ["prompt", "generation", "total"] {
        assert!(file["median"][rate].as_f64().unwrap() > 0.0, "{file}");
    }
    assert!(file["machine"]["cores"].as_u64().unwrap() > 0);
    let table = stdout(&evaluator(&arguments));
    assert!(table.contains("prompt processing") && table.contains("median of 3 runs"), "{table}");
}

#[test]
fn bench_counts_the_tokens_of_all_sequences_in_every_format() {
    let model = model();
    for dtype in ["f32", "f16", "bf16", "q8_0"] {
        let arguments = ["bench", "--model", model.to_str().unwrap(), "--prompt", "16", "--generate", "8"];
        let more = ["--threads", "2", "--dtype", dtype, "--runs", "1", "--batch", "3", "--json"];
        let file: Value =
            serde_json::from_str(&stdout(&evaluator(&[&arguments[..], &more].concat()))).unwrap();
        assert_eq!(file["dtype"], dtype);
        assert_eq!(file["config"]["batch"], 3);
        let (rate, seconds) = (&file["generate_tokens_per_second"], &file["runs"][0]["generation_seconds"]);
        let tokens = rate.as_f64().unwrap() * seconds.as_f64().unwrap();
        assert!((tokens - 21.0).abs() < 1e-6, "{file}");
        assert!(file["prompt_tokens_per_second"].as_f64().unwrap() > 0.0, "{file}");
    }
}

#[test]
fn generate_samples_if_asked() {
    let model = model();
    let generate = |more: &[&str]| {
        let prompt = ["generate", "--model", model.to_str().unwrap(), "--prompt", "The old teacher"];
        evaluator(&[&prompt[..], &["--max-tokens", "24"], more].concat())
    };
    let text = |more: &[&str]| stdout(&generate(more));
    let greedy = text(&["--greedy"]);
    assert_eq!(text(&["--temperature", "0"]), greedy);
    assert_eq!(text(&["--temperature", "5", "--top-k", "1"]), greedy);
    let warm = text(&["--temperature", "3", "--top-p", "0.99", "--seed", "1"]);
    assert_eq!(text(&["--temperature", "3", "--top-p", "0.99", "--seed", "1"]), warm);
    assert_ne!(text(&["--temperature", "3", "--top-p", "0.99", "--seed", "2"]), warm);
    assert_eq!(text(&["--dtype", "f16"]), greedy);
    for (more, word) in [
        (["--temperature", "-1"], "temperature -1"),
        (["--temperature", "NaN"], "temperature NaN"),
        (["--top-k", "0"], "top-k 0"),
        (["--top-p", "1.5"], "top-p 1.5"),
    ] {
        let output = generate(&[&more[0..1], &more[1..]].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(word), "{message}");
    }
    assert_eq!(generate(&["--greedy", "--top-k", "3"]).status.code(), Some(2));
}

#[test]
fn generate_continues_the_prompt() {
    let model = model();
    let generate = |tokens: &str| {
        let prompt = ["--prompt", "The old teacher", "--max-tokens", tokens, "--greedy"];
        stdout(&evaluator(&[&["generate", "--model", model.to_str().unwrap()][..], &prompt].concat()))
    };
    let long = generate("24");
    assert!(long.starts_with("The old teacher") && long.ends_with('\n') && long.len() > 20, "{long:?}");
    assert_eq!(long, generate("24"));
    assert_eq!(generate("0"), "The old teacher\n");
}

#[test]
fn a_prompt_may_look_like_a_flag() {
    let model = model();
    for prompt in ["-x", "--greedy", "- one\n- two", "-1"] {
        let arguments =
            ["generate", "--model", model.to_str().unwrap(), "--max-tokens", "2", "--prompt", prompt];
        let text = stdout(&evaluator(&arguments));
        assert!(text.starts_with(prompt), "{text:?}");
    }
}

/// Copies the tiny model into `folder`, with `changes` made to its config.
fn reshaped(folder: &Path, changes: &[(&str, &str)]) {
    for name in ["config.json", "model.safetensors", "tokenizer.model"] {
        std::fs::copy(model().join(name), folder.join(name)).expect("it can be copied");
    }
    let mut config = std::fs::read_to_string(folder.join("config.json")).expect("it was copied");
    for (from, to) in changes {
        assert!(config.contains(from), "{config}");
        config = config.replace(from, to);
    }
    std::fs::write(folder.join("config.json"), config).expect("it can be written");
}

#[test]
fn a_model_with_a_small_context_generates_what_fits() {
    let home = tempfile::tempdir().unwrap();
    reshaped(home.path(), &[("\"max_context_length\": 2048", "\"max_context_length\": 12")]);
    let folder = home.path().to_str().unwrap();
    let generate = |prompt: &str, more: &[&str]| {
        evaluator(&[&["generate", "--model", folder, "--prompt", prompt][..], more].concat())
    };
    let text = stdout(&generate("The", &[]));
    assert!(text.len() > "The\n".len(), "{text:?}");
    stdout(&evaluator(&["bench", "--model", folder, "--runs", "1"]));
    // The message gives advice that works, and no other.
    let message = |output: Output| {
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let long = message(generate("The", &["--max-tokens", "100"]));
    let most = long.trim().rsplit(' ').next().unwrap();
    stdout(&generate("The", &["--max-tokens", most]));
    for more in [&[][..], &["--max-tokens", "5"], &["--max-tokens", "0"]] {
        let long = message(generate("The old teacher counts an iron pot at the market", more));
        assert!(long.contains("shorten it to at most 11") && !long.contains("use --max-tokens"), "{long}");
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("text.txt");
    std::fs::write(&data, "Some text.").unwrap();
    let (model, data) = (model(), data.to_str().unwrap());
    let model = model.to_str().unwrap();
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["run", "--help"],
        &["run", "--model", model, "--data", data],
        &["bench", "--model", model, "--runs", "1", "--generate", "2"],
        &["bench", "--model", model, "--runs", "1", "--generate", "2", "--json"],
        &["generate", "--model", model, "--prompt", "The", "--max-tokens", "2"],
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output =
            Command::new(env!("CARGO_BIN_EXE_evaluator")).args(arguments).stdout(full).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(message.contains("No space left"), "{message}");
    }
}

/// Asserts that the program fails with code 2, gives `reasons` on standard error, and prints nothing else.
fn assert_refused(arguments: &[&str], reasons: &[&str]) {
    let output = evaluator(arguments);
    let message = String::from_utf8(output.stderr.clone()).expect("text");
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    assert!(output.stdout.is_empty());
    for reason in reasons {
        assert!(message.contains(reason), "{arguments:?}: {message}");
    }
}

#[test]
fn wrong_input_is_refused_with_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let model = model();
    let model = model.to_str().unwrap();
    let text = at("text.txt");
    std::fs::write(&text, "Some text.").unwrap();
    let lines = at("lines.jsonl");
    std::fs::write(&lines, "{\"text\":\"a\"}\n").unwrap();

    assert_refused(
        &["run", "--model", &at("nothing"), "--data", &text],
        &["not a model folder", "config.json"],
    );
    let missing = at("missing.parquet");
    assert_refused(&["run", "--model", model, "--data", &missing], &["missing.parquet", "no such file"]);
    assert_refused(&["run", "--model", model, "--data", &lines, "--text", "body"], &["lines.jsonl", "body"]);
    let output = at("no/such/folder/result.json");
    assert_refused(&["run", "--model", model, "--data", &text, "--output", &output], &["existing folder"]);
    assert_refused(&["run", "--model", model, "--data", &text, "--context", "4096"], &["at most 2048"]);
    assert_refused(&["run", "--model", model, "--data", &text, "--tasks", "arc"], &["did you mean arc_easy"]);
    assert_refused(&["bench"], &["--preset"]);
    assert_refused(&["bench", "--preset", "openelm-7b"], &["openelm-270m"]);
    assert_refused(&["bench", "--preset", "openelm-270m", "--norm", "batch"], &["rms, naive_rms or layer"]);
    assert_refused(&["bench", "--model", model, "--norm", "layer"], &["--norm", "--model"]);
    assert_refused(
        &["bench", "--model", model, "--prompt", "2000", "--generate", "100"],
        &["context of 2048"],
    );
    let arguments = ["generate", "--model", model, "--prompt", "The", "--max-tokens", "5000"];
    assert_refused(&arguments, &["do not fit in", "--max-tokens 2"]);
}

#[test]
fn files_of_different_exports_are_refused_together() {
    let home = tempfile::tempdir().unwrap();
    let text = home.path().join("text.txt");
    std::fs::write(&text, "Some text.").unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.model"] {
        std::fs::copy(model().join(name), home.path().join(name)).unwrap();
    }
    let run = ["run", "--model", home.path().to_str().unwrap(), "--data", text.to_str().unwrap()];
    let config = std::fs::read_to_string(home.path().join("config.json")).unwrap();

    let other = config.replace("\"eos_token_id\": 2", "\"eos_token_id\": 5");
    std::fs::write(home.path().join("config.json"), other).unwrap();
    assert_refused(&run, &["does not fit its model", "1 and 5"]);

    let other = config.replace("\"vocab_size\": 512", "\"vocab_size\": 1024");
    std::fs::write(home.path().join("config.json"), other).unwrap();
    assert_refused(&run, &["model.safetensors"]);

    std::fs::write(home.path().join("config.json"), &config).unwrap();
    std::fs::write(home.path().join("tokenizer.model"), "not a tokenizer").unwrap();
    assert_refused(&run, &["tokenizer.model"]);
    std::fs::remove_file(home.path().join("tokenizer.model")).unwrap();
    assert_refused(&run, &["neither tokenizer.model nor tokenizer.json", "--tokenizer"]);
    std::fs::write(home.path().join("model.safetensors"), "torn").unwrap();
    assert_refused(&run, &["model.safetensors"]);
}

#[test]
fn a_checkpoint_of_corenet_is_a_model_without_a_tokenizer() {
    let checkpoint = model().join("../corenet/checkpoint_average.pt");
    let (checkpoint, tokenizer) = (checkpoint.to_str().unwrap(), model().join("tokenizer.model"));
    let generate = ["generate", "--model", checkpoint, "--prompt", "a"];
    assert_refused(&generate, &["neither tokenizer.model nor tokenizer.json", "--tokenizer"]);
    let other = ["--tokenizer", tokenizer.to_str().unwrap()];
    assert_refused(&[&generate[..], &other].concat(), &["512 pieces", "vocabulary of only 10"]);
    assert_refused(
        &["generate", "--model", other[1], "--prompt", "a"],
        &["tokenizer.model", "a .pt file of CoreNet"],
    );
}

#[test]
fn help_shows_every_flag_of_the_contract() {
    for (command, flags) in [
        (
            "run",
            &["--model", "--tasks", "--data", "--output", "--text", "--context", "--dtype", "--threads"][..],
        ),
        (
            "bench",
            &[
                "--model",
                "--preset",
                "--prompt",
                "--generate",
                "--threads",
                "--dtype",
                "--runs",
                "--batch",
                "--json",
            ],
        ),
        (
            "generate",
            &[
                "--model",
                "--prompt",
                "--max-tokens",
                "--greedy",
                "--temperature",
                "--top-k",
                "--top-p",
                "--seed",
                "--dtype",
                "--threads",
            ],
        ),
    ] {
        let help = stdout(&evaluator(&[command, "--help"]));
        assert!(help.contains("Example:"), "{help}");
        for flag in flags {
            assert!(help.contains(flag), "{command} {flag}: {help}");
        }
    }
    assert!(stdout(&evaluator(&["--help"])).contains("Exit codes"));
}
