# Everything a fresh machine needs; each target installs what it uses into ./.venv and says how long it took.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
CLEAN := .venv-clean
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# The version of torch that everything here is tested with, installed before anything that would pull in another one.
# The build is the index's choice: PyPI's brings CUDA along, a wheel of a CPU build in pip's find-links or index wins.
TORCH := "torch==2.13.0"
# one process a core; small models gain nothing from threads
PYTEST := -m pytest -n 2 --dist loadfile
export IMAGE QUESTION
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-serve test-oldest test-all lint format docs figures tables release train-demo ablations clean

# runs one command and reports its time; the command's exit status is the recipe's
timed = @began=$$(date +%s); $(1); status=$$?; echo "== $@: $$(( $$(date +%s) - began )) s"; exit $$status

$(VENV)/.core: pyproject.toml
	$(call timed,$(PYTHON) -m venv $(VENV) && $(BIN)/python $(PIP_INSTALL) $(TORCH) \
		&& $(BIN)/python $(PIP_INSTALL) --editable .)
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(call timed,$(BIN)/python $(PIP_INSTALL) --editable ".[dev]")
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(call timed,$(BIN)/python $(PIP_INSTALL) --editable ".[docs]")
	@touch $@

$(VENV)/.stages: $(VENV)/.core
	$(call timed,$(BIN)/python $(PIP_INSTALL) --editable ".[stages]")
	@touch $@

# Ray and its web framework: 330 MB
$(VENV)/.serve: $(VENV)/.dev
	$(call timed,$(BIN)/python $(PIP_INSTALL) --editable ".[dev,serve]")
	@touch $@

# the oldest transformers that pyproject.toml admits
$(OLDEST)/.dev: pyproject.toml
	$(call timed,$(PYTHON) -m venv $(OLDEST) && $(OLDEST)/bin/python $(PIP_INSTALL) $(TORCH) \
		&& $(OLDEST)/bin/python $(PIP_INSTALL) "transformers==5.20.*" \
		&& $(OLDEST)/bin/python $(PIP_INSTALL) --editable ".[dev]")
	@touch $@

demo: $(VENV)/.core
	$(call timed,$(BIN)/python examples/demo.py $${IMAGE:+--image "$$IMAGE"} $${QUESTION:+--question "$$QUESTION"})

# the quick tier
test: $(VENV)/.dev
	$(call timed,$(BIN)/python $(PYTEST))

# torch, transformers and pillow alone, which several tests of the slow tier share
$(CLEAN)/.ready: $(VENV)/.dev
	$(call timed,$(BIN)/python -c "from hub_release.checks.clean_environment import make_environment as make; make('$(CLEAN)')")
	@touch $@

# clean environments, every block of the README, killed and restarted runs, two processes
test-slow: $(VENV)/.dev $(CLEAN)/.ready
	$(call timed,QZOOM_CLEAN_PYTHON=$(CURDIR)/$(CLEAN)/bin/python $(BIN)/python $(PYTEST) --durations 10 -m "slow and not gpu")

# the server, on this machine's loopback addresses only: quick and slow tier of what needs the extra `serve`
test-serve: $(VENV)/.serve
	$(call timed,$(BIN)/python -m pytest --durations 10 -m "not gpu" tests/serving)

# the quick tier again, on the oldest transformers
test-oldest: $(OLDEST)/.dev
	$(call timed,$(OLDEST)/bin/python $(PYTEST))

test-all: test test-slow test-oldest

lint: $(VENV)/.dev
	$(call timed,$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the API reference, build/docs/index.html
docs: $(VENV)/.docs
	$(call timed,$(BIN)/python -m pdoc --docformat google --output-directory build/docs modeling_qzoom \
		modeling_qzoom.loading_qzoom modeling_qzoom.backbones_qzoom modeling_qzoom.training modeling_qzoom.evaluation)

# the figures of the demo
figures: $(VENV)/.stages
	$(call timed,$(BIN)/python -m modeling_qzoom.evaluation --model hub_release/checkpoints/qzoom-demo --rows 2000 \
		--output hub_release/checkpoints/qzoom-demo/evaluation/figures.json --split test --seed 1 \
		--pareto examples/assets/pareto.png --page-kinds)

# the tables of the README about real sizes, from shapes alone
tables: $(VENV)/.dev
	$(call timed,$(BIN)/python -m hub_release.measure.memory && $(BIN)/python -m hub_release.measure.cost)

# the demo as a Hub repository, proven in a clean environment
release: $(VENV)/.core
	$(call timed,$(BIN)/python hub_release/build.py hub_release/checkpoints/qzoom-demo build/hub/qzoom-demo --force \
		&& $(BIN)/python hub_release/verify.py build/hub/qzoom-demo)

# from nothing to hub_release/checkpoints/qzoom-demo
train-demo: $(VENV)/.stages
	$(call timed,$(BIN)/python -m hub_release.demo.recipe)

# after train-demo, on its stages
ablations: $(VENV)/.stages
	$(call timed,$(BIN)/python -m hub_release.demo.ablations)

clean:
	rm -rf $(VENV) $(OLDEST) $(CLEAN) build dist out .pytest_cache .ruff_cache .mypy_cache
