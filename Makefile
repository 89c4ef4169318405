# Two commands: `make run` makes a zoo and its twins, `make test` checks everything.
SHELL := bash
PYTHON ?= python3
ZOO ?= digits_seed
N ?= 100
LEVELS ?=
METHODS ?=
SELECTOR ?=
WORKERS ?=
FORMATS ?=
NOTEBOOK ?= run_zoo
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs
LONG := ^(15_selectors|24_distances|28_blocks|29_workers|31_figures|47_zoo_data|60_hyperreps|61_probes|78_network_studies|hyper_representations|paper_appendix|predict_a_twin|bring_your_own|77_during_training|46_soup_questions|76_robustness|73_module_soups|19_averaging|44_soups|50_bench|51_bench_published|52_costs)
SCRATCH := scratch=$$(mktemp -d) && trap 'rm -rf $$scratch' EXIT && ZOOTWINS_STORE=$$scratch/zoos ZOOTWINS_FIGURES=$$scratch/figures OMP_NUM_THREADS=1

# Notebooks keep pictures only where the kernel may choose its own backend.
EXECUTE := env -u MPLBACKEND $(BIN)/jupyter nbconvert --to notebook --execute --inplace

export MPLBACKEND := Agg
export SOURCE_DATE_EPOCH := 0

.PHONY: run test test-all sanitize mutants lab keep paper package readme docs clean-check export-check readme-check notebooks lint pytest

$(VENV)/ready: setup.py settings.ini constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The bars of the notebook's stages go to the terminal, papermill's own words to a log of which the last error is shown.
# The bars pass through a pipe because papermill opens what it writes to anew, which would empty a file that `make run` is redirected to.
# The executed notebook replaces an earlier one only when the run ended well.
run: $(VENV)/ready
	@mkdir -p "$(RUNS)"
	@figures="$${ZOOTWINS_FIGURES:-runs}/$(ZOO)"; log="$(RUNS)/$(ZOO).log"; set -o pipefail; \
	ZOOTWINS_BARS=text $(BIN)/python -m papermill nbs/run_zoo.ipynb "$(RUNS)/$(ZOO).unfinished.ipynb" -p zoo "$(ZOO)" -p n_models "$(N)" \
		$(if $(LEVELS),-r levels "$(LEVELS)") $(if $(METHODS),-r methods "$(METHODS)") $(if $(SELECTOR),-r selector "$(SELECTOR)") $(if $(WORKERS),-r workers "$(WORKERS)") $(if $(FORMATS),-r formats "$(FORMATS)") --kernel python3 \
		--no-progress-bar --stdout-file /dev/null --stderr-file /dev/fd/3 3>&1 >"$$log" 2>&1 | (trap '' INT; cat >&2) && test -f "$$figures/run.json" \
		|| { grep -aE '^[A-Za-z.]+(Error|Interrupt)\b|^Interrupted:' "$$log" | tail -n 1 >&2; echo "The run of $(ZOO) did not end well; more is in $$log" >&2; exit 1; }; \
	mv "$(RUNS)/$(ZOO).unfinished.ipynb" "$(RUNS)/$(ZOO).ipynb" && rm "$$log" && \
	echo "Tables and figures of $(ZOO) lie in $$figures/, the executed notebook is $(RUNS)/$(ZOO).ipynb"

# What README and paper are made from is kept in figures/; only this command adds to it.
keep: $(VENV)/ready
	@test -f "runs/$(ZOO)/run.json" || { echo "There is no finished run of $(ZOO) in runs/: make run ZOO=$(ZOO) first." >&2; exit 1; }
	@mkdir -p "figures/$(ZOO)" && cp "runs/$(ZOO)"/*.{csv,png,parquet,json} "figures/$(ZOO)/"
	@git status --short "figures/$(ZOO)"

# The paper's collected tables and figures, the diagrams, and the numbers in its prose, from the kept runs.
paper: $(VENV)/ready
	$(BIN)/python -m zootwins.claims figures
	ZOOTWINS_FIGURES="$(CURDIR)/figures" $(EXECUTE) nbs/35_diagrams.ipynb nbs/paper_appendix.ipynb
	$(BIN)/python -m zootwins.kept figures nbs/paper.ipynb nbs/paper_appendix.ipynb nbs/index.ipynb
	$(BIN)/python -m zootwins.soup_facts figures/soups nbs/paper_soups.ipynb nbs/38_soup_claims.ipynb nbs/46_soup_questions.ipynb
	$(EXECUTE) nbs/paper.ipynb nbs/paper_soups.ipynb
	$(BIN)/nbdev_clean

test: clean-check export-check readme-check notebooks lint pytest

# Rare and long sweeps: every kill point, many races, notebooks and command lines from end to end, the site.
test-all: test
	$(SCRATCH) $(BIN)/nbdev_test --n_workers 2 --timing --file_re '$(LONG)'
	$(MAKE) docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow tests

clean-check export-check readme-check: $(VENV)/ready
	$(BIN)/python tests/fresh.py $@

# The notebooks run for real; what they make goes to a folder of its own. Those that take long are left to test-all; one
# needs images of CIFAR-10 and is tried on digits by a test.
notebooks: $(VENV)/ready
	$(SCRATCH) $(BIN)/nbdev_test --n_workers 2 --timing --skip_file_re '^[_.]|sparse_soups_networks|$(LONG)'

lint: $(VENV)/ready
	$(BIN)/ruff check zootwins tests docs

pytest: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

# The C++ engine under ASan and UBSan, in small trainings of all architectures.
sanitize: $(VENV)/ready
	$(BIN)/python -m pytest -q tests/test_lanes.py -k sanitizers

# How many small errors in the measures and the rules of verdicts the tests find, with a score for each.
mutants: $(VENV)/ready
	$(BIN)/python tests/mutants.py

# The modules from the notebooks, and README from index.ipynb.
package readme: $(VENV)/ready
	$(BIN)/python tests/fresh.py $@

# The site: notebooks with their outputs, and every function. A broken link is an error.
docs: $(VENV)/docs-ready
	$(BIN)/python docs/build.py && echo "Open _docs/html/index.html"

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# JupyterLab on a copy, which git does not know, so that a notebook that was read does not become a change.
lab: $(VENV)/ready
	cp -n "nbs/$(NOTEBOOK).ipynb" "nbs/_$(NOTEBOOK).ipynb"
	env -u MPLBACKEND $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" "nbs/_$(NOTEBOOK).ipynb"
