# Two commands do everything: `make demo` and `make test`. Each sets up what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: setup demo test test-slow lint types format bench clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# SwiGLU against FlashMHF on the text of the Python standard library: about six minutes on two cores.
demo: setup
	$(BIN)/flashmhf compare --variants swiglu,flashmhf --data stdlib --output-dir $(DEMO) \
	  --context-length 256 --per-device-train-batch-size 8 --max-steps 350 --learning-rate 1e-3 \
	  --eval-steps 70 --save-steps 350 --validation-tokens 65536

test: setup lint types
	$(BIN)/python -m pytest --numprocesses=2

test-slow: setup
	$(BIN)/python -m pytest --numprocesses=2 -m 'not gpu and not hopper'

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	$(BIN)/flashmhf bench layer

clean:
	rm -rf $(VENV) $(DEMO) build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
