"""The notebook of soups through papermill, as a user would call it."""
import json
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from small import run_notebook
from zootwins.core import UserError
from zootwins.plans import make_plan
from zootwins.soups import PARAMETERS, parse_story, story_folder, story_gains

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "sparse_soups.ipynb"
STORY = {
    "level": 80, "phases": 2, "copies": "2", "epochs": 1, "rate": 5e-3, "schedule": "constant", "selector": "lamp",
    "merges": "uniform", "original_epochs": 30,
}


papermill = partial(run_notebook, NOTEBOOK)


def test_there_is_one_cell_of_parameters_and_each_is_explained():
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", [])]
    lines = cells[0].source.splitlines()
    assert (
        len(cells) == 1
        and [line.split(" = ")[0] for line in lines] == list(PARAMETERS)
        and all("  # " in line for line in lines)
    )


@pytest.mark.slow
def test_a_run_and_another_with_more_copies(tmp_path):
    small = {"n_models": 2, "level": 80, "phases": 2, "epochs": 1, "merge": "uniform", "baselines": "none,longer"}
    done = papermill(tmp_path, **small, copies=2)
    assert done.returncode == 0, done.stderr[-2000:]
    story = lambda numbers: (
        tmp_path / "figures" / "soups" / "digits_seed" / f"lamp_80_2x1_constant_0.005_m{numbers}_uniform"
    )
    folder = story("2")
    record = json.loads((folder / "run.json").read_text())
    assert [stage["made"] for stage in record["stages"]] == [2, 4, 4, 0, 4, 2, 2]
    results = pd.read_parquet(folder / "results.parquet")
    assert set(results["row"]) == {
        "SMS", "best candidate", "mean candidate", "best by validation", "prediction ensemble", "IMP", "IMP ensemble",
        "IMP-RePrune", "IMP_mx",
    }
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "results.parquet", "table_1.csv", "gains.csv", "gains.png",
    }
    again = papermill(tmp_path, **small | {"baselines": "none,longer,phases,swa,gmp"}, copies="2,3", engine="lanes")
    assert again.returncode == 0, again.stderr[-2000:]
    made = [stage["made"] for stage in json.loads((story("2-3") / "run.json").read_text())["stages"]]
    assert made == [0, 0, 0, 0, 0, 0, 0, *[2] * 7, 4, 2, 6, 0, 2, 2, 2, *[2] * 6, 0, 0, 0, 6]
    both = pd.read_parquet(story("2-3") / "results.parquet")
    assert set(both["row"]) - set(results["row"]) == {
        "IMP with m phases", "IMP + SWA", "GMP", "GMP+SMS", "GMP+SMS mean candidate",
    }
    same = both[(both["m"] == 2) & both["row"].isin(results["row"])].reset_index(drop=True)
    assert same.equals(results)


def test_the_notebook_runs_again_in_one_kernel(tmp_path):
    notebook = nbformat.read(NOTEBOOK, 4)
    at = next(place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    small = {
        "n_models": 2, "level": 50, "phases": 1, "epochs": 1, "copies": "2", "store": str(tmp_path / "zoos"),
        "figures": str(tmp_path / "figures"),
    }
    runs = []
    for more in (
        {"merge": "uniform", "baselines": "", "formats": "md,svg"},
        {"merge": "learned", "baselines": "none", "candidates": "a name of one's own"},
    ):
        own = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in (small | more).items()))
        runs += [*notebook.cells[: at + 1], own, *notebook.cells[at + 1 :]]
    notebook.cells = [nbformat.from_dict(dict(cell, id=f"cell{place}")) for place, cell in enumerate(runs)]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    results = pd.read_parquet(
        tmp_path / "figures" / "soups" / "digits_seed" / "lamp_50_1x1_constant_0.005_m2_learned" / "results.parquet"
    )
    uniform = tmp_path / "figures" / "soups" / "digits_seed" / "lamp_50_1x1_constant_0.005_m2_uniform"
    assert {path.name for path in uniform.iterdir()} == {
        "run.json", "results.parquet", "table_1.md", "gains.csv", "gains.svg",
    }
    assert set(results["merge"]) == {"learned", ""} and set(results["row"]) >= {"SMS", "IMP", "IMP-RePrune"}


def test_an_unknown_parameter_is_refused_in_one_line(tmp_path):
    done = papermill(tmp_path, merges="uniform")
    assert done.returncode and "There is no parameter of sparse_soups 'merges' (did you mean 'merge'?)" in done.stderr
    assert not (tmp_path / "zoos").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"copies": ""}, "numbers of copies"), ({"copies": "3;5"}, "numbers of copies"),
        ({"copies": "0"}, "numbers of copies"), ({"merges": ""}, "numbers of copies"),
        ({"merges": "mean"}, "uniform, greedy, learned"), ({"level": 0.9}, "percentage"),
        ({"level": 100}, "percentage"), ({"schedule": "linear"}, "constant, FT"), ({"phases": 0}, "one phase"),
        ({"baselines": "none,IMP"}, "none, longer, phases, swa, gmp"), ({"selector": "l2"}, "global, layerwise"),
        ({"epochs": 0}, "one epoch"), ({"schedule": "LRW", "epochs": 31}, "fewer epochs"),
    ],
)
def test_mistakes_are_told(change, message):
    with pytest.raises(UserError, match=message) as error:
        parse_story(**STORY | change)
    assert "\n" not in str(error.value)


def test_an_unknown_format_is_refused(tmp_path):
    done = papermill(tmp_path, formats="jpg")
    assert (
        done.returncode
        and "format" in done.stderr
        and "csv, md, tex" in done.stderr
        and not (tmp_path / "zoos").exists()
    )


def test_stories_that_differ_in_epochs_or_phases_have_folders_of_their_own(tmp_path):
    plan = make_plan("digits_seed", 2, methods="", levels="0", figures=str(tmp_path))
    changes = [{}, {"epochs": 5}, {"phases": 3}, {"copies": "3"}, {"level": 90}, {"rate": None}]
    names = [story_folder(plan, parse_story(**STORY | change)).name for change in changes]
    assert (
        len(set(names)) == len(changes)
        and names[0] == "lamp_80_2x1_constant_0.005_m2_uniform"
        and names[1] == "lamp_80_2x5_constant_0.005_m2_uniform"
    )


def test_a_story_has_soups_runs_and_longer_runs():
    found = parse_story(**STORY | {"copies": "3,2", "merges": "uniform,greedy"})
    assert list(found) == [(how, m) for m in (2, 3) for how in ("uniform", "greedy", "none", "longer")]
    assert found["longer", 3].epochs == 3 and found["longer", 3].m == 1 and found["none", 2].merge == "none"
    assert (
        found["greedy", 3].level == 0.8
        and found["greedy", 3].history == ()
        and found["greedy", 3].original_epochs is None
    )
    assert parse_story(**STORY | {"schedule": "ALLR"})["uniform", 2].original_epochs == 30
    more = parse_story(**STORY | {"schedule": "ALLR", "baselines": "gmp,swa"})
    assert (
        list(more) == [("uniform", 2), ("swa", 2), ("gmp", 2), ("gmp soup", 2)]
        and more["gmp", 2].schedule == "LLR"
        and more["swa", 2].swa
    )


def test_gains_of_a_story_are_paired_within_phase_and_number():
    rows = [("SMS", "uniform", 0.9, 0.8), ("mean candidate", "uniform", 0.8, 0.8), ("IMP", "", 0.85, 0.7)]
    results = pd.DataFrame([{"row": row, "merge": how, "m": 2, "phase": 1, "model": model, "test_acc": value}
                            for row, how, *values in rows for model, value in enumerate(values)])
    found = story_gains(results).loc[1, 2]
    assert found["gain"].round(6).to_dict() == {"IMP": 7.5, "mean candidate (uniform)": 5.0}
    assert np.isclose(found.loc["IMP", "error"], 2.5) and found.loc[
        "mean candidate (uniform)", ["wins", "ties"]
    ].tolist() == [0.5, 0.5]
