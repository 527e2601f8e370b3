# Everything sets itself up: a virtual environment in .venv with the versions of constraints.txt. Its pyarrow is 25, the
# newest that Daft takes, so that all extras are tested in one environment; `test-newest` goes on with the newest pyarrow.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# What Pillow and pyarrow can break, but for Daft and the Space, which hold them back.
HELD_BACK = $(filter-out %_daft.py,$(wildcard tests/test_retrieval*.py)) $(wildcard tests/test_icons*.py) \
  $(addprefix tests/test_,evaluation.py pipeline.py processing.py sheet.py teacher.py training_data.py)

# Says in one line that Python is too old, before anything is installed.
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
  "Python 3.11 or newer is needed, PYTHON=$(PYTHON) is %s" % sys.version.split()[0])'

.PHONY: quickstart demo static-demo vendor test test-oldest test-newest lint bench clean

quickstart: $(VENV)/.base
	$(RUN) -m mome.quickstart $(IMAGES)

demo: $(VENV)/.installed
	$(RUN) space/app.py

# The search in the browser: downloads its packages, exports the weights, serves the page.
static-demo: $(VENV)/.installed
	$(RUN) space-static/vendor_packages.py
	$(RUN) space-static/build_page.py
	$(RUN) space-static/serve_page.py

# The packages that its tests run. Without npm or a network they are skipped, and nothing else is.
vendor: $(VENV)/.installed
	-$(RUN) space-static/vendor_packages.py

test: $(VENV)/.installed vendor
	$(RUN) -m pytest tests -n 2

# The lowest version of everything that pyproject.toml names. From PyPI that is a torch for GPUs, of several gigabytes;
# UV_TORCH_BACKEND=cpu takes the small one.
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
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps pillow pyarrow
	.venv-newest/bin/python -m pytest $(HELD_BACK) -n 2

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.installed
	$(RUN) -m pip install --quiet --no-deps -r benchmarks/requirements.txt
	$(RUN) -m mome.benchmarks.inference --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.captioning --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.cpu --model icons --results evaluation/results.csv
	$(RUN) -m mome.benchmarks.cpu --model base --results evaluation/results.csv
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

.venv-oldest/.installed: pyproject.toml
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct -e ".[test]"
	touch $@
