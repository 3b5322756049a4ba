# The verbs of those who work on Verve; `make` alone lists them. CONTRIBUTING.md tells more.
PYTHON ?= python3
PARALLEL = -n 12 --dist worksteal
unexport PYTHONDONTWRITEBYTECODE # or each of some hundred programs is compiled anew

help:
	@echo 'make run        start Verve, in memory, on port 8080'
	@echo 'make test       all tests, twelve at a time: some 4 minutes on two cores'
	@echo 'make test-fast  those that start no server and no program: half a minute'
	@echo 'make check      ruff, mypy and hadolint: as CI does'
	@echo 'make mutants    test the tests: which small changes of the product do they not notice?'
	@echo 'make bench      requests per second'

run: .venv/ready
	.venv/bin/python verve_server.py

test: .venv/ready
	.venv/bin/python -m pytest $(PARALLEL)

test-fast: .venv/ready
	.venv/bin/python -m pytest $(PARALLEL) -m unit

check: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/hadolint Dockerfile

mutants: .venv/ready
	.venv/bin/python tests/mutants.py

bench: .venv/ready
	.venv/bin/python bench/run.py

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

.PHONY: help run test test-fast check mutants bench
