# The development environment and what is done with it; "make" alone lists the targets.

VENV ?= .venv
export VENV
# MMDetection of which kind: empty (OpenMMLab's, nothing to compile), build (mmcv's operators compiled) or forks.
MMCV ?=
export MMCV

# The first Python that runs (a version manager's shim may exist and yet fail) and that mmcv, mmdet
# and torch support. If there is none, setup_env.py says what is missing.
PYTHON ?= $(shell \
	for python in python3.11 python3.12 python3.13 python3.10 python3; do \
		"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
			2>/dev/null && echo "$$python" && exit; \
	done; \
	echo python3)

TESTS ?= -m "not slow"
# Most tests keep one core busy: two processes take the files in turns.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile
# What differs between the kinds of MMDetection: imports, the demo, mmdet's own tools, OpenCV 4 or 5, R50's and a
# DCNv3's equality.
SHORT = tests/test_demo.py tests/test_packaging.py tests/test_inference/test_outputs.py tests/test_parity \
	-k "fails_in_one_line or another_project or by_the_command_line or test_post_processing or \
	(test_zoo and (r50_4scale or internimage_t))"

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-build test-forks short-build short-forks test-wheel lint docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## make or complete the environment in $VENV (default .venv); MMCV=build compiles, MMCV=forks takes the forks
	@$(PYTHON) tools/setup_env.py

demo: setup ## train a small DINO on handwritten digits, evaluate it, draw its detections
	$(VENV)/bin/python tools/demo.py

test: setup ## run the tests but for the slow ones
	$(PYTEST) $(TESTS)

test-slow: setup ## run the tests of large models
	$(PYTEST) -m slow

test-build: ## run the tests with mmcv's compiled operators, in an environment of its own
	@$(MAKE) test VENV=$(VENV)-build MMCV=build

test-forks: ## run the tests with the maintained forks of MMDetection, in an environment of its own
	@$(MAKE) test VENV=$(VENV)-forks MMCV=forks

short-build short-forks: short-%: ## run the few of them that tell these kinds of MMDetection apart
	@$(MAKE) test-$* TESTS='$(SHORT)'

WHEEL_ENV = $(VENV)-wheel
WHEEL_PIP = $(WHEEL_ENV)/bin/python -m pip -q --disable-pip-version-check
# Not `python -m pytest`, which would import the checkout.
WHEEL_PYTEST = $(WHEEL_ENV)/bin/pytest -p no:cacheprovider
WHEEL_TEST = $(WHEEL_PYTEST) tests/test_packaging.py -k "another_project or standin_is_there"

test-wheel: setup ## projects run with nothing but a wheel, beside numpy 1, numpy 2 and the forks; before a release
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel .
	$(PYTHON) -m venv --clear $(WHEEL_ENV)
	echo '*' > $(WHEEL_ENV)/.gitignore
	$(WHEEL_PIP) install torch torchvision pytest pytest-timeout "numpy<2" "$$(echo dist/*.whl)[cpu,demo]"
	$(WHEEL_TEST)
	$(WHEEL_PIP) install --upgrade "numpy>=2" opencv-python "$$(echo dist/*.whl)[export,own-data]"
	$(WHEEL_TEST)
	$(WHEEL_PYTEST) tests/test_tools/test_new.py
	$(WHEEL_PIP) uninstall -y mmcv-lite mmdet mmengine
	MMCV_WITH_OPS=0 $(WHEEL_PIP) install onedl-mmcv onedl-mmdetection onedl-mmengine
	$(WHEEL_TEST)

lint: setup ## check style and types
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy dino_mm

DOCS_ENV = $(VENV)-docs

docs: ## build the documentation into site/, links checked, in an environment of its own
	@test -x $(DOCS_ENV)/bin/mkdocs || $(PYTHON) -m venv --clear $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -m pip -q --disable-pip-version-check install -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict

clean: ## remove build products and caches, but not the environments
	rm -rf build dist site *.egg-info .*_cache .hypothesis
	find configs dino_mm tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
