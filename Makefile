# make setup | demo | test | lint | format | tidy | fuzz | chaos | interop | bench-peers | bench
# Each first sets up what it needs; PYTHON=python3.12 chooses another one (interop and bench-peers: always 3.11).
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard matryoshka/data/native/* matryoshka/retrieval/native/*)
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
FFCV := .venv-ffcv
NATIVE := $(wildcard $(addsuffix /*.[ch]pp,matryoshka/data/native matryoshka/retrieval/native)) tests/retrieval/search_kernels.cpp
UV_FFCV := $(BIN)/uv pip install --quiet --python $(FFCV)/bin/python

.PHONY: setup setup-dev demo test lint format tidy fuzz chaos interop bench-peers bench clean
.DEFAULT_GOAL := setup

setup: .venv/.ready
setup-dev: .venv/.ready-dev

$(BIN)/uv:
	@echo "setup: .venv"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9

.venv/.ready: requirements.txt $(SOURCES) | $(BIN)/uv
	@sh system-deps.sh native
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
	@if [ "$$(id -u)" = 0 ]; then sh system-deps.sh browser || true; fi  # without it the tests of pages are skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $${PYTEST_WORKERS:-2} -q $(PYTEST_ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# clang-tidy over the native code, with the checks in .clang-tidy (two CPU minutes)
TIDY := build/tidy
tidy: setup-dev
	@$(UV) cmake ninja 'nanobind>=3.0' clang-tidy==23.1.4
	@mkdir -p $(TIDY)
	@$(BIN)/cmake -S . -B $(TIDY) -G Ninja -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > $(TIDY).log || { cat $(TIDY).log; exit 1; }
	$(BIN)/clang-tidy --quiet -p $(TIDY) $(filter-out %neon.cpp %dotprod.cpp,$(filter matryoshka/%.cpp,$(NATIVE)))

# N damaged files (20,000). SANITIZE=1: with a native core that stops at memory errors and undefined behaviour.
SANITIZED := build/sanitized
fuzz: setup-dev
ifeq ($(SANITIZE),1)
	@$(UV) cmake ninja 'nanobind>=3.0'
	@mkdir -p $(SANITIZED)
	@$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DMATRYOSHKA_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > $(SANITIZED).log || { cat $(SANITIZED).log; exit 1; }
	@$(BIN)/ninja -C $(SANITIZED) > $(SANITIZED).log || { cat $(SANITIZED).log; exit 1; }
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(BIN)/python tests/fuzzing/fuzz.py --cases $(or $(N),20000) --limit 120 --native $$(ls $(SANITIZED)/_native*.so) $(FUZZ_ARGS)
else
	$(BIN)/python tests/fuzzing/fuzz.py --cases $(or $(N),20000) $(FUZZ_ARGS)
endif

# KILLS training runs that are killed (20) must end like one that is left alone
chaos: setup-dev
	$(BIN)/python tests/training/chaos.py --kills $(or $(KILLS),20) $(CHAOS_ARGS)

# FFCV and the other peers live in an environment of their own: they need Python 3.11 and 700 MB of system packages.
$(FFCV)/.ready: requirements.txt requirements-dev.txt requirements-ffcv.txt system-deps.sh $(SOURCES) | $(BIN)/uv
	@sh system-deps.sh native
	@sh system-deps.sh ffcv
	@test -x $(FFCV)/bin/python || { echo "setup: $(FFCV)"; $(BIN)/uv venv --quiet --python 3.11 $(FFCV); }
	@echo "setup: requirements.txt, FFCV and the native core (minutes on a new machine)"
	@$(UV_FFCV) --reinstall-package matryoshka --config-settings=build-dir=build/ffcv-{wheel_tag} \
	  -r requirements.txt -r requirements-dev.txt -r requirements-ffcv.txt
	@touch $@

$(FFCV)/.ready-peers: requirements-peers.txt $(FFCV)/.ready
	@echo "setup: requirements-peers.txt"
	@$(UV_FFCV) -r requirements-peers.txt
	@touch $@

# Files of the real FFCV in our reader, ours in the real FFCV
interop: $(FFCV)/.ready
	OMP_NUM_THREADS=1 $(FFCV)/bin/python -m pytest -q tests/data/test_interop.py $(PYTEST_ARGS)

bench-peers: $(FFCV)/.ready-peers

# PHOTOS, SMALL: folders of class folders, of JPEG photos and of 32-pixel images. Without `make bench-peers` some peers
# are missing, by name.
bench: setup
	@if [ -e $(FFCV)/.ready-peers ]; then $(MAKE) --no-print-directory bench-peers; fi
	@if [ -e $(FFCV)/.ready-peers ]; then bin=$(FFCV)/bin; else bin=$(BIN); fi; \
	  $$bin/python bench/loader.py $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(SMALL),--small $(SMALL)) $(BENCH_ARGS)

clean:
	rm -rf .venv $(FFCV) build
