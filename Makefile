# make demo: export the checkpoints of demo/, and print what they write and what one says of a picture.
# make chat: talk to a checkpoint. make ask: ask about a picture of yours. make web: a page to chat with a checkpoint (needs npm).
# make test: what CI checks, with npm and Chromium Transformers.js too; make test-transformers5: the rest of it.
# make coverage: both, and which lines they reach.
# Each has a virtual environment of its own and needs nothing else installed but Python.

PYTHON ?= python3
TORCH ?= torch
MODEL ?= demo/checkpoint
PROMPT ?= Once upon a time
QUESTION ?= Describe the picture.
OUT ?= .demo/onnx
PORT ?= 8000
# A worker for each core; a file's tests stay together, since they share exports.
PYTEST := -rs --durations=30 -n auto --dist loadfile --no-loadscope-reorder
REST := -m "not slow and not once" --ignore=tests/test_packaging.py
# transformers' processor of pictures needs torchvision. PyPI's is built for another torch than the CPU's, and works for
# the tests in part (tests/support/torchvision_python.py), so it gets a folder of its own. torch 2.13 has torchvision 0.28.
TORCHVISION = "import torch; print(f'torchvision==0.{int(torch.__version__.split(chr(46))[1]) + 15}.*')"
add_torchvision = $(1)/bin/pip install --quiet --no-deps --target $(1)/torchvision pillow "$$($(1)/bin/python -c $(TORCHVISION))" \
	|| echo "torchvision could not be installed: the tests of transformers' processor of pictures will be skipped" >&2
NODE_MODULES := examples/web/node_modules/.package-lock.json

.PHONY: demo ask chat web test test-transformers5 coverage lint clean

demo: .venv/ready .demo/vision/config.json
	.venv/bin/optimum-cli export onnx --model "$(MODEL)" "$(OUT)"
	.venv/bin/python demo/run.py "$(OUT)" "$(PROMPT)"
	.venv/bin/python demo/ask.py .demo/vision

chat: .venv/ready
	.venv/bin/optimum-cli export onnx --model "$(MODEL)" "$(OUT)"
	.venv/bin/optimum-cli lfm2 chat "$(OUT)"

ask: .venv/ready .demo/vision/config.json
	@test -n "$(PICTURE)" || { echo 'say which: make ask PICTURE=photo.jpg QUESTION="How many circles are there?"'; exit 2; }
	.venv/bin/python -c "import PIL" 2>/dev/null || .venv/bin/pip install --quiet pillow
	.venv/bin/python demo/ask.py .demo/vision --picture "$(PICTURE)" --question "$(QUESTION)"

.demo/vision/config.json: .venv/ready demo/vision_checkpoint/model.safetensors
	.venv/bin/optimum-cli export onnx --model demo/vision_checkpoint .demo/vision

# Transformers.js asks for the last token's logits alone only where the graph requires it to say so.
web: .venv/ready $(NODE_MODULES)
	.venv/bin/optimum-cli export onnx --model "$(MODEL)" --model-kwargs '{"num_logits_to_keep": "required"}' .demo/web
	.venv/bin/python examples/web/serve.py .demo/web --port "$(PORT)"

test: .venv-test/ready lint $(if $(shell command -v npm),$(NODE_MODULES))
	.venv-test/bin/python -m pytest $(PYTEST)

# optimum-onnx 0.1.0 refuses transformers 5 in its metadata alone.
test-transformers5: .venv-transformers5/ready
	.venv-transformers5/bin/python -m pytest $(PYTEST) $(REST)

# Of both releases together. It takes half as long again as the tests, so CI does it once a week.
coverage: .venv-test/ready .venv-transformers5/ready $(if $(shell command -v npm),$(NODE_MODULES))
	.venv-test/bin/python -m pytest $(PYTEST) --cov=optimum_lfm2 --cov-report=
	.venv-transformers5/bin/python -m pytest $(PYTEST) $(REST) --cov=optimum_lfm2 --cov-append --cov-fail-under=90

lint: .venv-test/ready
	.venv-test/bin/ruff check
	.venv-test/bin/ruff format --check
	.venv-test/bin/mypy
	.venv-test/bin/lint-imports

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet "$(TORCH)"
	.venv/bin/pip install --quiet -e ".[onnxruntime]"
	touch $@

.venv-test/ready: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet "$(TORCH)"
	.venv-test/bin/pip install --quiet -e ".[dev]"
	$(call add_torchvision,.venv-test)
	touch $@

$(NODE_MODULES): examples/web/package-lock.json
	cd examples/web && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

# Apart, since the other environment can be made at the same time.
.venv-transformers5/libraries: pyproject.toml
	$(PYTHON) -m venv .venv-transformers5
	.venv-transformers5/bin/pip install --quiet "$(TORCH)"
	.venv-transformers5/bin/pip install --quiet "transformers>=5" onnxruntime onnxruntime-genai==0.18.0 onnx "onnx-ir>=1.1" requests tqdm sentence-transformers gguf pytest pytest-cov pytest-xdist fastapi uvicorn openai llguidance
	touch $@

.venv-transformers5/ready: .venv-transformers5/libraries
	.venv-transformers5/bin/pip install --quiet --no-deps optimum==2.1.0 optimum-onnx==0.1.0 -e .
	$(call add_torchvision,.venv-transformers5)
	touch $@

clean:
	rm -rf .venv .venv-test .venv-transformers5 .demo examples/web/node_modules
