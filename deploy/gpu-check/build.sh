#!/bin/sh
# Builds the programs that gpu_check.py runs, stripped, into deploy/gpu-check/bin. The GPU machine needs no toolchain.
set -eu
cd "$(dirname "$0")/../.."
bin=deploy/gpu-check/bin
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$bin"
cargo build --release --locked --bin worker --bin evaluator
for program in worker evaluator; do
    strip -o "$bin/$program" "$target/release/$program"
done
for test in cuda golden nccl; do
    built=$(cargo test --release --locked -p ulmus-cuda -p ulmus-conformance --test "$test" --no-run --message-format=json |
        sed -n "s/.*\"name\":\"$test\".*\"executable\":\"\([^\"]*\)\".*/\1/p")
    strip -o "$bin/$test" "$built"
done
ls -l "$bin"
