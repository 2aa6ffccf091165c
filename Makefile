# `make` alone lists the targets. ARGS="..." goes through to the program that a target runs.

PY := .venv/bin/python
LAB_FLAGS := $(if $(DISPLAY)$(WAYLAND_DISPLAY)$(filter Darwin,$(shell uname)),,--no-browser) $(if $(filter 0,$(shell id -u)),--allow-root)
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-sanitize-with=notebooks/nbval_sanitize.cfg
TARGETS := help lab test image train bench lint types notebooks clean
export PYTHON PROMPT

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

lab: .venv/ready ## open JupyterLab in notebooks/ (without a display: print its address)
	cd notebooks && ../$(PY) -m jupyterlab $(LAB_FLAGS) $(ARGS)

test: .venv/ready-test ## run every test, the notebooks' cells and the browser tests among them (ARGS="tests/test_flow.py": only those)
	$(PY) -m pytest $(NBVAL) $(or $(ARGS),tests notebooks)

image: .venv/ready ## draw one picture: make image PROMPT="a red house beside a tree"
	$(PY) -m minisd3 generate $(if $(PROMPT),"$$PROMPT") $(ARGS)

train: .venv/ready ## train the small family from nothing
	$(PY) -m minisd3 train $(ARGS)

bench: .venv/ready-test ## time this package against diffusers
	$(PY) benchmarks/run.py $(ARGS)

lint: .venv/ready-test ## ruff over the code and the notebooks
	$(PY) -m ruff check

types: .venv/ready-test ## mypy over the package and the tests
	$(PY) -m mypy

notebooks: .venv/ready-test ## run the notebooks afresh and keep their text and pictures (ARGS="notebooks/01_vae.ipynb": only that)
	$(PY) notebooks/run.py $(or $(ARGS),$(wildcard notebooks/*.ipynb))

clean: ## remove .venv and every cache
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: SETUP = tools/setup.sh
.venv/ready-test: SETUP = tools/setup.sh test
.venv/ready .venv/ready-test: constraints.txt pyproject.toml tools/setup.sh
	@$(SETUP)
	@touch $@

.DEFAULT:
	$(error there is no target '$@'; the targets are: $(TARGETS))

.PHONY: $(TARGETS)
