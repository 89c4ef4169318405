"""Who listens hears every epoch of every row that a run makes, once and in order, and cannot damage the store."""
import json
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from small import IMAGES, different, left_over, says, small_plan
from zootwins.core import UserError
from zootwins.engines import train
from zootwins.population import sample_population
from zootwins.store import row_names
from zootwins.training import Recipe
from zootwins.twins import load_metrics, make_twins


class Ear:
    "Writes down what it hears, and notices if it is called twice at once."

    def __init__(self, fail_at=None):
        self.heard, self.order, self.busy, self.fail_at = [], [], threading.Lock(), fail_at

    def __call__(self, stage, rows, epoch, metrics):
        assert self.busy.acquire(blocking=False), "called twice at once"
        try:
            assert row_names(metrics) == row_names(rows) and (metrics["epoch"] == epoch).all() and "activation" in rows
            self.order.append((stage, tuple(row_names(rows)), epoch))
            if len(self.order) == self.fail_at:
                raise ValueError("no space\nleft on device")
            self.heard.append(metrics)
        finally:
            self.busy.release()

    @property
    def metrics(self):
        return pd.concat(self.heard).sort_values(["method", "level", "model", "epoch"], ignore_index=True)


def stored(plan):
    return load_metrics(plan).sort_values(["method", "level", "model", "epoch"], ignore_index=True)


@pytest.fixture
def pool(monkeypatch):
    "An executor whose workers find our images under their name."
    monkeypatch.setattr("zootwins.workers.load_images", lambda *_: IMAGES)
    monkeypatch.setattr("zootwins.workers._loaded", {})
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.mark.parametrize("executor", [False, True], ids=["threads", "executor"])
def test_every_epoch_of_every_row_is_told_once_and_in_order(tmp_path, pool, executor):
    plan = small_plan(tmp_path, n=5)
    plan, ear = replace(plan, engine=replace(plan.engine, width=lambda: 2, workers=lambda: 2)), Ear()
    make_twins(plan, IMAGES, progress=False, workers=pool if executor else None, on_epoch=ear)
    pd.testing.assert_frame_equal(ear.metrics[stored(plan).columns], stored(plan))
    assert max(Counter(ear.order).values()) == 1
    for block in {(stage, rows) for stage, rows, _ in ear.order}:
        told = [epoch for stage, rows, epoch in ear.order if (stage, rows) == block]
        assert told == list(range(len(told)))
    again = Ear()
    make_twins(plan, IMAGES, progress=False, on_epoch=again)
    assert again.order == []  # all of it was there


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    plan = small_plan(tmp_path_factory.mktemp("undisturbed"), n=2, epochs=3)
    make_twins(plan, IMAGES, progress=False)
    return plan


@pytest.mark.parametrize("fail_at", [1, 4, 9])
def test_a_failure_is_a_sentence_and_the_next_run_goes_on_to_the_same_end(tmp_path, undisturbed, fail_at):
    plan = small_plan(tmp_path, n=2, epochs=3)
    with pytest.raises(UserError, match="on_epoch failed after epoch .*ValueError: no space left on device") as told:
        make_twins(plan, IMAGES, progress=False, on_epoch=Ear(fail_at))
    assert says(told.value)
    ear = Ear()
    make_twins(plan, IMAGES, progress=False, on_epoch=ear)
    assert different(plan, undisturbed) is None and left_over(plan) == []
    unfinished = {(stage, rows) for stage, rows, _ in ear.order}
    for block in unfinished:  # told from their first epoch, whatever had been done
        assert [epoch for stage, rows, epoch in ear.order if (stage, rows) == block][0] == 0


def test_a_failure_with_an_executor_keeps_what_came(tmp_path, pool):
    plan = small_plan(tmp_path, n=4, methods="vd")
    plan = replace(plan, zoo=replace(plan.zoo, epochs=1, vd_epochs=1), engine=replace(plan.engine, width=lambda: 2))
    with pytest.raises(UserError, match="on_epoch failed"):
        make_twins(plan, IMAGES, progress=False, workers=pool, on_epoch=Ear(2))
    reports = make_twins(plan, IMAGES, progress=False)
    assert reports[0].reused > 0 and sum(report.made + report.reused for report in reports) == 8


def test_an_interruption_passes_through(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="what is done is kept"):
        make_twins(small_plan(tmp_path, n=1), IMAGES, progress=False, on_epoch=interrupt)


def test_training_in_memory_is_heard(trained):
    ear, zoo = [], sample_population(trained.zoo, 3)
    found = train(
        zoo, IMAGES, Recipe("digits_seed", "original", 2), progress=False, on_epoch=lambda *told: ear.append(told)
    )
    assert [(stage, epoch) for stage, _, epoch, _ in ear] == [("original", 0), ("original", 1), ("original", 2)]
    heard = pd.concat([metrics for *_, metrics in ear]).sort_values(["model", "epoch"], ignore_index=True)
    assert heard.equals(found.metrics) and ear[0][1]["seed"].tolist() == [1, 2, 3]


RECIPES = Path(__file__).parents[1] / "nbs" / "tutorials" / "watch_a_run.ipynb"


def recipe(package):
    "The code of the tutorial's recipe that imports a package."
    cells = ["".join(cell["source"]) for cell in json.loads(RECIPES.read_text(encoding="utf-8"))["cells"]]
    blocks = [block for cell in cells for block in re.findall(r"```python\n(.*?)```", cell, re.S)]
    return next(block for block in blocks if package in block)


@pytest.fixture
def logged(tmp_path, monkeypatch):
    "Runs a recipe of the tutorial in an empty folder; gives its names, and the metrics that it was told."
    def run(package):
        pytest.importorskip(package)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        names = {"row_names": row_names}
        exec(recipe(package), names)
        plan = small_plan(tmp_path / "store", n=2, epochs=2, levels="90")
        make_twins(plan, IMAGES, progress=False, on_epoch=names["on_epoch"])
        return names, load_metrics(plan)

    return run


def test_the_recipe_for_tensorboard(logged, tmp_path):
    names, metrics = logged("tensorboard")
    names["writer"].close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "tensorboard" / "digits_seed")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("mp test_acc/1 at 0.9")]
    wanted = metrics.query("method == 'mp' and model == 1")
    assert curve == [(epoch, pytest.approx(value)) for epoch, value in zip(wanted["epoch"], wanted["test_acc"])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["sqlite", "file"])
def test_the_recipe_for_mlflow(logged, monkeypatch, place):
    if place == "file":  # the older store, as a folder of files
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        there = recipe("mlflow").replace("sqlite:///mlflow.db", "file:./mlruns")
        monkeypatch.setitem(globals(), "recipe", lambda package: there)
    names, metrics = logged("mlflow")
    client, runs = names["client"], names["runs"]
    assert len(runs) == 6 and len(client.search_runs([names["experiment"]])) == 6
    run = runs["vd", "1"]
    wanted = metrics.query("method == 'vd' and model == 1")
    assert [(m.step, m.value) for m in client.get_metric_history(run, "sparsity")] == list(
        zip(wanted["epoch"], wanted["sparsity"])
    )
    assert (
        client.get_run(run).data.params["seed"] == "2"
        and client.get_run(runs["mp", "0 at 0.9"]).data.params["level"] == "0.9"
    )


def test_the_recipe_for_weights_and_biases(logged, tmp_path):
    names, metrics = logged("wandb")
    last = metrics.query("method == 'vd' and model == 0 and epoch == 2")["test_acc"].item()
    assert names["run"].summary["vd/0/test_acc"] == pytest.approx(last) and names["run"].summary["epoch"] == 2
    names["run"].finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
