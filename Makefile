# make sweep    find the best LoRA configuration on the embedded speech
# make test     run the whole test suite
#
# Each first makes what it needs, and is safe to repeat. VENV and PYTHON may be set:
#   make test PYTHON=python3.12 VENV=/tmp/venv
# TESTERS is the number of processes that share the test files; the longest files come first.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14 python,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
PY := $(VENV)/bin/python
ARGS ?=
TESTERS ?= 2
DEV := '.[dev,embedded]'

# The stamps name the checkout, so that a moved or copied one is installed again.
HERE := $(shell pwd | cksum | cut -d' ' -f1)
RUN_STAMP := $(VENV)/.installed-$(HERE)
DEV_STAMP := $(VENV)/.installed-dev-$(HERE)

# Without bytecode on disk, the imports at a start take 34 s instead of 13 s.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help sweep test coverage lint format install dev clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

sweep: $(RUN_STAMP)  ## Install if needed, then run sweeps/run.py (options: ARGS="--config sweeps/human.yaml")
	$(PY) sweeps/run.py $(ARGS)

test: $(DEV_STAMP)  ## Install if needed, then run the whole test suite (options: ARGS="-k report")
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest \
	  --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder $(ARGS)

coverage:  ## Run the test suite and show which lines it reaches (takes half as long again)
	$(MAKE) test ARGS="--cov --cov-report=term $(ARGS)"

lint: $(DEV_STAMP)  ## Check style, types and import layers
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -c 'from importlinter.cli import lint_imports_command as run; run()'

format: $(DEV_STAMP)  ## Format the code and fix what can be fixed automatically
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

install: $(RUN_STAMP)  ## Install what `make sweep` needs

dev: $(DEV_STAMP)  ## Install what `make test` and `make lint` need

clean:  ## Remove the virtual environment and caches; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .coverage

$(PY):
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or newer, found none; install it or run make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

# pip compiles files one by one; compiling them afterwards, on all cores, is faster. A few packages ship
# files for older Pythons, which cannot be compiled and are never imported.
define install
	@echo "Installing $(2)"
	@$(PY) -m pip install --quiet --no-compile --constraint constraints.txt $(1)
	@PYTHONWARNINGS=ignore $(PY) -m compileall -qq -j 0 $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || true
	@touch $@
endef

$(RUN_STAMP): pyproject.toml constraints.txt $(PY)
	$(call install,--editable .,pinned dependencies (some minutes and 7 GB the first time))

$(DEV_STAMP): $(RUN_STAMP)
	$(call install,--editable $(DEV),the tools of tests and checks)
