"""Populations: sampling, modules, files."""
import pandas as pd
import pytest
import torch

from zootwins.architectures import ARCHITECTURES, build
from zootwins.core import UserError, atomic_path
from zootwins.population import concatenate, from_modules, load_population, plain_models, sample_population, save_population
from zootwins.zoos import ZOOS, list_zoos, model_table, zoo_size


@pytest.mark.parametrize("name", list(ZOOS))
def test_every_zoo_can_be_sampled(name):
    zoo = ZOOS[name]
    population = sample_population(zoo, 3)
    module = population.to_module(2)
    assert module(torch.zeros(1, 3 if zoo.dataset in ("cifar10", "stl10") else 1, zoo.image_size, zoo.image_size)).shape == (1, 10)
    assert all((tensor == 0.01).all() for key, tensor in population.weights.items() if key.endswith("bias"))
    assert len(model_table(zoo)) == zoo_size(zoo)


def test_fixed_zoos_share_seeds_and_random_zoos_do_not():
    fixed, drawn = (model_table(ZOOS[f"mnist_{kind}"]) for kind in ("fixed", "random"))
    assert set(fixed["seed"]) == set(range(1, 11)) and drawn["seed"].nunique() > 2500
    factors = ["activation", "init", "optimizer", "lr", "wd", "dropout"]
    assert (fixed.groupby(factors).size() == 10).all() and (drawn.groupby(factors).size() == 10).all()
    population = sample_population(ZOOS["mnist_fixed"], 200)
    rows = population.models.query("init == 'kaiming_uniform' and seed == 3").index
    born = population.weights["module_list.0.weight"][list(rows)]
    assert len(rows) > 1 and (born == born[0]).all()


def test_a_larger_sample_begins_with_the_smaller():
    for name in ("usps_seed", "svhn_random"):
        small, large = (sample_population(ZOOS[name], n) for n in (4, 9))
        assert large.models.head(4).equals(small.models)
        assert all(torch.equal(large.weights[key][:4], small.weights[key]) for key in small.weights)


@pytest.mark.parametrize("n", [0, -1, 1001, 2.5, True, "3"])
def test_impossible_numbers_of_models(n):
    with pytest.raises(UserError, match="1 to 1000"):
        model_table(ZOOS["usps_seed"], n)


def test_table_4_as_printed():
    table = list_zoos(paper_only=True)
    assert table.loc["usps_seed", ["W", "Activation", "Optim", "LR VD", "LR MP", "WD", "Dropout"]].tolist() == [2416, "T", "AD", "3e-4", "1e-3", "1e-3", "0"]
    columns = ["Activation", "Optim", "LR VD", "LR MP", "WD", "Dropout"]
    assert table.loc["mnist_fixed", columns].tolist() == ["T, S, R, G", "AD, SGD", "1e-3, 1e-4", "1e-3, 1e-4", "1e-3, 1e-4", "0, 0.5"]
    assert table.loc["cifar10_large_seed", ["W", "LR VD", "LR MP", "WD"]].tolist() == [10760, "1e-5", "1e-4", "1e-2"]
    assert table.loc["fmnist_seed", "Printed"] == "LR VD 3e4" and table.loc["fmnist_fixed", "LR MP"] == "-"


def test_modules_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="Module 1 does not fit"):
        from_modules([build("cnn_small_1ch"), build("cnn_large")], "cnn_small_1ch")


def test_an_architecture_of_ones_own(tmp_path, monkeypatch):
    mine = lambda activation, dropout: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, bias=False), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2 * 26 * 26, 10))
    monkeypatch.setitem(ARCHITECTURES, "mine", mine)
    population = from_modules([mine("", 0) for _ in range(3)], "mine", plain_models(3, activation="relu"))
    save_population(population, tmp_path / "mine")
    monkeypatch.delitem(ARCHITECTURES, "mine")
    with pytest.raises(UserError, match="not known here"):
        load_population(tmp_path / "mine")


def test_only_like_is_joined_with_like():
    with pytest.raises(UserError, match="one architecture"):
        concatenate([sample_population(ZOOS["usps_seed"], 1), sample_population(ZOOS["cifar10_seed"], 1)])


def test_a_missing_half_of_a_population_is_told(tmp_path):
    save_population(sample_population(ZOOS["usps_seed"], 2), tmp_path / "original")
    (tmp_path / "original.parquet").unlink()
    with pytest.raises(UserError, match="not a readable population"):
        load_population(tmp_path / "original")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="No space left"), atomic_path(tmp_path / "table.csv") as temporary:
        temporary.write_text("half")
        pd.DataFrame({"x": range(10)}).to_csv("/dev/full")
    assert list(tmp_path.iterdir()) == []
