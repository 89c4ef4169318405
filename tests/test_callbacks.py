"""Who listens hears every epoch of every row that a run makes, once and in order, and cannot damage the store."""
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

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
    found = train(zoo, IMAGES, Recipe("digits_seed", "original", 2), progress=False, on_epoch=lambda *told: ear.append(told))
    assert [(stage, epoch) for stage, _, epoch, _ in ear] == [("original", 0), ("original", 1), ("original", 2)]
    heard = pd.concat([metrics for *_, metrics in ear]).sort_values(["model", "epoch"], ignore_index=True)
    assert heard.equals(found.metrics) and ear[0][1]["seed"].tolist() == [1, 2, 3]
