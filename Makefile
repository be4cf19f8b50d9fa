# Two commands: `make train`, `make test`. Both set up what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# Processes that run the tests; `make test` gives each one thread, so that they do not take each other's core.
WORKERS ?= 2

.PHONY: train test test-all check docs dist cover faults lock audit release-model bench-all clean help

help:
	@echo "make train     data, weights, features, a trained head and its report"
	@echo "make test      the tests to run before each commit, those with the real data and weights included"
	@echo "make test-all  every test: also fault loops, clusters, browsers and whatever else takes long"
	@echo "make check     lint, format, types"
	@echo "make docs      the documentation as a site: site/index.html"
	@echo "make dist      source distribution and wheel: dist/"
	@echo "make bench-all measures docs/performance.md again, on a quiet machine: two hours; BUNDLE=runs/1/model"
	@echo "make release-model  trains attire/shipped again and proves it in 16 bits; RECIPE=frozen-best"
	@echo "make faults    kills and fails every input/output call of every command, for hours, and resumes; FAULTS=train for one"
	@echo "make lock      writes locked.txt again: constraints.txt with the digest of every file that the index serves"
	@echo "make audit     known vulnerabilities of what locked.txt names; needs a service that knows them"
	@echo "make cover     all tests with the fraction of lines they run"

train: $(READY)
	@$(BIN)/attire train $(ARGS)
	@echo "attire is $(BIN)/attire; to type it bare: . $(BIN)/activate" >&2

test: $(READY_DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow' $(ARGS)

test-all: $(READY_DEV)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(READY_DEV)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

cover: $(READY_DEV)
	@$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

faults: $(READY_DEV)
	@$(BIN)/python faults/runner.py --journal faults.jsonl $(FAULTS) $(ARGS)

lock: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile --quiet pyproject.toml --extra dev -c constraints.txt --generate-hashes --universal \
		--python-version 3.11 --no-annotate --custom-compile-command 'make lock' --upgrade -o locked.txt

audit: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	@$(BIN)/python -m pip_audit --strict --disable-pip --require-hashes -r locked.txt

docs: $(READY_DEV)
	@$(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html; to search in it: $(BIN)/python -m http.server -d site"

dist: $(READY_DEV)
	@$(BIN)/python -m build --quiet --no-isolation && ls dist

# What ships: recipe frozen-best with synthetic drawings and outlier exposure.
RECIPE ?= frozen-best
SHIPS ?= --synthetic-drawings --outlier-exposure --epochs 20
RELEASED := runs/release-$(shell date +%Y%m%d-%H%M%S)

release-model: $(READY_DEV)
	@$(BIN)/attire train --recipe $(RECIPE) $(SHIPS) --out $(RELEASED)/ships $(ARGS)
	@$(BIN)/attire release $(RELEASED)/ships --out attire/shipped

BUNDLE ?= runs/1/model

bench-all: $(READY_DEV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group peers
	@$(BIN)/python benchmarks/stages.py --bundle $(BUNDLE)
	@$(BIN)/python benchmarks/growth.py
	@$(BIN)/python benchmarks/peers.py $(ARGS)
	@$(BIN)/python benchmarks/performance.py

# $(call install,WHAT): into .venv, in the tested versions; the target is its stamp.
define install
	@start=$$(date +%s); $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)' \
		2>$(VENV)/pip.log || { echo failed; tail -n 5 $(VENV)/pip.log >&2; exit 1; }; \
		touch $@; echo "done ($$(( $$(date +%s) - start )) s)"
endef

# The package alone, for `make train`; tests, checks and the site need the second.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@printf 'Setting up .venv: PyTorch and the rest, a few minutes the first time ... '
	@$(PYTHON) -m venv $(VENV) || { echo failed; exit 1; }
	$(call install,.)

$(READY_DEV): $(READY)
	@printf 'Adding what tests, checks and the site need ... '
	$(call install,.[dev])

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
