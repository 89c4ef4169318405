"""Copies, merges and distances: what must hold for any soup."""
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from zootwins import averaging
from zootwins.averaging import (
    average, check_masks, class_logits, compare_candidates, copies, copy_masks, gains, gradual_events, gradual_soup,
    greedy_soup, learned_soup, merge, merge_and_prune, prediction_ensemble, sparse_soup, train_copies, uniform_soup,
    validation_accuracy, weight_average,
)
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.distances import barrier, barycentre_distances, between, pairwise_distances, weight_vectors
from zootwins.engines import train
from zootwins.lanes import LANES
from zootwins.population import Population, concatenate, sample_population
from zootwins.selectors import prune
from zootwins.training import TORCH, Recipe, begin, evaluate, model_keys
from zootwins.variational import begin_variational, deterministic
from zootwins.zoos import ZOOS


@pytest.fixture(scope="module")
def images():
    return subset(load_images("digits"), 300, 200)


@pytest.fixture(scope="module")
def zoo(images):
    return train(
        sample_population(ZOOS["digits_seed"], 3), images, Recipe("digits_seed", "original", epochs=4, lr=3e-3),
        progress=False,
    ).population


@pytest.fixture(scope="module")
def pruned(zoo):
    return prune(zoo, 0.6, "lamp")


@pytest.fixture(scope="module")
def candidates(pruned, images):
    return train_copies(
        copies(pruned[0], 4), images, Recipe("digits_seed", "imp", epochs=2, lr=5e-3), copy_masks(pruned[1], 4)
    )


def equal(first, second):
    return all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


@pytest.mark.parametrize(
    "name, m",
    [("uniform", m) for m in (1, 2, 3, 5, 7, 10)] + [("greedy", 3), ("greedy", 7), ("learned", 1), ("learned", 3)],
)
def test_a_soup_of_equal_copies_is_the_copy(pruned, images, name, m):
    soup = merge(name, copies(pruned[0], m), images)
    assert equal(soup, pruned[0]) and soup.models.equals(pruned[0].models)


def test_zeros_stay_and_survivors_are_means(candidates, pruned):
    soup = uniform_soup(candidates.population, copy_masks(pruned[1], 4))
    for name, tensor in soup.weights.items():
        assert torch.allclose(tensor, candidates.population.weights[name].unflatten(0, (3, 4)).mean(1), atol=1e-6)
        if name in pruned[1]:
            assert (tensor[~pruned[1][name]] == 0).all()
    assert len(soup) == 3 and "copy" not in soup.models


def test_one_copy_is_plain_training_bit_for_bit(candidates, pruned, images):
    alone = train(pruned[0], images, Recipe("digits_seed", "imp", epochs=2, lr=5e-3), pruned[1], progress=False)
    assert equal(candidates.population[[0, 4, 8]], alone.population)
    single = train_copies(copies(pruned[0], 1), images, Recipe("digits_seed", "imp", epochs=2, lr=5e-3), pruned[1])
    assert equal(single.population, alone.population)


def test_copies_differ_in_their_batches_alone_and_the_first_are_the_first(candidates, pruned, images):
    three = train_copies(
        copies(pruned[0], 3), images, Recipe("digits_seed", "imp", epochs=2, lr=5e-3), copy_masks(pruned[1], 3)
    ).population
    of_four = candidates.population[[0, 1, 2, 4, 5, 6, 8, 9, 10]]
    assert equal(three, of_four)
    assert pairwise_distances(candidates.population)["relative"].min() > 0.005


def test_iterative_pruning_is_a_soup_of_one(zoo, images):
    recipe = Recipe("digits_seed", "imp", epochs=1, lr=5e-3)
    one = sparse_soup(zoo, images, 0.8, recipe, phases=2, m=1)
    population, masks = zoo, None
    for number, level in ((1, 1 - 0.2**0.5), (2, 0.8)):
        population, masks = prune(population, level, "global", masks)
        phase = Recipe("digits_seed", f"imp, phase {number}", epochs=1, lr=5e-3)
        population = train(population, images, phase, masks, progress=False).population
        assert equal(one[number - 1].soup, population) and all(
            torch.equal(mask, masks[name]) for name, mask in one[number - 1].masks.items()
        )
    assert math.isclose(one[0].level, 0.5527864045) and sum(mask.sum() for mask in masks.values()) == 3 * 483


def test_phases_of_soups_share_the_first_and_keep_their_zeros(zoo, images):
    recipe = Recipe("digits_seed", "imp", epochs=1, lr=5e-3, schedule="ALLR", original_epochs=4)
    soups = sparse_soup(zoo, images, 0.8, replace(recipe, schedule="constant"), phases=2, m=3, selector="lamp")
    alone = sparse_soup(zoo, images, 0.8, replace(recipe, schedule="constant"), phases=2, selector="lamp")
    assert equal(soups[0].candidates[::3], alone[0].soup) and not equal(soups[1].candidates[::3], alone[1].soup)
    soups = sparse_soup(zoo, images, 0.8, recipe, phases=2, m=2, selector="lamp", engine=TORCH)
    for before, after in zip(soups, soups[1:]):
        assert not any((after.masks[name] & ~mask).any() for name, mask in before.masks.items())
    assert all((soups[1].soup.weights[name][~mask] == 0).all() for name, mask in soups[1].masks.items())
    assert (soups[0].pruned.models["damage"] > 0).all() and not np.allclose(
        soups[0].pruned.models["damage"], soups[1].pruned.models["damage"]
    )


def test_greedy_is_never_below_the_best_copy_on_validation_and_takes_ties(candidates, images):
    accuracies = validation_accuracy(candidates.population, images).reshape(3, 4)
    soup, kept = greedy_soup(candidates.population, images)
    reached = validation_accuracy(soup, images)
    assert (reached >= accuracies.max(1).values).all()
    for i in range(3):
        assert kept[i, accuracies[i].argmax()] and equal(
            soup[[i]], average(candidates.population[[*range(4 * i, 4 * i + 4)]], kept[[i]])
        )
    assert greedy_soup(copies(soup, 3), images)[1].all()  # equal copies tie


def test_greedy_leaves_out_what_hurts(candidates, images):
    spoilt = Population(
        {name: tensor.clone() for name, tensor in candidates.population.weights.items()},
        candidates.population.models,
        "cnn_small_1ch",
    )
    for name in spoilt.weights:
        spoilt.weights[name][[1, 6]] *= -5
    _, kept = greedy_soup(spoilt, images)
    assert not kept[0, 1] and not kept[1, 2] and kept.any(1).all()


def test_greedy_does_not_depend_on_the_other_models(candidates, images):
    soup, kept = greedy_soup(candidates.population, images)
    alone, kept_alone = greedy_soup(candidates.population[[4, 5, 6, 7]], images)
    assert torch.equal(kept[[1]], kept_alone) and equal(alone, soup[[1]])


@pytest.mark.parametrize("teacher", [False, True])
def test_learned_coefficients_lie_on_the_simplex_and_lower_the_loss(candidates, images, zoo, teacher):
    soup, coefficients = learned_soup(candidates.population, images, teacher=zoo if teacher else None, steps=15)
    assert torch.allclose(coefficients.sum(1), torch.ones(3), atol=1e-6) and (coefficients >= 0).all()
    loss = lambda population: torch.stack(
        [
            F.cross_entropy(logits, target)
            for logits, target in zip(
                class_logits(population, images.x_val),
                class_logits(zoo, images.x_val).softmax(-1) if teacher else images.y_val.expand(3, -1),
            )
        ]
    )
    learned, uniform = loss(soup), loss(uniform_soup(candidates.population))
    assert (learned <= uniform + 1e-6).all() and (learned < uniform - 1e-5).any()


def test_masks_that_differ_are_refused_and_named(zoo):
    models = copies(zoo[[0, 0]], 1)
    first, second = prune(zoo[[0]], 0.5)[0], prune(zoo[[0]], 0.5, "layerwise")[0]
    both = concatenate([first, second])
    both.models = models.models.assign(model=7, copy=[0, 1])
    for refuse in (uniform_soup, check_masks):
        with pytest.raises(UserError, match="model 7 differ") as error:
            refuse(both)
        assert "\n" not in str(error.value)
    assert len(average(both)) == 1  # IMP-RePrune averages first and prunes then


def test_a_weight_that_training_brought_to_zero_is_no_difference_of_masks(candidates, pruned):
    touched = Population(
        {name: tensor.clone() for name, tensor in candidates.population.weights.items()},
        candidates.population.models,
        "cnn_small_1ch",
    )
    name = "module_list.11.weight"
    kept = pruned[1][name][0].nonzero()[0]
    touched.weights[name][0, kept[0], kept[1]] = 0
    with pytest.raises(UserError, match="differ"):
        uniform_soup(touched)
    assert len(uniform_soup(touched, copy_masks(pruned[1], 4))) == 3


@pytest.mark.parametrize("rows", [[0, 2, 1, 3], [1, 2, 3], [0, 1, 4], [0, 4, 1, 5], [0, 5]])
def test_copies_out_of_order_are_refused(candidates, rows):
    with pytest.raises(UserError, match="0 to m - 1") as error:
        uniform_soup(candidates.population[rows])
    assert "\n" not in str(error.value)


def test_models_without_copies_are_refused(zoo):
    with pytest.raises(UserError, match="averaging.copies"):
        uniform_soup(zoo)


def test_copies_take_factors_of_their_own(zoo, images):
    varied = copies(zoo[:2], 3, wd=(0.0, 1e-3, 1e-2), lr=(1e-3, 2e-3, 4e-3), epochs=(1, 2, 1))
    assert varied.models["model"].tolist() == [0, 0, 0, 1, 1, 1] and varied.models["copy"].tolist() == [0, 1, 2] * 2
    ends = train_copies(varied, images, Recipe("digits_seed", "imp", epochs=9))
    assert ends.metrics.groupby(["model", "copy"])["epoch"].max().tolist() == [1, 2, 1] * 2
    alone = train(varied[[4]], images, Recipe("digits_seed", "imp", epochs=2), progress=False).population
    assert equal(ends.population[[4]], alone)
    for m, factors in ((0, {}), (3, {"wd": (0.0,)})):
        with pytest.raises(UserError):
            copies(zoo, m, **factors)


def test_an_ensemble_is_the_mean_of_probabilities(candidates, images):
    loss, predicted = prediction_ensemble(candidates.population, images.x_test, images.y_test)
    by_hand = (
        torch.stack([candidates.population.to_module(i).eval()(images.x_test).softmax(-1) for i in range(4, 8)])
        .double()
        .mean(0)
    )
    assert torch.equal(predicted[1], by_hand.argmax(-1).to(torch.uint8))
    assert loss[1].item() == pytest.approx(F.nll_loss(by_hand.log(), images.y_test).item(), abs=1e-6)
    one = uniform_soup(candidates.population)
    alone, _ = prediction_ensemble(copies(one, 2), images.x_test, images.y_test)
    assert torch.allclose(
        alone, evaluate(one.weights, "cnn_small_1ch", ["tanh"] * 3, images.x_test, images.y_test)[0], atol=1e-5
    )


def test_ensembles_come_block_by_block_and_by_any_engine(candidates, images, monkeypatch):
    found = prediction_ensemble(candidates.population, images.x_test, images.y_test)
    monkeypatch.setattr(averaging, "TOGETHER", 2)
    parts = prediction_ensemble(candidates.population, images.x_test, images.y_test)
    assert all(torch.equal(one, other) for one, other in zip(found, parts)) and len(parts[0]) == 3
    by_reference = prediction_ensemble(candidates.population, images.x_test, images.y_test, TORCH)
    assert torch.allclose(found[0], by_reference[0], atol=1e-5) and (found[1] == by_reference[1]).float().mean() > 0.999
    noisy = begin_variational(candidates.population)
    assert torch.equal(
        class_logits(noisy, images.x_test),
        class_logits(replace(noisy, weights=deterministic(noisy.weights)), images.x_test),
    )


def test_a_soup_without_a_teacher_is_not_distilled(candidates, images):
    with pytest.raises(UserError, match="dense models") as error:
        merge("distilled", candidates.population, images)
    assert "\n" not in str(error.value)


def test_distillation_takes_part_in_algorithm_1(zoo, images):
    recipe = Recipe("digits_seed", "imp", epochs=1, lr=5e-3)
    (phase,) = sparse_soup(zoo, images, 0.6, recipe, m=2, merge_by="distilled")
    assert equal(phase.soup, learned_soup(phase.candidates, images, teacher=zoo)[0])


def test_the_cubic_schedule_of_sparsity():
    assert gradual_events(0.8, 5, 30, dense=True) == tuple(
        (5 * i, pytest.approx(0.8 * (1 - (1 - i / 5) ** 3))) for i in range(1, 6)
    )
    assert [epoch for epoch, _ in gradual_events(0.9, 3, 15, dense=False)] == [0, 5, 10] and gradual_events(
        0.9, 1, 1, dense=False
    ) == ((0, 0.9),)
    for events, epochs in ((3, 4), (7, 9), (5, 6)):
        places = [epoch for epoch, _ in gradual_events(0.9, events, epochs, dense=True)]
        assert len(set(places)) == events and 0 < min(places) <= max(places) < epochs
    for events, epochs in ((0, 5), (5, 5)):
        with pytest.raises(UserError, match="one event"):
            gradual_events(0.9, events, epochs, dense=True)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_gradual_copies_go_on_from_their_average(zoo, images, optimizer):
    models = copies(zoo, 2)
    models.models = models.models.assign(optimizer=optimizer)
    recipe = Recipe("digits_seed", "gmp", epochs=2, lr=2e-3)
    state = begin(models, model_keys(recipe, models.models))
    LANES.train_epoch(state, images.x_train, images.y_train, recipe)
    mean = {
        part: average(replace(state.population, weights=getattr(state, part))).weights
        for part in ("first", "second")
        if getattr(state, part)
    }
    pruned, masks = prune(average(state.population), 0.5, "lamp")
    merge_and_prune(state, 0.5, "lamp")
    for name, tensor in state.population.weights.items():
        assert torch.equal(tensor[::2], pruned.weights[name]) and torch.equal(tensor[1::2], pruned.weights[name])
        for part, tensors in mean.items():
            assert torch.equal(getattr(state, part)[name][1::2], tensors[name] * masks.get(name, 1))
    assert (
        all(torch.equal(mask[::2], masks[name]) for name, mask in state.masks.items())
        and state.steps == 30
        and bool(state.second) == (optimizer == "adam")
    )
    first = {name: mask.clone() for name, mask in state.masks.items()}
    LANES.train_epoch(state, images.x_train, images.y_train, recipe)
    merge_and_prune(state, 0.7, "lamp")
    assert not any((mask & ~first[name]).any() for name, mask in state.masks.items())
    assert sum(int(mask.sum()) for mask in state.masks.values()) == 6 * (2416 - round(0.7 * 2416))


def test_gradual_pruning_by_both_engines_and_beside_others(zoo, images):
    recipe, events = Recipe("digits_seed", "gmp", epochs=3, lr=2e-3), gradual_events(0.8, 2, 3, dense=True)
    found = gradual_soup(zoo, images, recipe, events, 2, "lamp")
    reference = gradual_soup(zoo, images, recipe, events, 2, "lamp", TORCH)
    assert max((a - b).abs().max() for a, b in zip(found.weights.values(), reference.weights.values())) < 1e-4
    assert equal(gradual_soup(zoo[[1]], images, recipe, events, 2, "lamp"), found[[2, 3]])
    check_masks(found)
    assert not equal(found[::2], found[1::2])


def test_weights_averaged_along_the_way(zoo, images):
    run = train(zoo, images, Recipe("digits_seed", "imp", epochs=2, lr=5e-3), keep=(1, 2), progress=False)
    mean = weight_average(run.snapshots)
    name = "module_list.9.weight"
    assert torch.allclose(
        mean.weights[name], (run.snapshots[1].weights[name] + run.snapshots[2].weights[name]) / 2, atol=1e-7
    )
    assert equal(weight_average({2: run.snapshots[2]}), run.population)


def test_variational_copies_can_be_averaged(zoo):
    noisy = begin_variational(zoo)
    assert equal(uniform_soup(copies(noisy, 3)), noisy)


def test_the_table_of_candidates(candidates, images):
    soup = uniform_soup(candidates.population)
    table = compare_candidates(candidates.population, {"uniform": soup}, images)
    _, predicted = evaluate(candidates.population.weights, "cnn_small_1ch", ["tanh"] * 12, images.x_test, images.y_test)
    right = (predicted == images.y_test).double().mean(1).reshape(3, 4)
    assert np.allclose(table["mean candidate"], right.mean(1)) and np.allclose(
        table["best candidate"], right.max(1).values
    )
    assert table["best by validation"].le(table["best candidate"]).all() and table.index.name == "model"
    chosen = validation_accuracy(candidates.population, images).reshape(3, 4).argmax(1)
    assert np.allclose(table["best by validation"], right[torch.arange(3), chosen])


def test_gains_are_paired_and_count_ties():
    table = pd.DataFrame({"soup": [0.9, 0.8, 0.7, 0.7], "other": [0.8, 0.8, 0.8, 0.6]})
    found = gains(table, "soup", ["other"]).loc["other"]
    assert found["gain"] == pytest.approx(2.5) and found["error"] == pytest.approx(np.std([10, 0, -10, 10], ddof=1) / 2)
    assert found[["wins", "ties", "loses"]].tolist() == [0.5, 0.25, 0.25]


def test_no_validation_images_no_choice(candidates, images):
    with pytest.raises(UserError, match="validation"):
        greedy_soup(candidates.population, replace(images, x_val=images.x_val[:0], y_val=images.y_val[:0]))
    with pytest.raises(UserError, match="uniform, greedy, learned"):
        merge("unifrom", candidates.population, images)


def test_distances_by_hand(candidates):
    found = pairwise_distances(candidates.population)
    assert len(found) == 3 * 6 and found["angle"].between(0, 90).all()
    a, b = weight_vectors(candidates.population)[[5, 7]]
    row = found[(found["model"] == 1) & (found["first"] == 1) & (found["second"] == 3)].iloc[0]
    assert row["distance"] == pytest.approx((a - b).norm().item()) and row["relative"] == pytest.approx(
        ((a - b).norm() / ((a.norm() + b.norm()) / 2)).item()
    )
    assert math.cos(math.radians(row["angle"])) == pytest.approx((a @ b / a.norm() / b.norm()).item())
    center = barycentre_distances(candidates.population)
    soup = weight_vectors(uniform_soup(candidates.population))
    assert center["distance"].iloc[5] == pytest.approx((a - soup[1]).norm().item(), rel=1e-4)
    assert (center.groupby("model")["distance"].max() < found.groupby("model")["distance"].max()).all()
    with pytest.raises(UserError, match="two copies"):
        pairwise_distances(candidates.population[[0, 4, 8]])


def test_barriers(candidates, zoo, images):
    first, second = candidates.population[::4], candidates.population[1::4]
    flat = barrier(first, first, images, points=3)
    assert flat["barrier"].abs().max() < 1e-9 and flat["first"].equals(flat["middle"])
    near, far = barrier(first, second, images, points=5), barrier(zoo, zoo[[1, 2, 0]], images, points=5)
    assert (near["barrier"] >= 0).all() and near["barrier"].max() < 0.1 < 0.5 < far["barrier"].min()
    assert equal(between(first, second, 0.0), first) and equal(between(first, second, 1.0), second)
    soup = uniform_soup(candidates.population[[0, 1, 4, 5, 8, 9]])
    middle = between(first, second, 0.5)
    assert all(torch.allclose(middle.weights[name], tensor, atol=1e-6) for name, tensor in soup.weights.items())
    for pair, points in (((first, second[:2]), 5), ((first, second), 4)):
        with pytest.raises(UserError, match="odd number"):
            barrier(*pair, images, points=points)
