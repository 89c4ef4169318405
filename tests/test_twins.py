"""Stages on disk: resumed, extended, never mixed up."""
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from small import IMAGES, different, in_child, killed_at, left_over, says, small_plan
from zootwins import blocks, twins
from zootwins.core import UserError
from zootwins.metrics import METRIC_COLUMNS
from zootwins.store import finished_files
from zootwins.states import choose_states
from zootwins.twins import (
    Interrupted, load_metrics, load_models, load_stage, make_twins, partner_agreements, read_history,
    removal_frequencies, run_record,
)


def run(plan):
    return make_twins(plan, IMAGES, progress=False)


def test_the_reference_engine_makes_every_stage(tmp_path):
    plan = small_plan(tmp_path, n=2, epochs=1, levels="90", engine="torch")
    plan = replace(plan, zoo=replace(plan.zoo, mp_epochs=1, vd_epochs=1))
    assert [r.made for r in run(plan)] == [2, 2, 2] and len(load_metrics(plan)) == 2 * 3 * 2


def test_a_run_makes_every_stage_and_its_metrics(tmp_path):
    plan = small_plan(tmp_path)
    assert [r.made for r in run(plan)] == [3, 6, 3]
    metrics = load_metrics(plan)
    assert list(metrics.columns) == METRIC_COLUMNS and len(metrics) == 3 * (4 + 2 * 3 + 3)
    assert metrics.query("method == 'vd' and epoch == 0")["agreement"].min() > 0.9
    at_90 = metrics.query("level == 0.9")
    assert np.allclose(at_90["sparsity"], round(0.9 * 2416) / 2416) and at_90["agreement"].between(0, 1).all()
    assert np.allclose(metrics["ggap"], metrics["train_acc"] - metrics["test_acc"])
    original, mp = (load_stage(plan, stage) for stage in ("original", "mp"))
    assert len(mp) == 6 and mp.models["level"].tolist() == [0.0] * 3 + [0.9] * 3
    level_0 = metrics.query("level == 0 and epoch == 0")["test_acc"].to_numpy()
    assert np.allclose(level_0, metrics.query("method == 'original' and epoch == 3")["test_acc"]) and len(original) == 3


def test_more_models_and_levels_are_added_and_nothing_is_changed(tmp_path, trained):
    plan = small_plan(tmp_path, n=2, epochs=6)
    run(plan)
    before = load_metrics(plan)
    larger = small_plan(tmp_path, n=5, epochs=6, levels="0,50,90")
    assert [r.made for r in run(larger)] == [3, 11, 3]
    assert load_metrics(plan).equals(before)
    if plan.engine.name == "lanes":  # bit for bit, whoever trains beside whom
        assert different(larger, trained) is None
    for part in (plan, larger):  # twins find their own originals, in whatever order they were made
        metrics = load_metrics(part)
        states = choose_states(metrics, level=0.9)
        own = partner_agreements(part, IMAGES, states).query("partner == 'its own original'")
        expected = (
            metrics.merge(states, on=["zoo", "method", "level", "epoch"])
            .groupby("method")["agreement"]
            .agg(["mean", "size"])
        )
        assert dict(zip(own["method"], own["mean"])) == pytest.approx((100 * expected["mean"]).to_dict())
        assert own["n"].tolist() == expected["size"].tolist()


def test_a_single_model_has_no_partners(tmp_path):
    plan = small_plan(tmp_path, n=1, methods="mp")
    run(plan)
    assert partner_agreements(plan, IMAGES, choose_states(load_metrics(plan))).empty


def test_without_methods_there_are_originals_and_nothing_else(tmp_path):
    plan = small_plan(tmp_path, n=2, methods="", levels="")
    assert [(r.stage, r.made) for r in run(plan)] == [("original", 2)]
    assert set(load_metrics(plan)["method"]) == {"original"} and removal_frequencies(plan).empty


def test_the_record_is_json(tmp_path):
    plan = small_plan(tmp_path, n=1)
    record = json.loads(json.dumps(run_record(plan, run(plan), IMAGES)))
    assert record["zoo"] == "digits_seed" and [s["stage"] for s in record["stages"]] == ["original", "mp", "vd"]
    assert all(s["model_samples_per_second"] > 0 for s in record["stages"])


def test_the_history_is_told(tmp_path):
    plan = small_plan(tmp_path, n=1)
    run(plan)
    told = [(h["stage"], h["made"], h["source"], h["taken_up"]) for h in read_history(plan.folder)]
    assert told == [("original", 1, "train", 0), ("mp", 2, "train", 0), ("vd", 1, "train", 0)]
    run(plan)
    assert len(read_history(plan.folder)) == 3


def test_a_store_names_no_commit_that_is_not_zootwins(tmp_path, monkeypatch):
    monkeypatch.setattr(twins, "files", lambda package: tmp_path)
    assert twins._commit() is None


def test_models_as_they_are_judged(trained):
    metrics = load_metrics(trained)
    for stage, rows in metrics[metrics["epoch"] == metrics.groupby("method")["epoch"].transform("max")].groupby(
        "method"
    ):
        models = load_models(trained.folder / stage)
        zeros = [
            float(
                sum((layer.weight == 0).sum() for layer in models.to_module(i).module_list if hasattr(layer, "weight"))
            )
            for i in range(len(models))
        ]
        assert np.allclose(np.array(zeros) / 2416, rows.sort_values(["level", "model"])["sparsity"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Four models and their twins, undisturbed."
    plan = small_plan(tmp_path_factory.mktemp("whole"), n=4, levels="0,50,80")
    run(plan)
    return plan


@pytest.mark.parametrize("at", [2, 9, 17, 23, 31])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, whole, monkeypatch, at):
    monkeypatch.setattr(blocks, "SAVE_EVERY", 0.0)
    plan = small_plan(tmp_path, n=4, levels="0,50,80")
    assert killed_at(at, plan.folder, lambda: run(plan)) == -signal.SIGKILL
    run(plan)
    assert different(plan, whole) is None and not left_over(plan)


def test_rows_that_a_killed_run_has_finished_are_taken_up_and_told(tmp_path, whole, capsys, monkeypatch):
    plan = small_plan(tmp_path, n=4, levels="0,50,80")

    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(twins, "write_manifest", killed)
        run(plan)
    assert finished_files(plan.folder, "original")
    with pytest.raises(UserError, match="no finished stage original"):
        load_metrics(plan)
    assert run(plan)[0].made == 0 and "are taken up" in capsys.readouterr().out
    assert read_history(plan.folder)[0]["taken_up"] == 1 and different(plan, whole) is None


def at_once(*plans):
    "Run plans side by side, each in a process of its own."
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(plan,)) for plan in plans]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_two_equal_runs_on_one_store_both_end_well(tmp_path, whole, capfd):
    plan = small_plan(tmp_path, n=4, levels="0,50,80")
    assert at_once(plan, plan) == [0, 0]
    assert different(plan, whole) is None and not left_over(plan)
    assert [h["made"] for h in read_history(plan.folder)] == [4, 12, 4]
    assert "this one waits for it" in capfd.readouterr().out


def test_two_different_runs_on_one_store_both_end_well(tmp_path, whole):
    assert at_once(small_plan(tmp_path, n=4, levels="50"), small_plan(tmp_path, n=2, levels="0,80")) == [0, 0]
    plan = small_plan(tmp_path, n=4, levels="0,50,80")
    assert run(plan)[1].made == 4 and different(plan, whole) is None and not left_over(plan)


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_whoever_interrupts_keeps_the_finished_epochs(tmp_path, engine):
    """By Ctrl-C or SIGTERM, in the middle of a stage; the user sees one line, and the handlers are as they were."""
    plan = small_plan(tmp_path, n=2, epochs=30, engine=engine, methods="")
    before = signal.getsignal(signal.SIGTERM)

    def stopped(number):
        seen = 0

        def train_epoch(state, *arguments):
            nonlocal seen
            seen += 1
            if seen == 6:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            return plan.engine.train_epoch(state, *arguments)
        with pytest.raises(twins.Interrupted, match="what is done is kept") as error:
            run(replace(plan, engine=replace(plan.engine, train_epoch=train_epoch)))
        assert says(error.value) and error.value._render_traceback_() == [str(error.value)]

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        stopped(number)
    assert signal.getsignal(signal.SIGTERM) is before
    report, = run(plan)
    assert report.model_samples == 15 * 2 * 80  # three times five of thirty epochs had been done
    undisturbed = small_plan(tmp_path / "whole", n=2, epochs=30, engine=engine, methods="")
    run(undisturbed)
    assert different(plan, undisturbed) is None and not left_over(plan)


SIGNALLED = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small import IMAGES, small_plan
from zootwins.twins import Interrupted, make_twins
plan = small_plan(Path(sys.argv[2]), n=4, epochs=6000)

def train_epoch(state, *arguments):
    done = plan.engine.train_epoch(state, *arguments)
    if state.epoch == 5:
        print("begun", flush=True)
    return done

try:
    make_twins(replace(plan, engine=replace(plan.engine, train_epoch=train_epoch)), IMAGES, progress=False)
except Interrupted as told:
    print(told)
"""


def test_a_process_that_gets_a_signal_says_one_line_and_ends(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED, str(Path(__file__).parent), str(tmp_path)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 0 and wrong == "" and re.fullmatch(r"Interrupted: what is done is kept in .*\n", said)
    assert len(list((tmp_path / "digits_seed" / "parts").glob("original-*"))) == 1


def test_a_lack_of_memory_is_one_sentence(tmp_path):
    plan = small_plan(tmp_path, n=2)
    for error in (MemoryError("malloc of size 64 failed"), RuntimeError("can't start new thread")):
        def none_left(*_, error=error):
            raise error
        with pytest.raises(UserError, match="There is not enough memory") as told:
            run(replace(plan, engine=replace(plan.engine, train_epoch=none_left)))
        assert says(told.value)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        def broken(*_):
            raise RuntimeError("a mistake of ours")
        run(replace(plan, engine=replace(plan.engine, train_epoch=broken)))


def test_a_limit_on_memory_ends_in_a_run_or_a_sentence(tmp_path):
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for extra in (2, 8, 32, 128, 2048):
        def limited(extra=extra):
            resource.setrlimit(resource.RLIMIT_AS, (now + extra * 2**20,) * 2)
            try:
                run(small_plan(tmp_path / str(extra), n=2))
            except UserError as error:
                assert says(error)
        assert in_child(limited) == 0, extra


def test_an_interruption_that_python_swallows_stops_the_run_all_the_same(tmp_path):
    """Exceptions in callbacks of the garbage collector are printed and forgotten."""
    stop, before = threading.Event(), signal.getsignal(signal.SIGINT)
    with pytest.raises(twins.Interrupted, match="what is done is kept"), twins.interruptible(tmp_path, stop):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        raise InterruptedError("The work was interrupted.")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(InterruptedError), twins.interruptible(tmp_path, threading.Event()):
        raise InterruptedError("Another thread wanted no more.")
