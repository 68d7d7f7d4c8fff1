# The two commands: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCE ?=
RECIPE ?= configs/demo.yaml
# Tests mostly wait for processes to start, so two at once win a third even on two cores. A file stays in one
# process (its fixtures are made once), and files go in their order: the small ones of tests/unit come last.
TEST_WORKERS ?= 2
PARALLEL := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
PORT ?= 5000

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint format ui logs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: ## Install what is missing (system packages, .venv, Python packages)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/setup.sh

demo: setup ## Generate or read (SOURCE=folder) images, prepare, train on two ranks, evaluate, log
	@$(BIN)/python scripts/demo.py --recipe "$(RECIPE)" $(if $(SOURCE),--source "$(SOURCE)")

ui: setup ## Open the MLflow UI on http://127.0.0.1:5000 (PORT=…)
	@$(BIN)/python scripts/ui.py --port $(PORT)

logs: setup ## Refresh the table of logs.md from MLflow
	@$(BIN)/python -m train logs

test: setup ## Set up the same way and run all tests that CI runs
	@$(BIN)/python -m pytest -m "not long" $(PARALLEL)

test-long: setup ## The long ones, too: storms and fuzzing; every command in a process started anew
	@COMMANDS_ANEW=1 $(BIN)/python -m pytest

lint: setup ## Linter, formatter and type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove what `make demo` made (data/ and runs/); .venv stays
	rm -rf data runs
