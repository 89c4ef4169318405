"""Phases on disk: the same as in memory, shared where chains begin alike, and resumed after kill -9."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from zootwins.averaging import copies, sparse_soup, uniform_soup
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.plans import make_plan
from zootwins.selectors import prunable
from zootwins.soups import APART, Chain, chain_table, make_soups, phase_name, phase_settings, phase_stage, read_candidates, read_soup, reprune
from zootwins.store import read_stage, read_stage_metrics
from zootwins.training import Recipe
from zootwins.twins import make_twins

SOUP = Chain(level=0.8, phases=2, m=2, epochs=1, lr=5e-3, selector="lamp")
ALONE = replace(SOUP, merge=APART)
LONG = replace(SOUP, epochs=6, m=6)  # 120 rows of 20 models: eight blocks of sixteen, of which six are under way at a time on two threads


@pytest.fixture(scope="module")
def images():
    return subset(load_images("digits"), 300, 200)


def planned(folder, n_models=3):
    plan = make_plan("digits_seed", n_models, methods="", store=str(folder), figures=str(folder))
    return replace(plan, zoo=replace(plan.zoo, epochs=3))


@pytest.fixture(scope="module")
def plan(tmp_path_factory, images):
    plan = planned(tmp_path_factory.mktemp("soups"))
    make_twins(plan, images, progress=False)
    make_soups(plan, images, [SOUP, ALONE], progress=False)
    return plan


def equal(first, second):
    return all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


def test_on_disk_as_in_memory(plan, images):
    originals = read_stage(plan.folder, "original")
    for chain in (SOUP, ALONE):
        m = 2 if chain is SOUP else 1
        memory = sparse_soup(originals, images, 0.8, Recipe("digits_seed", "imp", epochs=1, lr=5e-3), phases=2, m=m, selector="lamp")
        for phase in memory:
            candidates = read_candidates(plan, chain, phase.number)
            assert equal(candidates if m == 2 else candidates[::2], phase.candidates)
            if chain is SOUP:
                assert equal(read_soup(plan, SOUP, phase.number, images), phase.soup)


def test_only_what_is_missing_is_made(plan, images):
    before = {path: path.stat().st_mtime_ns for path in plan.folder.rglob("*.safetensors")}
    reports = make_soups(plan, images, [SOUP, ALONE, replace(SOUP, m=1)], progress=False)
    assert [report.made for report in reports] == [0] * 6
    assert before == {path: path.stat().st_mtime_ns for path in plan.folder.rglob("*.safetensors")}
    more = make_soups(plan, images, [replace(SOUP, m=3)], progress=False)
    assert [(report.made, report.reused) for report in more] == [(3, 6), (9, 0)]


def test_names_say_what_a_phase_depends_on(plan):
    first = lambda chain: phase_name(plan, chain, 1)
    second = lambda chain: phase_name(plan, chain, 2)
    for same in (replace(SOUP, m=5), replace(SOUP, merge="greedy"), ALONE):
        assert first(same) == first(SOUP) and second(same) != second(SOUP)
    assert second(replace(SOUP, m=1)) == second(ALONE) == second(replace(ALONE, m=7))
    for other in ({"lr": 1e-3}, {"epochs": 2}, {"selector": "global"}, {"schedule": "LLR"}, {"level": 0.9}, {"phases": 3}, {"warm_up": 0.1},
                  {"nesterov": True}, {"history": (1.0,)}, {"original_epochs": 9}):
        assert first(replace(SOUP, **other)) != first(SOUP)
    assert phase_settings(plan, SOUP, 2)["begins"] == {"phase": first(SOUP), "merge": "uniform", "m": 2}
    assert "-" not in first(SOUP) and (plan.folder / f"{first(SOUP)}.settings.json").exists()


def test_rows_and_metrics_know_their_copy(plan):
    stage = phase_stage(plan, SOUP, 2)
    metrics = read_stage_metrics(plan.folder, stage.name)
    assert len(metrics) == 3 * 2 * 2 and not metrics.duplicated(["model", "copy", "epoch"]).any()
    assert set(metrics["method"]) == {"imp"} and np.isclose(metrics["level"], 0.8).all() and metrics["agreement"].between(0, 1).all()
    assert np.allclose(metrics["sparsity"], round(0.8 * 2416) / 2416)
    assert read_candidates(plan, SOUP, 2).models["damage"].between(0, 1).all()


def test_later_masks_lie_within_earlier_ones(plan, images):
    before, after = read_soup(plan, SOUP, 1, images), read_soup(plan, SOUP, 2, images)
    assert not any(((after.weights[name] != 0) & (tensor == 0)).any() for name, tensor in prunable(before.weights).items())


def test_the_table_of_a_chain(plan, images):
    found = chain_table(plan, SOUP, images)
    assert set(found["row"]) == {"mean candidate", "best candidate", "best by validation", "SMS"} and len(found) == 2 * 4 * 3
    apart = chain_table(plan, ALONE, images)
    assert set(apart[apart["phase"] == 1]["row"]) == {"IMP"} and set(apart[apart["phase"] == 2]["row"]) == {"IMP", "IMP-RePrune"}
    same = lambda frame, row: frame[(frame["phase"] == 1) & (frame["row"] == row)]["test_acc"].tolist()
    assert same(found, "mean candidate") == same(apart, "IMP")


def test_repruning_reaches_the_level_again(plan):
    runs = read_candidates(plan, ALONE, 2)
    again, before = reprune(runs, 0.8, "lamp")
    zeros = sum((tensor == 0).flatten(1).sum(1) for tensor in prunable(again.weights).values())
    assert (zeros == round(0.8 * 2416)).all() and before.between(0.5, 0.8, inclusive="left").all()
    with pytest.raises(UserError, match="denser"):
        uniform_soup(runs)
    kept = reprune(copies(again, 2), 0.8, "lamp")
    assert equal(kept[0], again) and np.allclose(kept[1], round(0.8 * 2416) / 2416)


@pytest.mark.parametrize("change, message", [
    ({"merge": "mean"}, "uniform, greedy, learned, none"), ({"selector": "lampp"}, "lamp"), ({"m": 0}, "one copy"), ({"epochs": 0}, "one epoch"), ({"level": 1.0}, "below 1"),
    ({"phases": 0}, "one phase"), ({"schedule": "FT"}, "history"),
])
def test_impossible_chains_are_told_before_any_work(plan, images, change, message):
    before = sorted(plan.folder.iterdir())
    with pytest.raises(UserError, match=message) as error:
        make_soups(plan, images, [SOUP, replace(SOUP, **change)], progress=False)
    assert "\n" not in str(error.value) and sorted(plan.folder.iterdir()) == before


def test_candidates_that_are_not_there_are_named(plan):
    with pytest.raises(UserError, match="copy"):
        read_candidates(plan, replace(SOUP, m=9), 1)
    with pytest.raises(UserError, match="no finished stage"):
        read_candidates(plan, replace(SOUP, lr=0.1), 1)


KILLED = """
import sys
sys.path.insert(0, {here!r})
from test_soup_store import *
plan, images = planned({folder!r}, 20), subset(load_images("digits"), 100, 200)
make_soups(plan, images, [LONG], progress=False)
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_phase_costs_no_finished_work(tmp_path):
    images = subset(load_images("digits"), 100, 200)
    plan = planned(tmp_path / "killed", 20)
    make_twins(plan, images, progress=False)
    code = KILLED.format(here=os.path.dirname(__file__), folder=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    stage, deadline = plan.folder / phase_name(plan, LONG, 1), time.monotonic() + 60
    while not list(stage.glob("imp*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = sorted(path.name for path in stage.glob("imp*.safetensors"))
    assert finished and process.returncode == -signal.SIGKILL
    reports = make_soups(plan, images, [LONG], progress=False)
    assert reports[0].reused >= 1 and sum(report.made for report in reports) > 0 and set(finished) <= {path.name for path in stage.glob("imp*.safetensors")}
    whole = planned(tmp_path / "whole", 20)
    make_twins(whole, images, progress=False)
    make_soups(whole, images, [LONG], progress=False)
    for number in (1, 2):
        assert equal(read_candidates(plan, LONG, number), read_candidates(whole, LONG, number))
    assert not [path for path in plan.folder.rglob(".*") if path.suffix in (".safetensors", ".json")]
