# Every target that needs .venv makes it, so `make demo` works in a fresh clone with nothing but python3 and make.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install suites demo test realtime check all clean

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  PYTHON=python3.12     interpreter that makes .venv\n  PIP_ARGS="…"          more options for pip, such as --index-url for a CPU build of torch\n  ARGS="-n 2 -k guide"  more options for demo and the tests\n'

install: $(STAMP) ## make .venv with the simulator, training and development tools, at the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("dipole needs Python 3.11 or newer, this is %d.%d. Name one: make install PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[all,warp,dev]'
	@touch $@

suites: $(STAMP) ## add other packages' environments to .venv: Meta-World, gymnasium-robotics, gym-aloha, gym-pusht
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[all,warp,dev,suites]'

demo: $(STAMP) ## from nothing to a moving robot: demonstrations, training, evaluation, report
	$(BIN)/dipole demo $(ARGS)

test: $(STAMP) ## run the fast tests
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

realtime: $(STAMP) ## run what needs the clock, alone: faults of planner, bridge and robot, drivers, the served policy
	$(BIN)/python -m pytest -m 'slow and not ros and not franka' --ignore=tests/serve/test_export.py --ignore=tests/serve/test_export_transformed.py tests/serve $(ARGS)
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow tests/serve/test_export.py tests/serve/test_export_transformed.py

check: $(STAMP) ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/mypy

all: check ## check, then every test, the slow ones too
	$(BIN)/python -m pytest -m 'slow or not slow' --ignore=tests/serve/test_export.py --ignore=tests/serve/test_export_transformed.py $(ARGS)
	$(BIN)/python -m pytest -m 'slow or not slow' tests/serve/test_export.py tests/serve/test_export_transformed.py

clean: ## remove .venv, caches and builds; outputs/ and data stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis MUJOCO_LOG.TXT
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
