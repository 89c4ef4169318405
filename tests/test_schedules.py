"""Schedules against torch's own, ALLR's golden values, and the reference engine that follows them."""
import json
import math
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.engines import train
from zootwins.lanes import LANES
from zootwins.population import sample_population
from zootwins.schedules import (
    SCHEDULES, WARM_UP, epoch_factors, factor_at, initial_factors, pruning_damage, relative_history,
)
from zootwins.selectors import prune
from zootwins.streams import epoch_order, stream_keys
from zootwins.training import TORCH, Recipe, model_keys, rate_factors, rates_and_decays
from zootwins.zoos import ZOOS

LINEAR = [0.1 * (1 - epoch / 50) for epoch in range(50)]
STEPS = [0.1] * 90 + [0.01] * 90 + [0.001] * 20  # the paper's CIFAR-10 schedule


@pytest.fixture(scope="module")
def digits():
    return subset(load_images("digits"), 60, 100)


def whole(schedule, epochs=5, steps=20, **options):
    return torch.cat([epoch_factors(schedule, epoch, epochs, steps, **options) for epoch in range(1, epochs + 1)])


def torchs(scheduler, n):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = scheduler(optimizer), []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


@pytest.mark.parametrize(
    "schedule, options, theirs",
    [
        ("constant", {}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        ("LLR", {}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=100)),
        ("ALLR", {"original_epochs": 50}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=100)),
        ("CLR", {"warm_up": 0.0}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100)),
        (
            "CLR",
            {"warm_up": 0.0, "history": (2.0, 1.0, 0.5)},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.25),
        ),
    ],
)
def test_shapes_are_torchs(schedule, options, theirs):
    assert torch.allclose(whole(schedule, **options), torchs(theirs, 100), atol=1e-12)


def test_rewinding_repeats_the_last_epochs_and_not_all_but_them():
    found = whole("LRW", 10, 3, history=STEPS)
    assert torch.allclose(found, torch.full((30,), 0.01, dtype=torch.float64))
    found = whole("LRW", 5, 1, history=LINEAR)
    assert torch.allclose(found, torch.tensor(LINEAR[-5:], dtype=torch.float64) / 0.1)
    assert torch.allclose(whole("LRW", 50, 1, history=LINEAR), torch.tensor(LINEAR, dtype=torch.float64) / 0.1)
    with pytest.raises(UserError, match="fewer epochs"):
        epoch_factors("LRW", 1, 51, 1, history=LINEAR)


def test_a_history_of_steps_is_read_as_one_of_epochs():
    fine = [rate for rate in LINEAR for _ in range(7)]
    for schedule in ("LRW", "SLR", "FT"):
        assert torch.allclose(whole(schedule, history=LINEAR), whole(schedule, history=fine, original_epochs=50))


def test_fine_tuning_and_scaled_restart():
    assert torch.allclose(whole("FT", history=STEPS), torch.full((100,), 0.01, dtype=torch.float64))
    found = whole("SLR", 4, 50, history=STEPS)
    assert (found[:20] < 1).all() and found[0] == 0 and (found[20:101] == 1).all() and math.isclose(found[-1], 0.01)
    assert torch.equal(
        whole("SLR", 4, 50, history=STEPS, warm_up=0.0),
        torch.tensor([relative_history(STEPS)[i] for i in range(200)], dtype=torch.float64),
    )


def test_warm_up_is_half_a_cosine_and_the_texts_by_default():
    assert WARM_UP == {"SLR": 0.1, "CLR": 0.1}
    found = whole("LLR", 2, 50, warm_up=0.2)
    assert found[0] == 0 and math.isclose(found[10], 0.5) and found[20] == 1 and math.isclose(found[60], 0.5)
    assert whole("LLR")[0] == 1 and whole("CLR")[0] == 0
    with pytest.raises(UserError, match="share"):
        epoch_factors("LLR", 1, 5, 10, warm_up=1.0)


def test_a_history_that_warms_up_begins_at_its_top():
    assert relative_history([0.05, 0.1, 0.2, 0.1]) == [1.0, 1.0, 1.0, 0.5]


def test_one_value_per_epoch_is_that_of_its_middle():
    assert [epoch_factors("LLR", epoch, 5, 3, per_step=False).tolist() for epoch in (1, 5)] == [
        [0.9] * 3,
        [pytest.approx(0.1)] * 3,
    ]
    assert math.isclose(epoch_factors("LLR", 2, 5, 200).mean().item(), 0.7, abs_tol=0.001)


@pytest.mark.parametrize(
    "schedule, options, message",
    [
        ("LLRR", {}, "constant, FT"), ("FT", {}, "history"), ("SLR", {}, "history"), ("ALLR", {}, "original_epochs"),
        ("FT", {"history": (0.0, 0.0)}, "positive"), ("LLR", {"history": (1.0, -1.0)}, "negative"),
        ("LLR", {"history": (1.0, float("inf"))}, "positive"),
    ],
)
def test_mistakes_are_told(schedule, options, message):
    with pytest.raises(UserError, match=message) as error:
        epoch_factors(schedule, 1, 5, 10, **options)
    assert "\n" not in str(error.value)


WEIGHTS = {"a.weight": torch.tensor([[0.1, -0.5, 0.3, 0.2]])}
MASKS = {"a.weight": torch.tensor([[False, True, True, False]])}


def test_damage_by_hand():
    assert pruning_damage(WEIGHTS, MASKS).item() == pytest.approx(0.5063696835, abs=1e-8)
    equal = {"a.weight": torch.tensor([[0.4, -0.4, 0.4, 0.4]])}
    assert pruning_damage(equal, MASKS).item() == pytest.approx(1.0)
    assert pruning_damage(WEIGHTS, {"a.weight": torch.ones(1, 4, dtype=torch.bool)}).item() == 0


@pytest.mark.parametrize(
    "damage, epochs, original, expected",
    [
        (0.5063696835, 5, 50, 5.063696835e-4), (0.05, 5, 50, 1e-4), (0.1, 5, 50, 1e-4), (0.5063696835, 50, 50, 1e-3),
        (0.5, 80, 50, 1e-3), (1.0, 5, 50, 1e-3), (0.0, 1, 50, 2e-5),
    ],
)
def test_allr_is_clipped_on_both_sides(damage, epochs, original, expected):
    assert 1e-3 * initial_factors(
        torch.tensor([damage], dtype=torch.float64), epochs, original
    ).item() == pytest.approx(expected, rel=1e-9)


def test_the_share_is_that_of_one_step_and_not_the_cumulative_one():
    earlier = {"a.weight": torch.tensor([[False, True, True, True]])}
    left = {"a.weight": WEIGHTS["a.weight"] * earlier["a.weight"]}
    assert pruning_damage(left, MASKS, earlier).item() == pytest.approx((0.2**2 / (0.38 / 3)) ** 0.5)


def test_the_authors_norm_counts_biases_and_is_smaller():
    weights = WEIGHTS | {"a.bias": torch.tensor([[1.0]])}
    both = [pruning_damage(weights, MASKS, everything=everything).item() for everything in (False, True)]
    assert both[1] == pytest.approx(both[0] * (0.39 / 1.39) ** 0.5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    "schedule, options",
    [
        ("LLR", {}), ("CLR", {"warm_up": 0.2}), ("SLR", {"history": (3.0, 2.0, 1.0), "nesterov": True}),
        ("LLR", {"per_step": False}),
    ],
)
def test_the_engine_follows_the_schedule_as_torch_would(digits, schedule, options, optimizer):
    population = sample_population(ZOOS["digits_seed"], 2)
    population.models = population.models.assign(optimizer=optimizer, lr=[1e-3, 4e-3], wd=[1e-3, 1e-2])
    recipe = Recipe("digits_seed", "imp", epochs=3, schedule=schedule, batch_size=8, **options)
    trained = train(population, digits, recipe, engine=TORCH, progress=False).population
    for i in (0, 1):
        module, factors = population.to_module(i), population.models.iloc[i]
        if optimizer == "adam":
            step = torch.optim.Adam(module.parameters(), factors["lr"], weight_decay=factors["wd"])
        else:
            step = torch.optim.SGD(
                module.parameters(), factors["lr"], momentum=0.9, weight_decay=factors["wd"], nesterov=recipe.nesterov
            )
        key = stream_keys("digits_seed", "imp", [factors["seed"]])[0]
        for epoch in range(1, 4):
            for batch, factor in zip(epoch_order(60, key, epoch).split(8), rate_factors(recipe, epoch, 8)):
                step.param_groups[0]["lr"] = factors["lr"] * factor.item()
                step.zero_grad()
                F.cross_entropy(module(digits.x_train[batch]), digits.y_train[batch]).backward()
                step.step()
        apart = max(
            (parameter - trained.weights[name][i]).abs().max().item() for name, parameter in module.named_parameters()
        )
        assert apart < 2e-5


def test_nesterov_is_another_way(digits):
    population = sample_population(ZOOS["digits_seed"], 1)
    population.models = population.models.assign(optimizer="sgd", lr=1e-2)
    ends = [
        train(
            population, digits, Recipe("digits_seed", "imp", epochs=1, nesterov=nesterov), engine=TORCH, progress=False
        ).population
        for nesterov in (False, True)
    ]
    assert not torch.allclose(*(end.weights["module_list.0.weight"] for end in ends), atol=1e-5)


def test_allr_starts_every_model_at_a_rate_of_its_own(digits):
    population = sample_population(ZOOS["digits_seed"], 3)
    pruned, masks = prune(population, 0.8)
    recipe = Recipe("digits_seed", "imp", epochs=2, lr=1e-3, schedule="ALLR", original_epochs=30)
    with pytest.raises(UserError, match="damage"):
        train(pruned, digits, recipe, masks, engine=TORCH, progress=False)
    damage = pruning_damage(population.weights, masks)
    assert (damage > 0.1).all() and damage.unique().numel() == 3
    pruned.models = pruned.models.assign(damage=damage.numpy())
    adaptive = train(pruned, digits, recipe, masks, engine=TORCH, progress=False).population
    pruned.models = pruned.models.assign(lr=(1e-3 * damage).numpy())
    linear = train(
        pruned, digits, Recipe("digits_seed", "imp", epochs=2, schedule="LLR"), masks, engine=TORCH, progress=False
    ).population
    assert all(torch.equal(adaptive.weights[name], tensor) for name, tensor in linear.weights.items())


def test_a_recipe_pickles_and_turns_into_json():
    recipe = Recipe(
        "digits_seed", "imp", epochs=5, schedule="LRW", history=(1.0, 0.5), nesterov=True, warm_up=0.1, per_step=False,
        original_epochs=30,
    )
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    read = json.loads(json.dumps(asdict(recipe)))
    assert Recipe(**read | {"history": tuple(read["history"])}) == recipe
    assert Recipe("digits_seed", "imp", 5).schedule == "constant" in SCHEDULES and factor_at(0.3, "constant", 5) == 1


def test_copies_have_streams_of_their_own_and_copy_0_the_models():
    models = sample_population(ZOOS["digits_seed"], 2).models
    twice = models.loc[[0, 0, 1, 1]].assign(copy=[0, 1, 0, 1])
    recipe = Recipe("digits_seed", "imp", epochs=1, run_seed=3)
    keys = model_keys(recipe, twice)
    assert torch.equal(keys[::2], stream_keys("digits_seed", "imp", models["seed"], 3)) and torch.equal(
        keys[::2], model_keys(recipe, models)
    )
    assert len(keys.unique(dim=0)) == 4 and not torch.equal(
        rates_and_decays(models.assign(lr=[1.0, 2.0]), recipe, "cpu")[0], torch.ones(2)
    )


@pytest.mark.parametrize("options, message", [({"schedule": "LLR"}, "for LLR"), ({"nesterov": True}, "for Nesterov")])
def test_an_engine_that_knows_no_schedules_refuses_them(digits, options, message):
    still = replace(LANES, name="still", schedules=False)
    population = sample_population(ZOOS["digits_seed"], 1)
    with pytest.raises(UserError, match=message):
        train(population, digits, Recipe("digits_seed", "imp", epochs=1, **options), engine=still, progress=False)
    assert (
        len(train(population, digits, Recipe("digits_seed", "imp", epochs=1), engine=still, progress=False).metrics)
        == 2
    )


@pytest.mark.parametrize(
    "optimizer, options",
    [
        ("adam", {"schedule": "LLR"}),
        ("sgd", {"schedule": "CLR", "warm_up": 0.2, "nesterov": True}),
        ("adam", {"schedule": "ALLR", "original_epochs": 30}),
    ],
)
def test_the_fast_engine_follows_the_same_schedule(digits, optimizer, options):
    population = sample_population(ZOOS["digits_seed"], 3)
    pruned, masks = prune(population, 0.5)
    pruned.models = pruned.models.assign(
        optimizer=optimizer, lr=[1e-3, 4e-3, 2e-3], damage=pruning_damage(population.weights, masks).numpy()
    )
    recipe = Recipe("digits_seed", "imp", epochs=2, **options)
    slow, fast = (
        train(pruned, digits, recipe, masks, engine=engine, progress=False).population for engine in (TORCH, LANES)
    )
    constant = train(
        pruned, digits, replace(recipe, schedule="constant"), masks, engine=LANES, progress=False
    ).population
    apart = lambda other: max(
        (other.weights[name] - tensor).abs().max().item() for name, tensor in slow.weights.items()
    )
    assert apart(fast) < 1e-4 < 1e-3 < apart(constant)
