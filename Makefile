# Everything sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# The release of transformers that the package still supports, for `make test-oldest`.
OLDEST = 5.17.0

# Says in one line that Python is too old, before anything is installed.
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
  "Python 3.11 or newer is needed, PYTHON=$(PYTHON) is %s" % sys.version.split()[0])'

.PHONY: quickstart demo test test-oldest test-newest lint bench clean

quickstart: $(VENV)/.base
	$(RUN) -m mome.quickstart $(IMAGES)

demo: $(VENV)/.installed
	$(RUN) space/app.py

test: $(VENV)/.installed
	$(RUN) -m pytest tests -n 2

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest tests -n 2

# The newest release of everything, as users get it today: made anew each time.
test-newest:
	@$(CHECK_PYTHON)
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  torch==$$(.venv-newest/bin/python -c "import torch; print(torch.__version__.split('+')[0])") -e ".[test]"
	.venv-newest/bin/python -m pytest tests -n 2

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.installed
	$(RUN) -m pip install --quiet --no-deps -r benchmarks/requirements.txt
	$(RUN) -m mome.benchmarks.inference --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.captioning --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.conversion --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.coca --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.training --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.retrieval --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.space --results evaluation/results.csv

clean:
	rm -rf .venv .venv-oldest .venv-newest .cache build *.egg-info

# What the quickstart and the command `mome` need.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[retrieval]"
	touch $@

$(VENV)/.installed: $(VENV)/.base
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

.venv-oldest/.installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check transformers==$(OLDEST) -e ".[test]"
	touch $@
