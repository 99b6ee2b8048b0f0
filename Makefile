# make demo: export a checkpoint and print what it writes. make test: everything that CI checks.
# Each has a virtual environment of its own and needs nothing installed but Python.

PYTHON ?= python3
TORCH ?= torch
MODEL ?= demo/checkpoint
PROMPT ?= Once upon a time
OUT ?= .demo/onnx

.PHONY: demo test lint clean

demo: .venv/ready
	.venv/bin/optimum-cli export onnx --model "$(MODEL)" "$(OUT)"
	.venv/bin/python demo/run.py "$(OUT)" "$(PROMPT)"

test: .venv-test/ready lint
	.venv-test/bin/python -m pytest --cov=optimum_lfm2 --cov-report=term --cov-fail-under=90

lint: .venv-test/ready
	.venv-test/bin/ruff check
	.venv-test/bin/ruff format --check
	.venv-test/bin/mypy

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet "$(TORCH)"
	.venv/bin/pip install --quiet -e ".[onnxruntime]"
	touch $@

.venv-test/ready: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet "$(TORCH)"
	.venv-test/bin/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-test .demo
