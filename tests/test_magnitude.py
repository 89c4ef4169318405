"""Magnitude pruning: exact counts, by an independent definition, and equal to torch's own where that is defined."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune

from zootwins.core import UserError
from zootwins.magnitude import apply_masks, count_kept, keep_highest
from zootwins.population import Population, sample_population
from zootwins.selectors import prune
from zootwins.zoos import ZOOS

LEVELS = [i / 10 for i in range(10)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["usps_seed", "cifar10_seed", "cifar10_large_seed", "mnist_fixed"])
def test_global_pruning_is_torchs(name, level):
    zoo = sample_population(ZOOS[name], 2)
    pruned, masks = prune(zoo, level)
    module = zoo.to_module(1)
    layers = [m for m in module.modules() if hasattr(m, "weight")]
    torch_prune.global_unstructured(
        [(m, "weight") for m in layers], pruning_method=torch_prune.L1Unstructured, amount=level
    )
    ours = [pruned.weights[key][1] for key in masks]
    assert all(torch.equal(m.weight, weight) for m, weight in zip(layers, ours))


@pytest.mark.parametrize("level", LEVELS)
def test_layerwise_pruning_is_torchs(level):
    zoo = sample_population(ZOOS["svhn_seed"], 2)
    _, masks = prune(zoo, level, "layerwise")
    module = zoo.to_module(0)
    for path, layer in module.named_modules():
        if hasattr(layer, "weight"):
            torch_prune.l1_unstructured(layer, "weight", amount=level)
            assert torch.equal(layer.weight_mask.bool(), masks[f"{path}.weight"][0])


def by_hand(values, level):
    "A mask by numpy: the round(level * n) smallest absolute values go, the first of equal ones first."
    mask = np.ones(len(values), dtype=bool)
    mask[np.argsort(np.abs(values), kind="stable")[:round(level * len(values))]] = False
    return mask


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.999), st.sampled_from(["global", "layerwise"]), st.integers(0, 3))
def test_masks_are_those_of_an_independent_definition_even_with_ties(level, selector, digits):
    zoo = sample_population(ZOOS["digits_seed"], 3)
    weights = {key: torch.round(w, decimals=digits) for key, w in zoo.weights.items()}
    _, masks = prune(Population(weights, zoo.models, zoo.architecture), level, selector)
    for model in range(3):
        flat = {key: weights[key][model].flatten().numpy() for key in masks}
        if selector == "global":
            together = by_hand(np.concatenate(list(flat.values())), level)
            expected = dict(zip(flat, np.split(together, np.cumsum([len(part) for part in flat.values()])[:-1])))
        else:
            expected = {key: by_hand(part, level) for key, part in flat.items()}
        assert all(np.array_equal(masks[key][model].flatten().numpy(), mask) for key, mask in expected.items())


def test_the_count_is_that_of_round():
    for n in (1, 2, 3, 20, 96, 2416):
        assert [count_kept(n, level) for level in LEVELS] == [n - round(level * n) for level in LEVELS]
    assert count_kept(5, 0.5) == 3 and count_kept(7, 0.5) == 3 and count_kept(2416, 0.9) == 242


def test_of_equal_scores_the_first_go_and_all_or_none_may_stay():
    scores = torch.tensor([[1.0, 1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    assert keep_highest(scores, 2).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert keep_highest(scores, 4).all() and not keep_highest(scores, 0).any()


@pytest.mark.parametrize("level", [-0.1, 1.0, 50, float("nan")])
def test_impossible_levels(level):
    with pytest.raises(UserError, match="below 1"):
        count_kept(3, level)
    with pytest.raises(UserError, match="below 1"):
        prune(sample_population(ZOOS["digits_seed"], 1), level)


@pytest.mark.parametrize("selector", ["global", "layerwise"])
def test_pruned_models_are_the_masked_ones_with_their_biases(selector):
    zoo = sample_population(ZOOS["digits_seed"], 3)
    pruned, masks = prune(zoo, 0.7, selector)
    assert (
        set(pruned.weights) == set(zoo.weights)
        and pruned.models.equals(zoo.models)
        and pruned.architecture == zoo.architecture
    )
    for name, weights in zoo.weights.items():
        assert (
            torch.equal(pruned.weights[name], weights * masks[name] if name.endswith("weight") else weights)
            and pruned.weights[name].dtype == weights.dtype
        )
    assert all(torch.equal(tensor, pruned.weights[name]) for name, tensor in apply_masks(zoo.weights, masks).items())
