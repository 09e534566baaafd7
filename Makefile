# Two commands do everything: `make demo` and `make test`. Each sets up what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INTEGRATIONS := $(VENV)-integrations
SITE := -c 'import site; print(site.getsitepackages()[0])'
DEMO ?= demo

.PHONY: setup demo test test-slow lint types docs format bench clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# On top of it, libraries that transformers and PEFT import wherever they find them, which takes seconds and writes
# warnings: only their own tests see them.
$(INTEGRATIONS)/installed: $(VENV)/installed
	$(PYTHON) -m venv --without-pip $(INTEGRATIONS)
	$(BIN)/python $(SITE) > "$$($(INTEGRATIONS)/bin/python $(SITE))/others.pth"
	$(BIN)/python -m pip --python $(INTEGRATIONS)/bin/python install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[integrations]'
	touch $@

# SwiGLU against FlashMHF on the text of the Python standard library, three seeds each, with a verdict: at most six
# minutes on two cores.
DEMO_RECIPE = --max-steps 360 --per-device-train-batch-size 4 --lr-scheduler-type linear
demo: setup
	$(BIN)/flashmhf compare --variants swiglu,flashmhf --seeds 0,1,2 --jobs auto --data stdlib --output-dir $(DEMO) \
	  --context-length 256 $(DEMO_RECIPE) --document-bytes 4096 \
	  --eval-strategy no --validation-tokens 16384 --save-strategy no --report-to none

test: setup lint types $(INTEGRATIONS)/installed
	$(BIN)/python -m pytest --numprocesses=2
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations/test_kernel_hub.py tests/integrations/test_quantisation.py

test-slow: setup
	$(BIN)/python -m pytest --numprocesses=2 -m 'not gpu and not hopper'

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

# The site, in site/; a warning is an error. `make test` builds it, too (tests/docs/test_site.py).
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	$(BIN)/flashmhf bench layer

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(DEMO) build site src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
