"""The run notebook through papermill, as a user would call it."""
import json
import subprocess
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from nbclient import NotebookClient

from small import run_notebook
from zootwins.plans import PARAMETERS, make_plan
from zootwins.publishing import export_zoo

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "run_zoo.ipynb"


papermill = partial(run_notebook, NOTEBOOK)


def test_there_is_one_cell_of_parameters_and_each_is_explained():
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    lines = cells[0].source.splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(PARAMETERS)
    assert all("  # " in line for line in lines)


def all_in_one_kernel(folder, *runs):
    "Run all cells of the notebook several times in one kernel, each time with a cell of one's own after the first."
    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])) + 1
    own = [
        f"store, figures = {str(folder / 'zoos')!r}, {str(folder / 'figures')!r}\n"
        + "\n".join(f"{k} = {v!r}" for k, v in run.items())
        for run in runs
    ]
    notebook.cells = [
        cell
        for code in own
        for cell in (*notebook.cells[:first], nbformat.v4.new_code_cell(code), *notebook.cells[first:])
    ]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()


@pytest.mark.slow
def test_the_notebook_runs_again_and_again_in_one_kernel(tmp_path):
    all_in_one_kernel(
        tmp_path,
        {"n_models": 2, "levels": "0,90", "origin": "a name of one's own"},
        {"n_models": 1, "methods": "", "model": 3},
    )
    record = json.loads((tmp_path / "figures" / "digits_seed" / "run.json").read_text())
    assert (
        record["n_models"] == 1
        and record["methods"] == []
        and [stage["made"] for stage in record["history"]] == [2, 4, 2]
    )
    assert set(pd.read_parquet(tmp_path / "figures" / "digits_seed" / "metrics.parquet")["method"]) == {"original"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of three models with two selectors, and its originals as a published zoo."
    folder = tmp_path_factory.mktemp("run")
    done = papermill(folder, ROOT / "nbs", zoo="digits_seed", n_models=3, levels="90", selector="lamp,global")
    assert done.returncode == 0, done.stderr[-2000:]
    export_zoo(folder / "zoos" / "digits_seed", folder / "published", ["original"])
    return folder


def test_a_run_writes_all_tables_and_figures(run):
    folder = run / "figures" / "digits_seed"
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "run.json", "metrics.parquet", "table_empty.csv", "figure_2.png", "figure_5.png",
        *(f"table_{i}.csv" for i in (1, 2, 5, 6, 7, 8)),
    }
    assert all((folder / name).stat().st_size > 5_000 for name in names if name.endswith("png"))
    record = json.loads((folder / "run.json").read_text())
    assert record["n_models"] == 3 and record["levels"] == [0.9] and record["selectors"] == ["global", "lamp"]
    assert [(stage["stage"], stage["made"]) for stage in record["history"]] == [
        ("original", 3), ("mp", 3), ("mp_lamp", 3), ("vd", 3),
    ]
    assert set(pd.read_parquet(folder / "metrics.parquet")["selector"]) == {"", "global", "lamp"}
    assert set(pd.read_csv(folder / "table_empty.csv")["selector"]) == {"global", "lamp"}


def test_a_run_changes_nothing_that_git_knows(run):
    told = subprocess.run(["git", "status", "--porcelain", "figures"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode or not told.stdout
    assert make_plan("digits_seed").figures == ROOT / "runs" / "digits_seed"


@pytest.mark.slow
def test_a_published_zoo_gets_the_same_tables_and_figures(tmp_path, run):
    source = run / "published" / "original"
    done = papermill(tmp_path, zoo="digits_seed", n_models=None, source=source, levels="90", selector="global,lamp")
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (folder / "figures" / "digits_seed" for folder in (run, tmp_path))
    assert {p.name for p in theirs.iterdir()} - {p.name for p in ours.iterdir()} == {"reevaluation.csv"}
    tables = sorted(p.name for p in ours.glob("table_*.csv"))
    assert len(tables) >= 6 and all((theirs / name).read_bytes() == (ours / name).read_bytes() for name in tables)
    assert (pd.read_csv(theirs / "reevaluation.csv")["images"] == 0).all()
    record = json.loads((theirs / "run.json").read_text())
    assert record["n_models"] == 3 and record["source"]["models"] == 3 and record["stages"][0]["model_samples"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "zoo,source,told",
    [
        ("digits_seed", "nowhere", "There is no zoo at"),
        ("cifar10_seed", "published", "holds models of the architecture cnn_small_1ch"),
    ],
)
def test_a_source_that_cannot_be_is_told(tmp_path, run, zoo, source, told):
    done = papermill(tmp_path, zoo=zoo, source=run / source / "original", n_models=None)
    assert done.returncode != 0 and told in done.stderr and not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    "wrong,told",
    [
        pytest.param(
            {"zoo": "digits_sed"}, "There is no zoo 'digits_sed' (did you mean 'digits_seed'?)", marks=pytest.mark.slow
        ),
        ({"model": 3}, "There is no parameter of run_zoo 'model'"),
        pytest.param({"levels": "50,150"}, "are not levels of pruning", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_told_in_one_sentence_and_leave_no_record(tmp_path, wrong, told):
    record = tmp_path / "figures" / "digits_seed" / "run.json"
    done = papermill(tmp_path, **{"zoo": "digits_seed", **wrong})
    assert done.returncode != 0 and told in done.stderr and not record.exists()
    assert "Traceback" not in nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].get("source", "")
    errors = [
        o
        for c in nbformat.read(tmp_path / "out.ipynb", 4).cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "error"
    ]
    assert len(errors) == 1 and len(errors[0]["traceback"]) == 1
