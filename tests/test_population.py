"""Populations: sampling, modules, files."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.utils.prune

from zootwins.architectures import ARCHITECTURES, build
from zootwins.core import UserError, atomic_path, project_root
from zootwins.population import (
    Population, complete_models, concatenate, from_modules, from_state_dicts, load_population, parameter_shapes,
    plain_models, sample_population, save_population,
)
from zootwins.zoos import FACTORS, GRID_ZOOS, ZOOS, list_zoos, model_table, zoo_size


@pytest.mark.parametrize("name", list(ZOOS))
def test_every_zoo_can_be_sampled(name):
    zoo = ZOOS[name]
    population = sample_population(zoo, 3)
    module = population.to_module(2)
    assert module(
        torch.zeros(1, 3 if zoo.dataset in ("cifar10", "stl10") else 1, zoo.image_size, zoo.image_size)
    ).shape == (1, 10)
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


@pytest.mark.parametrize("name", ["mnist_fixed", "fmnist_fixed", "fmnist_random"])
def test_the_models_of_kept_grids_have_the_factors_they_were_trained_with(name):
    rows = pd.read_parquet(project_root() / f"figures/{name}/metrics.parquet")
    last = rows[rows["method"] == "original"].sort_values("epoch").groupby("model")["test_acc"].last()
    table = model_table(ZOOS[name], 128).set_index("model")
    design = pd.get_dummies(table[list(FACTORS)].astype(str), dtype=float)
    fitted = design @ np.linalg.lstsq(design, last.loc[design.index], rcond=None)[0]
    assert 1 - ((last - fitted) ** 2).sum() / ((last - last.mean()) ** 2).sum() > 0.4
    assert ZOOS[name].draw == "shuffled"


@pytest.mark.parametrize("n", [16, 50, 64, 100, 128])
@pytest.mark.parametrize("zoo", [zoo for zoo in GRID_ZOOS if zoo.draw == "balanced"], ids=lambda zoo: zoo.name)
def test_a_draw_from_a_grid_has_every_value_equally_often(zoo, n):
    table = model_table(zoo, n)
    assert not table.duplicated(list(FACTORS)).any()
    for factor in FACTORS:
        counts = table[factor].value_counts().reindex(getattr(zoo, factor), fill_value=0)
        assert counts.max() - counts.min() <= 2, counts.to_dict()
    pairs = table.groupby(["activation", "init"]).size().reindex(
        pd.MultiIndex.from_product([zoo.activation, zoo.init]), fill_value=0)
    assert pairs.max() - pairs.min() <= 2, pairs.to_dict()


@pytest.mark.parametrize("n", [0, -1, 1001, 2.5, True, "3"])
def test_impossible_numbers_of_models(n):
    with pytest.raises(UserError, match="1 to 1000"):
        model_table(ZOOS["usps_seed"], n)


def test_table_4_as_printed():
    table = list_zoos(paper_only=True)
    assert table.loc["usps_seed", ["W", "Activation", "Optim", "LR VD", "LR MP", "WD", "Dropout"]].tolist() == [
        2416, "T", "AD", "3e-4", "1e-3", "1e-3", "0",
    ]
    columns = ["Activation", "Optim", "LR VD", "LR MP", "WD", "Dropout"]
    assert table.loc["mnist_fixed", columns].tolist() == [
        "T, S, R, G", "AD, SGD", "1e-3, 1e-4", "1e-3, 1e-4", "1e-3, 1e-4", "0, 0.5",
    ]
    assert table.loc["cifar10_large_seed", ["W", "LR VD", "LR MP", "WD"]].tolist() == [10760, "5e-6", "1e-4", "1e-2"]
    assert table.loc["cifar10_large_seed", "Printed"] == "LR VD 1e-5"
    assert table.loc["fmnist_seed", "Printed"] == "LR VD 3e4" and table.loc["fmnist_fixed", "LR MP"] == "-"


def test_modules_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="Module 1 does not fit"):
        from_modules([build("cnn_small_1ch"), build("cnn_large")], "cnn_small_1ch")


def test_an_architecture_of_ones_own(tmp_path, monkeypatch):
    mine = lambda activation, dropout: torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3, bias=False), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2 * 26 * 26, 10)
    )
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


# ---- what people bring

def mine():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2 * 26 * 26, 3)
    )


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "mine", lambda activation, dropout: mine())
    return mine().state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {
            "model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
            "optimizer": {"state": {}},
        },
        lambda state: {f"net.body.{name}": tensor for name, tensor in state.items()},
        lambda state: {name: tensor.double() for name, tensor in state.items()},
    ],
)
def test_state_dicts_as_people_save_them(own, wrap):
    population = from_state_dicts([wrap(own), own], "mine")
    assert all(
        torch.equal(tensor[0], own[name]) and tensor.dtype == torch.float32
        for name, tensor in population.weights.items()
    )


def test_pruned_modules_bring_their_masks(own):
    module = mine()
    for layer in (module[0], module[3]):
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    population = from_modules([module], "mine")
    assert (
        torch.equal(population.weights["3.weight"][0], module[3].weight)
        and (population.weights["3.weight"] == 0).float().mean() == 0.5
    )


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda s: s.pop("3.bias"), "it has no 3.bias"), (lambda s: s.update(bn=torch.ones(2)), "it has bn, which"),
        (lambda s: s.update({"0.bias": torch.ones(3)}), "expected is"),
        (lambda s: s.update({"0.bias": torch.ones(2, dtype=torch.int8)}), "torch.int8"),
        (lambda s: s.update({"0.bias": torch.tensor([1, float("inf")])}), "not finite"),
        (lambda s: s.update({"0.weight_g": torch.ones(2), "0.weight_v": s.pop("0.weight")}), "parametrisation"),
        (lambda s: s.clear(), "it is empty"), (lambda s: s.update(epoch=3), "'epoch' is a value of type int"),
    ],
)
def test_each_reason_why_weights_do_not_fit_has_its_own_sentence(own, change, reason):
    state = dict(own)
    change(state)
    with pytest.raises(UserError, match=f"Module 1 does not fit.*{reason}"):
        from_state_dicts([own, state], "mine")


@pytest.mark.parametrize(
    "make,reason",
    [
        (
            lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.InstanceNorm2d(2, affine=True)),
            "InstanceNorm2d",
        ),
        (lambda: torch.nn.BatchNorm2d(2, track_running_stats=False), "no running statistics"),
        (lambda: torch.nn.BatchNorm1d(2, momentum=None), "a fixed momentum"),
        (lambda: torch.nn.LayerNorm([2, 3]), "over 2 dimensions"),
        (lambda: torch.nn.utils.weight_norm(torch.nn.Linear(3, 2)), "weight_g"),
        (lambda: torch.nn.utils.prune.random_unstructured(torch.nn.Linear(3, 2), "weight", 0.5), "weight_mask"),
        (lambda: torch.nn.Embedding(3, 2), "Embedding"),
        (lambda: Tied(), "same tensor twice"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_architectures_that_cannot_be_taken(monkeypatch, make, reason):
    monkeypatch.setitem(ARCHITECTURES, "mine", lambda activation, dropout: make())
    with pytest.raises(UserError, match=reason):
        parameter_shapes("mine")


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    "table,reason",
    [
        ({"lr": [1e-3]}, "row for each of the 2"), ({"lr": [1e-3, -1]}, "lr -1"), ({"dropout": [0, 50]}, "dropout 50"),
        ({"model": [4, 4]}, "the model 4 twice"), ({"wd": ["much", 0]}, "wd much"),
        ({"lr": [1e-3, float("inf")]}, "lr inf"),
    ],
)
def test_tables_of_factors_that_cannot_be(table, reason):
    with pytest.raises(UserError, match=reason):
        complete_models(pd.DataFrame(table), 2)


def test_a_table_without_the_column_model_is_taken_and_what_is_missing_is_named(own):
    with pytest.warns(UserWarning, match="lacks model, seed, activation, init, optimizer, wd, dropout, parent.*wd 0.0"):
        population = from_state_dicts(
            [own, own], "mine", pd.DataFrame({"lr": [0.1, 0.2], "owner": ["a", "b"]}, index=[7, 7])
        )
    assert (
        population.models["model"].tolist() == [0, 1]
        and population.models["lr"].tolist() == [0.1, 0.2]
        and population.models["owner"].tolist() == ["a", "b"]
    )
    whole = population.models.drop(columns="model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_state_dicts([own, own], "mine", whole).models["model"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda w, m: (w, m.iloc[:1]), "weights of 1 models"),
        (lambda w, m: (w | {"x.weight": w["module_list.0.bias"].clone()}, m), "x.weight"),
        (lambda w, m: ({k: t for k, t in w.items() if k != "module_list.0.bias"}, m), "module_list.0.bias is missing"),
        (lambda w, m: (w | {"module_list.0.bias": w["module_list.0.bias"].double()}, m), "float64"),
        (lambda w, m: (w, m.drop(columns="model")), "have no numbers"),
        (lambda w, m: (w | {"module_list.0.bias": w["module_list.3.bias"].clone()}, m), "module_list.0.bias is"),
    ],
)
def test_a_stored_population_is_what_it_says(tmp_path, change, reason):
    population = sample_population(ZOOS["usps_seed"], 2)
    save_population(population, tmp_path / "a")
    assert len(load_population(tmp_path / "a")) == 2
    weights, models = change(population.weights, population.models)
    save_population(Population(weights, models, population.architecture), tmp_path / "a")
    with pytest.raises(UserError, match=reason):
        load_population(tmp_path / "a")
