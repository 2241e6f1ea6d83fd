# Short names for what people do often. CI runs `.ci/run`, which these recipes call too.

# Where runs of these recipes go.
runs := "runs"

# List the recipes.
default:
    @just --list

# Everything that CI checks before it runs anything: formatting, lints, the coordinator without workers.
lint:
    .ci/run format lint lean

# All tests.
test:
    .ci/run test

# What a change must pass: as CI, and the policy on dependencies.
check: deny
    .ci/run

# Licences, sources and bans of dependencies; known defects too, where the advisory database can be fetched.
deny:
    cargo deny check licenses bans sources

advisories:
    cargo deny check advisories

# The whole mission in small.
quickstart:
    cargo run --release --bin coordinator -- --plan plans/quickstart.toml --set store.url={{ runs }}

# The paper's claim in small: a uniform and a layer-wise scaled model of equal size.
uniform-vs-scaled:
    cargo run --release --bin coordinator -- --plan plans/uniform-vs-scaled.toml --set store.url={{ runs }}

# Speed of prompt processing and generation of a published shape, with synthetic weights.
bench preset="openelm-270m":
    cargo run --release --bin evaluator -- bench --preset {{ preset }} --prompt 35 --generate 128
