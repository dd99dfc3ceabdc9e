# `make train` and `make test` work from a bare clone; everything lives in .venv.

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
PIP_INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
STAMP := .venv/.installed
DOCS_STAMP := .venv/.docs-installed

# A file data.py where someone works must not shadow our package `data`.
export PYTHONSAFEPATH := 1

.PHONY: help env train road test test-gpu test-cluster check coverage docs prove clean

help:
	@echo "make train             environment, demo corpus and tokenizer, a TP2 x PP2 training on CPU, a sample of text"
	@echo "make road              environment, the whole road in minutes: raw text, training, proof, Hugging Face, SFT, PPO, a chat"
	@echo "make test              environment, all tests that need no root"
	@echo "make test-gpu          the tests that need an NVIDIA GPU (skipped, with the reason, without one)"
	@echo "make test-cluster      environment, a real 4-node Slurm on this machine, the tests on it (root, Debian or Ubuntu)"
	@echo "make check             ruff, mypy, import rules"
	@echo "make docs              the pages of docs/ as a site in site/, every link checked"
	@echo "make coverage          the tests once more, measured: which lines of each package ran, ranks and commands included"
	@echo "make prove AREA=name   the full campaign behind a claim: minutes to an hour"
	@echo "make clean             remove the environment and every cache"
	@echo "PYTHON=path picks the interpreter (3.11 or 3.12), TORCH_INDEX=url where torch comes from, WORKERS=n how many tests run at once"

env: $(STAMP)

# torch first and alone: whatever needs it later finds it there and pulls no other build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) scripts/check_python.py
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python scripts/check_python.py
	@echo "installing into .venv, 1 of 2: torch ..."
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "installing into .venv, 2 of 2: everything else, a minute or two ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@echo "installed: $$(du -sh .venv | cut -f1)"
	@touch $@

train: env
	@scripts/demo.sh

road: env
	@.venv/bin/python scripts/road.py $(ARGS)

test: env
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --ignore=tests/cluster --numprocesses $(WORKERS) --dist worksteal $(ARGS)

# On a machine with a GPU, in whatever environment it has: GPU_PYTHON=python3 where packages come with an image.
GPU_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
test-gpu:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON) -m pytest tests/gpu -m gpu -rs $(ARGS)

# The permission comes first: whoever may not run it learns that before anything is installed.
test-cluster:
	@scripts/install_slurm.sh
	@$(MAKE) --no-print-directory env
	.venv/bin/python -m pytest tests/cluster $(ARGS)

# All four run even where one fails: one round tells everything.
check: env
	@failed=0; \
	for tool in "ruff check ." "ruff format --check ." "mypy" "lint-imports"; do \
		echo "== $$tool"; .venv/bin/$$tool || failed=1; \
	done; exit $$failed

$(DOCS_STAMP): pyproject.toml constraints.txt $(STAMP)
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

# Strict: a link or a heading that is not there ends the build. What a page would fetch from elsewhere does so too.
docs: $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@! grep -rnE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//' site --include='*.html' \
		|| { echo "the lines above fetch something from elsewhere: keep it in docs/"; exit 1; }
	@echo "site/index.html: $$(find site -name '*.html' | wc -l) pages"

coverage: env
	rm -rf build/coverage
	OMP_NUM_THREADS=1 .venv/bin/coverage run -m pytest --ignore=tests/cluster $(ARGS) || echo "some tests failed: see above"
	.venv/bin/coverage combine -q
	PYTHONPATH="$(CURDIR)" .venv/bin/python -m scripts.coverage_by_package

prove: env
	@test -n "$(AREA)" || { echo "make prove AREA=name; there are: $$(cd benchmarks/prove 2>/dev/null && ls *.py | sed 's/\.py$$//; /^_/d' | xargs)"; exit 2; }
	PYTHONPATH="$(CURDIR)" .venv/bin/python -m benchmarks.prove.$(AREA)

clean:
	rm -rf .venv build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
