# Everything runs in .venv, which the first target that needs it creates from nothing.
#   make PYTHON=python3.12 ...       another interpreter
#   make PIP_ARGS='--index-url ...'  another place to take packages from
PYTHON ?= python3
PIP_ARGS ?=
# A file stays with one worker, so that what its tests share is made once.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := ssmc-demo

# pytest's workers share the cores: one thread each for torch's operators.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

HAS_GPU := $(shell nvidia-smi -L 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test check format clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Compress, export and benchmark the embedded model in ./ssmc-demo
	rm -rf $(DEMO) && mkdir $(DEMO)
	cd $(DEMO) && ../$(BIN)/ssmc compress tiny --pattern column --sparsity 0.5
	cd $(DEMO) && ../$(BIN)/ssmc export --format safetensors
	cd $(DEMO) && ../$(BIN)/ssmc bench

# Where there is a GPU, what runs kernels has it to itself; every other test sees a machine without one, as in CI.
test: $(READY) ## Run all tests
ifneq ($(HAS_GPU),)
	$(TEST_ENV) $(BIN)/python -m pytest -m gpu
	$(TEST_ENV) CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest $(PYTEST_ARGS) -m "not gpu"
else
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)
endif

check: $(READY) ## Look for mistakes and for formatting that differs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## Format the code and mend what can be mended mechanically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what the other targets made, except .venv
	rm -rf $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# torch comes from its pin in constraints.txt: without one, pip takes the newest CUDA build of several GB.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "ssmc needs Python 3.11 or later, \
	$(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v)'
	@echo "Preparing $(VENV): a few minutes the first time, most of it for PyTorch."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $(READY)
