# `make help` lists the targets.
PYTHON ?= python3

.DEFAULT_GOAL := help
BIN := .venv/bin
LOCKS := $(addprefix requirements/,build.txt lock.txt model.txt source.txt)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: env
env: .venv/.complete ## build .venv from the locks (PYTHON=python3.12 chooses the interpreter)

.venv/.complete: $(LOCKS) pyproject.toml scripts/build_env.py scripts/llama_library_only.cmake
	@$(PYTHON) scripts/build_env.py

.PHONY: demo
demo: env ## a batch of real tasks with deadlines on two edge workers and one cloud worker
	@$(BIN)/perllm demo

.PHONY: up
up: env ## the same system, running until interrupted
	@$(BIN)/perllm up

.PHONY: test
test: env ## the whole test suite
	$(BIN)/pytest -n 2 --dist loadfile

.PHONY: test-fast
test-fast: env ## the unit tests only
	$(BIN)/pytest tests/unit

.PHONY: test-clients
test-clients: env ## other people's clients (OpenAI's SDKs, agent frameworks, Celery) against a whole system
	@$(BIN)/python scripts/build_clients.py
	$(BIN)/pytest tests/clients

.PHONY: lint
lint: env ## ruff, the import contract, mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

.PHONY: docs
docs: env ## the documentation as a site in .build/site, its reference pages made anew
	@$(BIN)/perllm settings --markdown >docs/settings.md
	@$(BIN)/perllm policies --markdown >docs/policies.md
	$(BIN)/mkdocs build --strict

.PHONY: chaos
chaos: env ## kills at random moments under load, then a check of every task (ARGS="--quick", ARGS="--seed 3")
	@PYTHONPATH=.:tests $(BIN)/python -m chaos $(ARGS)

.PHONY: attack
attack: env ## a hostile tenant beside a quiet one for ten minutes, who is to notice nothing (ARGS="--quick", ARGS="--only KIND")
	@PYTHONPATH=.:tests $(BIN)/python -m attack $(ARGS)

.PHONY: soak
soak: env ## a million no-op tasks, and whether any process's memory grows (ARGS="--tasks 20000")
	@$(BIN)/python -m benchmarks.soak $(ARGS)

.PHONY: bench-tools
bench-tools: env ## calls of tools by the small model over 10,000 random schemas (ARGS="--random", ARGS="--schemas 500")
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.tools $(ARGS)

# Each benchmark is a module of benchmarks/ that prints JSON and compares with a peer.
bench-%: .venv/.bench ## run a benchmark: bench-dispatch, bench-far_worker, bench-decision, bench-schedule, bench-edge, bench-answers, bench-cloud, bench-api
	@$(BIN)/python -m benchmarks.$*

.venv/.bench: requirements/bench.txt .venv/.complete
	@echo "installing the peers the benchmarks compare with"
	@$(BIN)/pip install --quiet --no-deps --require-hashes -r $<
	@touch $@

UV := .build/lock/bin/uv
COMPILE := UV_CUSTOM_COMPILE_COMMAND="make lock" UV_PYTHON_DOWNLOADS=never $(UV) pip compile --quiet --generate-hashes \
	$(if $(UPGRADE),--upgrade)
EVERYWHERE := --universal --python-version 3.11 --fork-strategy fewest
SOURCE := --no-emit-package llama-cpp-python

.PHONY: lock
lock: $(UV) ## bring requirements/*.txt up to date with pyproject.toml (UPGRADE=1 for newer versions)
	$(COMPILE) $(EVERYWHERE) $(SOURCE) --extra all --extra dev --extra docs pyproject.toml \
		-o requirements/lock.txt
	$(COMPILE) $(EVERYWHERE) -c requirements/lock.txt --extra bench pyproject.toml -o requirements/bench.txt
	$(COMPILE) $(EVERYWHERE) -c requirements/lock.txt $(SOURCE) --extra server --extra scheduler --extra edge --extra remote --extra api pyproject.toml \
		-o requirements/runtime.txt
	$(COMPILE) --python-platform linux --python-version 3.12 --extra cloud pyproject.toml -o requirements/cloud.txt
	$(COMPILE) $(EVERYWHERE) --no-deps requirements/source.in -o requirements/source.txt
	$(COMPILE) $(EVERYWHERE) --no-deps requirements/model.in -o requirements/model.txt
	$(COMPILE) $(EVERYWHERE) requirements/build.in -o requirements/build.txt
	for one in openai-2 openai-3; do $(COMPILE) $(EVERYWHERE) tests/clients/$$one.in -o tests/clients/$$one.txt; done
	cd tests/clients && npm install --package-lock-only --silent --no-audit --no-fund

$(UV):
	$(PYTHON) -m venv .build/lock
	.build/lock/bin/pip install --quiet uv

.PHONY: clean
clean: ## remove the environment and everything built (not the cache of compiled wheels)
	rm -rf .venv .build build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
