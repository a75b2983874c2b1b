#!/usr/bin/env bash
# Builds the CUDA tests and benches and copies them to carry/, for a machine with a GPU and no Rust.
# LORAX_CUDA_ARCHS=90a deploy/carry_cuda.sh
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p carry
built=$(
  cargo test -p kernels --features cuda --no-run --message-format json &&
    cargo build -p kernels --features cuda --bench cuda --bench ops --message-format json
)
for target in test:conformance:conformance test:cuda:cuda_tests bench:cuda:cuda_bench bench:ops:ops_bench; do
  IFS=: read -r kind name as <<< "$target"
  path=$(python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    t = m.get("target", {})
    if m.get("executable") and t.get("kind") == [sys.argv[1]] and t.get("name") == sys.argv[2]:
        print(m["executable"])
' "$kind" "$name" <<< "$built" | tail -n 1)
  strip -o "carry/$as" "$path"
done
ls -l carry
