# Everything a fresh machine needs; each target installs what it uses into ./.venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export IMAGE QUESTION

.PHONY: demo test test-all lint format figures train-demo ablations clean

# CPU builds of torch first: anything that pulls torch in by itself would bring CUDA along
$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/.core
	$(BIN)/python examples/demo.py $${IMAGE:+--image "$$IMAGE"} $${QUESTION:+--question "$$QUESTION"}

# one process a core; small models gain nothing from threads
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the slow tier too: clean environments, killed and restarted runs, two processes
test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.train: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[train]"
	touch $@

# the figures in the README, with the command that it names
figures: $(VENV)/.train
	OMP_NUM_THREADS=1 $(BIN)/python -m modeling_qzoom.evaluation --model hub_release/checkpoints/qzoom-demo --split test \
		--seed 1 --rows 900 --page-kinds --ladder-rows 0 --output hub_release/checkpoints/qzoom-demo-figures.json

# from nothing to hub_release/checkpoints/qzoom-demo
train-demo: $(VENV)/.train
	OMP_NUM_THREADS=1 $(BIN)/python hub_release/train_demo.py

# after train-demo, on its stages
ablations: $(VENV)/.train
	OMP_NUM_THREADS=1 $(BIN)/python hub_release/ablate_demo.py

clean:
	rm -rf $(VENV) build out .pytest_cache .ruff_cache
