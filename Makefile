# Everything from a bare machine: needs Python >= 3.10 and make, sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# macOS: plain mlx brings Metal. Linux: CUDA where nvidia-smi answers, else the CPU.
BACKEND := $(shell if [ "$$(uname -s)" = Darwin ]; then echo; \
	elif nvidia-smi >/dev/null 2>&1; then echo cuda; else echo cpu; fi)
comma := ,

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed
	$(RUN) generate.py

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n auto --cov=mlx_hydra --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.installed
	$(RUN) benchmarks/prefill.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.$(if $(BACKEND),[$(BACKEND)])'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev$(if $(BACKEND),$(comma)$(BACKEND))]'
	@touch $@ $(VENV)/.installed
