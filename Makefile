# `make` or `make help` lists what there is. Everything is installed into .venv, which the first target that needs it makes.
#   PYTHON=python3.12   the Python to make .venv with        ARGS='-k docs -x'   what to hand to pytest or to the demo

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
FACTS := settings.ini setup.py pyproject.toml
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
OLD_ENOUGH := import sys; sys.exit(sys.version_info < tuple(map(int, '$(MIN_PYTHON)'.split('.'))))

.PHONY: help demo test lab format lint docs readme bench lock clean moved
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile | expand -t 16

demo: $(VENV)/.installed ## train a small network on handwritten digits, prune it, restore it; a table, and the figure demo.png
	@echo "Running the demo; it takes about a minute and leaves its figure in demo.png."
	@$(VENV)/bin/lbyl-demo $(ARGS)

test: $(VENV)/.installed-dev ## run all tests: notebooks, methods, packaging, pages
	@echo "Running all tests; the notebooks run one by one, which takes most of the time."
	@$(PY) -m pytest $(ARGS)

lab: $(VENV)/.installed-dev ## open the notebooks in JupyterLab
	@echo "Opening JupyterLab in nbs/; Ctrl-C ends it."
	@cd nbs && ../$(PY) -m jupyterlab

format: $(VENV)/.installed-dev ## lay out all code, in notebooks too, at 100 columns
	@$(PY) -m ruff check --quiet --fix-only --select I .
	@$(PY) -m ruff format .
	@$(VENV)/bin/nbdev-export
	@echo "The modules in lbyl_nb are exported anew."

lint: $(VENV)/.installed-dev ## say what ruff would change or finds wrong, and change nothing
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .

docs: $(VENV)/.installed-dev ## build the website into _docs (needs quarto for the last step)
	@echo "Processing the notebooks for the website."
	@$(PY) tools/docs.py pages
	@command -v quarto >/dev/null || { echo "The pages are ready in _proc, but turning them into the website needs quarto, which is not on the PATH: see https://quarto.org/docs/get-started"; exit 1; }
	@echo "Rendering them with quarto."
	@cd _proc && quarto render
	@rm -rf _docs && mv _proc/_docs _docs && mv _proc/_colab _docs/colab
	@echo "The website is in _docs; open _docs/index.html."

readme: $(VENV)/.installed-dev ## write README.md anew from nbs/index.ipynb
	@$(PY) tools/docs.py readme
	@echo "README.md now says what nbs/index.ipynb says."

bench: $(VENV)/.installed ## measure speed and memory, by the scripts in benchmarks/, one after another
	@for script in benchmarks/[a-z]*.py; do echo "Running $$script."; $(PY) $$script || exit 1; done

lock: $(VENV)/.installed-dev ## write down the versions that are installed, in requirements.lock
	@$(PY) tools/lock.py

clean: ## remove what the other targets built, but keep .venv
	@rm -rf _proc _docs build dist *.egg-info demo.png .pytest_cache .hypothesis nbs/nbdev.yml
	@find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
	@echo "Removed what was built. To install from scratch as well: rm -rf $(VENV)"

# Each stamp is written last, so that an interrupted installation is taken up again; .place holds the folder that .venv was made in,
# because a virtual environment, and the editable installation in it, do not survive being moved or copied.
ifneq ($(shell test -x $(PY) && cat $(VENV)/.place 2>/dev/null),$(CURDIR))
$(VENV)/.place: moved
endif

$(VENV)/.place:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) on the PATH; lbyl_nb needs Python $(MIN_PYTHON) or newer."; exit 1; }
	@$(PYTHON) -c "$(OLD_ENOUGH)" || { echo "lbyl_nb needs Python $(MIN_PYTHON) or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one, say: make PYTHON=python3.12 test"; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(if $(wildcard $(VENV)/.place),--clear) $(VENV)
	@echo '$(CURDIR)' > $@

$(VENV)/.installed: $(VENV)/.place $(FACTS)
	@echo "Installing lbyl_nb and what it needs into $(VENV). PyTorch is large: a few minutes the first time, seconds after that."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.place $(FACTS)
	@echo "Installing lbyl_nb, what it needs, and the tools to test and document it into $(VENV). PyTorch is large: a few minutes the first time, seconds after that."
	@$(PIP) --editable '.[dev]'
	@touch $(VENV)/.installed $@
