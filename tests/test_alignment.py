"""Symmetries of models: the same function, exact recovery, and an inner product that never falls."""
from itertools import permutations

import pytest
import torch
from torch import nn

from zootwins import alignment
from zootwins.alignment import Symmetry, aligned, augmented, followed_by, hidden_layers, identity, inner_product, match
from zootwins.alignment import match_layer, random_symmetry, transform
from zootwins.architectures import ARCHITECTURES, ZooCNN
from zootwins.averaging import class_logits, copies
from zootwins.core import UserError
from zootwins.population import Population, concatenate, initial_population, noise_shapes, plain_models
from zootwins.selectors import prunable, prune

IMAGES = {"cnn_small_1ch": (5, 1, 28, 28), "cnn_small_3ch": (5, 3, 28, 28), "cnn_large": (5, 3, 32, 32)}


def some(n=4, architecture="cnn_small_1ch", **factors):
    "Models with biases of their own."
    models = plain_models(n, init="kaiming_normal", **factors)
    population = initial_population(models, architecture, "alignment")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in population.weights.items():
        if name.endswith("bias"):
            tensor += torch.randn(tensor.shape, generator=generator)
    return population


def same(one, other):
    return all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


@pytest.mark.parametrize("architecture", IMAGES)
def test_a_permuted_and_flipped_model_is_the_same_function(architecture):
    population = some(4, architecture, activation=["tanh", "relu", "gelu", "sigmoid"])
    x = torch.rand(IMAGES[architecture], generator=torch.Generator().manual_seed(0))
    moved = augmented(population)
    assert torch.allclose(class_logits(population, x), class_logits(moved, x), atol=1e-4)
    assert not any(
        torch.equal(population.weights[name][i], tensor[i])
        for i in range(4)
        for name, tensor in prunable(moved.weights).items()
    )
    signs = random_symmetry(population).signs
    flipped = {path: (sign < 0).any(1).tolist() for path, sign in signs.items()}
    free = {layer.path for layer in hidden_layers(architecture) if layer.flips}
    assert len(free) == (1 if architecture == "cnn_large" else 2)
    assert all(found == [path in free, False, False, False] for path, found in flipped.items())


def test_signs_are_not_free_before_max_pooling_nor_for_other_activations():
    x = torch.rand(IMAGES["cnn_small_1ch"], generator=torch.Generator().manual_seed(0))
    for activation, path, free in (
        ("tanh", "module_list.6", True),
        ("tanh", "module_list.3", False),
        ("relu", "module_list.6", False),
    ):
        population = some(2, activation=activation)
        nothing = identity(population)
        flip = Symmetry({path: nothing.orders[path]}, {path: -nothing.signs[path]})
        assert (
            torch.allclose(class_logits(population, x), class_logits(transform(population, flip), x), atol=1e-4) == free
        )
        assert next(layer.flips for layer in hidden_layers("cnn_small_1ch", activation) if layer.path == path) == free


@pytest.mark.parametrize("architecture", IMAGES)
def test_matching_recovers_a_random_symmetry_bit_by_bit(architecture):
    population = some(4, architecture, activation=["tanh", "relu", "tanh", "sigmoid"])
    for draw in range(3):
        assert same(aligned(augmented(population, draw), population), population)
        assert same(aligned(augmented(population, draw, flips=False), population, flips=False), population)
    unflipped = aligned(augmented(population), population, flips=False)
    assert [same(unflipped[[i]], population[[i]]) for i in range(4)] == [False, True, False, True]


def test_pruned_models_are_recovered_too():
    population = prune(some(), 0.8)[0]
    assert same(aligned(augmented(population), population), population)


def test_one_layer_is_assigned_as_well_as_trying_all_orders():
    population, reference = some(3), some(6)[[3, 4, 5]]
    layer = hidden_layers("cnn_small_1ch")[2]
    for free in (False, True):
        found = transform(population, match_layer(population, reference, layer, torch.full((3,), free)))
        best = torch.full((3,), -torch.inf, dtype=torch.float64)
        for order in permutations(range(layer.units)):
            for bits in range(2**layer.units if free else 1):
                signs = torch.tensor([[-1.0 if bits >> unit & 1 else 1.0 for unit in range(layer.units)]]).repeat(3, 1)
                tried = Symmetry({layer.path: torch.tensor([order] * 3)}, {layer.path: signs})
                best = torch.maximum(best, inner_product(transform(population, tried), reference))
        assert torch.allclose(inner_product(found, reference), best, rtol=1e-9)


def test_matching_never_loses_and_flips_help():
    population, reference = some(6), some(12)[range(6, 12)]
    start = inner_product(population, reference)
    permuted, flipped = (inner_product(aligned(population, reference, flips), reference) for flips in (False, True))
    assert (permuted > start).all() and (flipped > permuted).all()
    longer = inner_product(transform(population, match(population, reference, sweeps=1)), reference)
    assert (longer <= flipped + 1e-9).all()


def test_one_reference_serves_all_and_neighbours_do_not_matter():
    population, reference = some(4), some(5)[[4]]
    together = aligned(population, reference)
    assert all(same(aligned(population[[i]], reference), together[[i]]) for i in range(4))
    assert same(augmented(population)[[2]], augmented(population[[2]]))
    assert not same(augmented(population, 0), augmented(population, 1)) and same(
        augmented(population, 1), augmented(population, 1)
    )


def test_symmetries_follow_one_another():
    population = some(activation=["tanh", "relu", "tanh", "gelu"])
    first, second = random_symmetry(population, 1), random_symmetry(population, 2)
    assert same(transform(population, followed_by(first, second)), transform(transform(population, first), second))
    assert same(transform(population, identity(population)), population)


def test_copies_keep_their_common_mask():
    population = copies(prune(some(), 0.8)[0], 2)
    moved = augmented(population)
    assert all(torch.equal(tensor[::2] == 0, tensor[1::2] == 0) for tensor in prunable(moved.weights).values())


def test_log_variances_move_with_their_weights_and_keep_their_sign():
    population = some()
    noise = {
        name: -population.weights[name.replace("log_sigma2_bias", "bias").replace("log_sigma2", "weight")].abs()
        for name in noise_shapes("cnn_small_1ch")
    }
    population.weights |= noise
    moved = augmented(population)
    for name in noise:
        assert torch.equal(
            moved.weights[name],
            -moved.weights[name.replace("log_sigma2_bias", "bias").replace("log_sigma2", "weight")].abs(),
        )


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(UserError, match="as many of theirs, or with one, not with 2 of cnn_small_1ch"):
        match(some(3), some(2))
    with pytest.raises(UserError, match="not with 3 of cnn_small_3ch"):
        match(some(3), some(3, "cnn_small_3ch"))
    norm = lambda activation, dropout: ZooCNN(
        [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)]
    )
    for name, make, message in (
        ("normed", norm, "has a BatchNorm2d"),
        ("tree", lambda activation, dropout: nn.Bilinear(2, 2, 2), "not a chain"),
    ):
        monkeypatch.setitem(ARCHITECTURES, name, make)
        with pytest.raises(UserError, match=message) as error:
            hidden_layers(name)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(
        ARCHITECTURES,
        "plain",
        lambda activation, dropout: nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 10)),
    )
    assert hidden_layers("plain") == (alignment.Hidden("1", "3", 3, True),)


def test_a_mixed_pair_flips_only_where_both_are_free():
    population = some(2, activation=["tanh", "tanh"])
    reference = concatenate(
        [
            population[[0]],
            Population(
                {name: tensor[[1]] for name, tensor in population.weights.items()},
                plain_models(1, activation="relu"),
                "cnn_small_1ch",
            ),
        ]
    )
    found = match(augmented(population), reference)
    assert (found.signs["module_list.9"][0] < 0).any() and not (found.signs["module_list.9"][1] < 0).any()
