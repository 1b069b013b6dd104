# Every target sets itself up: the first one run makes .venv (about 5 GB with torch), later ones reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_FOR_DOCS := $(VENV)/.ready-for-docs

.PHONY: demo test test-slow lint docs bench models clean

demo: $(READY)
	$(BIN)/recon demo --out demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	mkdir -p build/typing && ln -sfn ../../cli build/typing/recon_cli  # mypy does not see the folder's other name
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks examples
	$(BIN)/lint-imports

docs: $(READY_FOR_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/sparse_step.py
	$(BIN)/python benchmarks/branched_step.py
	$(BIN)/python benchmarks/until_stable.py
	$(BIN)/python benchmarks/method_step.py
	$(BIN)/python benchmarks/plan_costs.py
	$(BIN)/python benchmarks/answers.py

models: $(READY)
	$(BIN)/python -m tests.families

$(READY): pyproject.toml scripts/install.sh
	@sh scripts/install.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(READY_FOR_DOCS): $(READY)
	@sh scripts/install.sh "$(PYTHON)" "$(VENV)" docs
	@touch $@

clean:
	rm -rf $(VENV) build demo
