# Two commands set everything up: `make demo` and `make test`. Both make .venv on first use.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# of FAISS an environment has one kind: for NVIDIA GPUs where there is a driver, else for CPUs
FAISS ?= $(if $(wildcard /proc/driver/nvidia/version),cuda,cpu)

.PHONY: demo test lint types docs reliability bench clean

demo: $(VENV)/installed
	$(RUN)/ood-heatmap demo runs/demo

test: $(VENV)/tested lint types docs
	$(RUN)/python -m pytest

lint: $(VENV)/tested
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

# mypy cannot follow the import hook of an editable install: check a plain copy of the package
types: $(VENV)/tested
	rm -rf build && $(RUN)/pip install --quiet --no-deps --target build/types .
	cp -r tests benchmarks docs build/types
	cd build/types && $(CURDIR)/$(RUN)/mypy --config-file $(CURDIR)/setup.cfg ood_heatmap tests benchmarks docs

# the manual, into site/; its notebook is run. The reference reads a copy of the package as installed
docs: $(VENV)/tested
	rm -rf build/package && mkdir -p build/package && cp -r ood_heatmap build/package
	cp -r cache pipeline build/package/ood_heatmap
	$(RUN)/mkdocs build --quiet --strict

$(VENV)/installed: setup.cfg pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --editable .$$($(RUN)/python -c 'import faiss' 2> /dev/null || echo '[$(FAISS)]')
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(RUN)/pip install --editable '.[test]'
	touch $@

# every trial of which `make test` takes a sample: kills, refused calls, damage; a table at the end
reliability: $(VENV)/tested
	OOD_HEATMAP_RELIABILITY=full $(RUN)/python -m pytest tests/reliability

# ratios within one run; writes benchmarks/results.md and .json
bench: $(VENV)/tested
	$(RUN)/python benchmarks/run.py

clean:
	rm -rf build site runs/demo *.egg-info
