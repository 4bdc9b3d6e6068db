# On a fresh machine with Python 3.11 and a package index:
#   make demo   set up, then distill a real model on two CPU cores
#   make test   set up, then run all tests
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PINS   := docker/requirements-cpu.txt

# The CPU build of torch comes from a folder of wheels if PIP_FIND_LINKS names one, else from PyTorch's CPU index.
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),,--torch-backend cpu)
# Byte code is always cached: otherwise each of the rollout engine's three processes would compile all of vLLM.
unexport PYTHONDONTWRITEBYTECODE

ARGS ?=

.PHONY: setup demo test mutants chaos lint bench bench-loop roofline compare scaling gpu-check clean

setup: $(READY)

$(READY): $(PINS) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' $(PINS))"
	$(BIN)/uv pip sync --quiet --python $(BIN)/python $(TORCH_SOURCE) $(PINS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python examples/demo.py $(ARGS)

# Three tests at a time, each with up to four processes of its own: those of hosts and stops wait more than they
# compute. ARGS="-n 0 -s" for one after the other, with output.
# Every run draws other random inputs; ARGS="-m random --draws 30" repeats the tests that draw any, 30 times.
test: setup
	$(BIN)/python -m pytest -n 3 $(ARGS)

# Plants single faults in copies, two at a time, each of which a test must notice; ARGS="--only loss" for one room.
mutants: setup
	$(BIN)/python -m tests.mutants $(ARGS)

# Runs under random faults, compared with undisturbed ones; ARGS="--rounds 12 --engine-share 0" for a short session.
chaos: setup
	$(BIN)/python -m tests.chaos $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python examples/benchmarks/head.py $(ARGS)

bench-loop: setup
	$(BIN)/python examples/benchmarks/loop.py $(ARGS)

# A lower bound of the loss's time on a GPU, from a model: make roofline GPU=h100|h200|b200
GPU ?= h100
roofline: setup
	$(BIN)/python examples/benchmarks/roofline.py --gpu $(GPU) $(ARGS)

compare: setup
	$(BIN)/python examples/benchmarks/objectives/compare.py $(ARGS)

scaling: setup
	$(BIN)/python examples/benchmarks/scaling.py $(ARGS)

# On a machine with a GPU, in the container or any environment with the gpu extra: all GPU checks, one table
# of which a cut run leaves its rows (examples/README.md).
# Works from any directory: the image links this file into the one its containers start in.
gpu-check:
	root=$$(dirname "$$(readlink -f '$(lastword $(MAKEFILE_LIST))')"); \
	python="$$root/$(BIN)/python"; test -x "$$python" || python=python3; \
	"$$python" "$$root/examples/benchmarks/gpu_check/check.py" $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
