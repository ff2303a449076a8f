# Everything works from a fresh clone: `make serve`, `make test`. Needs Python 3.11 or later with its venv
# module, and a package index. An own interpreter: make venv PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
# Test processes at a time. Most tests wait for processes of their own; more would only make these slow.
# A module's tests stay together (loadscope), so that the system they share is started once.
JOBS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv serve test test-vllm soak mutation check format docs demo-model clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 13

venv: $(READY)  ## Set up .venv with the pinned packages, if it is not up to date

# The stamp is written last, so a set-up that was interrupted starts over. A venv whose interpreter has
# gone (an upgraded system Python) is made anew.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no $(PYTHON): install Python 3.11 or later, or name one: make venv PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1): 3.11 or later is needed; name one: make venv PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "Setting up $(VENV); the first time, this takes some minutes" >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,dev]'
	@touch $@

serve: venv  ## Serve the demo model on port 8011; another: make serve ARGS="MODEL --port 9000"
	@exec $(BIN)/llmboost serve $(ARGS)

test: venv  ## Run the tests; some of them: make test ARGS="-k name"
	@exec $(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(ARGS)

# Both engines run the tests of what every engine promises.
test-vllm: $(VLLM_READY)  ## Run the tests of the vLLM engine, on a CPU, in an environment of their own
	@exec $(VLLM_VENV)/bin/python -m pytest tests/vllm tests/unit/test_engine_contract.py \
	  tests/unit/test_engine_resume.py tests/unit/test_engine_grammar.py $(ARGS)

$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@$(VLLM_VENV)/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VLLM_VENV)
	@echo "Setting up $(VLLM_VENV); the first time, this takes some minutes" >&2
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

soak: venv  ## Random faults under load for 10 minutes; shorter: make soak ARGS="--minutes 2"
	@exec $(BIN)/python -m tests.faults.soak $(ARGS)

mutation: venv  ## Take one guarantee away at a time: do the tests notice? (minutes)
	@exec $(BIN)/python -m tests.faults.mutation $(ARGS)

check: venv  ## Lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: venv  ## Put the sources into their format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: venv  ## Write docs/settings.md from the settings
	@$(BIN)/python -m llmboost.cli.reference > docs/settings.md

demo-model: venv  ## Train the demo model (under an hour on two cores)
	@exec $(BIN)/python -m demo.train $(ARGS)

clean:  ## Remove .venv, .venv-vllm and all caches
	rm -rf $(VENV) $(VLLM_VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
