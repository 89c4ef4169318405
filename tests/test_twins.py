"""Stages on disk: resumed, extended, never mixed up."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.metrics import METRIC_COLUMNS
from zootwins.population import load_population
from zootwins.twins import blocks, load_metrics, make_plan, make_stages, make_twins, open_store, run_record
from zootwins.zoos import get_zoo, model_table


def small_plan(folder, n=3, epochs=3, **changes):
    zoo = replace(get_zoo("digits_seed"), epochs=epochs, mp_epochs=2, vd_epochs=2)
    return replace(make_plan("digits_seed", n, **{"levels": "0,90", **changes}, store=str(folder), figures=str(folder / "figures")), zoo=zoo)


@pytest.fixture(scope="module")
def images():
    return subset(load_images("digits"), 80, 50)


@pytest.mark.parametrize("wrong,told", [
    ({"zoo": "usps"}, "usps_seed"), ({"n_models": 0}, "1 to"), ({"n_models": 2.0}, "whole number"), ({"methods": "mp,vdd"}, "Valid: mp, vd"),
    ({"levels": "0,100"}, "below 100"), ({"levels": "-5"}, "below 100"), ({"levels": "a"}, "percentages"), ({"levels": ""}, "at least one level"),
    ({"engine": "lane"}, "auto, lanes, torch"), ({"device": "gpu"}, "cpu, cuda"), ({"seed": "x"}, "whole number"),
    ({"engine": "lanes", "device": "cuda"}, "CUDA|CPU only"),
])
def test_what_cannot_be_is_told_in_one_sentence(wrong, told):
    with pytest.raises(UserError, match=told) as error:
        make_plan(**{"zoo": "digits_seed", **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_run_makes_every_stage_and_its_metrics(tmp_path, images, engine):
    plan = small_plan(tmp_path, engine=engine)
    reports = make_twins(plan, images, progress=False)
    metrics = load_metrics(plan)
    assert [r.made for r in reports] == [3, 6, 3]
    assert list(metrics.columns) == METRIC_COLUMNS and len(metrics) == 3 * (4 + 2 * 3 + 3)
    assert metrics.query("method == 'vd' and epoch == 0")["agreement"].min() > 0.9
    at_90 = metrics.query("level == 0.9")
    assert np.allclose(at_90["sparsity"], round(0.9 * 2416) / 2416) and at_90["agreement"].between(0, 1).all()
    assert np.allclose(metrics["ggap"], metrics["train_acc"] - metrics["test_acc"])
    original, mp = (load_population(plan.folder / stage) for stage in ("original", "mp"))
    assert len(mp) == 6 and mp.models["level"].tolist() == [0.0] * 3 + [0.9] * 3
    level_0 = metrics.query("level == 0 and epoch == 0")["test_acc"].to_numpy()
    assert np.allclose(level_0, metrics.query("method == 'original' and epoch == 3")["test_acc"]) and len(original) == 3


def test_more_models_and_levels_are_added_and_nothing_is_changed(tmp_path, images):
    plan = small_plan(tmp_path / "a", n=2)
    make_twins(plan, images, progress=False)
    before = load_metrics(plan)
    larger = small_plan(tmp_path / "a", n=4, levels="0,50,90")
    assert [r.made for r in make_twins(larger, images, progress=False)] == [2, 8, 2]
    assert load_metrics(plan).equals(before)
    at_once = small_plan(tmp_path / "b", n=4, levels="0,50,90")
    make_twins(at_once, images, progress=False)
    if plan.engine.name == "lanes":  # bit for bit, whoever trains beside whom
        pd.testing.assert_frame_equal(load_metrics(larger), load_metrics(at_once), check_exact=True)


@pytest.mark.parametrize("changes,told", [({"seed": 1}, "another seed"), ({"engine": "torch"}, "another engine"), ({"epochs": 4}, "epochs 3, now 4")])
def test_other_parameters_do_not_touch_a_store(tmp_path, images, changes, told):
    plan = small_plan(tmp_path)
    open_store(plan, images)
    if plan.engine.name == "torch" and "engine" in changes:
        pytest.skip("there is only one engine here: no C++ compiler")
    with pytest.raises(UserError, match=told):
        open_store(small_plan(tmp_path, **changes), images)
    with pytest.raises(UserError, match="another images"):
        open_store(plan, subset(images, 70, 50))


def test_a_damaged_store_is_told(tmp_path, images):
    plan = small_plan(tmp_path)
    make_twins(plan, images, progress=False)
    (plan.folder / "original.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="not a readable population"):
        make_twins(plan, images, progress=False)
    (plan.folder / "store.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        make_twins(plan, images, progress=False)


def test_blocks_hold_only_like_models():
    models = model_table(get_zoo("mnist_fixed"), 400)
    rows = pd.DataFrame({"model": range(400), "level": np.nan})
    parts = blocks(rows, models)
    assert sorted(m for part in parts for m in part["model"]) == list(range(400))
    assert all(models.iloc[part["model"]][["activation", "optimizer", "dropout"]].drop_duplicates().shape[0] == 1 for part in parts)


RUN = """
import sys
from pathlib import Path
from zootwins import twins
from zootwins.datasets import load_images, subset
sys.path.insert(0, sys.argv[2])
from test_twins import small_plan
twins.SAVE_EVERY = 0.0
twins.make_twins(small_plan(Path(sys.argv[1]), n=4, epochs=int(sys.argv[3])), subset(load_images("digits"), 80, 50), progress=False)
"""


def test_a_killed_run_goes_on_to_the_same_end(tmp_path, images):
    epochs = 400  # long enough to be killed in the middle
    here = os.path.dirname(__file__)
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "killed"), here, str(epochs)])
    parts = tmp_path / "killed" / "digits_seed" / "parts"
    deadline = time.monotonic() + 120
    while not list(parts.glob("original-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "digits_seed" / "original.safetensors").exists()
    plan = small_plan(tmp_path / "killed", n=4, epochs=epochs)
    make_twins(plan, images, progress=False)
    whole = small_plan(tmp_path / "whole", n=4, epochs=epochs)
    make_twins(whole, images, progress=False)
    for stage in make_stages(plan):
        one, other = (load_population(p.folder / stage.name) for p in (plan, whole))
        assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)
    pd.testing.assert_frame_equal(load_metrics(plan), load_metrics(whole), check_exact=True)
    assert not [p.name for p in plan.folder.rglob(".*")] and not list(parts.iterdir())


def test_the_record_is_json(tmp_path, images):
    plan = small_plan(tmp_path, n=1)
    record = json.loads(json.dumps(run_record(plan, make_twins(plan, images, progress=False), images)))
    assert record["zoo"] == "digits_seed" and [s["stage"] for s in record["stages"]] == ["original", "mp", "vd"]
    assert all(s["model_samples_per_second"] > 0 for s in record["stages"])
