"""Removal frequencies against naive counting, on disk, and against chance."""
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zootwins.architectures import build, layer_names
from zootwins.core import UserError
from zootwins.layers import (
    FREQUENCY_COLUMNS, frequency_spread, layer_profile, layer_sizes, read_frequencies, removal_frequency,
    save_frequencies, stack_frequencies, whole_sparsity,
)
from zootwins.metrics import sparsity
from zootwins.population import sample_population
from zootwins.selectors import prune
from zootwins.variational import begin_variational, deterministic, sparse_masks
from zootwins.zoos import ZOOS

LAYERS = {"conv1": "a", "fc1": "b"}


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_frequency_is_counting(models, rows, columns, seed):
    random = torch.Generator().manual_seed(seed)
    masks = {
        "b.weight": torch.rand(models, rows, columns, generator=random) > 0.5,
        "a.weight": torch.rand(models, 2, 1, 3, 3, generator=random) > 0.5,
    }
    found = removal_frequency(masks, LAYERS)
    assert found["layer"].tolist() == ["conv1"] * 18 + ["fc1"] * (rows * columns)
    for row in found.itertuples():
        kept = [bool(mask.reshape(-1)[row.weight]) for mask in masks[f"{LAYERS[row.layer]}.weight"]]
        assert row.frequency == pytest.approx(kept.count(False) / models) and row.models == models
    weights = {name: mask * (torch.rand(mask.shape, generator=random) + 0.1) for name, mask in masks.items()} | {
        "a.bias": torch.zeros(models, 2)
    }
    pd.testing.assert_frame_equal(removal_frequency(weights, LAYERS), found)


@pytest.mark.parametrize("zoo", ["digits_seed", "cifar10_seed", "cifar10_large_seed"])
def test_mean_frequency_is_mean_sparsity(zoo):
    population = sample_population(ZOOS[zoo], 6)
    names = layer_names(build(population.architecture))
    for masks in (prune(population, 0.6)[1], prune(population, 0.6, "layerwise")[1]):
        by_layer = (
            removal_frequency(masks, names)
            .groupby("layer", observed=True, sort=False)["frequency"]
            .agg(["mean", "size"])
        )
        measured = sparsity(masks, names)
        assert by_layer["size"].to_dict() == layer_sizes(population.architecture)
        assert all(
            by_layer.loc[layer, "mean"] == pytest.approx(measured[f"sparsity_{layer}"].mean().item(), abs=1e-6)
            for layer in names
        )


def test_variational_masks_and_pruned_weights_count_alike():
    noisy = begin_variational(sample_population(ZOOS["usps_seed"], 5))
    random = torch.Generator().manual_seed(1)
    for name in [name for name in noisy.weights if "sigma" in name]:
        noisy.weights[name] = noisy.weights[name] + 12 * torch.rand(noisy.weights[name].shape, generator=random)
    names = layer_names(build(noisy.architecture))
    found = removal_frequency(sparse_masks(noisy.weights), names)
    assert 0 < found["frequency"].mean() < 1
    pd.testing.assert_frame_equal(found, removal_frequency(deterministic(noisy.weights), names))


def stacked(zoo="digits_seed"):
    population = sample_population(ZOOS[zoo], 4)
    names = layer_names(build(population.architecture))
    states = {
        (zoo, "vd", "", None, epoch): removal_frequency(prune(population, epoch / 10)[1], names) for epoch in (0, 5)
    }
    return stack_frequencies(
        states | {(zoo, "mp", "global", 0.5, 15): removal_frequency(prune(population, 0.5)[1], names)}
    )


def test_stacked_states_survive_the_disk(tmp_path):
    frequencies = stacked()
    assert list(frequencies.columns) == FREQUENCY_COLUMNS and len(frequencies) == 3 * 2416
    assert frequencies.memory_usage(deep=True).sum() < 30 * len(frequencies)
    assert frequencies.drop_duplicates(["zoo", "method", "level", "epoch"])["level"].isna().tolist() == [
        True,
        True,
        False,
    ]
    for name in ("one", "two"):
        save_frequencies(stacked(), tmp_path / f"{name}.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    pd.testing.assert_frame_equal(read_frequencies(tmp_path / "one.parquet"), frequencies)


def test_zoos_of_different_architectures_are_read_together(tmp_path):
    zoos = ("digits_seed", "cifar10_large_seed")
    for zoo in zoos:
        save_frequencies(stacked(zoo), tmp_path / f"{zoo}.parquet")
    both = read_frequencies(*(tmp_path / f"{zoo}.parquet" for zoo in zoos))
    assert both.groupby("zoo", observed=True).size().to_dict() == {
        "digits_seed": 3 * 2416,
        "cifar10_large_seed": 3 * 10760,
    }
    assert list(both["layer"].cat.categories) == ["conv1", "conv2", "conv3", "fc1", "fc2"]


def test_a_file_holds_the_columns_alone_and_an_older_one_needs_no_selector(tmp_path):
    """A selection keeps no trace of the rows it was taken from; a run without the column was pruned by its own rule."""
    pruned = stacked().query("method == 'mp'")
    save_frequencies(pruned, tmp_path / "new.parquet")
    assert pyarrow.parquet.read_schema(tmp_path / "new.parquet").names == FREQUENCY_COLUMNS
    pruned.drop(columns="selector").to_parquet(tmp_path / "old.parquet")
    both = read_frequencies(tmp_path / "old.parquet", tmp_path / "new.parquet")
    assert set(both["selector"]) == {"global"} and both.index.tolist() == list(range(2 * 2416))


def test_a_profile_has_a_row_for_every_layer_of_a_zoo_and_keeps_the_order_of_the_states():
    """By hand: a layer that a zoo lacks is no row; states stay in their order, also those without a level."""
    metrics = pd.DataFrame({
        "zoo": ["b", "b", "a"], "method": "mp", "level": [0.9, 0.5, np.nan], "epoch": 1, "model": 0,
        "sparsity_conv1": [0.9, 0.5, 0.2], "sparsity_fc1": [0.8, 0.4, np.nan],
    })
    profile = layer_profile(metrics, sizes={"b": {"conv1": 1, "fc1": 3}, "a": {"conv1": 5}})
    assert profile[["zoo", "layer", "size", "mean", "n"]].to_numpy().tolist() == [
        ["b", "conv1", 1, 0.9, 1], ["b", "conv1", 1, 0.5, 1], ["a", "conv1", 5, 0.2, 1], ["b", "fc1", 3, 0.8, 1],
        ["b", "fc1", 3, 0.4, 1],
    ] and profile.index.tolist() == [0, 1, 2, 3, 4]
    assert profile.columns.tolist() == ["zoo", "method", "level", "epoch", "layer", "size", "mean", "std", "n"]
    whole = whole_sparsity(profile)
    assert whole["zoo"].tolist() == ["b", "b", "a"] and whole["mean"].tolist() == pytest.approx([0.825, 0.425, 0.2])


def test_spread_has_a_row_for_every_state_and_layer_in_their_order():
    """By hand: two of four weights go in one of two models, so mean 1/4, std 1/sqrt(12), chance sqrt(3/32)."""
    shares = removal_frequency({"b.weight": torch.tensor([[0.0, 0, 1, 1], [1, 1, 1, 1]])}, {"fc1": "b"})
    states = [("z", "vd", "", None, 5), ("z", "vd", "", None, 0), ("z", "mp", "global", 0.5, 15)]
    found = frequency_spread(stack_frequencies(dict.fromkeys(states, shares)))
    assert found["epoch"].tolist() == [5, 0, 15] and found["level"].isna().tolist() == [True, True, False]
    assert found["size"].tolist() == [4] * 3 and found["models"].tolist() == [2] * 3
    for name, value in (("mean", 1 / 4), ("std", 12**-0.5), ("chance", (3 / 32) ** 0.5)):
        assert found[name].tolist() == pytest.approx([value] * 3)


def test_spread_of_equal_weights_is_chance_and_a_special_weight_shows():
    random = torch.Generator().manual_seed(2)
    equal = torch.rand(400, 60, 60, generator=random) < 0.3
    special = equal.clone()
    special[:, :, ::10] = True
    states = {
        ("zoo", "vd", "", None, epoch): removal_frequency({"b.weight": mask}, {"fc1": "b"})
        for epoch, mask in enumerate((equal, special))
    }
    first, second = frequency_spread(stack_frequencies(states)).itertuples()
    assert (
        first.size == 3600 and first.models == 400 and first.chance == pytest.approx(np.sqrt(0.7 * 0.3 / 400), rel=0.05)
    )
    assert first.std == pytest.approx(first.chance, rel=0.1) and second.std > 5 * second.chance


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="fc1"):
        removal_frequency({"a.weight": torch.zeros(2, 3)}, LAYERS)
    with pytest.raises(UserError, match="at least one state"):
        stack_frequencies({})
    (tmp_path / "text.parquet").write_text("no parquet")
    pd.DataFrame({"zoo": ["usps_seed"]}).to_parquet(tmp_path / "other.parquet")
    for name, message in (("missing", "run the zoo"), ("text", "run the zoo"), ("other", "frequency")):
        with pytest.raises(UserError, match=message):
            read_frequencies(tmp_path / f"{name}.parquet")
