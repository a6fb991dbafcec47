# Everything runs in .venv, which the first target that needs it creates from nothing.
#   make PYTHON=python3.12 ...       another interpreter
#   make PIP_ARGS='--index-url ...'  another place to take packages from
PYTHON ?= python3
PIP_ARGS ?=
# A file stays with one worker, so that what its tests share is made once.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

# As in: make fuzz FUZZ_ARGS='--examples 500 --seed 7 config text'
FUZZ_ARGS ?=
# As in: make faults FAULTS_ARGS='--part 2/3'
FAULTS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
READY := $(VENV)/.ready
DEMO := ssmc-demo
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

# pytest's workers share the cores: one thread each for torch's operators.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# 16 samples of 512 tokens in place of 64 of 2048: the demo takes two minutes, not five.
FEW := --nsamples 16 --seqlen 512 --force

.DEFAULT_GOAL := help
.PHONY: help demo test quick fuzz faults check types format docs consumers clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BASE) ## Compress, export and measure the embedded model in ./ssmc-demo: what pays, and what it costs
	rm -rf $(DEMO) && mkdir $(DEMO)
	cd $(DEMO) && ../$(BIN)/ssmc compress tiny --sparsity 0.5 --out half $(FEW)
	cd $(DEMO) && ../$(BIN)/ssmc export half --format safetensors
	cd $(DEMO) && ../$(BIN)/ssmc compress tiny --sparsity 0.875 --out eighth --quiet $(FEW)
	cd $(DEMO) && ../$(BIN)/ssmc export eighth --quiet
	cd $(DEMO) && ../$(BIN)/ssmc compress tiny --pattern column+channel --sparsity column=0.75,channel=0.25 \
		--out narrow --quiet $(FEW)
	cd $(DEMO) && ../$(BIN)/ssmc export narrow --quiet
	cd $(DEMO) && ../$(BIN)/ssmc bench --dense tiny --model half/safetensors --model eighth/safetensors \
		--model narrow/safetensors --lengths 512 --batch-sizes 1 --time-budget 30 --no-stock --out .
	@echo && $(BIN)/python examples/what_pays.py $(DEMO)/bench.json

test: $(READY) ## Run all tests
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

quick: $(READY) ## Run the tests that are not marked slow
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not slow'

fuzz: $(READY) ## Read 10,000 damaged files of every kind, an hour; results and log in build/fuzz
	$(TEST_ENV) $(BIN)/python -m tests.fuzz.run $(FUZZ_ARGS)

faults: $(READY) ## Kill runs, take their disk away and change their model at every step, an hour
	$(TEST_ENV) $(BIN)/python -m tests.faults.run $(FAULTS_ARGS)

check: $(READY) types ## Look for mistakes, formatting that differs and types that do not fit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders are laid out as they are installed, as parts of ssmc, since that is how they import each other.
types: $(READY) ## Check the types
	mkdir -p build/types/ssmc
	for name in cli compressor exporters runtime; do ln -sfn ../../../$$name build/types/ssmc/$$name; done
	for name in __init__.py py.typed; do ln -sfn ../../../ssmc/$$name build/types/ssmc/$$name; done
	$(BIN)/python -m mypy

format: $(READY) ## Format the code and mend what can be mended mechanically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## Build the documentation in build/site; open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

consumers: $(READY) ## Let other people's software run exports, in environments of its own in .consumers
	$(TEST_ENV) $(BIN)/python -m consumers.run

clean: ## Remove what the other targets made, except .venv and .consumers
	rm -rf $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# torch comes from its pin in constraints.txt: without one, pip takes the newest CUDA build of several GB.
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "ssmc needs Python 3.11 or later, \
	$(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v)'
	@echo "Preparing $(VENV): a minute or two the first time, most of it for PyTorch."
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $(BASE)

$(READY): $(BASE)
	@echo "Adding what development needs to $(VENV)."
	$(PIP) -e '.[dev]'
	@touch $(READY)
