"""Studies, and the script that makes one in parts."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from zootwins import network_studies
from zootwins.network_studies import STUDIES, main, study_cells, study_rows, toy_study
from zootwins.reported_soups import read_reported_soups, soup_table

ROOT = Path(__file__).parent.parent
TOY = replace(toy_study(STUDIES["resnet18"]), parts=STUDIES["resnet18"].parts[1:4:2])


def test_finished_seeds_are_read_and_others_added(tmp_path, monkeypatch):
    first = study_rows(TOY, tmp_path, [0])
    monkeypatch.setattr(network_studies, "part_rows", lambda study, part, model, images, seed, folder: None)
    assert study_rows(TOY, tmp_path, [0]).equals(first)
    assert set(first["row"]) == {
        "dense", "SMS", "mean candidate", "best candidate", "best by validation", "ensemble", "IMP", "IMP_mx",
    }
    assert set(first["pruning"]) == {"", "weights", "filters"} and first["test_acc"].between(0, 1).all()


def test_cells_have_the_form_of_the_papers(tmp_path):
    rows = study_rows(TOY, tmp_path, [0, 1])
    cells = study_cells(rows, "toy")
    assert set(cells.columns) <= {*read_reported_soups().columns} | {"doubtful"}
    one = rows[(rows["table"] == 6) & (rows["row"] == "IMP")]
    cell = cells[(cells["table"] == 6) & (cells["row"] == "IMP")].iloc[0]
    assert len(one) == 2 and cell["mean"] == pytest.approx(100 * one["test_acc"].mean()) and cell["std"] >= 0
    assert "IMP_mx" in soup_table(cells, 12, "toy").layout.index


def test_the_papers_parts_are_in_the_study_for_a_gpu():
    printed = read_reported_soups()
    there = printed[printed["table"].isin([6, 12])].drop_duplicates(["table", "level"])
    study = STUDIES["resnet18"]
    assert sorted(zip(there["table"], there["level"])) == sorted((part.table, part.level) for part in study.parts)
    assert study.retrain_epochs == 20 and study.settings.weight_decay == 5e-4 and study.settings.batch_size == 128


@pytest.mark.parametrize("arguments", [["resnet34", "x"], ["narrow", "x", "--seeds", "a"], ["resnet18", "x"]])
def test_what_cannot_be_is_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2 and not list(tmp_path.iterdir())
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_script_goes_on_until_all_is_there(tmp_path):
    def start(limit):
        command = ["bash", ROOT / "benchmarks" / "resnet18_gpu.sh", tmp_path / "runs", "3"]
        return subprocess.run(
            command,
            env=os.environ
            | {"TOY": "1", "LIMIT": limit, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    over = start("1")
    assert over.returncode == 75 and "start again" in over.stdout
    done = start("280")
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "runs" / "rows.csv")
    assert set(rows["table"].dropna()) == {6, 12} and rows["model"].eq(3).all()


@pytest.mark.slow
def test_the_notebook_about_networks_runs_on_digits_too(tmp_path):
    command = [
        sys.executable, "-m", "papermill", str(ROOT / "nbs" / "sparse_soups_networks.ipynb"),
        str(tmp_path / "out.ipynb"), "--kernel", "python3", "--no-progress-bar", "-p", "dataset", "digits", "-p",
        "n_train", "400", "-p", "n_test", "400", "-p", "epochs", "3", "-p", "phases", "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "out.ipynb").read_text()
    assert "5 dense nets" in text and "the uniform soup against" in text
