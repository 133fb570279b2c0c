PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A process and one thread for every core: tests are many small programs, and threads that wait by spinning stop others.
PYTEST = OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all messages check format bench docs recipe

help:  ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with pinned dependencies

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Surefoot needs Python 3.10 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,games,play]'
	@touch $(READY)

demo: $(READY)  ## PPO fine-tunes a real model towards a real reward: about 5 minutes on 2 cores
	@$(BIN)/surefoot demo

test: $(READY)  ## The tests that CI runs
	$(PYTEST) -m 'not slow'

test-all: $(READY)  ## All tests, the slow ones too (kill and resume, learning on the real model)
	$(PYTEST)

messages: $(READY)  ## Write tests/messages.txt, the wording of every refusal, from a run of all tests
	SUREFOOT_MESSAGES=renew $(BIN)/python -m pytest -q

check: $(READY)  ## Format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_docs.py

format: $(READY)  ## Format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## Speed beside transformers' generate, and where an update's time goes
	$(BIN)/python benchmarks/speed/generation.py
	$(BIN)/python benchmarks/speed/update.py

recipe: $(READY)  ## Reproduce a recipe's tables: make recipe NAME=semi_supervised [ARGS=--quick]
	@test -f recipes/$(NAME)/measure.py || { echo "recipes that measure themselves: $(patsubst recipes/%/measure.py,%,$(wildcard recipes/*/measure.py)); name one with NAME=..."; exit 2; }
	$(BIN)/python recipes/$(NAME)/measure.py $(ARGS)

docs: $(READY)  ## Write docs/config.md, docs/metrics.md and the table of docs/from-trl.md from the code
	$(BIN)/python docs/generate.py
