# Each line below is a command that can be typed by hand.
# Another interpreter or place:  make demo PYTHON=python3.12 VENV=/somewhere/else

PYTHON  ?= python3
VENV    ?= .venv
OUTPUT  ?= runs/demo
RUN     := $(VENV)/bin/python
INSTALL := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
TORCH   := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow docs lint bench clean

help:  ## what can be asked for
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

demo: $(VENV)/.package  ## train, compare and report on the embedded pipeline (CPU, no download)
	$(VENV)/bin/inversion-dpo demo --output $(OUTPUT)

test: $(VENV)/.dev  ## the tests, without the slow ones, on up to four cores
	$(RUN) -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.dev  ## the slow tests only
	$(RUN) -m pytest -m slow

docs: $(VENV)/.docs  ## the documentation's pages, into build/site
	$(RUN) -m mkdocs build --strict --quiet

lint: $(VENV)/.dev  ## ruff (rules and format) and mypy
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

bench: $(VENV)/.dev  ## every script in benchmarks/ that measures by itself on a CPU, one after another (hours)
	for script in $(filter-out benchmarks/compositional.py benchmarks/scale.py benchmarks/gpu.py, $(sort $(wildcard benchmarks/*.py))); do \
		$(RUN) $$script || exit 1; done

clean:  ## remove the environment, builds and caches; runs/ is kept
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment is made once and refreshed only when a file named here changes.
# torch comes first and alone, so that a build for this machine that pip already knows of is taken.
$(VENV)/.torch: constraints.txt
	@echo "[1/2] environment in $(VENV), $(TORCH) (the large one: minutes where it is downloaded)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "[2/2] inversion-dpo and what it needs"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "[2/2] inversion-dpo, what it needs and what tests it"
	$(INSTALL) -e '.[dev,web]'
	@touch $(VENV)/.package $@

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) -e '.[docs]'
	@touch $@
