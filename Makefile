SHELL := bash
.SHELLFLAGS := -euo pipefail -c
BIN := .venv/bin

.PHONY: setup demo test check bench torture gpu-check

setup:  ## make .venv; quick when nothing is missing
	@.ci/setup

demo: setup  ## pack digits, pretrain, evaluate, export, reopen: a few minutes on two cores
	@$(BIN)/keel demo

test: setup  ## the tests, in two processes
	@$(BIN)/python -m pytest --numprocesses 2

check: setup  ## lint, types, architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/architecture

bench: setup  ## the benchmarks, each in its own process
	@$(BIN)/python benchmarks/run.py

torture: setup  ## the long tests: tens of thousands of fuzzed inputs, kills at random moments
	@KEEL_TORTURE=1 $(BIN)/python -m pytest -m torture --timeout=3600 || { [ $$? = 5 ] && echo "no such tests yet"; }

gpu-check:  ## GPU tests and a short ViT-B/16 training; a plain message where there is no GPU
	@.ci/gpu-check
