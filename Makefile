# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test faults lint format type-check coverage docs notebooks build release-check clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(INSTALLED): pyproject.toml src/anomalib_raad.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED) ## Train, quantize, fine-tune and test on real solar cells
	$(BIN)/python -m benchmarks.demo

test: $(INSTALLED) lint type-check ## Check the code and run the tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

faults: $(INSTALLED) ## Kill training 20 times and resume it, try many settings (half an hour on two cores)
	FAULT_ROUNDS=5 $(BIN)/python -m pytest -o timeout=0 tests/faults

lint: $(INSTALLED) ## Check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED) ## Rewrite in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type-check: $(INSTALLED) ## Check types
	$(BIN)/mypy

coverage: $(INSTALLED) ## Run the tests and show which lines none of them reaches
	$(BIN)/python -m pytest --cov=anomalib_raad --cov-report=term-missing:skip-covered

docs: $(INSTALLED) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(INSTALLED) ## Run the notebooks and keep their outputs
	$(BIN)/python notebooks/execute.py

build: $(INSTALLED) ## Build sdist and wheel into dist/
	$(BIN)/python -m build

release-check: $(INSTALLED) ## Build sdist and wheel, check them, try the wheel in an environment of its own
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python -m pip install --quiet dist/*.whl
	cd build/release && bin/python -c "from anomalib.models import get_model; print(type(get_model('raad')))"

clean: ## Remove the environment and everything built
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache
