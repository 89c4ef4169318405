"""Selectors: golden values, exact and cumulative counts, and masks of later phases within earlier ones."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zootwins.core import UserError
from zootwins.datasets import load_images
from zootwins.population import Population, sample_population
from zootwins.selectors import (
    SELECTORS, Selector, check_target, deal, empty_layers, erk_counts, kept_weights, lamp_scores, prunable, prune,
    snip_scores, sparsity_per_phase, uniform_plus_counts,
)
from zootwins.zoos import ZOOS

NAMES = [name for name in SELECTORS if name not in ("filters", "uniform+")]
SIZES = {"conv1": 200, "conv2": 1200, "conv3": 96, "fc1": 720, "fc2": 200}


@pytest.fixture(scope="module")
def images():
    return load_images("digits")


@pytest.fixture(scope="module")
def zoo():
    return sample_population(ZOOS["digits_seed"], 3)


def shapes_of(zoo):
    return {name: tuple(tensor.shape[1:]) for name, tensor in prunable(zoo.weights).items()}


@pytest.mark.parametrize(
    "level, phases, expected, left",
    [
        (0.8, 3, (0.4151964524, 0.6580048107, 0.8), (1413, 826, 483)),
        (0.9, 3, (0.5358411166, 0.7845565310, 0.9), (1121, 521, 242)),
        (0.95, 3, (0.6315968501, 0.8642791192, 0.95), (890, 328, 121)),
        (0.98, 3, (0.7285582383, 0.9263193700, 0.98), (656, 178, 48)), (0.9, 2, (0.6837722340, 0.9), (764, 242)),
        (0.6, 3, (0.2631937003, 0.4571164767, 0.6), (1780, 1312, 966)), (0.5, 1, (0.5,), (1208,)),
    ],
)
def test_levels_of_the_phases(level, phases, expected, left):
    found = sparsity_per_phase(level, phases)
    assert np.allclose(found, expected, atol=1e-9) and found[-1] == level
    assert tuple(2416 - round(each * 2416) for each in found) == left


@pytest.mark.parametrize("level, phases", [(0.9, 0), (1.0, 3), (-0.1, 1)])
def test_impossible_phases(level, phases):
    with pytest.raises(UserError):
        sparsity_per_phase(level, phases)


@pytest.mark.parametrize("name", NAMES)
def test_phases_are_nested_exact_and_cumulative(zoo, images, name):
    current, earlier = zoo, None
    for level, left in zip(sparsity_per_phase(0.9, 3), (1121, 521, 242)):
        current, masks = prune(current, level, name, earlier, images)
        counts = sum(mask.flatten(1).sum(1) for mask in masks.values())
        if name == "layerwise":
            assert all(
                mask.flatten(1).sum(1).eq(mask[0].numel() - round(level * mask[0].numel())).all()
                for mask in masks.values()
            )
        else:
            assert counts.eq(left).all()
        for key, mask in masks.items():
            assert (current.weights[key][~mask] == 0).all()
            assert earlier is None or not (mask & ~earlier[key]).any()
            # what survives is untouched, retrained or not
            current.weights[key] = current.weights[key] * 1.5
        earlier = masks
    assert torch.equal(current.weights["module_list.0.bias"], zoo.weights["module_list.0.bias"])


@pytest.mark.parametrize(
    "level, densities",
    [
        (0.5, (0.124848, 0.815758, 0, 0.283502, 0)), (0.8, (0.678993, 0.932420, 0.507226, 0.737187, 0.493147)),
        (0.9, (0.839497, 0.966210, 0.753613, 0.868594, 0.746573)),
        (0.95, (0.919748, 0.983105, 0.876807, 0.934297, 0.873287)),
    ],
)
def test_erk_is_the_published_one_within_a_weight(zoo, level, densities):
    counts = list(erk_counts(shapes_of(zoo), level).values())
    assert sum(counts) == 2416 - round(level * 2416)
    assert all(
        abs(size * (1 - sparsity) - count) <= 1 for size, sparsity, count in zip(SIZES.values(), densities, counts)
    )


@pytest.mark.parametrize(
    "level, middle, last",
    [
        (0.5, 0.5451263538, 0.5451263538), (0.7, 0.7630866426, 0.7630866426), (0.75, 0.8194444444, 0.8),
        (0.8, 0.8794642857, 0.8), (0.85, 0.9394841270, 0.8), (0.9, 0.9990079365, 0.8),
    ],
)
def test_uniform_plus_is_the_published_one_within_a_weight(zoo, level, middle, last):
    counts = list(uniform_plus_counts(shapes_of(zoo), level).values())
    assert counts[0] == 200 and sum(counts) == 2416 - round(level * 2416)
    assert all(
        abs(size * (1 - sparsity) - count) <= 1
        for size, sparsity, count in zip((1200, 96, 720, 200), (middle,) * 3 + (last,), counts[1:])
    )


def test_uniform_plus_is_possible_up_to_its_bound_and_no_further(zoo):
    bound = 1 - 240 / 2416
    assert sum(uniform_plus_counts(shapes_of(zoo), bound).values()) == 240
    for level in (bound + 1 / 2416, 0.95):
        with pytest.raises(UserError, match="highest possible level is 90.1%") as error:
            prune(zoo, level, "uniform+")
        assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=6), st.data()
)
def test_deal_keeps_bounds_sums_and_never_takes_back(layers, data):
    shares, sizes, low = zip(*layers)
    low = [min(a, b) for a, b in zip(low, sizes)]
    total = data.draw(st.integers(sum(low), sum(sizes)))
    found = deal(shares, low, sizes, total)
    assert sum(found) == total and all(a <= k <= b for a, k, b in zip(low, found, sizes))
    if total < sum(sizes):
        more = deal(shares, low, sizes, total + 1)
        assert sum(more) == total + 1 and all(b >= a for a, b in zip(found, more))


def test_lamp_by_hand_and_across_layers():
    population = Population(
        {"a.weight": torch.tensor([[[0.1, -0.5, 0.3, 0.2]]]), "b.weight": torch.tensor([[[1.0, -2.0, 3.0]]])},
        pd.DataFrame({"seed": [1]}),
        "",
    )
    scores = lamp_scores(population)
    assert torch.allclose(
        scores["a.weight"], torch.tensor([[[0.0256410256, 1, 0.2647058824, 0.1052631579]]], dtype=torch.float64)
    )
    assert torch.allclose(scores["b.weight"], torch.tensor([[0.0714285714, 0.3076923077, 1]], dtype=torch.float64))
    _, masks = prune(population, 4 / 7, "lamp")
    assert masks["a.weight"].tolist() == [[[False, True, False, False]]] and masks["b.weight"].tolist() == [
        [[False, True, True]]
    ]


def test_lamp_of_a_layer_without_weights_is_zero():
    population = Population(
        {"a.weight": torch.zeros(1, 1, 3), "b.weight": torch.tensor([[[1.0, 2.0]]])}, pd.DataFrame({"seed": [1]}), ""
    )
    assert lamp_scores(population)["a.weight"].eq(0).all() and lamp_scores(population)["b.weight"].max() == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_models_mask_does_not_depend_on_its_neighbours(zoo, images, name):
    _, together = prune(zoo, 0.8, name, images=images)
    _, alone = prune(zoo[[2]], 0.8, name, images=images)
    _, reverse = prune(zoo[[2, 1, 0]], 0.8, name, images=images)
    assert all(
        torch.equal(together[key][[2]], mask) and torch.equal(reverse[key][[0]], mask) for key, mask in alone.items()
    )


def test_sums_over_images_hardly_depend_on_who_is_beside(zoo, images):
    """Single precision differs by 1e-7 there, which moves a weight over the threshold once in some thousand masks."""
    together, alone = snip_scores(zoo, images), snip_scores(zoo[[2]], images)
    for name, scores in alone.items():
        assert scores.dtype == torch.double and torch.allclose(together[name][[2]], scores, rtol=1e-11, atol=1e-18)


@pytest.mark.parametrize("name", SELECTORS)
def test_targets_are_checked_before_anything_is_trained(name):
    for architecture in ("cnn_small_1ch", "cnn_small_3ch", "cnn_large"):
        for level in (0.0, 0.5, 0.7):
            check_target(name, architecture, level)
    if name == "uniform+":
        with pytest.raises(UserError, match="highest possible level is 90.1%"):
            check_target(name, "cnn_small_1ch", 0.95)
    else:
        check_target(name, "cnn_small_1ch", 0.95)


def test_every_model_may_have_a_level_of_its_own(zoo):
    _, masks = prune(zoo, [0.5, 0.9, 0.5], "lamp")
    for i, level in enumerate((0.5, 0.9, 0.5)):
        _, alone = prune(zoo[[i]], level, "lamp")
        assert all(torch.equal(masks[key][[i]], mask) for key, mask in alone.items())


def test_random_masks_differ_between_models_and_not_between_runs(zoo):
    (_, first), (_, second) = prune(zoo, 0.5, "random"), prune(zoo, 0.5, "random")
    name = "module_list.3.weight"
    assert torch.equal(first[name], second[name])
    assert 0.4 < (first[name][0] ^ first[name][1]).double().mean() < 0.6


def test_filters_go_whole_and_linear_layers_stay(zoo):
    pruned, masks = prune(zoo, 0.5, "filters")
    for name, mask in masks.items():
        if mask.ndim == 5:
            whole = mask.flatten(2)
            assert (
                torch.equal(whole.any(2), whole.all(2))
                and whole.any(2).sum(1).eq(mask.shape[1] - round(0.5 * mask.shape[1])).all()
            )
            norms = zoo.weights[name].flatten(2).norm(dim=2)
            assert (
                norms.masked_fill(whole.any(2), -1).max(1).values
                <= norms.masked_fill(~whole.any(2), torch.inf).min(1).values
            ).all()
        else:
            assert mask.all()
    again, later = prune(pruned, 0.75, "filters", masks)
    assert not any((later[name] & ~masks[name]).any() for name in masks)


def test_a_users_function_and_selector(zoo):
    def smallest(population, images):
        return {name: -tensor.abs() for name, tensor in prunable(population.weights).items()}

    _, masks = prune(zoo, 0.5, smallest)
    _, largest = prune(zoo, 0.5, "global")
    assert all((mask ^ largest[name]).all() for name, mask in masks.items())
    _, even = prune(
        zoo,
        0.5,
        Selector(
            "even", smallest, lambda shapes, level: {name: math.prod(shape) // 2 for name, shape in shapes.items()}
        ),
    )
    assert all(mask.flatten(1).sum(1).eq(mask[0].numel() // 2).all() for mask in even.values())


def test_some_layers_only(zoo):
    last = "module_list.11.weight"
    _, masks = prune(zoo, 0.25, lambda population, images: {last: population.weights[last].abs()})
    assert masks[last].flatten(1).sum(1).eq(150).all() and all(
        mask.all() for name, mask in masks.items() if name != last
    )


@pytest.mark.parametrize("name", ["global", "layerwise", "lamp", "erk"])
def test_a_diverged_model_leaves_its_neighbours_alone(zoo, name):
    hurt = Population({key: tensor.clone() for key, tensor in zoo.weights.items()}, zoo.models, zoo.architecture)
    hurt.weights["module_list.3.weight"][1] = torch.nan
    (_, calm), (_, masks) = prune(zoo, 0.8, name), prune(hurt, 0.8, name)
    assert all(torch.equal(calm[key][[0, 2]], mask[[0, 2]]) for key, mask in masks.items())
    assert sum(mask[1].sum() for mask in masks.values()) == 483
    assert sum(mask[1].sum() for mask in prune(hurt, 0.9, name, masks)[1].values()) == 242


@pytest.mark.parametrize(
    "selector, level, message",
    [
        ("magnitude", 0.5, "global, layerwise"), ("snip", 0.5, "training images"), ("lamp", 1.0, "below 1"),
        ("lamp", 90, "fraction"), (lambda p, i: {"module_list.0.weight": torch.zeros(3, 7)}, 0.5, "do not fit"),
        (lambda p, i: {"nothing": torch.zeros(3, 7)}, 0.5, "do not fit"),
    ],
)
def test_mistakes_are_told(zoo, selector, level, message):
    with pytest.raises(UserError, match=message) as error:
        prune(zoo, level, selector)
    assert "\n" not in str(error.value)


def test_levels_cannot_fall_and_selectors_cannot_change_where_less_is_left(zoo):
    pruned, masks = prune(zoo, 0.8, "global")
    for level, name in ((0.5, "global"), (0.85, "layerwise")):
        with pytest.raises(UserError, match="earlier pruning left"):
            prune(pruned, level, name, masks)


def test_empty_layers_are_counted(zoo):
    assert not empty_layers(prune(zoo, 0.5, "lamp")[1], zoo.architecture).any(axis=None)
    masks = {name: mask.clone() for name, mask in prune(zoo, 0.5, "lamp")[1].items()}
    masks["module_list.3.weight"][1] = False
    masks["module_list.3.weight"][1, 0, 0, 0, 0] = True
    assert kept_weights(masks, zoo.architecture)["conv2"].iloc[1] == 1 and not empty_layers(
        masks, zoo.architecture
    ).any(axis=None)
    masks["module_list.3.weight"][1] = False
    found = empty_layers(masks, zoo.architecture)
    assert (
        list(found.columns) == list(SIZES)
        and found["conv2"].tolist() == [False, True, False]
        and found.to_numpy().sum() == 1
    )


def test_a_model_with_an_empty_layer_says_the_same_about_every_image(zoo, images):
    pruned, masks = prune(zoo, 0.95, "global")
    assert empty_layers(masks, zoo.architecture).any(axis=1).all()
    logits = pruned.to_module(0).eval()(images.x_test[:50])
    assert torch.equal(logits, logits[:1].expand_as(logits))
