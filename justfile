# Short names for what people do often. CI runs `.ci/run`, which these recipes call too.

# Where runs of these recipes go.
runs := "runs"

# List the recipes.
default:
    @just --list

# Formatting, lints, and what builds with fewer features.
lint:
    .ci/run format lint lean

# All tests.
test:
    .ci/run test

# Disturbs runs in every way at random moments; `just chaos SEEDS=1 FIRST=17` repeats the faults of a seed.
chaos seeds="SEEDS=5" first="FIRST=1":
    CHAOS_{{ seeds }} CHAOS_{{ first }} .ci/run chaos

# Writes the pages of the documents that follow from the sources.
docs:
    ULMUS_WRITE_DOCS=1 cargo test --workspace --test plan_page

# What a change must pass: as CI, and the policy on dependencies.
check: deny
    .ci/run

# Licences, bans and sources of dependencies. Needs cargo-deny: `cargo install --locked cargo-deny@0.20.2`.
deny:
    cargo deny --locked check licenses bans sources

# Known defects of dependencies. Needs the network: it fetches the database of rustsec.org.
advisories:
    cargo deny --locked check advisories

# The whole mission in small.
quickstart:
    cargo run --release --bin coordinator -- --plan plans/quickstart.toml --set store.url={{ runs }}

# The paper's claim in small: a uniform and a layer-wise scaled model of equal size.
uniform-vs-scaled:
    cargo run --release --bin coordinator -- --plan plans/uniform-vs-scaled.toml --set store.url={{ runs }}

# Speed of prompt processing and generation of a published shape, with synthetic weights.
bench preset="openelm-270m":
    cargo run --release --bin evaluator -- bench --preset {{ preset }} --prompt 35 --generate 128
