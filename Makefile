# Two commands: `make run` and `make test`. Both make .venv on their first call and are quick afterwards.
PYTHON ?= python3
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
REQUIREMENTS := $(if $(filter-out 0,$(GPU)),requirements.txt,requirements-cpu.txt)
BIN := .venv/bin

.PHONY: run test lab clean
run: .venv/installed
	$(BIN)/python ppo.py --search mcts $(ARGS)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(ARGS)

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

# TORCH_INDEX: a package index with CPU builds of torch, for a Linux laptop that should not download CUDA
.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(REQUIREMENTS))"
	$(BIN)/python -m pip install --quiet -r $(REQUIREMENTS)
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
