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

from zootwins.averaging import average, copies, gradual_soup, learned_soup, sparse_soup, train_copies, uniform_soup
from zootwins.averaging import test_accuracy as accuracy_on_test_images
from zootwins.blocks import cut_blocks, cut_rows, train_block
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.lanes import LANES, lane_count
from zootwins.plans import make_plan
from zootwins.population import initial_population
from zootwins.selectors import prunable, prune
from zootwins.soups import (
    APART, GMP, GMP_SOUP, LONGER, MORE_PHASES, SWA, VARIATIONAL, Chain, Gradual, chain_table, copy_settings,
    gradual_stage, make_soups, make_variational, phase_name, phase_names, phase_settings, phase_stages, read_candidates,
    read_gradual, read_soup, read_variational, reprune, story_chains, story_table, variational_table,
)
from zootwins.store import read_stage, read_stage_metrics
from zootwins.training import Recipe
from zootwins.twins import make_twins, read_history

SOUP = Chain(level=0.8, phases=2, m=2, epochs=1, lr=5e-3, selector="lamp")
ALONE = replace(SOUP, merge=APART)
LONG = replace(
    SOUP, epochs=6, m=6
)  # 120 rows of 20 models: eight blocks of sixteen, of which six are under way at a time on two threads


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
        memory = sparse_soup(
            originals, images, 0.8, Recipe("digits_seed", "imp", epochs=1, lr=5e-3), phases=2, m=m, selector="lamp"
        )
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
    for other in (
        {"lr": 1e-3}, {"epochs": 2}, {"selector": "global"}, {"schedule": "LLR"}, {"level": 0.9}, {"phases": 3},
        {"warm_up": 0.1}, {"nesterov": True}, {"history": (1.0,)}, {"original_epochs": 9},
    ):
        assert first(replace(SOUP, **other)) != first(SOUP)
    assert phase_settings(plan, SOUP, 2)["begins"] == {"phase": first(SOUP), "merge": "uniform", "m": 2}
    assert "-" not in first(SOUP) and (plan.folder / f"{first(SOUP)}.settings.json").exists()


def test_rows_and_metrics_know_their_copy(plan):
    (stage,) = phase_stages(plan, SOUP, 2)
    metrics = read_stage_metrics(plan.folder, stage.name)
    assert len(metrics) == 3 * 2 * 2 and not metrics.duplicated(["model", "copy", "epoch"]).any()
    assert (
        set(metrics["method"]) == {"imp"}
        and np.isclose(metrics["level"], 0.8).all()
        and metrics["agreement"].between(0, 1).all()
    )
    assert np.allclose(metrics["sparsity"], round(0.8 * 2416) / 2416)
    assert read_candidates(plan, SOUP, 2).models["damage"].between(0, 1).all()


def test_later_masks_lie_within_earlier_ones(plan, images):
    before, after = read_soup(plan, SOUP, 1, images), read_soup(plan, SOUP, 2, images)
    assert not any(
        ((after.weights[name] != 0) & (tensor == 0)).any() for name, tensor in prunable(before.weights).items()
    )


def test_the_table_of_a_chain(plan, images):
    found = chain_table(plan, SOUP, images)
    assert (
        set(found["row"]) == {"mean candidate", "best candidate", "best by validation", "SMS", "prediction ensemble"}
        and len(found) == 2 * 5 * 3
    )
    apart = chain_table(plan, ALONE, images)
    assert set(apart[apart["phase"] == 1]["row"]) == {"IMP", "IMP ensemble"} and set(
        apart[apart["phase"] == 2]["row"]
    ) == {"IMP", "IMP ensemble", "IMP-RePrune"}
    same = lambda frame, row: frame[(frame["phase"] == 1) & (frame["row"] == row)]["test_acc"].tolist()
    assert same(found, "mean candidate") == same(apart, "IMP") and same(found, "prediction ensemble") == same(
        apart, "IMP ensemble"
    )


def test_repruning_reaches_the_level_again(plan):
    runs = read_candidates(plan, ALONE, 2)
    again, before = reprune(runs, 0.8, "lamp")
    zeros = sum((tensor == 0).flatten(1).sum(1) for tensor in prunable(again.weights).values())
    assert (zeros == round(0.8 * 2416)).all() and before.between(0.5, 0.8, inclusive="left").all()
    with pytest.raises(UserError, match="denser"):
        uniform_soup(runs)
    kept = reprune(copies(again, 2), 0.8, "lamp")
    assert equal(kept[0], again) and np.allclose(kept[1], round(0.8 * 2416) / 2416)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"merge": "mean"}, "uniform, greedy, learned, distilled, none"), ({"selector": "lampp"}, "lamp"),
        ({"m": 0}, "one copy"), ({"epochs": 0}, "one epoch"), ({"level": 1.0}, "below 1"), ({"phases": 0}, "one phase"),
        ({"schedule": "FT"}, "history"), ({"varied": "dropout", "values": (0.1, 0.2)}, "seed, wd, lr, epochs"),
        ({"varied": "wd"}, "a value each"), ({"values": (1.0, 2.0)}, "no values"),
        ({"varied": "wd", "values": (1e-3,)}, "2 copies, 1 values"),
        ({"varied": "lr", "values": (0.0, 1e-3)}, "at least 0"),
        ({"varied": "epochs", "values": (1, 1.5)}, "whole numbers"), ({"wd": -0.1}, "at least 0"),
        ({"varied": "wd", "values": (-1e-3, 0.0)}, "at least 0"),
        ({"varied": "epochs", "values": (1, float("nan"))}, "whole"),
        ({"varied": "epochs", "values": (1, 4), "schedule": "LRW", "history": (1.0, 0.5, 0.1)}, "fewer epochs"),
    ],
)
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


GOLDEN = {  # names in stores that were made before wd, swa and varied were known
    Chain(): ("imp54a6491a68668474", "imp0067895ae7565175", "imp9c75c3e2be9de6a8"),
    Chain(m=5, merge="greedy", lr=5e-3, selector="lamp"): (
        "impd5e4d0f873c7523c",
        "imp358232ee5d10308f",
        "impc8471ea8dda8425c",
    ),
    Chain(merge="none", lr=5e-3, selector="lamp"): (
        "impd5e4d0f873c7523c",
        "imp73e69a419dfbccb7",
        "impc85c3548ab07119d",
    ),
    Chain(
        level=0.95, merge="learned", schedule="ALLR", history=(1.0,) * 50, original_epochs=50, warm_up=0.1,
        nesterov=True,
    ): ("imp4a641f6dee47256f", "imp7a9aa93886433be5", "imp42fd4e076ae8290f"),
}


@pytest.mark.parametrize("chain", GOLDEN)
def test_names_of_stores_that_exist_stay(tmp_path, chain):
    plan = make_plan("usps_seed", 4, methods="", store=str(tmp_path), figures=str(tmp_path))
    assert tuple(phase_name(plan, chain, number) for number in (1, 2, 3)) == GOLDEN[chain]
    settings = phase_settings(plan, Chain(), 2)
    assert settings == {
        "batch_size": 10,
        "begins": {"m": 3, "merge": "uniform", "phase": GOLDEN[Chain()][0]},
        "epochs": 5,
        "history": [],
        "level": 0.7845565309968117,
        "lr": None,
        "nesterov": False,
        "original_epochs": None,
        "phase": 2,
        "schedule": "constant",
        "selector": "global",
        "warm_up": None,
    }


def test_one_copy_is_iterative_pruning_bit_for_bit(plan, images):
    alone = replace(SOUP, m=1)
    make_soups(plan, images, [alone], progress=False)
    for number in (1, 2):
        runs = read_candidates(plan, ALONE, number)[::2]
        assert equal(read_candidates(plan, alone, number), runs) and equal(read_soup(plan, alone, number, images), runs)


@pytest.mark.parametrize("varied, values", [("wd", (1e-3, 1e-2)), ("lr", (5e-3, 1e-3)), ("epochs", (1, 2))])
def test_copies_with_a_value_of_their_own(plan, images, varied, values):
    chain = replace(SOUP, varied=varied, values=values)
    reports = make_soups(plan, images, [chain], progress=False)
    assert sum(report.made for report in reports) == 3 * (1 if varied in ("lr", "epochs") else 2) + 6
    found = read_candidates(plan, chain, 1)
    assert found.models["copy"].tolist() == [0, 1] * 3 and found.models[varied].tolist() == list(values) * 3
    second = copies(read_stage(plan.folder, "original"), 2, **{varied: values})
    recipe, name = (
        Recipe("digits_seed", "imp, phase 1", epochs=1, lr=None if varied == "lr" else 5e-3),
        phase_names(plan, chain, 1),
    )
    pruned, masks = prune(second, 1 - 0.2**0.5, "lamp")
    assert equal(found, train_copies(pruned, images, recipe, masks).population)
    assert len(set(name)) == 2 and name[0] == phase_name(plan, copy_settings(chain, 0), 1)
    assert phase_settings(plan, chain, 2, 1)["begins"] == {"phases": name, "merge": "uniform", "m": 2}
    assert varied != "lr" or name[0] == phase_name(plan, SOUP, 1)  # shared with a chain of that rate
    apart = replace(chain, merge=APART)
    assert phase_settings(plan, apart, 2, 1)["begins"] == {"phase": name[1], "merge": APART}


def test_weights_averaged_along_every_phase(plan, images):
    chain = replace(ALONE, m=1, epochs=2, swa=True)
    make_soups(plan, images, [chain, replace(chain, swa=False)], progress=False)
    assert phase_settings(plan, chain, 1)["swa"] and "swa" not in phase_settings(plan, ALONE, 1)
    (stage,) = phase_stages(plan, chain, 1)
    way = [read_stage(plan.folder, stage.name, epoch) for epoch in (1, 2)]
    found = read_candidates(plan, chain, 1)
    assert equal(way[1], read_candidates(plan, replace(chain, swa=False), 1))
    assert all(
        torch.allclose(tensor, (way[0].weights[name] + way[1].weights[name]) / 2, atol=1e-7)
        for name, tensor in found.weights.items()
    )
    before, after = found, read_stage(plan.folder, phase_stages(plan, chain, 2)[0].name, 0)
    kept = [(after.weights[name] != 0) for name in prunable(after.weights)]
    assert all(
        torch.equal(after.weights[name][mask], before.weights[name][mask])
        for name, mask in zip(prunable(after.weights), kept)
    )
    assert set(chain_table(plan, chain, images)["row"]) == {"IMP + SWA"}


def test_a_soup_distilled_from_the_originals(plan, images):
    chain = replace(SOUP, merge="distilled")
    make_soups(plan, images, [chain], progress=False)
    originals, candidates = read_stage(plan.folder, "original"), read_candidates(plan, chain, 1)
    assert equal(read_soup(plan, chain, 1, images), learned_soup(candidates, images, teacher=originals)[0])
    assert not equal(read_soup(plan, chain, 1, images), read_soup(plan, replace(SOUP, merge="learned"), 1, images))


GRADUAL = Gradual(level=0.8, events=2, m=2, epochs=4, lr=5e-3, selector="lamp")


@pytest.mark.parametrize("gradual", [GRADUAL, replace(GRADUAL, scratch=True, epochs=3), replace(GRADUAL, m=1)])
def test_gradual_runs_on_disk_as_in_memory(plan, images, gradual):
    (report,) = make_soups(plan, images, [gradual], progress=False)
    stage = gradual_stage(plan, gradual)
    assert report.made == 3 * gradual.m and make_soups(plan, images, [gradual], progress=False)[0].made == 0
    start = (
        initial_population(plan.models, "cnn_small_1ch", "digits_seed")
        if gradual.scratch
        else read_stage(plan.folder, "original")
    )
    recipe = replace(stage.recipe, zoo="digits_seed")
    assert equal(read_gradual(plan, gradual), gradual_soup(start, images, recipe, stage.events, gradual.m, "lamp"))
    metrics = read_stage_metrics(plan.folder, stage.name)
    last, levels = metrics[metrics["epoch"] == gradual.epochs], dict(stage.events)
    assert (
        np.allclose(last["sparsity"], round(0.8 * 2416) / 2416)
        and set(metrics["method"]) == {"gmp"}
        and last["agreement"].between(0.1, 1).all()
    )
    for epoch in range(gradual.epochs):  # what was measured after an epoch was pruned before it
        due = max([level for at, level in levels.items() if at < max(epoch, 1)], default=0.0)
        assert np.allclose(metrics[metrics["epoch"] == epoch]["sparsity"], round(due * 2416) / 2416)


def test_a_gradual_run_that_is_stopped_goes_on_to_the_same_bits(plan, images, tmp_path):
    (block,) = cut_blocks(gradual_stage(plan, GRADUAL), plan.engine, read_stage(plan.folder, "original"))
    whole = list(train_block(block, images, plan.engine))[-1]
    for stop_at in (1, 2, 3):  # before, at and after the second event
        task = train_block(block, images, plan.engine, "cpu", tmp_path)
        while next(task).epoch < stop_at:
            pass
        task.close()
        steps = list(train_block(block, images, plan.engine, "cpu", tmp_path))
        assert steps[0].skipped == stop_at * 6 * 300 and equal(steps[-1].populations[4], whole.populations[4])
        for path in tmp_path.iterdir():
            path.unlink()


def test_gradual_runs_keep_the_copies_of_a_model_together(plan):
    stage = gradual_stage(replace(plan, n_models=40), replace(GRADUAL, m=3))
    parts = [rows["model"].value_counts() for rows in cut_rows(stage.rows, LANES, 3)]
    assert (
        len(stage.rows) == 120
        and all((part == 3).all() for part in parts)
        and max(map(sum, parts)) <= max(lane_count(), 3)
    )
    assert [len(rows) for rows in cut_rows(stage.rows, replace(LANES, width=lambda: 2), 3)] == [3] * 40


@pytest.mark.parametrize(
    "change, message",
    [
        ({"events": 0}, "one event"), ({"events": 5}, "an epoch or step after each"),
        ({"schedule": "ALLR", "original_epochs": 3}, "ALLR"), ({"m": 0}, "one copy"), ({"selector": "l"}, "lamp"),
        ({"level": 1.0}, "below 1"),
    ],
)
def test_impossible_gradual_runs(plan, images, change, message):
    with pytest.raises(UserError, match=message) as error:
        make_soups(plan, images, [replace(GRADUAL, **change)], progress=False)
    assert "\n" not in str(error.value)


def test_a_story_has_a_row_for_every_baseline(plan, images):
    chains = story_chains(replace(SOUP, m=1), ["uniform"], [2], (APART, LONGER, MORE_PHASES, SWA, GMP))
    assert list(chains) == [
        ("uniform", 2), (APART, 2), (LONGER, 2), (MORE_PHASES, 2), (SWA, 2), (GMP, 2), (GMP_SOUP, 2),
    ]
    assert (
        chains[MORE_PHASES, 2].phases == 4
        and chains[GMP_SOUP, 2].m == 2
        and chains[GMP, 2].epochs == 2
        and chains[GMP, 2].events == 2
    )
    make_soups(plan, images, chains.values(), progress=False)
    found = story_table(plan, chains, images)
    by_phase = found.groupby("row")["phase"].unique().map(list).to_dict()
    both, last = [1, 2], [2]
    assert by_phase == {
        "SMS": both, "mean candidate": both, "best candidate": both, "best by validation": both,
        "prediction ensemble": both, "IMP": both, "IMP ensemble": both, "IMP-RePrune": last, "IMP_mx": both,
        "IMP with m phases": both, "IMP + SWA": both, "GMP": last, "GMP+SMS": last, "GMP+SMS mean candidate": last,
    }
    assert (
        set(found["varied"]) == {"seed"}
        and found.groupby("phase")["sparsity"].nunique().eq(1).all()
        and found["test_acc"].between(0, 1).all()
    )
    record = [each["stage"] for each in read_history(plan.folder)]
    assert record[0] == "original" and {phase_name(plan, SOUP, 2), gradual_stage(plan, chains[GMP, 2]).name} <= set(
        record
    )


def test_variational_copies_and_their_soups(plan, images):
    short = replace(plan, zoo=replace(plan.zoo, epochs=3, vd_epochs=2), folder=plan.folder.parent / "vd")
    make_twins(replace(short, methods=("vd",)), images, progress=False)
    report = make_variational(short, images, 2, progress=False)
    assert (
        report.stage == VARIATIONAL
        and report.made == 6
        and make_variational(short, images, 2, progress=False).made == 0
    )
    for epoch in (0, 2):
        runs = read_variational(short, 2, epoch)
        assert equal(runs[::2], read_stage(short.folder, "vd", epoch)) and equal(runs[1::2], runs[::2]) == (epoch == 0)
    found = variational_table(short, 2, images, (1, 2), window=2)
    assert len(found) == 2 * 3 * 3 and set(found["row"]) == {"VD", "VD soup", "VD + SWA"}
    soup = average(read_variational(short, 2, 2))
    by_hand = accuracy_on_test_images(soup, images)
    assert np.allclose(found[(found["epoch"] == 2) & (found["row"] == "VD soup")]["test_acc"], by_hand)
    same = lambda row: found[(found["epoch"] == 1) & (found["row"] == row)]["test_acc"].tolist()
    assert same("VD") == same("VD + SWA")  # one epoch is its own average
    with pytest.raises(UserError, match="one copy"):
        make_variational(short, images, 0)


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
    assert (
        reports[0].reused >= 1
        and sum(report.made for report in reports) > 0
        and set(finished) <= {path.name for path in stage.glob("imp*.safetensors")}
    )
    whole = planned(tmp_path / "whole", 20)
    make_twins(whole, images, progress=False)
    make_soups(whole, images, [LONG], progress=False)
    for number in (1, 2):
        assert equal(read_candidates(plan, LONG, number), read_candidates(whole, LONG, number))
    assert not [path for path in plan.folder.rglob(".*") if path.suffix in (".safetensors", ".json")]
