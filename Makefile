# The development environment and what is done with it; "make" alone lists the targets.

VENV ?= .venv
export VENV

# The first Python that runs (a version manager's shim may exist and yet fail) and that mmcv, mmdet
# and torch support. If there is none, setup_env.py says what is missing.
PYTHON ?= $(shell \
	for python in python3.11 python3.12 python3.10 python3; do \
		"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
			2>/dev/null && echo "$$python" && exit; \
	done; \
	echo python3)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: ## make or complete the environment in $VENV (default .venv)
	@$(PYTHON) tools/setup_env.py

demo: setup ## train a small DINO on handwritten digits, evaluate it, draw its detections
	$(VENV)/bin/python tools/demo.py

test: setup ## run the tests but for the slow ones
	$(VENV)/bin/python -m pytest -m "not slow"

test-slow: setup ## run the tests of large models
	$(VENV)/bin/python -m pytest -m slow

lint: setup ## check style and types
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy dino_mm

clean: ## remove build products and caches, but not the environment
	rm -rf build dist *.egg-info .*_cache .hypothesis
	find configs dino_mm tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
