# make bench: the comparison with torch.   make test: the test suite.   Both install first, into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: bench test lint install

bench: install
	$(BIN)/python -m bench $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: install
	$(BIN)/pip install -q ruff mypy clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

# A torch that the interpreter already has is used, and not downloaded again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"sdpa needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $$($(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" if u.find_spec("torch") else "")') $(VENV)

install: $(BIN)/python
	$(BIN)/pip install -q 'torch>=2.8' 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24' ninja
	@! command -v nvcc >/dev/null || $(BIN)/pip install -q 'nvidia-cutlass>=4.2'
	$(BIN)/pip install -q --no-build-isolation -e '.[test,bench]'
	$(BIN)/python -m sdpa
