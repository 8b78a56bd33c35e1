# SPDX-License-Identifier: Apache-2.0
#
# `make train` and `make test` are all a newcomer needs; `make help` lists the rest.
#
# Everything is set up below this folder (.venv*, build, dist, dist-cuda) and redone only when
# what it was made from changes: environments when requirements/ or pyproject.toml do (their stamps
# carry a hash of both), the wheel when a source file does. `make clean` removes it all.

PYTHON ?= python3
JOBS ?= $(shell nproc)
TRAIN_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
.NOTPARALLEL:
ifndef V
.SILENT:
endif

HASH := $(shell cat requirements/*.txt pyproject.toml | sha256sum | cut -c1-16)
VENV := .venv
OLD_VENV := .venv-oldest
BIN := $(VENV)/bin
WHEEL_SOURCES := $(shell find src include python cmake -type f -not -name '*.pyc') \
                 CMakeLists.txt pyproject.toml README.md LICENSE tests/cases/shapes.json

# cmake and ninja are those of .venv in every recipe; they use JOBS cores.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train test test-cpp test-asan test-tsan test-python test-oldest build-cuda lint format \
        wheel wheel-cuda clean

help:
	echo 'make train        build, install into .venv, train a small MoE language model'
	echo '                  (TRAIN_ARGS="--steps 100 ..." is passed on to `penstock train`)'
	echo 'make test         build and run every test: test-cpp test-asan test-tsan test-python'
	echo '                  test-oldest'
	echo 'make lint         formats, includes, sizes;  make format rewrites what can be rewritten'
	echo 'make wheel        dist/penstock-*.whl'
	echo 'make build-cuda   compile the CUDA backend (needs nvcc)'
	echo 'make wheel-cuda   dist-cuda/penstock-*.whl, which holds the CUDA backend too (needs nvcc)'
	echo 'make clean        remove everything that was set up or built here'
	echo 'PYTHON=python3.12 chooses the interpreter, JOBS=2 the number of compilers at a time,'
	echo 'TEST_WORKERS=2 that of Python test processes (some 2 GB each), V=1 shows the commands'

# ---- environments ----

TEST_EXTRAS := train,hf,peft,test

# $(1) the environment
define make_venv
$(PYTHON) -m venv $(1) || { echo 'make: $(PYTHON) cannot make a virtual environment; on Debian and \
Ubuntu: apt install python3-venv' >&2; exit 1; }
$(1)/bin/python -m pip install --quiet --upgrade 'pip>=23'
endef

$(VENV)/.tools-$(HASH):
	echo '==> $(VENV): build tools'
	rm -f $(VENV)/.tools-*
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet -c requirements/newest.txt -r requirements/build.txt
	touch $@

dist/.built: $(VENV)/.tools-$(HASH) $(WHEEL_SOURCES)
	echo '==> dist: building the wheel (a few minutes the first time)'
	rm -rf dist
	$(BIN)/python -m pip wheel . --quiet --no-build-isolation --no-deps --wheel-dir dist \
	  -C build-dir=build/wheel
	touch $@

wheel: dist/.built
	ls dist/*.whl

dist-cuda/.built: $(VENV)/.tools-$(HASH) $(WHEEL_SOURCES)
	echo '==> dist-cuda: building the wheel with the CUDA backend (about ten minutes the first time)'
	rm -rf dist-cuda
	$(BIN)/python -m pip wheel . --quiet --no-build-isolation --no-deps --wheel-dir dist-cuda \
	  -C build-dir=build/wheel-cuda -C cmake.define.PENSTOCK_BUILD_CUDA=ON
	touch $@

wheel-cuda: dist-cuda/.built
	ls dist-cuda/*.whl

# $(1) the environment, $(2) its constraints, $(3) the extras. Dependencies first, then the wheel by
# itself, so that a rebuilt wheel of the same version replaces the one before.
define install_wheel
wheel=$$(ls dist/*.whl)
$(1)/bin/python -m pip install -c $(2) "$$wheel[$(3)]"
$(1)/bin/python -m pip install --quiet --force-reinstall --no-deps "$$wheel"
endef

$(VENV)/.train: dist/.built
	echo '==> $(VENV): Penstock and PyTorch (the first time, a download of some 3 GB)'
	$(call install_wheel,$(VENV),requirements/newest.txt,train)
	touch $@

$(VENV)/.test: dist/.built
	echo '==> $(VENV): Penstock, PyTorch and test tools (the first time, a download of some 3 GB)'
	$(call install_wheel,$(VENV),requirements/newest.txt,$(TEST_EXTRAS))
	touch $@ $(VENV)/.train

$(OLD_VENV)/.python-$(HASH):
	rm -f $(OLD_VENV)/.python-*
	$(call make_venv,$(OLD_VENV))
	touch $@

$(OLD_VENV)/.test: dist/.built $(OLD_VENV)/.python-$(HASH)
	echo '==> $(OLD_VENV): the same wheel beside an older PyTorch (the first time, some 4 GB more)'
	$(call install_wheel,$(OLD_VENV),requirements/oldest.txt,$(TEST_EXTRAS))
	touch $@

# ---- the two commands ----

train: $(VENV)/.train
	$(BIN)/penstock train $(TRAIN_ARGS)

test: test-cpp test-asan test-tsan test-python test-oldest

# ---- C++ tests ----

test-cpp: $(VENV)/.tools-$(HASH)
	echo '==> test-cpp'
	scripts/get_googletest.sh
	cmake --preset cpu --log-level=WARNING
	cmake --build --preset cpu
	ctest --preset cpu

test-asan: $(VENV)/.tools-$(HASH)
	echo '==> test-asan'
	scripts/get_googletest.sh
	cmake --preset cpu-asan --log-level=WARNING
	cmake --build --preset cpu-asan
	ctest --preset cpu-asan

test-tsan: $(VENV)/.tools-$(HASH)
	echo '==> test-tsan'
	scripts/get_googletest.sh
	cmake --preset cpu-tsan --log-level=WARNING
	cmake --build --preset cpu-tsan
	ctest --preset cpu-tsan

build-cuda: $(VENV)/.tools-$(HASH)
	cmake --preset cuda -DPENSTOCK_BUILD_TESTS=OFF
	cmake --build --preset cuda

# ---- Python tests ----

# Workers share the cores: an OpenMP thread of one that spins while it waits takes them from another
# (tests/python/train on two cores: 80 s spinning, 48 s passive).
PYTEST := -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)
test-python test-oldest: export OMP_WAIT_POLICY := passive

test-python: $(VENV)/.test
	echo '==> test-python'
	$(BIN)/python $(PYTEST)

# What the same binary computes does not depend on torch; how torch calls it does. So the older torch
# is spared the sweeps over numbers, and what it takes no part in.
OLDEST_LEAVES_OUT := tests/scripts tests/python/checkpoint tests/python/train tests/python/test_routers.py \
                     tests/python/test_gradcheck.py tests/python/cases/test_coverage.py \
                     tests/python/cases/test_hostile_values.py tests/python/test_token_rounding.py \
                     tests/python/test_numpy.py tests/python/test_blocks.py tests/python/test_large_pages.py

test-oldest: $(OLD_VENV)/.test
	echo '==> test-oldest'
	$(OLD_VENV)/bin/python $(PYTEST) $(addprefix --ignore=,$(OLDEST_LEAVES_OUT))

# ---- lint ----

CPP_FILES := $(shell git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')

$(VENV)/.lint-$(HASH): $(VENV)/.tools-$(HASH)
	rm -f $(VENV)/.lint-*
	$(BIN)/python -m pip install --quiet -r requirements/lint.txt
	touch $@

lint: $(VENV)/.lint-$(HASH)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/python scripts/check_includes.py
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/python scripts/update_readme.py --check

format: $(VENV)/.lint-$(HASH)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist dist-cuda $(VENV) $(OLD_VENV)
