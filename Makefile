# Everything from a fresh clone: Python 3.11+, gcc/g++, make and git are enough.
#   make train   install what training needs, then train a GPT on the text that Python carries (a few minutes on two cores)
#   make test    install the rest, then run every test; ARGS='-m "not slow"' leaves out whole trainings
#   make test-gpu  the tests of what differs on an NVIDIA GPU, on this machine's: some minutes
#   make check   lint, format, types, import rules, a strict build of the docs
#   make prove   the proofs in full: thousands of random models, a kill at every system call, every flipped bit, runs killed 50 times
#   make bench   every benchmark, against the real peers in the same run
#   make bench-gpu  the one for an NVIDIA GPU: training, saving, decoding, in 7 minutes; the ladder with ARGS='--only ladder'
#   make docs    the site, in site/
#   make reference  docs/options.md and docs/modules.md, from the code
#   make venv    the installation alone: .venv/bin/onym and .venv/bin/python

PYTHON ?= python3
VENV   := .venv
BASE   := $(VENV)/.ready-to-train
READY  := $(VENV)/.ready

# uv installs in a fraction of pip's time, where it is there.
UV := $(shell command -v uv 2> /dev/null)
ifdef UV
INSTALL := $(UV) pip install --quiet --python $(VENV)/bin/python --constraint constraints.txt
MAKE_VENV := $(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
else
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MAKE_VENV := $(PYTHON) -m venv $(VENV)
endif

.PHONY: train test test-gpu check prove bench bench-gpu docs reference format venv clean
.DELETE_ON_ERROR:

train: $(BASE)
	$(VENV)/bin/onym train $(ARGS)

# The quick tests first, so that the first failure shows in the first minute; a file's tests stay in one process.
test: venv
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

# In one process: they share what is compiled, and the GPU.
test-gpu: venv
	$(VENV)/bin/python -m pytest -m cuda $(ARGS)

check: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --site-dir $(VENV)/site

prove: venv
	$(VENV)/bin/python -m pytest tests/names/test_any_nesting.py tests/state/test_tree.py --hypothesis-profile=prove --durations=0 $(ARGS)
	ONYM_PROVE=1 $(VENV)/bin/python -m pytest tests/test_main_job.py tests/storage tests/format tests/checkpoint tests/data/test_chat_template.py tests/train/test_precision.py tests/train/test_resume.py tests/train/test_ranks.py tests/train/test_network.py tests/train/test_sharded_training.py tests/integrations tests/serve/test_load.py tests/cli/test_ladder.py --hypothesis-profile=prove --durations=0 -s $(ARGS)

bench: venv
	for claim in bench/[a-z]*.py; do $(VENV)/bin/python $$claim $(ARGS) || exit 1; done

bench-gpu: venv
	$(VENV)/bin/python bench/gpu.py $(ARGS)

docs: venv
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

reference: $(BASE)
	$(VENV)/bin/python docs/reference.py

format: venv
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

venv: $(READY)

$(BASE): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Onym needs Python 3.11 or later; $(PYTHON) is older. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(MAKE_VENV)
	$(INSTALL) --editable '.[serve]'  # so that the run can be shown
	@touch $@

# The book's package and LitGPT are references for the tests. The book's package asks for TensorFlow and JupyterLab, which only its
# notebooks need; LitGPT asks for an older huggingface_hub than transformers does.
$(READY): $(BASE)
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps llms-from-scratch litgpt
	@touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis
