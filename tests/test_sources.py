"""Originals that were trained elsewhere."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from small import small_plan
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.engines import train
from zootwins.metrics import METRIC_COLUMNS
from zootwins.plans import fingerprint, make_plan
from zootwins.population import Population, sample_population, save_population
from zootwins.published import write_zoo
from zootwins.publishing import hashes
from zootwins.sources import open_source, read_source, source_fingerprint, with_factors, with_seeds
from zootwins.store import open_store
from zootwins.training import Recipe
from zootwins.twins import fitting_epoch, load_metrics, load_stage, make_twins, run_record, table_reevaluation
from zootwins.untrusted import HASHES
from zootwins.zoos import FACTORS, get_zoo, model_table


@pytest.fixture(scope="session")
def originals(trained):
    return replace(load_stage(trained, "original"), models=load_stage(trained, "original").models.drop(columns="level"))


def equal_twins(plan, trained):
    "Whether twins and their metrics are the bits of those that were trained in one go."
    for stage in ("mp", "vd"):
        left, right = (
            load_stage(one, stage) for one in (plan, replace(trained, levels=plan.levels, n_models=plan.n_models))
        )
        assert left.models[["model", "level", "seed"]].equals(right.models[["model", "level", "seed"]])
        assert all(torch.equal(left.weights[name], right.weights[name]) for name in right.weights)
    frames = (
        load_metrics(one).query("method != 'original'").reset_index(drop=True)
        for one in (plan, replace(trained, levels=plan.levels))
    )
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_twins_of_a_population_are_those_of_the_zoo_it_was(tmp_path, images, trained, originals):
    plan = small_plan(tmp_path, n=None, epochs=6, source=originals)
    reports = make_twins(plan, images, progress=False)
    assert [(r.made, r.model_samples > 0) for r in reports] == [(5, False), (10, True), (5, True)]
    equal_twins(plan, trained)
    first = load_metrics(plan).query("method == 'original'")
    assert first["epoch"].tolist() == [6] * 5 and (first["agreement"] == 1).all() and (first["sparsity"] == 0).all()
    assert np.allclose(
        first["test_acc"], load_metrics(trained).query("method == 'original' and epoch == 6")["test_acc"]
    )
    record = json.loads(json.dumps(run_record(plan, reports, images)))
    assert record["source"]["models"] == 5 and record["stages"][0]["model_samples_per_second"] is None


def test_models_of_a_source_can_be_added(tmp_path, images, trained, originals):
    make_twins(small_plan(tmp_path, n=2, epochs=6, source=originals), images, progress=False)
    plan = small_plan(tmp_path, n=5, epochs=6, source=originals)
    assert [r.made for r in make_twins(plan, images, progress=False)] == [3, 6, 3]
    equal_twins(plan, trained)
    with pytest.raises(UserError, match="from 1 to 5"):
        small_plan(tmp_path, n=6, source=originals)


def test_a_store_does_not_mix_sources(tmp_path, images, originals):
    opened = lambda plan: open_store(plan.folder, fingerprint(plan, images))
    others = Population(
        {name: w + 0.1 for name, w in originals.weights.items()}, originals.models, originals.architecture
    )
    opened(small_plan(tmp_path, n=2, source=originals))
    opened(small_plan(tmp_path, n=5, source=originals))
    for source in (others, originals[:3], "train"):
        with pytest.raises(UserError, match="another source"):
            opened(small_plan(tmp_path, n=2, source=source))
    opened(small_plan(tmp_path / "b", n=2))
    with pytest.raises(UserError, match="another source .none, now"):
        opened(small_plan(tmp_path / "b", n=2, source=originals))


def test_a_source_of_another_architecture_is_refused(tmp_path):
    with pytest.raises(UserError, match="cnn_large.*choose one of cifar10_large_seed"):
        small_plan(tmp_path, source=sample_population(get_zoo("cifar10_large_seed"), 2))


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
    assert found[["activation", "optimizer", "lr", "wd", "dropout"]].drop_duplicates().values.tolist() == [
        ["tanh", "adam", 3e-3, 0.0, 0.0]
    ]
    with pytest.raises(UserError, match="2 of 2 models do not say their activation"):
        with_factors(bare, get_zoo("mnist_fixed"))
    with pytest.raises(UserError, match="no activation 'silu'"):
        with_factors(bare.assign(activation="silu"), get_zoo("svhn_seed"))


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_twins_of_a_published_zoo_are_those_of_the_zoo_it_was(tmp_path, images, trained, published, suffix):
    plan = small_plan(tmp_path, n=None, epochs=50, source=published.with_name(published.name + suffix))
    assert plan.n_models == 5 and plan.epochs == 6 and plan.models["seed"].tolist() == [1, 2, 3, 4, 5]
    assert [r.made for r in make_twins(plan, images, progress=False)] == [5, 10, 5]
    equal_twins(plan, trained)
    one, other = (load_metrics(p).query("method == 'original'").reset_index(drop=True) for p in (plan, trained))
    pd.testing.assert_frame_equal(one, other, check_like=True)
    checked = table_reevaluation(plan, images)
    assert checked.numbers["images"].abs().max() == 0 and checked.layout["Models"].item() == "5"


def test_a_zip_and_its_folder_are_one_source(tmp_path, published):
    one, other = (
        small_plan(tmp_path, n=2, source=published.with_name(published.name + suffix)).source for suffix in ("", ".zip")
    )
    assert source_fingerprint(one) == source_fingerprint(other) and one.name != other.name


def test_weights_that_do_not_give_what_was_recorded_are_told(tmp_path, images, trained):
    metrics = load_metrics(trained).query("method == 'original'")
    wrong = np.where(metrics["model"] == 1, 0.02, np.where(metrics["model"] < 3, 0.04, 0))
    folder = write_zoo(
        {6: load_stage(trained, "original")}, metrics.assign(test_acc=metrics["test_acc"] - wrong), tmp_path / "wrong"
    )
    plan = small_plan(tmp_path, n=None, source=folder, methods="", levels="")
    make_twins(plan, images, progress=False)
    checked = table_reevaluation(plan, images)
    assert checked.numbers["images"].tolist() == [2, 1, 2, 0, 0]
    row = checked.layout.iloc[0]
    assert (
        row["Differ by more than one image"] == "2"
        and row["Largest difference"] == "4.000"
        and row["Mean difference"] == "2.000"
    )


def test_what_cannot_be_a_source_is_told(tmp_path, trained, published):
    with pytest.raises(UserError, match="There is no zoo at"):
        small_plan(tmp_path, source=tmp_path / "nowhere")
    with pytest.raises(UserError, match="from 1 to 5, or None"):
        small_plan(tmp_path, n=6, source=published)
    metrics = load_metrics(trained)
    write_zoo({2: load_stage(trained, "vd")}, metrics[metrics["method"] == "vd"], tmp_path / "twins")
    with pytest.raises(UserError, match="holds twins, not original models"):
        small_plan(tmp_path, source=tmp_path / "twins")


def test_models_that_cannot_be_read_are_left_out(tmp_path, images, published):
    folder = tmp_path / "damaged"
    shutil.copytree(published, folder)
    next(sorted(folder.iterdir())[1].rglob("checkpoints")).write_bytes(b"damaged")
    plan = small_plan(tmp_path, n=None, source=folder, methods="", levels="")
    assert plan.n_models == 4 and len(plan.source.left_out) == 1 and plan.models["seed"].tolist() == [1, 3, 4, 5]
    assert plan.source.recorded["model"].unique().tolist() == [0, 1, 2, 3]
    reports = make_twins(plan, images, progress=False)
    assert run_record(plan, reports, images)["source"]["left_out"] == 1


def test_a_file_of_a_zenodo_record_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOOTWINS_DATA", str(tmp_path))
    population = sample_population(get_zoo("mnist_seed"), 3)
    told = {"epoch": 50, "train_loss": 1.0, "train_acc": 0.5, "test_loss": 1.0, "test_acc": 0.5}
    folder = write_zoo(
        {50: population},
        pd.DataFrame([{"model": m, **told} for m in range(3)]),
        tmp_path / "published" / "stl10" / "tune_zoo",
    )
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    plan = make_plan(
        "mnist_seed", None, "stl10/tune_zoo.zip", store=str(tmp_path / "store"), figures=str(tmp_path / "figures")
    )
    name = "module_list.0.weight"
    assert plan.n_models == 3 and torch.equal(plan.source.population.weights[name], population.weights[name])


def test_fitting_epoch_finds_the_records_that_belong_to_the_weights():
    recorded = pd.DataFrame(
        [(m, e, 0.5 + 0.01 * e + 0.001 * m) for m in range(4) for e in range(5)], columns=["model", "epoch", "test_acc"]
    )
    for shift in (-1, 0, 1):
        found = np.array([0.5 + 0.01 * (3 + shift) + 0.001 * m for m in range(4)])
        assert fitting_epoch(recorded, found, 3, 1000) == (3 + shift, 4)
    assert fitting_epoch(recorded, found + 0.3, 3, 1000) == (3, 0)
    assert fitting_epoch(recorded, np.full(4, 0.53), 3, 10) == (3, 4)  # as good as others: their own


def test_what_a_source_does_not_tell_is_counted_and_named(tmp_path):
    zoo = get_zoo("mnist_seed")
    population = sample_population(zoo, 3)
    measured = {"train_loss": 1.0, "train_acc": 50.0, "test_loss": 1.0, "test_acc": 40.0, "sparsity": 0.0}
    rows = pd.DataFrame([{"model": m, "epoch": e, **measured} for m in range(3) for e in range(1, 4)])
    folder = write_zoo({e: population for e in range(1, 4)}, rows, tmp_path / "zoo")
    for model in folder.iterdir():
        (model / "params.json").write_text('{"seed": 5, "weight_decay": 0.02}')
        for path in sorted(model.glob("checkpoint_*")):
            path.rename(model / f"checkpoint_{int(path.name[-6:]) - 1:06d}")
    source = open_source(folder, zoo)
    assert source.epoch == 3 and "+ 1, certain" in source.numbering and set(source.population.models["wd"]) == {0.02}
    assert np.allclose(source.recorded["test_acc"], 0.4)
    told = source.notes.set_index("name")["times"]
    assert told["lr 0.0003"] == 3 and told["activation tanh"] == 3 and told["test_acc"] == 9 and "wd 0.0" not in told


def test_a_publication_with_a_damaged_file_is_no_source(tmp_path):
    save_population(sample_population(get_zoo("digits_seed"), 2), tmp_path / "original")
    row = {
        "zoo": "digits_seed", "method": "original", "selector": "", "level": np.nan, "epoch": 50,
        **dict.fromkeys(METRIC_COLUMNS[6:], 0.5),
    }
    metrics = pd.DataFrame([row | {"model": m} for m in range(2)])
    metrics.to_parquet(tmp_path / "metrics.parquet")
    (tmp_path / HASHES).write_text(hashes(tmp_path))
    (tmp_path / ".gitattributes").write_text("x")
    source = read_source(tmp_path)
    assert source.epoch == 50 and source.notes["name"].tolist() == [".gitattributes"]
    path = tmp_path / "original.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01"[-1:])
    with pytest.raises(UserError, match="original.safetensors differs"):
        read_source(tmp_path)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_reevaluation_says_which_records_the_weights_belong_to(tmp_path, shift):
    "Six digits models; the checkpoint folders of one of the zoos carry a number that is one too high."
    zoo, images = get_zoo("digits_seed"), subset(load_images("digits"), 200, 400)
    trained = train(
        sample_population(zoo, 6), images, Recipe(zoo.name, "original", 4, 2e-3), keep=(1, 2, 3), progress=False
    )
    folder = write_zoo(trained.snapshots, trained.metrics.assign(sparsity=0.0), tmp_path / "zoo")
    for model in folder.iterdir():
        for path in sorted(model.glob("checkpoint_*"), reverse=True):
            path.rename(model / f"checkpoint_{int(path.name[-6:]) + shift:06d}")
    plan = make_plan(
        zoo.name, 6, source=str(folder), methods="vd", store=str(tmp_path / "store"), figures=str(tmp_path / "figures")
    )
    plan = replace(plan, zoo=replace(plan.zoo, vd_epochs=1))
    make_twins(plan, images, progress=False)
    table = table_reevaluation(plan, images)
    assert plan.epochs == 3 + shift and table.layout["Fit the records of epoch"].item() == "3 (6 of 6)"
    assert ("NOT belong" in table.caption) == bool(shift)
