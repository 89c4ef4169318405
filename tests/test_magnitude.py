"""Magnitude pruning: exact counts, and equal to torch's own where that is defined."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune

from zootwins.core import UserError
from zootwins.magnitude import magnitude_masks, prune
from zootwins.population import sample_population
from zootwins.zoos import ZOOS

LEVELS = [i / 10 for i in range(10)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["usps_seed", "cifar10_seed", "cifar10_large_seed", "mnist_fixed"])
def test_global_pruning_is_torchs(name, level):
    zoo = sample_population(ZOOS[name], 2)
    pruned, masks = prune(zoo, level)
    module = zoo.to_module(1)
    layers = [m for m in module.modules() if hasattr(m, "weight")]
    torch_prune.global_unstructured([(m, "weight") for m in layers], pruning_method=torch_prune.L1Unstructured, amount=level)
    ours = [pruned.weights[key][1] for key in masks]
    assert all(torch.equal(m.weight, weight) for m, weight in zip(layers, ours))


@pytest.mark.parametrize("level", LEVELS)
def test_layerwise_pruning_is_torchs(level):
    zoo = sample_population(ZOOS["svhn_seed"], 2)
    masks = magnitude_masks(zoo.weights, level, "layerwise")
    module = zoo.to_module(0)
    for path, layer in module.named_modules():
        if hasattr(layer, "weight"):
            torch_prune.l1_unstructured(layer, "weight", amount=level)
            assert torch.equal(layer.weight_mask.bool(), masks[f"{path}.weight"][0])


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.999), st.sampled_from(["global", "layerwise"]), st.integers(0, 3))
def test_counts_are_exact_even_with_ties(level, scope, digits):
    zoo = sample_population(ZOOS["digits_seed"], 3)
    weights = {key: torch.round(w, decimals=digits) for key, w in zoo.weights.items()}
    masks = magnitude_masks(weights, level, scope)
    removed = {key: (~mask).flatten(1).sum(1) for key, mask in masks.items()}
    if scope == "global":
        assert (sum(removed.values()) == round(level * 2416)).all()
    else:
        assert all((count == round(level * weights[key][0].numel())).all() for key, count in removed.items())
    kept = torch.cat([torch.where(m, weights[k].abs(), torch.inf).flatten(1) for k, m in masks.items()], 1).min(1).values
    gone = torch.cat([torch.where(m, -torch.inf, weights[k].abs()).flatten(1) for k, m in masks.items()], 1).max(1).values
    assert scope == "layerwise" or (gone <= kept).all()


@pytest.mark.parametrize("level", [-0.1, 1.0, 50, float("nan")])
def test_impossible_levels(level):
    with pytest.raises(UserError, match="below 1"):
        magnitude_masks({"a.weight": torch.zeros(1, 1, 3)}, level)


def test_unknown_scope():
    with pytest.raises(UserError, match="global, layerwise"):
        magnitude_masks({"a.weight": torch.zeros(1, 1, 3)}, 0.5, "filter")


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_pruned_models_are_the_masked_ones_with_their_biases(scope):
    zoo = sample_population(ZOOS["digits_seed"], 3)
    pruned, masks = prune(zoo, 0.7, scope)
    assert set(pruned.weights) == set(zoo.weights) and pruned.models.equals(zoo.models) and pruned.architecture == zoo.architecture
    for name, weights in zoo.weights.items():
        assert torch.equal(pruned.weights[name], weights * masks[name] if name.endswith("weight") else weights) and pruned.weights[name].dtype == weights.dtype
