# Every target makes the environment that it needs; Python 3.11 and make are all that has to be there.
#   make demo    run the example, everything it writes is in demo-output/
#   make test    all tests, three ways: both fronts together, the NumPyro front alone, the Pyro front alone
#   make lint    formatting, types, import rules and the documentation
#   make docs    the documentation, in site/
#   make bench   timings beside other libraries
#   make clean   remove what the targets wrote; `make distclean` removes the environments too
# PYTEST_ARGS reaches every pytest: make test-full PYTEST_ARGS="-k spline"

SHELL := /bin/sh
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= $(shell tools/find-python 3.11 | grep . || tools/find-python 3.11+)
PYTHON312 ?= $(shell tools/find-python 3.12)
JOBS ?= 2
PYTEST_ARGS ?=
TEST_TIMEOUT ?= 300
LEG_TIMEOUT ?= 1500

export MPLBACKEND ?= Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export NO_MKDOCS_2_WARNING := 1

LIMIT := $(shell command -v timeout >/dev/null 2>&1 && echo 'timeout --kill-after=30 $(LEG_TIMEOUT)')
PYTEST = -m pytest -n $(JOBS) --dist worksteal --timeout $(TEST_TIMEOUT)
# One thread for each worker: the numerical libraries would otherwise start a pool in every process.
TEST = env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(LIMIT)

.PHONY: demo test test-full test-numpyro test-pyro lint docs bench clean distclean

demo: .venv/.stamp
	mkdir -p demo-output
	.venv/bin/python examples/demo.py

test: test-full test-numpyro test-pyro

# Both fronts in one environment: every test, slow ones and the examples in the docstrings included, but for what the two targets
# below run again.
ONCE = $(if $(PYTHON312),-m "slow or not front")
test-full: .venv/.stamp
	.venv/bin/python tools/check_env.py numpyro pyro
	$(TEST) .venv/bin/python $(PYTEST) $(ONCE) --doctest-modules tests flowppl $(PYTEST_ARGS)

# The NumPyro front on Python 3.12, the newest jax and ArviZ 1.x, without torch.
ifneq ($(PYTHON312),)
test-numpyro: .venv-numpyro/.stamp
	.venv-numpyro/bin/python tools/check_env.py numpyro
	$(TEST) .venv-numpyro/bin/python $(PYTEST) -m "not slow" --doctest-modules \
		--ignore=tests/pyro --ignore=flowppl/numpyro/flowjax.py tests flowppl/numpyro $(PYTEST_ARGS)
else
test-numpyro:
	@echo 'NOT RUN: the tests of the NumPyro front alone, since there is no Python 3.12 (set PYTHON312=/path/to/python3.12)' >&2
	@test "$(CI)" != true
endif

# The Pyro front without jax, and without ArviZ and matplotlib.
test-pyro: .venv-pyro/.stamp
	.venv-pyro/bin/python tools/check_env.py pyro
	$(TEST) .venv-pyro/bin/python $(PYTEST) -m "not slow" --doctest-modules \
		--ignore=tests/numpyro --ignore=flowppl/pyro/zuko.py tests flowppl/pyro $(PYTEST_ARGS)

lint: .venv/.stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/mkdocs build --strict --quiet

docs: .venv/.stamp
	.venv/bin/mkdocs build --strict

bench: .venv-bench/.stamp
	.venv-bench/bin/python -m benchmarks

# An environment is made once, brought up to date when its stamp is older than what it is made from.
DEPENDS = pyproject.toml constraints.txt Makefile
INSTALL = -m pip install -qq --constraint constraints.txt --editable

.venv/.stamp: $(DEPENDS)
	$(call make_venv,$(PYTHON),3.11 or later)
	$(@D)/bin/python $(INSTALL) '.[dev]'
	@touch $@

.venv-numpyro/.stamp: $(DEPENDS)
	$(call make_venv,$(PYTHON312),3.12)
	$(@D)/bin/python $(INSTALL) '.[numpyro,plots,test]'
	@touch $@

.venv-pyro/.stamp: $(DEPENDS)
	$(call make_venv,$(PYTHON),3.11 or later)
	$(@D)/bin/python $(INSTALL) '.[pyro,test]'
	@touch $@

.venv-bench/.stamp: $(DEPENDS) benchmarks/requirements.txt
	$(call make_venv,$(PYTHON),3.11 or later)
	$(@D)/bin/python $(INSTALL) '.[all]' --requirement benchmarks/requirements.txt
	@touch $@

define make_venv
@test -n "$(1)" || { echo 'No Python $(2) found; set PYTHON=/path/to/python' >&2; exit 1; }
@echo 'Environment $(@D)'
@test -x $(@D)/bin/pip || "$(1)" -m venv $(@D)
endef

clean:
	rm -rf demo-output site dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-numpyro .venv-pyro .venv-bench
