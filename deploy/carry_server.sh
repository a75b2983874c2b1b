#!/usr/bin/env bash
# Builds the server with the CUDA backend and the load generator, stripped, into carry/bin, for a machine with a GPU and
# no Rust: see integration-tests/gpu. LORAX_CUDA_ARCHS=90a deploy/carry_server.sh
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --features lorax-shard/cuda \
  -p lorax-launcher -p lorax-router -p lorax-shard -p integration-tests --bin lorax-launcher --bin lorax-router --bin lorax-shard --bin lorax-bench
mkdir -p carry/bin
for program in lorax-launcher lorax-router lorax-shard lorax-bench; do
  strip -o "carry/bin/$program" "target/release/$program"
done
ls -l carry/bin
