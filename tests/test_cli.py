"""The command line: what it makes is what papermill makes, and mistakes are told in one sentence."""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import papermill
import pytest
from click.testing import CliRunner

from zootwins import cli
from zootwins.core import UserError
from zootwins.plans import PARAMETERS
from zootwins.store import finished_files
from zootwins.zoos import ZOOS

ROOT = Path(__file__).resolve().parents[1]


def command(*words):
    "Run the command in this process."
    return CliRunner().invoke(cli.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two models of a zoo and their pruned twins, by the command; what it said."
    folder = tmp_path_factory.mktemp("made")
    done = command(
        "run", "digits_seed", "-n", 2, "--levels", 50, "--methods", "mp", "--store", folder / "zoos", "--figures",
        folder / "figures",
    )
    assert done.exit_code == 0, done.output
    return folder, done.output


@pytest.mark.slow
def test_papermill_and_the_command_agree(tmp_path, made):
    given = {
        "zoo": "digits_seed", "n_models": 2, "levels": "50", "methods": "mp", "store": str(tmp_path / "zoos"),
        "figures": str(tmp_path / "figures"),
    }
    papermill.execute_notebook(
        str(ROOT / "nbs/run_zoo.ipynb"), str(tmp_path / "out.ipynb"), given, kernel_name="python3", progress_bar=False
    )
    ours, theirs = (folder / "figures" / "digits_seed" for folder in (made[0], tmp_path))
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()} and len(list(ours.glob("*.csv"))) >= 6
    for path in ours.iterdir():
        if path.suffix in (".csv", ".parquet", ".png"):
            assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name
    records = [json.loads((folder / "run.json").read_text()) for folder in (ours, theirs)]
    same = ("zoo", "n_models", "methods", "levels", "seed", "engine", "arithmetic", "device", "images")
    assert all(records[0][name] == records[1][name] for name in same)
    assert [stage["made"] for stage in records[0]["stages"]] == [0, 0] and [
        h["made"] for h in records[0]["history"]
    ] == [2, 2]


def test_a_run_says_where_its_figures_are_and_asked_again_makes_nothing(made):
    folder, said = made
    assert f"digits_seed: 2 models; tables and figures are in {folder / 'figures' / 'digits_seed'}" in said
    assert (folder / "figures" / "digits_seed.ipynb").is_file() and not list(
        (folder / "figures").glob("*.unfinished.ipynb")
    )
    assert [record["made"] for record in json.loads((folder / "zoos/digits_seed/mp.json").read_text())["history"]] == [
        2
    ]


def test_every_parameter_of_the_notebook_is_an_option():
    options = {parameter.name for parameter in cli.run_command.params} - {"zoos"}
    assert options == set(PARAMETERS) - {"zoo"} == set(cli.defaults_of(cli.find_notebook())) - {"zoo"}


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["run", "digits_sed"], 1, "did you mean 'digits_seed'"),
        (["run", "digits_seed", "-n", "0"], 1, "is not a number of models"),
        (["run", "digits_seed", "--levels", "150"], 1, "are not levels of pruning"),
        (["run", "digits_seed", "--selector", "lamb"], 1, "did you mean 'lamp'"),
        (["run", "digits_seed", "--workers", "dusk"], 1, "'dusk' does not name workers"),
        (["run", "digits_seed", "--source", "/nowhere"], 1, "There is no zoo at"),
        (["show", "/nowhere"], 1, "/nowhere is not a store"), (["run"], 2, "Missing argument 'ZOO...'"),
        (["run", "digits_seed", "-n", "few"], 2, "neither a whole number nor the word all"),
        (["ran"], 2, "No such command 'ran'"),
    ],
)
def test_mistakes_are_told_with_an_exit_code(tmp_path, words, code, told):
    places = ["--store", tmp_path, "--figures", tmp_path] if words[:1] == ["run"] and len(words) > 1 else []
    done = command(*words, *places)
    assert done.exit_code == code and told in done.output
    assert code == 2 or done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_zoo_given_twice_is_made_once_and_all_means_all(tmp_path):
    notebook = cli.find_notebook()
    plans = cli.plans_of(
        ["digits_seed", "usps_seed", "digits_seed"], {"n_models": None, "store": str(tmp_path)}, notebook
    )
    assert [(plan.zoo.name, plan.n_models) for plan in plans] == [("digits_seed", 1000), ("usps_seed", 1000)]
    assert cli.plans_of(["digits_seed"], {}, notebook)[0].n_models == 32
    assert list(cli.images_of(plans[:1])) == ["digits_seed"]


def test_zoos_lists_the_registry():
    lines = command("zoos").output.splitlines()
    assert len(lines) == 1 + len(ZOOS) and all(any(line.split()[0] == name for line in lines) for name in ZOOS)
    assert len(command("zoos", "--paper").output.splitlines()) == 15


def test_show_tells_what_there_is_and_what_is_wrong(tmp_path, made):
    shutil.copytree(made[0] / "zoos", tmp_path / "zoos")
    folder = tmp_path / "zoos" / "digits_seed"
    done = command("show", tmp_path / "zoos")
    assert done.exit_code == 0 and "original: 2 rows in" in done.output and "mp: 2 rows in" in done.output
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / "vd-0.safetensors").write_bytes(b"12345")
    assert "unfinished: 1 blocks, 5 bytes" in command("show", folder).output
    path, = finished_files(folder, "mp")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = command("show", folder)
    assert done.exit_code == 1 and f"mp: {path.name} is damaged" in done.output
    path.unlink()
    assert f"{path.name} is missing" in command("show", folder).output
    (folder / "mp.json").write_text("{}")
    assert "mp.json is damaged" in command("show", folder).output
    (folder / "store.json").write_text("{}")
    assert "another version of zootwins" in command("show", folder).output


def test_a_zoo_that_cannot_be_drawn_is_told_and_its_models_are_kept(tmp_path, made, monkeypatch):
    broken = json.loads((ROOT / "nbs/run_zoo.ipynb").read_text())
    broken["cells"][2]["source"] = ["raise ValueError('no ink')"]
    (tmp_path / "run_zoo.ipynb").write_text(json.dumps(broken))
    (plan,) = cli.plans_of(
        ["digits_seed"], {"store": str(tmp_path), "figures": str(tmp_path / "figures")}, tmp_path / "run_zoo.ipynb"
    )
    with pytest.raises(UserError, match="digits_seed could not be drawn .no ink."):
        cli.draw(plan, {}, tmp_path / "run_zoo.ipynb")
    assert (
        not (tmp_path / "figures/digits_seed.ipynb").exists()
        and (tmp_path / "figures/digits_seed.unfinished.ipynb").exists()
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_is_one_line(tmp_path, sent):
    words = [
        "-m", "zootwins.cli", "run", "digits_seed", "-n", "64", "--store", str(tmp_path), "--figures", str(tmp_path),
    ]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while not (tmp_path / "digits_seed" / "original.lock").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert (
        err.strip()
        .splitlines()[-1]
        .endswith(f"Interrupted: what is done is kept in {tmp_path / 'digits_seed'}; run again to go on.")
    )
