# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
# Tests start hundreds of processes; each would compile all modules anew where Python is told not to keep bytecode.
export PYTHONDONTWRITEBYTECODE :=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHORT_TESTS := tests/encoding/test_encode.py tests/encoding/test_tokenizer_files.py tests/corpus/test_formats.py \
	tests/corpus/test_listing.py tests/corpus/test_metadata.py tests/interchange/test_import.py tests/corpus/test_order.py tests/dataroot/test_locks.py tests/remote/test_network.py \
	tests/remote/test_hub.py tests/shards/test_pack.py tests/views/test_views.py tests/pipeline/test_pipeline.py tests/cli/test_flow.py \
	tests/comparison/test_compare.py tests/publishing/test_publishing.py tests/reporting/test_report.py::test_the_numbers_of_the_page_are_those_of_stats \
	tests/reporting/test_report.py::test_a_browser_draws_every_chart

.PHONY: demo test test-lowest test-cluster interop campaign docs dist check format clean

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
	$(BIN)/python -m pytest -m cluster --timeout=600 tests/pipeline/test_cluster.py

interop: $(READY)  ## the readers of other projects, for tests/interchange/test_readers.py (Python 3.11, 340 MB)
	$(BIN)/python -m venv --without-pip $(VENV)/interop
	$(BIN)/python -m pip --python $(VENV)/interop/bin/python install --quiet --no-deps -r tests/interchange/interop.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(VENV)/interop/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth  # PyTorch, NumPy and such are those of .venv

SECONDS ?= 600
campaign: $(READY)  ## kills, power loss, damage, faults, odd input, races, bad servers, for SECONDS (docs/reliability.md)
	$(BIN)/python tests/campaign.py --seconds $(SECONDS)

docs: $(READY)  ## the documentation as a site, strictly, into ./site
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: $(READY)  ## wheel and sdist into ./dist, installed elsewhere on every Python at hand, where the demo runs
	$(BIN)/python -m pip install --quiet build uv
	$(BIN)/python scripts/check_dist.py

check: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build dist site

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("tokenmill needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)
