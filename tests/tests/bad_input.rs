//! Wrong input gives a clear message and the right exit code, and loses nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use rustix::process::Signal;
use ulmus_tests::{CHAIN, Ended, Sandbox, TINY, repository, until, write_examples};

/// The program must exit with `code` and print all of `texts`.
#[track_caller]
fn assert_refused(ended: &Ended, code: i32, texts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for text in texts {
        assert!(ended.output.contains(text), "{text:?} is not in:\n{}", ended.output);
    }
}

#[test]
fn mistakes_in_the_plan_are_told_all_at_once() {
    let sandbox = Sandbox::new();
    let wrong =
        sandbox.coordinator(&["--set", "train.lr=1", "--set", "data.lanes=3", "--set", "model.head_dim=x"]);
    assert_refused(
        &wrong.ends(),
        2,
        &[
            "3 problems",
            "train.lr = 1: unknown key",
            "data.lanes = 3",
            "set it to 2",
            "model.head_dim = \"x\"",
        ],
    );
    let nobody = sandbox.coordinator(&["--set", "local.workers=0", "--demo-failure"]).ends();
    assert_refused(&nobody, 2, &["--demo-failure", "local.workers is 0"]);
    let similar = sandbox.coordinator(&["--set", "train.max_lrr=0.1"]).ends();
    assert_refused(&similar, 2, &["did you mean max_lr?"]);
    assert_refused(&sandbox.coordinator_bare(&["--plan", "no.toml"]).ends(), 2, &["no.toml", "--plan"]);
    sandbox.write("broken.toml", "[run]\nname = \n");
    assert_refused(&sandbox.coordinator_bare(&["--plan", "broken.toml"]).ends(), 2, &["line 2", "not TOML"]);
    assert!(!sandbox.path("runs").exists(), "nothing was started");
}

#[test]
fn check_starts_nothing_and_prints_what_a_plan_means() {
    let sandbox = Sandbox::new();
    let said = sandbox.coordinator_bare(&["--plan", "plan.toml", "--check"]).succeeds();
    for text in
        ["max_lr = 0.01", "# model:", "query heads", "# memory per worker", "milestones", "bytes sent"]
    {
        assert!(said.contains(text), "{said}");
    }
    let said = sandbox.coordinator_bare(&["--plan", "plan.toml", "--check", "sources"]).succeeds();
    assert!(said.contains("400 files match"), "{said}");
    assert!(!sandbox.path("runs").exists());
    for (name, parameters) in
        [("270m", "271,691,008"), ("450m", "457,375,744"), ("1_1b", "1,080,153,600"), ("3b", "3,037,040,640")]
    {
        let plan = repository().join(format!("plans/openelm-{name}.toml"));
        let said = sandbox.coordinator_bare(&["--plan", plan.to_str().unwrap(), "--check"]).succeeds();
        assert!(said.contains(&format!("# model: {parameters} parameters")), "{said}");
        let begun = sandbox.coordinator_bare(&["init", "--from", &format!("openelm-{name}")]).succeeds();
        assert_eq!(begun.trim_end(), fs::read_to_string(plan).unwrap().trim_end());
    }
    for name in ["270m", "450m", "1_1b", "3b"] {
        for tuning in ["instruct", "lora", "dora"] {
            let plan = repository().join(format!("plans/openelm-{name}-{tuning}.toml"));
            let said = sandbox.coordinator_bare(&["--plan", plan.to_str().unwrap(), "--check"]).succeeds();
            assert!(said.contains("# tuning"), "{said}");
        }
    }
    for name in ["quickstart", "uniform-vs-scaled"] {
        let plan = repository().join(format!("plans/{name}.toml"));
        sandbox.coordinator_bare(&["--plan", plan.to_str().unwrap(), "--check"]).succeeds();
    }
    assert_refused(&sandbox.coordinator_bare(&["init", "--from", "gpt"]).ends(), 2, &["openelm-270m"]);
}

/// A source that cannot be used ends the run in its first phase, and `--check sources` finds it earlier.
fn assert_bad_source(sandbox: &Sandbox, name: &str, source: &str, texts: &[&str]) {
    let plan = fs::read_to_string(sandbox.path("plan.toml")).unwrap();
    sandbox
        .write("bad.toml", format!("{plan}\n[[data.source]]\nname = \"bad\"\ntext = \"text\"\n{source}\n"));
    let checked = sandbox.coordinator_bare(&["--plan", "bad.toml", "--check", "sources"]).ends();
    assert_refused(&checked, 2, texts);
    let run = ["--plan", "bad.toml", "--set", &format!("run.name={name}")];
    assert_refused(&sandbox.coordinator_bare(&run).ends(), 2, texts);
}

#[test]
fn sources_that_cannot_be_used_are_named() {
    let sandbox = Sandbox::new();
    let nowhere = "url = \"nowhere\"\nfiles = [\"a.parquet\"]";
    assert_bad_source(&sandbox, "nowhere", nowhere, &["nowhere", "not a folder", "correct the path"]);
    fs::create_dir(sandbox.path("raw")).unwrap();
    let parquet = "url = \"raw\"\nfiles = [\"a.parquet\"]";
    assert_bad_source(&sandbox, "missing", parquet, &["a.parquet", "does not exist"]);
    sandbox.write("raw/a.parquet", "this is no parquet file, however it is named");
    assert_bad_source(&sandbox, "parquet", parquet, &["a.parquet", "not parquet"]);
    sandbox.write("raw/b.jsonl", "{\"content\": \"words\", \"id\": 1}\n");
    let jsonl = "url = \"raw\"\nfiles = [\"b.jsonl\"]";
    assert_bad_source(&sandbox, "column", jsonl, &["b.jsonl", "no column", "content"]);
    sandbox.write("raw/b.jsonl", "{\"text\": \"words\"}\n");
    // Without an override, this plan would already stop at the tokenizer.
    let checked = sandbox.coordinator_bare(&["--plan", "bad.toml", "--check", "sources"]).ends();
    assert_refused(&checked, 2, &["1 unit for the 4 lanes", "use data.lanes of at most 1"]);
    let outside = ["bad.toml", "--set", "data.source.0.name=../bad", "--check"];
    let outside = sandbox.coordinator_bare(&[&["--plan"][..], &outside].concat()).ends();
    assert_refused(&outside, 2, &["data.source.0.name", "write name = \"web\""]);
}

/// What `--check sources` says of a plan.
fn check(sandbox: &Sandbox, plan: &str) -> Ended {
    sandbox.write("checked.toml", plan);
    sandbox.coordinator_bare(&["--plan", "checked.toml", "--check", "sources"]).ends()
}

/// A plan that tunes the model of the repository's tests to answers.
fn based(settings: &str) -> String {
    let base = repository().join("tests/golden/tiny");
    format!(
        "[run]\nname = \"based\"\n[local]\nworkers = 1\n[base]\nmodel = {:?}\n[[tune]]\nname = \"sft\"\nof = \"base\"\n\
         method = \"sft\"\nmax_length = 96\nbatch = 8\nmicro_batch = 2\n{settings}\n[[tune.data]]\nurl = \"answers.jsonl\"\n",
        base.display().to_string()
    )
}

#[test]
fn what_stages_learn_from_is_checked_and_shown_before_the_run() {
    let sandbox = Sandbox::new();
    write_examples(&sandbox.path(""));
    let said = check(&sandbox, &[TINY, CHAIN].concat());
    assert_eq!(said.code, Some(0), "{}", said.output);
    for text in [
        "tune sft has the chat template recipe",
        "tune sft data: 61 of 61 rows in 1 file are kept\n  ",
        "answers.jsonl: jsonl, 61 rows, conversations (messages)",
        "tune sft eval: 61 of 61 rows in 1 file are kept\n  ",
        "preferences.jsonl: jsonl, 61 rows, preferences with prompts",
        "instructions.json: json, 61 rows, instructions (Alpaca)",
        "tune sft learns for example, as text without token ids: the run will train its tokenizer:\nrow 0 of ",
        "<|assistant|>\n\u{27e6}",
        "chosen, learned between \u{27e6} and \u{27e7}:\n\u{27e6}",
    ] {
        assert!(said.output.contains(text), "{text:?} is not in:\n{}", said.output);
    }
    assert_eq!(said.output.matches("\nrow ").count(), 9, "{}", said.output);

    sandbox.write("texts.txt", "no such words\nnor these\n");
    let said = check(&sandbox, &based("decontaminate = \"texts.txt\""));
    assert_eq!(said.code, Some(0), "{}", said.output);
    for text in [
        "tests/golden/tiny: there, of the shape of the plan's model",
        "tokenizer of the tuning stages ",
        "tokenizer.model: 512 pieces",
        "rows with one of the 2 texts of texts.txt",
        " learned (between \u{27e6} and \u{27e7}):\n",
        "row 2 of ",
    ] {
        assert!(said.output.contains(text), "{text:?} is not in:\n{}", said.output);
    }
    // Of a long file, the beginning is enough.
    let rows = "{\"text\": \"a b c\"}\n".repeat(5000);
    sandbox.write("answers.jsonl", rows.clone() + "broken");
    let said = check(&sandbox, &based("")).output;
    assert!(said.contains("1024 of the first 1024 rows in 1 file are kept"), "{said}");
    assert!(said.contains("answers.jsonl: jsonl, more than 1024 rows, texts"), "{said}");
    assert!(!sandbox.path("runs").exists(), "nothing was started");
}

#[test]
fn stages_that_cannot_learn_are_refused_with_their_key() {
    let sandbox = Sandbox::new();
    write_examples(&sandbox.path(""));
    let good = fs::read_to_string(sandbox.path("answers.jsonl")).unwrap();
    let assert_bad = |settings: &str, texts: &[&str]| {
        assert_refused(&check(&sandbox, &based(settings)), 2, &[texts, &["the plan cannot run"]].concat());
    };
    assert_bad("template = \"none.jinja\"", &["tune.0.template = \"none.jinja\"", "does not exist"]);
    sandbox.write("bad.jinja", "{% if %}");
    assert_bad("template = \"bad.jinja\"", &["tune.0.template", "bad.jinja cannot be used"]);
    assert_bad("decontaminate = \"none.txt\"", &["tune.0.decontaminate = \"none.txt\"", "does not exist"]);
    assert_bad("lrs = [1e-3, 1e-3]", &["tune.0.lrs", "61 rows give 8 updates, and lrs has 2"]);
    let adapter = repository().join("tests/golden/tune/peft/lora/final");
    let from = |place: &str| format!("[tune.adapter]\nrank = 3\nfrom = {place:?}");
    assert_bad(&from("nowhere"), &["tune.0.adapter.from = \"nowhere\"", "adapter_config.json"]);
    assert_bad(&from(adapter.to_str().unwrap()), &["tune.0.adapter.from", "other ranks, scales or targets"]);
    let dpo = based("").replace("\"sft\"\nmax", "\"dpo\"\nmax");
    assert_refused(&check(&sandbox, &dpo), 2, &["tune.0.data = \"answers.jsonl\"", "set method = \"sft\""]);
    for (rows, texts) in [
        (format!("{good}\n{{\"messages\": 1}}\n"), ["answers.jsonl, row 61 (from 0)", "column \"messages\""]),
        ("{\"question\": 1}".to_owned(), ["answers.jsonl: the columns", "of no known form"]),
        ("{\"text\": \" \"}".to_owned(), ["no row of", "an answer is empty"]),
        (format!("{good}\nbroken"), ["is not JSON lines", "line 62"]),
        (String::new(), ["answers.jsonl", "has no rows"]),
    ] {
        sandbox.write("answers.jsonl", rows);
        assert_bad("", &[&["tune.0.data"], &texts[..]].concat());
    }
    sandbox.write("answers.jsonl", good);

    // A base without its weights, of another shape, or without a tokenizer.
    fs::create_dir(sandbox.path("model")).unwrap();
    let tiny = repository().join("tests/golden/tiny");
    fs::copy(tiny.join("config.json"), sandbox.path("model/config.json")).unwrap();
    let of = |place: &str| based("").replace(tiny.to_str().unwrap(), place);
    let told =
        ["base.model = \"model\"", "model.safetensors", "has no tokenizer.model and no tokenizer.json"];
    assert_refused(&check(&sandbox, &of("model")), 2, &told);
    let other = based(&from(adapter.to_str().unwrap())) + "[model]\npreset = \"openelm-270m\"\n";
    let told = ["base.model", "leave out [model]", "tune.0.adapter.from", "this base model"];
    assert_refused(&check(&sandbox, &other), 2, &told);
    assert!(!sandbox.path("runs").exists(), "nothing was started");
}

#[test]
fn a_corpus_that_the_filters_empty_is_named() {
    let sandbox = Sandbox::new();
    let ended = sandbox.coordinator(&["--set", "data.min_characters=1000000"]).ends();
    assert_refused(&ended, 2, &["prepare failed", "prepared", "min_characters"]);
}

#[test]
fn what_is_in_use_is_refused() {
    let sandbox = Sandbox::new();
    let first = sandbox.coordinator(&["--set", "local.workers=0"]);
    let address = first.address();
    let second = sandbox.coordinator(&["--set", "local.workers=0"]).ends();
    assert_refused(&second, 3, &["another coordinator", "run.name"]);
    let taken = ["--plan", "plan.toml", "--listen", &address, "--set", "run.name=other"];
    assert_refused(&sandbox.coordinator_bare(&taken).ends(), 3, &[&address, "--listen"]);
    first.signal(Signal::INT);
    assert_eq!(first.ends().code, Some(130));
}

#[test]
fn a_changed_plan_needs_another_name_and_loses_nothing() {
    let sandbox = Sandbox::new();
    sandbox.coordinator(&[]).succeeds();
    let before = sandbox.run("tiny").contents();
    let changed = sandbox.coordinator(&["--set", "train.max_lr=0.02", "--set", "run.seed=7"]).ends();
    assert_refused(&changed, 2, &["train.max_lr was 0.01 and is now 0.02", "run.seed was 0", "run.name"]);
    assert_eq!(sandbox.run("tiny").contents(), before);
    // Keys that do not affect training may change. The run is complete, so nothing is done again.
    let said = sandbox.coordinator(&["--set", "local.workers=2"]).succeeds();
    assert!(said.contains("held-out perplexity") && !said.contains("workers train"), "{said}");
}

#[test]
fn a_worker_that_finds_nobody_says_so() {
    let sandbox = Sandbox::new();
    let alone = sandbox.worker_bare(&["--join", "127.0.0.1:9", "--join-timeout", "100ms"]).ends();
    assert_refused(&alone, 6, &["127.0.0.1:9", "no coordinator"]);
    let named = sandbox.worker_bare(&["--join", "127.0.0.1:9", "--name", "../x"]).ends();
    assert_refused(&named, 2, &["--name", "../x"]);
    assert_refused(&sandbox.worker_bare(&["--join", "nonsense"]).ends(), 2, &["nonsense", "HOST:PORT"]);
}

/// The nonce that workers must read in the run folder. It is written a moment after the address is printed.
fn nonce(sandbox: &Sandbox) -> String {
    let path = sandbox.path("runs/tiny/coordinator.nonce");
    until("the coordinator's nonce", || fs::read_to_string(&path).ok())
}

#[test]
fn a_refused_worker_ends_with_the_reason() {
    let sandbox = Sandbox::new();
    let coordinator = sandbox.coordinator(&["--set", "local.workers=0"]);
    let address = coordinator.address();
    nonce(&sandbox);
    // The worker reads the same path, but finds the nonce of another folder there.
    sandbox.write("runs/tiny/coordinator.nonce", "of another machine");
    let worker = sandbox.worker(&address, "elsewhere").ends();
    assert_refused(&worker, 3, &["elsewhere", "does not share the run's store", "store.url"]);
    coordinator.says("refused: worker elsewhere does not share the run's store");
}

#[test]
fn a_name_that_is_taken_is_refused_without_haste() {
    let sandbox = Sandbox::new();
    let coordinator = sandbox.coordinator(&["--set", "local.workers=0", "--set", "cluster.min_workers=2"]);
    let address = coordinator.address();
    let _first = sandbox.worker(&address, "twin");
    coordinator.says("worker twin joined");
    let second = ["--join", &address, "--name", "twin", "--join-timeout", "1s"];
    assert_refused(&sandbox.worker_bare(&second).ends(), 6, &["a worker named twin", "another --name"]);
    coordinator.signal(Signal::INT);
    let said = coordinator.ends().output;
    let refusals = said.matches("refused: a worker named twin").count();
    assert!((1..10).contains(&refusals), "the refusal was printed {refusals} times");
}

#[test]
fn every_program_explains_itself() {
    let sandbox = Sandbox::new();
    let coordinator = sandbox.coordinator_bare(&["--help"]).succeeds();
    for text in [
        "--plan",
        "--set",
        "--check",
        "--listen",
        "--token-file",
        "--demo-failure",
        "init",
        "130",
        "ULMUS_LISTEN",
    ] {
        assert!(coordinator.contains(text), "coordinator --help has no {text}");
    }
    let worker = sandbox.worker_bare(&["--help"]).succeeds();
    for flag in ["join", "token-file", "device", "threads", "name", "advertise", "join-timeout"] {
        let variable = format!("ULMUS_{}", flag.to_uppercase().replace('-', "_"));
        assert!(worker.contains(&format!("--{flag}")) && worker.contains(&variable), "{flag}: {worker}");
    }
    assert!(worker.contains("Exit codes"), "{worker}");
    for command in ["run", "bench", "generate"] {
        let help = sandbox.evaluator(&[command, "--help"]).succeeds();
        assert!(help.contains("Example: evaluator") && help.contains("--model"), "{help}");
    }
}

#[test]
fn a_worker_that_does_not_see_the_store_is_refused() {
    use ulmus_proto::v1;
    use ulmus_transport::TokenSource;
    use ulmus_types::{
        Digest, Hello, Incarnation, Ready, ToCoordinator, ToWorker, WorkerId, WorkerStatus, nonce_digest,
    };

    /// Acts as a worker that sends these messages. Returns the reason for which it is refused.
    async fn refused(address: &str, token: &TokenSource, version: &str, says: Vec<ToCoordinator>) -> String {
        let hello = ToCoordinator::Hello(Hello {
            worker: WorkerId::new("stranger", Incarnation::new(1)).unwrap(),
            version: version.to_owned(),
            address: "127.0.0.1:1".to_owned(),
            device: "none".to_owned(),
            threads: 1,
            pid: 1,
            run: None,
            secret: None,
            status: WorkerStatus::Idle,
            host: "elsewhere".to_owned(),
            memory: 0,
            only_jobs: false,
        });
        let link = ulmus_transport::connect(address, token).await.unwrap();
        let mut client = v1::coordinator_client::CoordinatorClient::new(link.service());
        // The stream stays open after the last message, as a worker's does.
        let (say, messages) = tokio::sync::mpsc::channel(8);
        say.send(v1::FromWorker::from((None, hello))).await.unwrap();
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(messages);
        let mut incoming = client.session(outgoing).await.unwrap().into_inner();
        let mut says = says.into_iter();
        while let Some(message) = incoming.message().await.unwrap() {
            match message.try_into() {
                Ok(ToWorker::Refused { reason, .. }) => return reason,
                Ok(ToWorker::Welcome { id, .. }) => {
                    for message in says.by_ref() {
                        say.send(v1::FromWorker::from((Some(id), message))).await.unwrap();
                    }
                }
                _ => {}
            }
        }
        "never refused".to_owned()
    }

    let sandbox = Sandbox::new();
    let coordinator = sandbox.coordinator(&["--set", "local.workers=0"]);
    let address = coordinator.address();
    let token = TokenSource::File(sandbox.run("tiny").path().join("join.token"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let ours = ulmus_proto::VERSION;
        let reason = refused(&address, &token, "0.0.1", vec![]).await;
        assert!(reason.contains("version 0.0.1") && reason.contains(ours), "{reason}");
        let blind = ToCoordinator::StoreRead(Err("no such folder".to_owned()));
        let reason = refused(&address, &token, ours, vec![blind]).await;
        assert!(reason.contains("no such folder") && reason.contains("store.url"), "{reason}");
        let other = ToCoordinator::StoreRead(Ok(nonce_digest(b"something else")));
        let reason = refused(&address, &token, ours, vec![other]).await;
        assert!(reason.contains("another folder"), "{reason}");
    });
    // A real worker sets the run's fingerprint; a worker with another one is then refused.
    let worker = sandbox.worker(&address, "real");
    coordinator.says("worker real joined");
    let nonce = sandbox.run("tiny").read("coordinator.nonce");
    runtime.block_on(async {
        let sees = ToCoordinator::StoreRead(Ok(nonce_digest(nonce.as_bytes())));
        let odd = ToCoordinator::Ready(Ready {
            fingerprint: Some(Digest::of(b"other arithmetic")),
            generation: None,
            reports: Vec::new(),
            snapshots: Vec::new(),
        });
        let reason = refused(&address, &token, ulmus_proto::VERSION, vec![sees, odd]).await;
        assert!(reason.contains("computes other bits") && reason.contains("stranger"), "{reason}");
    });
    coordinator.succeeds();
    worker.succeeds();
}
