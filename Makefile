# Everything done twice. `make help` lists the targets.
# Needs Python >= 3.10 (with venv) and make; the first target that needs it builds the environment.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,viz,babyai,ant,expert,data
ARGS ?=

# torch is installed by itself and first, so that no other package's range can choose a build. On a system where this
# version is a CUDA build and a CPU build is wanted, name an index of CPU wheels in TORCH_PIP_ARGS.
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv test test-slow coverage lint types format reproduce figures bench gpu mutate torture neutral clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) TORCH_PIP_ARGS=$(TORCH_PIP_ARGS) ARGS=$(ARGS)"

venv: $(STAMP) ## create the environment with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"{sys.executable} is Python {sys.version.split()[0]} where 3.10 or newer is needed; choose another, as in: make PYTHON=python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH_PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

test: $(STAMP) ## run the tests, without the slow ones, in two processes
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

coverage: $(STAMP) ## run the tests of `make test` and say which lines and branches of src they leave out
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --cov --cov-report=term $(ARGS)

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## rewrite files to the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

reproduce: $(STAMP) ## train and evaluate the preset quick, all phases, beside raw-action RL
	$(BIN)/metacontroller reproduce --preset quick --out runs/quick $(ARGS)

figures: $(STAMP) ## all baselines, analyses and figures of the preset quick, three seeds, and a report; resumes
	$(BIN)/metacontroller figures --preset quick --out runs/quick $(ARGS)

bench: $(STAMP) ## run every benchmark; each prints a table
	@set -e; for script in $(filter-out $(addprefix benchmarks/,gpu.py ant_decisions.py variants_grid.py),$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

gpu: $(STAMP) ## parity, roofline and the paper preset on a GPU; each call resumes the last
	$(BIN)/python benchmarks/gpu.py $(ARGS)

mutate: $(STAMP) ## break lines of the source, one at a time, and say which breakage no test notices
	$(BIN)/python tests/mutation/mutate.py $(ARGS)

torture: $(STAMP) ## kill, signal, starve and damage runs, and say what does not survive; half an hour
	$(BIN)/python tests/torture/torture.py $(ARGS)

neutral: $(STAMP) ## train short runs; ARGS="--write FILE" notes their numbers, ARGS="--against FILE" compares with them
	$(BIN)/python tests/neutral/neutral.py $(ARGS)

clean: ## remove the environment and caches; runs are kept
	rm -rf $(VENV) build dist .coverage* .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
