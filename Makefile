# Two commands: `make run` makes a zoo and its twins, `make test` checks everything.
SHELL := bash
PYTHON ?= python3
ZOO ?= digits_seed
N ?= 100
LEVELS ?=
WORKERS ?=
FIGURES ?= $(or $(ZOOTWINS_FIGURES),figures)
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs

export MPLBACKEND := Agg
export SOURCE_DATE_EPOCH := 0

.PHONY: run test lab readme clean-check export-check readme-check notebooks lint pytest

$(VENV)/ready: setup.py settings.ini constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The bars of the notebook's stages go to the terminal, papermill's own words to a log of which the last error is shown.
# The bars pass through a pipe because papermill opens what it writes to anew, which would empty a file that `make run` is redirected to.
# The executed notebook replaces an earlier one only when the run ended well.
run: $(VENV)/ready
	@mkdir -p $(RUNS)
	@set -o pipefail; $(BIN)/python -m papermill nbs/run_zoo.ipynb $(RUNS)/$(ZOO).unfinished.ipynb -p zoo $(ZOO) -p n_models $(N) $(if $(LEVELS),-p levels $(LEVELS)) $(if $(WORKERS),-p workers $(WORKERS)) --kernel python3 \
		--no-progress-bar --stdout-file /dev/null --stderr-file /dev/fd/3 3>&1 >$(RUNS)/$(ZOO).log 2>&1 | (trap '' INT; cat >&2) && test -f $(FIGURES)/$(ZOO)/run.json \
		|| { grep -aE '^[A-Za-z.]+(Error|Interrupt)\b' $(RUNS)/$(ZOO).log | tail -n 1 >&2; echo "The run of $(ZOO) did not end well; more is in $(RUNS)/$(ZOO).log" >&2; exit 1; }
	@mv $(RUNS)/$(ZOO).unfinished.ipynb $(RUNS)/$(ZOO).ipynb
	@rm $(RUNS)/$(ZOO).log
	@echo "Tables and figures of $(ZOO) lie in $(FIGURES)/$(ZOO)/, the executed notebook is $(RUNS)/$(ZOO).ipynb"

test: clean-check export-check readme-check notebooks lint pytest

clean-check export-check readme-check: $(VENV)/ready
	$(BIN)/python tests/fresh.py $@

# The notebooks run for real; what they make goes to a folder of its own.
notebooks: $(VENV)/ready
	scratch=$$(mktemp -d) && trap 'rm -rf $$scratch' EXIT && \
	ZOOTWINS_STORE=$$scratch/zoos ZOOTWINS_FIGURES=$$scratch/figures OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

lint: $(VENV)/ready
	$(BIN)/ruff check zootwins tests

pytest: $(VENV)/ready
	$(BIN)/python -m pytest -q tests

readme: $(VENV)/ready
	$(BIN)/python tests/fresh.py readme

lab: $(VENV)/ready
	$(BIN)/jupyter lab --notebook-dir=nbs
