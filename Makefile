# Two commands: `make train`, `make test`. Both set up what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test check docs dist cover faults lock audit release-model bench-all clean help

help:
	@echo "make train   data, weights, features, a trained classifier and its report"
	@echo "make test    all tests, the real ones included"
	@echo "make check   lint, format, types"
	@echo "make docs    the documentation as a site: site/index.html"
	@echo "make dist    source distribution and wheel: dist/"
	@echo "make bench-all  docs/performance.md measured anew, on a quiet machine: two hours; BUNDLE=runs/1/model"
	@echo "make release-model  attire/shipped made again: trained, proved in 16 bits; RECIPE=frozen-best"
	@echo "make faults  every input/output call of every command killed and failed in turn, hours, goes on where it stopped; FAULTS=train for one"
	@echo "make lock    locked.txt anew: constraints.txt with the digest of every file that the index serves"
	@echo "make audit   known vulnerabilities of what locked.txt names; needs a service that knows them"
	@echo "make cover   all tests with the share of lines they run"

train: $(READY)
	@$(BIN)/attire train $(ARGS)
	@echo "attire is $(BIN)/attire; to type it bare: . $(BIN)/activate" >&2

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

cover: $(READY)
	@$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

faults: $(READY)
	@$(BIN)/python faults/runner.py --journal faults.jsonl $(FAULTS) $(ARGS)

lock: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile --quiet pyproject.toml --extra dev -c constraints.txt --generate-hashes --universal \
		--python-version 3.11 --no-annotate --custom-compile-command 'make lock' --upgrade -o locked.txt

audit: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	@$(BIN)/python -m pip_audit --strict --disable-pip --require-hashes -r locked.txt

docs: $(READY)
	@$(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html; to search in it: $(BIN)/python -m http.server -d site"

dist: $(READY)
	@$(BIN)/python -m build --quiet --no-isolation && ls dist

# What ships: recipe frozen-best, also trained on drawings and strange shapes.
RECIPE ?= frozen-best
SHIPS ?= --synthetic-drawings --outlier-exposure --epochs 20
RELEASED := runs/release-$(shell date +%Y%m%d-%H%M%S)

release-model: $(READY)
	@$(BIN)/attire train --recipe $(RECIPE) $(SHIPS) --out $(RELEASED)/ships $(ARGS)
	@$(BIN)/attire release $(RELEASED)/ships --out attire/shipped

BUNDLE ?= runs/1/model

bench-all: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group peers
	@$(BIN)/python benchmarks/stages.py --bundle $(BUNDLE)
	@$(BIN)/python benchmarks/growth.py
	@$(BIN)/python benchmarks/peers.py $(ARGS)
	@$(BIN)/python benchmarks/performance.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@printf 'Setting up .venv: PyTorch and the rest, a few minutes the first time ... '
	@start=$$(date +%s); $(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>$(VENV)/pip.log || \
		{ echo failed; tail -n 5 $(VENV)/pip.log >&2; exit 1; }; \
		touch $@; echo "done ($$(( $$(date +%s) - start )) s)"

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
