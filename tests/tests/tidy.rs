//! Rules of the repository that the compiler does not check.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand, PackageId, Target};
use ulmus_plan::{Normalize, Pack};
use ulmus_tests::repository;

/// A row of the code map in ARCHITECTURE.md.
struct Row {
    folder: String,
    /// Our crates that it may use outside tests, and whether only with a feature.
    may_use: BTreeMap<String, bool>,
}

/// The code map, by name of the crate.
fn code_map() -> BTreeMap<String, Row> {
    let text = fs::read_to_string(repository().join("ARCHITECTURE.md")).unwrap();
    let (_, section) = text.split_once("\n## Code map\n").unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    rows.take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [folder, name, _, may_use] = cells[..] else { panic!("four cells are in a row: {line}") };
            let may_use = may_use.split(", ").filter(|on| *on != "nothing").map(|on| {
                let plain = on.strip_suffix(" (feature)");
                (format!("ulmus-{}", plain.unwrap_or(on)), plain.is_some())
            });
            let row = Row { folder: folder.trim_matches('`').to_owned(), may_use: may_use.collect() };
            (name.trim_matches('`').to_owned(), row)
        })
        .collect()
}

/// Crates that are pure because they cannot use the crates in [`IMPURE`].
const PURE: [&str; 8] = [
    "ulmus-types",
    "ulmus-chat",
    "ulmus-plan",
    "ulmus-run",
    "ulmus-coord-core",
    "ulmus-worker-core",
    "ulmus-backend",
    "ulmus-model",
];
const IMPURE: [&str; 5] = ["tokio", "tonic", "rusqlite", "object_store", "tracing"];
/// A pure crate that may log with `tracing`.
const EXCEPTION: (&str, &str) = ("ulmus-model", "tracing");

/// The code map has no arrows that point up, so crates have no cycles.
#[test]
fn crates_use_only_what_they_may() {
    let metadata = MetadataCommand::new().current_dir(repository()).no_deps().exec().unwrap();
    let map = code_map();
    let mut seen = BTreeSet::new();
    for package in &metadata.packages {
        let name = package.name.as_str();
        let row = map.get(name).unwrap_or_else(|| panic!("{name} has no place in the code map"));
        assert_eq!(package.manifest_path.parent().unwrap(), repository().join(&row.folder), "{name}");
        seen.insert(name.to_owned());
        let mut unused: BTreeSet<&String> = row.may_use.keys().collect();
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal) {
            let on = dependency.name.as_str();
            let pure = !PURE.contains(&name) || !IMPURE.contains(&on) || (name, on) == EXCEPTION;
            assert!(pure, "{name} is pure and may not use {on}");
            if on.starts_with("ulmus-") {
                let by_feature = row.may_use.get(on).unwrap_or_else(|| panic!("{name} may not use {on}"));
                assert_eq!(dependency.optional, *by_feature, "{name}, {on}: by a feature or not");
                unused.remove(&dependency.name);
            }
        }
        assert!(unused.is_empty(), "the code map says that {name} uses {unused:?}");
    }
    assert_eq!(seen, map.into_keys().collect(), "the code map names a crate that is not there");
}

/// Each library crate can be tried by itself; its example is built with the tests.
/// Clippy refuses clocks, chance and hash order in pure crates, by the file that their folders link to.
#[test]
fn pure_crates_have_the_lints_of_pure_crates() {
    let map = code_map();
    for name in PURE {
        let link = repository().join(&map[name].folder).join("clippy.toml");
        let target = link.canonicalize().unwrap_or_else(|_| panic!("{name} has no {}", link.display()));
        assert_eq!(target, repository().join("clippy-pure.toml").canonicalize().unwrap(), "{name}");
    }
}

/// The names after `crate::` in a file, without its tests.
fn own_modules(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let code: String =
        code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let name = |text: &str| -> String {
        text.chars().take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_').collect()
    };
    let after = code.split("crate::").skip(1).flat_map(|after| match after.strip_prefix('{') {
        Some(list) => {
            let (mut depth, mut names, mut begins) = (1, Vec::new(), true);
            for (index, character) in list.char_indices() {
                match character {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 1 => begins = true,
                    _ if depth == 1 && begins && !character.is_whitespace() => {
                        names.push(name(&list[index..]));
                        begins = false;
                    }
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
            names
        }
        None => vec![name(after)],
    });
    after.filter(|name| !name.is_empty()).collect()
}

/// Within a crate, too, knowledge flows in one direction.
#[test]
fn modules_of_a_crate_use_each_other_in_no_circle() {
    let mut checked = 0;
    for row in code_map().values() {
        let folder = repository().join(&row.folder).join("src");
        let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for path in sources(&folder) {
            let below = path.strip_prefix(&folder).unwrap();
            let module = below.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            let is_test = below.iter().any(|part| part == "tests" || part == "tests.rs");
            if !is_test && !["lib", "main"].contains(&module.as_str()) {
                let used = own_modules(&fs::read_to_string(&path).unwrap());
                uses.entry(module.clone())
                    .or_default()
                    .extend(used.into_iter().filter(|used| *used != module));
            }
        }
        // Modules that use no other of those that are left are taken away until none is left.
        checked += uses.len();
        while !uses.is_empty() {
            let left: BTreeSet<String> = uses.keys().cloned().collect();
            let before = uses.len();
            uses.retain(|_, used| used.iter().any(|used| left.contains(used)));
            assert!(uses.len() < before, "{}: a circle among {left:?}", row.folder);
        }
    }
    assert!(checked > 100, "{checked} modules");
}

#[test]
fn every_library_crate_has_an_example() {
    let metadata = MetadataCommand::new().current_dir(repository()).no_deps().exec().unwrap();
    let libraries = metadata.packages.iter().filter(|package| package.targets.iter().any(Target::is_lib));
    let without = libraries.filter(|package| !package.targets.iter().any(Target::is_example));
    let names: Vec<&str> = without.map(|package| package.name.as_str()).collect();
    assert_eq!(names, ["ulmus-tests"], "every other library crate has an example");
}

#[test]
fn plans_name_crates_that_the_build_fetches() {
    // What the default members need to be built: cargo unpacks nothing else for the README's first command.
    let options = ["--locked", "--filter-platform", "x86_64-unknown-linux-gnu"].map(str::to_owned);
    let metadata = MetadataCommand::new().current_dir(repository()).other_options(options).exec().unwrap();
    let nodes = &metadata.resolve.as_ref().unwrap().nodes;
    let node = |id: &PackageId| nodes.iter().find(|node| node.id == *id).unwrap();
    let mut waiting: Vec<_> = metadata.workspace_default_members.iter().collect();
    let mut needed = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if needed.insert(id) {
            let is_built = |kind: &DependencyKind| *kind != DependencyKind::Development;
            let built =
                node(id).deps.iter().filter(|on| on.dep_kinds.iter().any(|kind| is_built(&kind.kind)));
            waiting.extend(built.map(|on| &on.pkg));
        }
    }
    let packages = metadata.packages.iter().filter(|package| needed.contains(&package.id));
    let fetched: BTreeSet<String> =
        packages.map(|package| format!("{} {}", package.name, package.version)).collect();
    for plan in ["quickstart.toml", "uniform-vs-scaled.toml"] {
        let text = fs::read_to_string(repository().join("plans").join(plan)).unwrap();
        for plan in ulmus_plan::read(&text, &[]).unwrap() {
            let crates = plan.prepare.unwrap().crates;
            assert!(crates.len() > 10);
            let missing: Vec<_> = crates.iter().filter(|name| !fetched.contains(*name)).collect();
            assert!(missing.is_empty(), "no program needs {missing:?}");
        }
    }
}

#[test]
fn published_plans_have_the_published_sizes() {
    let sizes =
        [("270m", 271_691_008), ("450m", 457_375_744), ("1_1b", 1_080_153_600), ("3b", 3_037_040_640)];
    for (name, parameters) in sizes {
        let text = fs::read_to_string(repository().join(format!("plans/openelm-{name}.toml"))).unwrap();
        let plan = ulmus_plan::read(&text, &[]).unwrap().remove(0);
        assert_eq!(plan.model.parameters(), parameters);
        assert_eq!(
            (plan.train.iterations, plan.checkpoint.every, plan.checkpoint.average),
            (350_000, 5000, 5)
        );
        assert_eq!(plan.tokens_per_step(), 4_194_304);
        assert_eq!((plan.data.normalize, plan.data.pack), (Normalize::Ftfy, Pack::Corenet));

        // Its `-modern` variant differs only in how documents are packed.
        let twin = repository().join(format!("plans/openelm-{name}-modern.toml"));
        let mut twin = ulmus_plan::read(&fs::read_to_string(twin).unwrap(), &[]).unwrap().remove(0);
        assert_eq!((twin.data.normalize, twin.data.pack), (Normalize::Nfc, Pack::Concat));
        assert_eq!(twin.run.name.to_string(), format!("{}-modern", plan.run.name));
        (twin.data.normalize, twin.data.pack) = (Normalize::Ftfy, Pack::Corenet);
        twin.run.name.clone_from(&plan.run.name);
        assert_eq!(twin, plan);
    }
}

/// Every text between two marks.
fn between<'a>(text: &'a str, open: &'a str, close: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(open).skip(1).filter_map(move |rest| rest.split_once(close)).map(|(inner, _)| inner)
}

#[test]
fn documents_link_to_files_that_are_there() {
    for file in sources(repository()).into_iter().filter(|file| file.extension().unwrap() == "md") {
        let text = fs::read_to_string(&file).unwrap();
        for link in between(&text, "](", ")").filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let path = file.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(path.exists(), "{} links to {link}", file.display());
        }
    }
}

/// Each row of a table ends with files and the tests in them.
#[test]
fn faults_and_invariants_name_tests_that_are_there() {
    let page = |name: &str| fs::read_to_string(repository().join(name)).unwrap();
    let architecture = page("ARCHITECTURE.md");
    let (_, invariants) = architecture.split_once("## Invariants").unwrap();
    let (invariants, _) = invariants.split_once("## Decisions").unwrap();
    for (text, least) in [(&*page("docs/faults.md"), 60), (invariants, 60)] {
        let mut named = 0;
        for (_, tests) in text.lines().filter_map(|row| row.strip_suffix(" |")?.rsplit_once(" | ")) {
            let mut source = String::new();
            for name in tests.split('`').skip(1).step_by(2) {
                if Path::new(name).extension().is_some_and(|suffix| suffix == "rs") {
                    source = page(name);
                } else if name.contains(['/', '.']) {
                    assert!(repository().join(name).exists(), "no file {name}");
                } else {
                    assert!(source.contains(&format!("fn {name}(")), "no test {name}");
                    named += 1;
                }
            }
        }
        assert!(named > least, "{named}");
    }
}

#[test]
fn nothing_unfinished_and_no_machine_is_in_the_sources() {
    // Written in pieces, so that this file does not match.
    let unwanted = [["to", "do!("].concat(), ["unimple", "mented!("].concat(), ["/ro", "ot/"].concat()];
    for file in sources(repository()) {
        let text = fs::read_to_string(&file).unwrap_or_default();
        for unwanted in &unwanted {
            assert!(!text.contains(unwanted.as_str()), "{} has {unwanted}", file.display());
        }
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() {
            if !name.starts_with('.') && !name.starts_with("target") && name != "runs" && name != "golden" {
                files.extend(sources(&path));
            }
        } else if ["rs", "toml", "md", "proto"].iter().any(|suffix| name.ends_with(&format!(".{suffix}"))) {
            files.push(path);
        }
    }
    files
}
