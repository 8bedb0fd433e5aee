# Everything from a fresh clone: Python 3.11+, gcc/g++, make and git are enough.
#   make train   set up, then train a GPT on the text that Python carries (a few minutes on two cores)
#   make test    set up, then every test
#   make check   lint, format, types, import rules
#   make prove   the proofs in full: thousands of random models, a kill at every system call, every flipped bit, runs killed 50 times (an hour)
#   make bench   every benchmark, against the real peers in the same run
#   make reference  docs/options.md, from the options in the code
#   make venv    the set-up alone: .venv/bin/onym and .venv/bin/python

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready

.PHONY: train test check prove bench reference format venv clean
.DELETE_ON_ERROR:

train: venv
	$(VENV)/bin/onym train $(ARGS)

# A file's tests stay together: some share what took long to make.
test: venv
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

prove: venv
	$(VENV)/bin/python -m pytest tests/names/test_any_nesting.py tests/state/test_tree.py --hypothesis-profile=prove --durations=0 $(ARGS)
	ONYM_PROVE=1 $(VENV)/bin/python -m pytest tests/test_main_job.py tests/test_shares.py tests/store tests/train/test_resume.py tests/train/test_ranks.py tests/train/test_network.py tests/train/test_sharded_training.py --hypothesis-profile=prove --durations=0 -s $(ARGS)

bench: venv
	for claim in bench/[a-z]*.py; do $(VENV)/bin/python $$claim $(ARGS) || exit 1; done

reference: venv
	$(VENV)/bin/python -m onym.cli.reference > docs/options.md

format: venv
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

venv: $(READY)

# The book's package and LitGPT are references for the tests. What the book's declares to need (TensorFlow, JupyterLab) is for its
# notebooks, and LitGPT asks for an older huggingface_hub than transformers does.
$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Onym needs Python 3.11 or later; $(PYTHON) is older. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llms-from-scratch litgpt
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
