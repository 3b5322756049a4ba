# For those who stay: `make run`, `make test`, `make check`, `make bench`.
PYTHON ?= python3

run: .venv/ready
	.venv/bin/python verve_server.py

test: .venv/ready
	.venv/bin/python -m pytest

check: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/hadolint Dockerfile

bench: .venv/ready
	.venv/bin/python bench/run.py

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements-dev.txt
	touch $@

.PHONY: run test check bench
