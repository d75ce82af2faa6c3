# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHORT_TESTS := $(addprefix tests/test_,encode.py formats.py listing.py locks.py network.py order.py pack.py pipeline.py \
	tokenizer_files.py flow.py hub.py)

.PHONY: demo test test-lowest test-cluster check format clean

demo: $(READY)  ## pretokenize Python's own library into ./demo
	$(BIN)/tokenmill demo demo

test: $(READY)  ## all tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-lowest: $(READY)  ## the short tests with every dependency at its lower bound
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear $(VENV)/lowest
	VIRTUAL_ENV=$(VENV)/lowest $(BIN)/uv pip install --quiet --resolution lowest-direct --editable '.[dev]'
	$(VENV)/lowest/bin/python -m pytest -p no:cacheprovider --numprocesses auto --dist loadfile $(SHORT_TESTS)

test-cluster: $(READY)  ## Ray on several machines, as network namespaces (Linux, root)
	$(BIN)/python -m pip install --quiet --editable '.[dev,ray]'
	$(BIN)/python -m pytest -m cluster --timeout=600 tests/test_cluster.py

check: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build dist

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("tokenmill needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)
