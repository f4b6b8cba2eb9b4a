# make setup | demo | test | lint | bench      each first sets up what it needs; PYTHON=python3.12 chooses another one
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard matryoshka/native/*)
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

.PHONY: setup setup-dev demo test lint format bench clean
.DEFAULT_GOAL := setup

setup: .venv/.ready
setup-dev: .venv/.ready-dev

.venv/.ready: requirements.txt $(SOURCES)
	@sh native-deps.sh
	@test -x $(BIN)/uv || { echo "setup: .venv"; rm -rf .venv; $(PYTHON) -m venv .venv; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9; }
	@echo "setup: requirements.txt and the native core (a minute on a new machine)"
	@$(UV) --reinstall-package matryoshka -r requirements.txt
	@touch $@

.venv/.ready-dev: requirements-dev.txt .venv/.ready
	@echo "setup: requirements-dev.txt"
	@$(UV) -r requirements-dev.txt
	@touch $@

demo: setup
	@$(BIN)/matryoshka demo

# Threads of the tests' own processes would fight for the cores: one each, and one process per core.
test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $${PYTEST_WORKERS:-2} -q $(PYTEST_ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PHOTOS: a folder of class folders with JPEG photos
bench: setup
	$(BIN)/python bench/loader.py $(if $(PHOTOS),--photos $(PHOTOS))

clean:
	rm -rf .venv build
