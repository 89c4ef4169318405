"""Stages on disk: resumed, extended, never mixed up."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from zootwins import lanes, twins
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.metrics import METRIC_COLUMNS
from zootwins.population import Population, load_population, sample_population
from zootwins.published import write_zoo
from zootwins.tables import choose_states
from zootwins.training import TORCH, groups
from zootwins.twins import (
    blocks, load_metrics, load_models, make_plan, make_stages, make_twins, open_store,
    partner_agreements, read_history, run_record, table_reevaluation, take_turns, with_factors, with_seeds,
)
from zootwins.zoos import FACTORS, get_zoo, model_table


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
    for part in (plan, larger):  # twins find their own originals, in whatever order they were made
        metrics = load_metrics(part)
        states = choose_states(metrics, level=0.9)
        own = partner_agreements(part, images, states).query("partner == 'its own original'")
        expected = metrics.merge(states, on=["zoo", "method", "level", "epoch"]).groupby("method")["agreement"].agg(["mean", "size"])
        assert dict(zip(own["method"], own["mean"])) == pytest.approx((100 * expected["mean"]).to_dict()) and own["n"].tolist() == expected["size"].tolist()


def test_a_single_model_has_no_partners(tmp_path, images):
    plan = small_plan(tmp_path, n=1, methods="mp")
    make_twins(plan, images, progress=False)
    assert partner_agreements(plan, images, choose_states(load_metrics(plan))).empty


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


@pytest.mark.parametrize("engine, width, kinds", [(TORCH, 256, 1), (replace(TORCH, mixes=True, width=lambda: 16), 16, 2)])
def test_blocks_hold_what_an_engine_can_train_together(engine, width, kinds):
    models = model_table(get_zoo("mnist_fixed"), 400)
    rows = pd.DataFrame({"model": range(400), "level": np.nan})
    parts = blocks(rows, models, engine)
    assert sorted(m for part in parts for m in part["model"]) == list(range(400))
    assert max(len(part) for part in parts) == min(width, max(map(len, groups(models, engine))))
    assert max(models.iloc[part["model"]][["activation", "optimizer", "dropout"]].drop_duplicates().shape[0] for part in parts) == kinds


def test_without_a_compiler_the_reference_engine_takes_over(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    lanes.library.cache_clear()
    try:
        assert twins.choose_engine("auto", "cpu", "cnn_large") is TORCH
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "install g++ or clang++" in said
        with pytest.raises(UserError, match="install g"):
            twins.choose_engine("lanes", "cpu", "cnn_large")
    finally:
        lanes.library.cache_clear()


def test_the_lanes_say_what_they_cannot_train(capsys):
    assert twins.choose_engine("auto", "cpu", "mlp") is TORCH and "and not mlp" in capsys.readouterr().out
    assert "CPU only" in twins.why_no_lanes("cuda", "cnn_large")


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 40])
def test_tasks_take_turns(tasks, workers):
    """All are worked through and the results keep their order; a single worker does one step of each, again and again, wave by wave."""
    steps = []

    def task(number):
        for step in range(5):
            steps.append((number, step))
            yield step
        return number, None, 5

    made = take_turns([task(n) for n in range(tasks)], replace(TORCH, workers=lambda: workers))
    assert [number for number, _, _ in made] == list(range(tasks))
    assert sorted(steps) == [(number, step) for number in range(tasks) for step in range(5)]
    if workers == 1:
        assert steps == [(number, step) for wave in range(0, tasks, 8) for step in range(5) for number in range(wave, min(wave + 8, tasks))]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_one_failure_ends_all_tasks(error):
    interrupted = threading.Event()

    def endless():
        while not interrupted.is_set():
            time.sleep(0.01)
            yield 0

    def failing():
        yield 0
        raise error("no more")

    engine = replace(TORCH, workers=lambda: 2, interrupt=interrupted.set)
    with pytest.raises(error, match="no more"):
        take_turns([endless(), failing(), endless()], engine)
    assert interrupted.is_set()


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


def test_the_history_is_told_and_a_store_without_one_is_no_error(tmp_path, images):
    plan = small_plan(tmp_path, n=1)
    reports = make_twins(plan, images, progress=False)
    assert [(h["stage"], h["made"], h["source"]) for h in read_history(plan.folder)] == [("original", 1, "train"), ("mp", 2, "train"), ("vd", 1, "train")]
    make_twins(plan, images, progress=False)
    assert len(read_history(plan.folder)) == 3
    (plan.folder / "history.json").unlink()
    assert run_record(plan, reports, images)["history"] == []


def test_a_store_names_no_commit_that_is_not_zootwins(tmp_path, images, monkeypatch):
    monkeypatch.setattr(twins, "files", lambda package: tmp_path)
    assert twins._commit() is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    "Five trained models, and their twins, made in one go."
    plan = small_plan(tmp_path_factory.mktemp("trained"), n=5, epochs=6)
    make_twins(plan, images, progress=False)
    return plan


def equal_stages(one, other, stages=("mp", "vd")):
    "Whether twins and their metrics are the same bits."
    for stage in stages:
        left, right = (load_population(plan.folder / stage) for plan in (one, other))
        assert all(torch.equal(left.weights[name], right.weights[name]) for name in right.weights)
    frames = [load_metrics(plan) for plan in (one, other)]
    pd.testing.assert_frame_equal(*(frame[frame["method"].isin(stages)].reset_index(drop=True) for frame in frames), check_exact=True)


def test_twins_of_a_population_are_those_of_the_zoo_it_was(tmp_path, images, trained):
    originals = load_population(trained.folder / "original")
    plan = small_plan(tmp_path, n=None, epochs=6, source=originals)
    reports = make_twins(plan, images, progress=False)
    assert [(r.made, r.model_samples > 0) for r in reports] == [(5, False), (10, True), (5, True)]
    equal_stages(plan, trained)
    first = load_metrics(plan).query("method == 'original'")
    assert first["epoch"].tolist() == [6] * 5 and (first["agreement"] == 1).all() and (first["sparsity"] == 0).all()
    last = load_metrics(trained).query("method == 'original' and epoch == 6")
    assert np.allclose(first["test_acc"], last["test_acc"])
    record = json.loads(json.dumps(run_record(plan, reports, images)))
    assert record["source"]["models"] == 5 and record["stages"][0]["model_samples_per_second"] is None


def test_models_of_a_source_can_be_added_and_are_not_counted_twice(tmp_path, images, trained):
    originals = load_population(trained.folder / "original")
    make_twins(small_plan(tmp_path, n=2, epochs=6, source=originals), images, progress=False)
    plan = small_plan(tmp_path, n=5, epochs=6, source=originals)
    assert [r.made for r in make_twins(plan, images, progress=False)] == [3, 6, 3]
    equal_stages(plan, trained)
    with pytest.raises(UserError, match="from 1 to 5"):
        small_plan(tmp_path, n=6, source=originals)


def test_a_store_does_not_mix_sources(tmp_path, images, trained):
    originals = load_population(trained.folder / "original")
    others = Population({name: w + 0.1 for name, w in originals.weights.items()}, originals.models, originals.architecture)
    open_store(small_plan(tmp_path, n=2, source=originals), images)
    open_store(small_plan(tmp_path, n=5, source=originals), images)
    for source in (others, originals[:3], "train"):
        with pytest.raises(UserError, match="another source"):
            open_store(small_plan(tmp_path, n=2, source=source), images)
    open_store(small_plan(tmp_path / "b", n=2), images)
    with pytest.raises(UserError, match="another source .none, now"):
        open_store(small_plan(tmp_path / "b", n=2, source=originals), images)


def test_a_source_of_another_architecture_is_refused(tmp_path):
    with pytest.raises(UserError, match="cnn_large.*choose one of cifar10_large_seed"):
        small_plan(tmp_path, source=sample_population(get_zoo("cifar10_large_seed"), 2))


def test_an_interrupted_taking_of_originals_goes_on(tmp_path, images, trained, monkeypatch):
    plan = small_plan(tmp_path, n=5, epochs=6, source=load_population(trained.folder / "original"))

    def killed(population, path):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(twins, "save_population", killed)
        make_twins(plan, images, progress=False)
    assert (plan.folder / "metrics.parquet").exists() and not (plan.folder / "original.safetensors").exists()
    make_twins(plan, images, progress=False)
    equal_stages(plan, trained)
    assert len(load_metrics(plan).query("method == 'original'")) == 5


def test_seeds_name_streams_only_where_they_tell_models_apart():
    own = model_table(get_zoo("mnist_fixed"), 50)
    fit = lambda models: with_seeds(with_factors(models, get_zoo("mnist_fixed")))
    assert fit(own)[["seed", *FACTORS]].equals(own[["seed", *FACTORS]])
    assert fit(own.assign(seed=-1).sample(frac=1, random_state=0))["seed"].tolist() == list(range(1, 51))
    twice = pd.concat([own, own])
    assert fit(twice)["seed"].tolist() == list(range(1, 101)) and fit(twice)["model"].tolist() == list(range(100))
    assert fit(own.assign(seed=own["seed"].where(own["model"] != 7)))["seed"].tolist() == list(range(1, 51))


def test_factors_that_are_not_told_come_from_the_entry_if_it_leaves_no_choice():
    bare = pd.DataFrame({"activation": ["", ""], "optimizer": ["", ""], "lr": [np.nan, np.nan]})
    found = with_factors(bare, get_zoo("svhn_seed"))
    assert found[["activation", "optimizer", "lr", "wd", "dropout"]].drop_duplicates().values.tolist() == [["tanh", "adam", 3e-3, 0.0, 0.0]]
    with pytest.raises(UserError, match="2 of 2 models do not say their activation"):
        with_factors(bare, get_zoo("mnist_fixed"))
    with pytest.raises(UserError, match="no activation 'silu'"):
        with_factors(bare.assign(activation="silu"), get_zoo("svhn_seed"))


@pytest.fixture(scope="module")
def published(tmp_path_factory, trained):
    "The trained zoo as its authors would have published it: a folder and a zip of it."
    folder = tmp_path_factory.mktemp("published") / "tune_zoo_digits"
    metrics = load_metrics(trained)
    write_zoo({6: load_population(trained.folder / "original")}, metrics[metrics["method"] == "original"], folder)
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    return folder


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_twins_of_a_published_zoo_are_those_of_the_zoo_it_was(tmp_path, images, trained, published, suffix):
    plan = small_plan(tmp_path, n=None, epochs=50, source=published.with_name(published.name + suffix))
    assert plan.n_models == 5 and plan.epochs == 6 and plan.models["seed"].tolist() == [1, 2, 3, 4, 5]
    assert [r.made for r in make_twins(plan, images, progress=False)] == [5, 10, 5]
    equal_stages(plan, trained)
    one, other = (load_metrics(p).query("method == 'original'").reset_index(drop=True) for p in (plan, trained))
    pd.testing.assert_frame_equal(one, other, check_like=True)
    checked = table_reevaluation(plan, load_population(plan.folder / "original"), images)
    assert checked.numbers["images"].abs().max() == 0 and checked.layout["Models"].item() == "5"


def test_a_zip_and_its_folder_are_one_source(tmp_path, images, published):
    for suffix in ("", ".zip"):
        open_store(small_plan(tmp_path, n=2, source=published.with_name(published.name + suffix)), images)


def test_weights_that_do_not_give_what_was_recorded_are_told(tmp_path, images, trained, published):
    metrics = load_metrics(trained)
    metrics = metrics[metrics["method"] == "original"].assign(test_acc=lambda m: m["test_acc"] - np.where(m["model"] == 1, 0.02, np.where(m["model"] < 3, 0.04, 0)))
    folder = write_zoo({6: load_population(trained.folder / "original")}, metrics, tmp_path / "wrong")
    plan = small_plan(tmp_path, n=None, source=folder)
    make_twins(replace(plan, methods=()), images, progress=False)
    checked = table_reevaluation(plan, load_population(plan.folder / "original"), images)
    assert checked.numbers["images"].tolist() == [2, 1, 2, 0, 0]
    row = checked.layout.iloc[0]
    assert row["Differ by more than one image"] == "2" and row["Largest difference"] == "4.000" and row["Mean difference"] == "2.000"


def test_what_cannot_be_a_source_is_told(tmp_path, images, trained, published):
    with pytest.raises(UserError, match="There is no zoo at"):
        small_plan(tmp_path, source=tmp_path / "nowhere")
    with pytest.raises(UserError, match="from 1 to 5, or None"):
        small_plan(tmp_path, n=6, source=published)
    metrics = load_metrics(trained)
    write_zoo({2: load_population(trained.folder / "vd")}, metrics[metrics["method"] == "vd"], tmp_path / "twins")
    with pytest.raises(UserError, match="holds twins, not original models"):
        small_plan(tmp_path, source=tmp_path / "twins")


def test_models_that_cannot_be_read_are_left_out(tmp_path, images, published):
    folder = tmp_path / "damaged"
    shutil.copytree(published, folder)
    next(sorted(folder.iterdir())[1].rglob("checkpoints")).write_bytes(b"damaged")
    plan = small_plan(tmp_path, n=None, source=folder)
    assert plan.n_models == 4 and len(plan.source.left_out) == 1 and plan.models["seed"].tolist() == [1, 3, 4, 5]
    assert plan.source.recorded["model"].unique().tolist() == [0, 1, 2, 3]
    reports = make_twins(replace(plan, methods=()), images, progress=False)
    assert run_record(plan, reports, images)["source"]["left_out"] == 1


def test_models_as_they_are_judged(trained):
    metrics = load_metrics(trained)
    for stage, rows in metrics[metrics["epoch"] == metrics.groupby("method")["epoch"].transform("max")].groupby("method"):
        models = load_models(trained.folder / stage)
        zeros = [float(sum((layer.weight == 0).sum() for layer in models.to_module(i).module_list if hasattr(layer, "weight"))) for i in range(len(models))]
        assert np.allclose(np.array(zeros) / 2416, rows.sort_values(["level", "model"])["sparsity"])


def test_a_file_of_a_zenodo_record_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOOTWINS_DATA", str(tmp_path))
    population = sample_population(get_zoo("mnist_seed"), 3)
    recorded = pd.DataFrame([{"model": m, "epoch": 50, "train_loss": 1.0, "train_acc": 0.5, "test_loss": 1.0, "test_acc": 0.5} for m in range(3)])
    folder = write_zoo({50: population}, recorded, tmp_path / "published" / "stl10" / "tune_zoo")
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    plan = make_plan("mnist_seed", None, "stl10/tune_zoo.zip", store=str(tmp_path / "store"), figures=str(tmp_path / "figures"))
    assert plan.n_models == 3 and torch.equal(plan.source.population.weights["module_list.0.weight"], population.weights["module_list.0.weight"])
