VENV := .venv
PYTHON := $(VENV)/bin/python

# Quantize the bundled model with every scheme and print the comparison
demo: $(VENV)/installed
	$(PYTHON) -m quantize.eval.demo

# Time and memory of the analysis of a 32-layer, 8B-shaped model
bench-analysis: $(VENV)/installed
	$(PYTHON) -m quantize.eval.bench_analysis

# Every outlier handler on easy and hard models: benchmarks/handlers.json and .md (resumes what it finds there)
bench-handlers: $(VENV)/installed
	$(PYTHON) -m quantize.eval.bench_handlers

# Six- and four-bit handlers on a small ViT that is trained first
bench-vit: $(VENV)/installed
	$(PYTHON) -m quantize.eval.vit

# How ranges of activations move with the length of sequences, and what calibrating at another length costs
bench-lengths: $(VENV)/installed
	$(PYTHON) -m quantize.eval.lengths

# Lint, types and tests
test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile

# Reformat
format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch comes first and pinned: left to the resolver, a machine without a GPU is sent gigabytes of CUDA packages
$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: demo bench-analysis bench-handlers bench-vit bench-lengths test format
